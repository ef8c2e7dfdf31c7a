"""The first looks in 4 and 6 bits: they never change an answer, and most weights are then never read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models import kernels
from models.dtypes import encode, quantize
from models.head import Block, Head
from models.kernels import cpu
from tests.kernels.cases import DTYPES, SCREENING, Shape, copy, each_level, head_of, random_block, random_input
from tests.kernels.test_topk import all_scores

each_screening_level = pytest.mark.parametrize("level", SCREENING, indirect=True)
examples = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80)


def assert_same(x: np.ndarray, head: Head, k: int) -> None:
    """With screens the scores are the same bit for bit, and each label has its own: without ties, the labels are the same."""
    screens = kernels.screen(head)
    assert None not in screens
    scores, labels = kernels.topk(x, head, k, screens=screens)
    np.testing.assert_array_equal(scores, kernels.topk(x, head, k)[0])
    np.testing.assert_array_equal(np.take_along_axis(all_scores(x, head), labels, axis=1), scores)
    assert all(len(set(row)) == len(row) for row in labels.tolist())


@each_screening_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 384, 30_000, 32, 32, threads=2),
        Shape(2, 37, 20_000, 1, 32),
        Shape(7, 101, 20_000, 33, 64, threads=2),
        Shape(23, 384, 30_000, 32, 32, threads=2),
        Shape(48, 768, 10_000, 128, 32),
        Shape(1, 768, 10_000, 100, 64, threads=2),
        Shape(50, 768, 20_000, 64, 96, threads=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("k", [1, 10, 300])
def test_answers_stay_the_same(shape: Shape, dtype: str, k: int, level: str) -> None:
    cpu.set_threads(shape.threads)
    assert_same(random_input(shape), head_of(random_block(shape, "shared", dtype)), k)


def unusual(data: st.DataObject, shape: Shape, connectivity: str) -> tuple[np.ndarray, Block]:
    """Groups and rows of very different size, outliers, zeros, biases that decide, nearly equal labels; fp32 or any int8."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    block = random_block(shape, connectivity, "fp32")

    def sizes(count: int) -> np.ndarray:
        exponent = data.draw(st.sampled_from([0, 1, 6, 17]))
        return 10.0 ** rng.uniform(-exponent, min(exponent, 6), count)

    values = block.values * sizes(block.groups)[:, None, None]
    if data.draw(st.booleans()):  # a weight that dwarfs the others of its group
        values[:, 0, :] *= 1000
    if data.draw(st.booleans()):
        values[rng.random(values.shape) < 0.7] = 0
    if data.draw(st.booleans()):  # in each group copies of a label, a hair apart
        values = values[:, :, :1] * (1 + 1e-6 * rng.standard_normal(values.shape))
    bias = block.bias * data.draw(st.sampled_from([0.0, 1.0, 1e4]))
    x = random_input(shape) * sizes(shape.B)[:, None]
    if data.draw(st.booleans()):
        x[:, rng.integers(shape.D)] *= 300
    if data.draw(st.booleans()):
        x[rng.random(x.shape) < 0.5] = 0
    block, values = copy(block, bias=bias.astype(np.float32)), values.astype(np.float32)
    if data.draw(st.booleans()):
        return x.astype(np.float32), copy(block, values=values)
    values, scales = quantize(values, "int8")
    values[rng.random(values.shape) < 0.01] = -128
    scales *= rng.choice([-1, 1], scales.shape)
    return x.astype(np.float32), copy(block, dtype="int8", values=values, scales=scales)


def overwrite(block: Block, groups: slice) -> None:
    """Makes scores of these groups huge."""
    (block.values if block.scales is None else block.scales)[groups] = 1e6


@each_screening_level
@examples
@given(data=st.data())
def test_whatever_the_numbers_are(level: str, data: st.DataObject) -> None:
    D, K = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    shape = Shape(data.draw(st.integers(1, 20)), D, data.draw(st.integers(1, 3000)), min(K, D), 32)
    x, block = unusual(data, shape, "shared")
    assert_same(x, head_of(block), data.draw(st.sampled_from([1, 5, 40])))


@each_screening_level
@pytest.mark.parametrize("B", [1, 30])
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_weights_of_labels_that_cannot_win_are_not_read(dtype: str, B: int, level: str) -> None:
    """Seen by what happens when they change after the first look was made: nothing."""
    cpu.set_threads(1)
    shape = Shape(B, 384, 50_000, 32, 32)
    block = random_block(shape, "shared", dtype)
    block.bias[:100] = 30  # the best labels come first
    head, x = head_of(block), random_input(shape)
    screens, expected = kernels.screen(head), kernels.topk(x, head, 10)
    overwrite(block, slice(100, None))
    np.testing.assert_array_equal(kernels.topk(x, head, 10, screens=screens), expected)
    assert (kernels.topk(x, head, 10)[0] != expected[0]).any()


@each_screening_level
def test_rows_too_large_for_it_are_scored_without(level: str) -> None:
    shape = Shape(3, 64, 5_000, 32, 32)
    x = random_input(shape)
    x[1] *= 1e25
    assert_same(x, head_of(random_block(shape, "shared", "fp32")), 10)


def with_value(block: Block, value: float) -> Block:
    values = block.values.copy()
    values[-1, 0, 0] = encode(np.float32([value]), block.dtype)[0]
    return copy(block, values=values)


@each_level
def test_what_has_none(level: str) -> None:
    def screens(connectivity: str, K: int = 32, G: int = 32) -> list[kernels.Screen | None]:
        return kernels.screen(head_of(random_block(Shape(1, 300, 500, K, G), connectivity, "bf16")))

    assert screens("private", K=15) == screens("private", K=257) == screens("dense") == screens("shared", K=129) == [None]
    if level not in SCREENING:
        assert screens("shared") == [None]
        return
    (screen,) = screens("shared")
    assert screen is not None
    assert screen.nbytes == 16 * (32 * 32 * 6 // 8 + 24)
    huge = with_value(random_block(Shape(1, 300, 500, 32, 32), "shared", "bf16"), 1e20)
    assert kernels.screen(head_of(huge)) == [None]


@each_screening_level
@pytest.mark.parametrize("B", [1, 3, 20])
@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-19, 1e-15, 1e15])
def test_very_small_and_very_large_numbers(scale: float, B: int, level: str) -> None:
    shape = Shape(B, 100, 3_000, 32, 32)
    block = random_block(shape, "shared", "fp32")
    block = copy(block, values=(block.values * np.float32(scale)), bias=block.bias * 0)
    for size in (1e-25, 1e-21, 1e-18, 1.0, 1e15):
        assert_same(random_input(shape) * np.float32(size), head_of(block), 5)


@pytest.mark.parametrize("connectivity", ["shared", "private"])
@pytest.mark.parametrize("G", [16, 32, 48])
def test_what_one_instruction_set_made_serves_another(G: int, connectivity: str) -> None:
    """Or is left aside where it cannot."""
    before = cpu.level()
    try:
        for B in (1, 5, 20):
            shape = Shape(B, 100, 3_000, 32, G)
            head, x = head_of(random_block(shape, connectivity, "bf16")), random_input(shape)
            for made in cpu.LEVELS:
                cpu.use_level(made)
                screens = kernels.screen(head)
                for used in cpu.LEVELS:
                    cpu.use_level(used)
                    expected = kernels.topk(x, head, 10)
                    for ours, theirs in zip(kernels.topk(x, head, 10, screens=screens), expected, strict=True):
                        np.testing.assert_array_equal(ours, theirs)
    finally:
        cpu.use_level(before)


@each_screening_level
def test_blocks_with_and_without_one_make_one_answer(level: str) -> None:
    shape = Shape(9, 200, 3_000, 32, 32)
    blocks = [random_block(shape, c, "bf16", first=i * shape.L) for i, c in enumerate(("dense", "shared", "private", "shared"))]
    head, x = head_of(*blocks), random_input(shape)
    screens = kernels.screen(head)
    assert [screen is None for screen in screens] == [True, False, False, False]
    np.testing.assert_array_equal(kernels.topk(x, head, 50, screens=screens), kernels.topk(x, head, 50))
    with pytest.raises(ValueError, match="screens"):
        kernels.topk(x, head, 50, screens=screens[:2])
