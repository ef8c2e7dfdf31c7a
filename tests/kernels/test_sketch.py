"""The first look at private labels' heaviest connections: it never changes an answer, and most weights are then never read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import kernels
from models.dtypes import decode
from models.kernels import Subset, cpu
from tests.kernels.cases import DTYPES, Shape, copy, each_level, head_of, random_block, random_input
from tests.kernels.test_screen import assert_same, examples, overwrite, unusual, with_value


@each_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 384, 20_000, 32, 32, threads=2),
        Shape(2, 40, 5_000, 16, 16),
        Shape(3, 300, 5_000, 256, 48, threads=2),
        Shape(7, 768, 10_000, 33, 64, threads=2),
        Shape(8, 101, 5_000, 32, 32),  # from here on a block runs along the batch
        Shape(49, 101, 5_000, 32, 32, threads=2),  # the last row alone
    ],
    ids=str,
)
@pytest.mark.parametrize("k", [1, 10, 300])
def test_answers_stay_the_same(shape: Shape, dtype: str, k: int, level: str) -> None:
    cpu.set_threads(shape.threads)
    assert_same(random_input(shape), head_of(random_block(shape, "private", dtype)), k)


@each_level
@examples
@given(data=st.data())
def test_whatever_the_numbers_are(level: str, data: st.DataObject) -> None:
    K = data.draw(st.integers(16, 60))
    shape = Shape(data.draw(st.integers(1, 20)), K + data.draw(st.integers(0, 40)), data.draw(st.integers(1, 2000)), K, 32)
    x, block = unusual(data, shape, "private")
    assert_same(x, head_of(block), data.draw(st.sampled_from([1, 5, 40, 3000])))


@each_level
@pytest.mark.parametrize("kept", ["heavy", "light", "alike"])
def test_what_a_sketch_leaves_out_counts(kept: str, level: str) -> None:
    """Labels whose light weights meet the row's only large input, or cancel what the heavy ones add up to."""
    shape = Shape(5, 64, 4_000, 16, 32)
    block, x = random_block(shape, "private", "fp32"), random_input(shape) * 1e-3
    x[:, 0] = 1e3
    values = np.abs(block.values)
    values[:, 8:] *= {"heavy": 1e-4, "light": 1, "alike": 0}[kept]
    values[:, 8:] += {"heavy": 0, "light": 0, "alike": 1}[kept]
    block = copy(block, values=values)
    assert_same(x, head_of(block), 10)
    assert_same(-x, head_of(block), 10)


@each_level
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e15])
def test_very_small_and_very_large_numbers(scale: float, level: str) -> None:
    shape = Shape(3, 100, 3_000, 32, 32)
    block = random_block(shape, "private", "fp32")
    block = copy(block, values=(block.values * np.float32(scale)), bias=block.bias * 0)
    for size in (1e-25, 1.0, 1e15, 1e25):
        if scale * size < 1e35:
            assert_same(random_input(shape) * np.float32(size), head_of(block), 10)


@each_level
def test_rows_of_zeros_and_filters(level: str) -> None:
    shape = Shape(20, 100, 3_000, 24, 32)
    head, x = head_of(random_block(shape, "private", "bf16")), random_input(shape)
    x[1] = 0
    rng = np.random.default_rng(5)
    some, few = (np.sort(rng.choice(3_000, count, replace=False)) for count in (900, 4))
    allowed = [Subset(some), None, Subset(few), Subset(some, excluded=True), Subset(few, excluded=True)]
    allowed *= 4
    for row in (slice(None), slice(5), slice(0, 1), slice(2, 3), slice(3, 4)):
        plain = kernels.topk(x[row], head, 10, allowed[row])
        for ours, theirs in zip(kernels.topk(x[row], head, 10, allowed[row], kernels.screen(head)), plain, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@each_level
@pytest.mark.parametrize("B", [1, 7, 16, 33])
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_weights_of_labels_that_cannot_win_are_not_read(dtype: str, B: int, level: str) -> None:
    """Seen by what happens when they change after the first look was made: nothing."""
    if B > 7 and level != "avx512vnni":
        B = 7  # more run along the batch there and read all weights
    cpu.set_threads(1)
    block = random_block(Shape(B, 384, 20_000, 32, 32), "private", dtype)
    block.bias[:100] = 30  # the best labels come first
    head, x = head_of(block), random_input(Shape(B, 384, 20_000, 32, 32))
    screens, expected = kernels.screen(head), kernels.topk(x, head, 10)
    overwrite(block, slice(100, None))
    np.testing.assert_array_equal(kernels.topk(x, head, 10, screens=screens), expected)
    assert (kernels.topk(x, head, 10)[0] != expected[0]).any()


@each_level
def test_it_holds_the_heaviest_connections(level: str) -> None:
    block = random_block(Shape(1, 200, 100, 32, 32), "private", "bf16")
    (sketch,) = kernels.screen(head_of(block))
    assert isinstance(sketch, kernels.Sketch)
    K = 28 if level == "avx512vnni" else 24
    assert sketch.nbytes == 4 * ((K * 3 + 2) * 32 + 8)
    weights = np.abs(decode(block.values, "bf16"))
    heaviest = np.sort(np.take_along_axis(block.indices, np.argsort(-weights, axis=1, kind="stable")[:, :K], axis=1), axis=1)
    kept = sketch.offsets.swapaxes(1, 2).reshape(-1, 32, K).swapaxes(1, 2)
    np.testing.assert_array_equal(np.sort(kept, axis=1), 2 * heaviest)
    rest = np.sqrt((np.sort(weights.astype(np.float64), axis=1)[:, : 32 - K] ** 2).sum(axis=1))
    assert (decode(sketch.rest, "bf16") >= rest).all()
    assert (decode(sketch.rest, "bf16") <= rest * 1.01).all()
    assert kernels.screen(head_of(with_value(block, 1e20))) == [None]
