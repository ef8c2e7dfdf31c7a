"""What a training step needs beside a block: positives, moments and the random numbers of stochastic rounding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.kernels import Optimizer, Positives, rounding_key
from models.kernels.step import group_keys, random_bits
from tests.kernels.cases import Shape, head_of, random_block

WORD = (1 << 64) - 1


def splitmix64(x: int) -> int:
    """The generator's published form (Steele, Lea & Flood 2014), in plain integers."""
    x = (x + 0x9E3779B97F4A7C15) & WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def lowbias32(x: int) -> int:
    """Wellons' 32-bit mixer up to its last shift, in plain integers."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    return ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF


def test_splitmix_matches_its_published_vector() -> None:
    assert [splitmix64(seed * 0x9E3779B97F4A7C15 & WORD) for seed in range(3)] == [
        0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F,
    ]  # fmt: skip


@settings(deadline=None)
@given(key=st.integers(0, WORD), group=st.integers(0, 1 << 40), element=st.integers(0, (1 << 31) - 1))
def test_random_bits_are_as_documented(key: int, group: int, element: int) -> None:
    mixed = splitmix64((key + group) & WORD)
    (k0,), (k1,) = group_keys(key, np.array([group]))
    assert (int(k0), int(k1)) == (mixed & 0xFFFFFFFF, mixed >> 32)
    expected = lowbias32(((element + int(k0)) & 0xFFFFFFFF) ^ int(k1)) >> 16
    assert int(random_bits(k0, k1, np.array([element]))[0]) == expected


@settings(deadline=None)
@given(seed=st.integers(-(1 << 63), WORD), step=st.integers(1, 1 << 40), block=st.integers(0, 1000))
def test_a_key_is_64_bits_of_seed_step_and_block(seed: int, step: int, block: int) -> None:
    key = rounding_key(seed, step, block)
    assert 0 <= key <= WORD
    assert key == splitmix64(splitmix64(splitmix64(seed & WORD) ^ step) ^ block)


def test_keys_differ_for_each_seed_step_and_block() -> None:
    keys = {rounding_key(seed, step, block) for seed in range(20) for step in range(1, 21) for block in range(20)}
    assert len(keys) == 20 * 20 * 20


def test_random_bits_are_uniform_and_independent() -> None:
    """Each of the 16 bits is set half of the time, within a group and across groups, and neighbours do not agree."""
    k0, k1 = group_keys(rounding_key(0, 1, 0), np.arange(100))
    bits = random_bits(k0[:, None], k1[:, None], np.arange(2000)).astype(np.int64)
    assert bits.min() >= 0
    assert bits.max() <= 0xFFFF
    n = bits.size
    assert bits.mean() == pytest.approx(32_767.5, abs=5 * 18_919 / n**0.5)
    for other in (bits[:, 1:] ^ bits[:, :-1], bits[1:] ^ bits[:-1], bits):
        shares = [((other >> bit) & 1).mean() for bit in range(16)]
        np.testing.assert_allclose(shares, 0.5, atol=5 * 0.5 / other.size**0.5)


def test_positives_are_split_over_blocks_sorted_and_distinct() -> None:
    first = random_block(Shape(0, 8, 30, 3, 16), "shared", "fp32", seed=1)
    second = random_block(Shape(0, 8, 50, 3, 32), "private", "fp32", seed=2, first=30)
    head = head_of(first, second)
    located = head.slots()
    labels = [np.array(row, dtype=np.int32) for row in ([5, 40, 5], [], [79, 0, 31, 40], [40], [29, 5])]
    split = Positives.of_batch(labels, located, head)
    assert len(split) == 2
    found = []
    for block, part in zip(head.blocks, split, strict=True):
        assert (part.slots.dtype, part.rows.dtype) == (np.int64, np.int32)
        pairs = list(zip(part.slots.tolist(), part.rows.tolist(), strict=True))
        assert pairs == sorted(set(pairs))
        found += [(row, int(block.label_ids.reshape(-1)[slot])) for slot, row in pairs]
    assert sorted(found) == sorted({(row, int(label)) for row, ids in enumerate(labels) for label in ids})


@pytest.mark.parametrize("labels", [[], [np.empty(0, np.int32)] * 3], ids=["no rows", "rows without labels"])
def test_positives_of_an_empty_batch(labels: list[np.ndarray]) -> None:
    head = head_of(random_block(Shape(0, 8, 30, 3, 16), "shared", "fp32"))
    (part,) = Positives.of_batch(labels, head.slots(), head)
    assert len(part.slots) == len(part.rows) == 0


@pytest.mark.parametrize(("kind", "count"), [("sgd", 0), ("momentum", 1), ("adam", 2)])
def test_moments_start_at_zero_with_the_shape_of_the_block(kind: str, count: int) -> None:
    block = random_block(Shape(0, 8, 30, 3, 16), "private", "bf16")
    moments = Optimizer(kind).moments(block)
    assert [m.shape for m in moments.values] == [block.values.shape] * count
    assert [m.shape for m in moments.bias] == [block.bias.shape] * count
    assert not any(m.any() for m in moments.values + moments.bias)
    assert moments.nbytes == count * 4 * (block.values.size + block.bias.size)
    assert all(m.dtype == np.float32 for m in moments.values + moments.bias)
