"""Top-k: the three-way rule, and what must hold exactly whatever the numbers are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models import kernels
from models.head import Block, Head
from models.kernels import cpu, reference
from tests.kernels.cases import (
    CONNECTIVITIES,
    DTYPES,
    SHAPES,
    Shape,
    assert_close,
    each_connectivity,
    each_level,
    head_of,
    random_block,
    random_input,
    three_ways,
)

# Hypothesis runs all its examples on the one instruction set that the `level` fixture has chosen.
examples = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)


def mixed_head(shape: Shape, dtype: str) -> Head:
    """A dense, a shared and a private block of unequal size, labels in ascending order of the blocks."""
    blocks, first = [], 0
    for i, connectivity in enumerate(CONNECTIVITIES):
        part = replace(shape, L=max(1, shape.L // (i + 2)), K=min(shape.D, shape.K + i), G=(shape.G, 16, 48)[i])
        blocks.append(random_block(part, connectivity, dtype, seed=i, first=first))
        first += part.L
    return head_of(*blocks)


def all_scores(x: np.ndarray, head: Head) -> np.ndarray:
    """The kernels' own scores fp32 [B, L], in label order."""
    every = np.empty((len(x), head.n_labels), dtype=np.float32)
    for block in head.blocks:
        real = block.label_ids >= 0
        every[:, block.label_ids[real]] = kernels.scores(x, block)[:, real]
    return every


def assert_exact(x: np.ndarray, head: Head, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The answer is the k best of all scores, bit for bit: best first, no label twice, each with its own score."""
    every = all_scores(x, head)
    for screens in (kernels.screen(head), None):
        scores, labels = kernels.topk(x, head, k, screens=screens)
        assert (scores.dtype, labels.dtype) == (np.float32, np.int32)
        np.testing.assert_array_equal(scores, -np.sort(-every, axis=1)[:, :k])
        np.testing.assert_array_equal(np.take_along_axis(every, labels, axis=1), scores)
        assert all(len(set(row)) == len(row) for row in labels.tolist())
    return scores, labels


def by_reference(precision: type, shape: Shape, dtype: str, k: int) -> np.ndarray:
    return reference.topk(random_input(shape), mixed_head(shape, dtype), k, precision)[0]


@each_level
@pytest.mark.parametrize("k", [1, 10, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.D < 60_000], ids=str)
def test_topk(shape: Shape, dtype: str, k: int, level: str) -> None:
    """Often k exceeds the number of labels: then all of them are the answer."""
    truth, plain = three_ways(by_reference, shape, dtype, k)
    cpu.set_threads(shape.threads)
    head = mixed_head(shape, dtype)
    scores, _ = assert_exact(random_input(shape), head, k)
    assert scores.shape == (shape.B, min(k, head.n_labels))
    assert_close(scores, plain, truth, "scores")


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    D = draw(st.integers(1, 40))
    return Shape(
        B=draw(st.integers(0, 100)), D=D, L=draw(st.integers(1, 200)), K=draw(st.integers(1, D)),
        G=draw(st.sampled_from([16, 32, 48, 64, 80])), threads=draw(st.integers(1, 3)),
    )  # fmt: skip


@each_level
@examples
@given(shape=shapes(), dtype=st.sampled_from(DTYPES), k=st.integers(1, 300))
def test_any_shape_gives_the_best_of_all_scores(level: str, shape: Shape, dtype: str, k: int) -> None:
    cpu.set_threads(shape.threads)
    assert_exact(random_input(shape), mixed_head(shape, dtype), k)


@each_level
@examples
@given(shape=shapes(), dtype=st.sampled_from(DTYPES), k=st.integers(1, 300), data=st.data())
def test_a_row_alone_scores_as_in_its_batch(level: str, shape: Shape, dtype: str, k: int, data: st.DataObject) -> None:
    """Bit for bit: batching requests together changes no answer."""
    x, head = random_input(replace(shape, B=shape.B + 1)), mixed_head(shape, dtype)
    row = data.draw(st.integers(0, shape.B))
    cpu.set_threads(shape.threads)
    np.testing.assert_array_equal(kernels.topk(x[row : row + 1], head, k)[0][0], kernels.topk(x, head, k)[0][row])


def moved(block: Block, order: np.random.Generator) -> Block:
    """The same labels in other slots: groups in another order, and slots in another order within each."""
    groups, slots = order.permutation(block.groups), order.permutation(block.group_size)
    indices = block.indices
    if indices is not None:
        indices = np.ascontiguousarray(indices[groups][..., slots] if indices.ndim == 3 else indices[groups])
    return replace(
        block, values=np.ascontiguousarray(block.values[groups][..., slots]), indices=indices,
        bias=block.bias[groups][:, slots].copy(), label_ids=block.label_ids[groups][:, slots].copy(),
        scales=None if block.scales is None else block.scales[groups][:, slots].copy(),
    )  # fmt: skip


@each_level
@examples
@given(shape=shapes(), dtype=st.sampled_from(DTYPES), k=st.integers(1, 300), seed=st.integers(0, 1000))
def test_labels_may_stand_in_any_order(level: str, shape: Shape, dtype: str, k: int, seed: int) -> None:
    """Moving labels to other slots, groups and blocks changes no answer; giving them other ids changes just the ids."""
    x, head, order = random_input(shape), mixed_head(shape, dtype), np.random.default_rng(seed)
    cpu.set_threads(shape.threads)
    scores, labels = assert_exact(x, head, k)
    blocks = [moved(block, order) for block in head.blocks]
    again, same = assert_exact(x, head_of(*(blocks[i] for i in order.permutation(3))), k)
    np.testing.assert_array_equal(again, scores)
    untied = (all_scores(x, head)[:, :, None] == scores[:, None, :]).sum(axis=1) == 1
    np.testing.assert_array_equal(same[untied], labels[untied])
    renamed = order.permutation(head.n_labels).astype(np.int32)
    for block in blocks:
        block.label_ids[...] = np.where(block.label_ids < 0, -1, renamed[block.label_ids])
    np.testing.assert_array_equal(kernels.topk(x, head_of(*blocks), k)[1][untied], renamed[labels][untied])


@each_level
@pytest.mark.parametrize("B", [1, 5, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_with_every_input_is_dense(dtype: str, B: int, level: str) -> None:
    """Bit for bit: the sums run over the inputs in the same order."""
    shape = Shape(B, 300, 100, 300, 32)
    x, dense = random_input(shape), random_block(shape, "dense", dtype)
    every = np.arange(shape.D, dtype=np.uint16)
    shared = replace(dense, connectivity="shared", indices=np.tile(every, (dense.groups, 1)))
    private = replace(dense, connectivity="private", indices=np.tile(every[:, None], (dense.groups, 1, shape.G)))
    expected = assert_exact(x, head_of(dense), 10)
    for block in (shared, private):
        for ours, theirs in zip(kernels.topk(x, head_of(block), 10), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@each_level
@each_connectivity
@pytest.mark.parametrize("B", [1, 9])
@pytest.mark.parametrize("k", [1, 7, 90, 1000])
def test_ties_give_distinct_labels(k: int, B: int, connectivity: str, level: str) -> None:
    shape = Shape(B, 8, 90, 3, 16, threads=2)
    block, x = random_block(shape, connectivity, "fp32"), random_input(shape)
    cpu.set_threads(shape.threads)
    block.values[...] = 0
    block.bias[...] = -3
    scores, _ = assert_exact(x, head_of(block), k)
    assert (scores == -3).all()
    block.bias[:, ::2] = 2  # two ties, one inside the other
    assert_exact(x, head_of(block), k)


@each_level
@each_connectivity
@pytest.mark.parametrize("B", [1, 9])
def test_order_of_tiny_scores(B: int, connectivity: str, level: str) -> None:
    """Subnormal scores keep their order, −0 equals +0, and nothing is flushed to zero."""
    block = random_block(Shape(B, 4, 64, 4, 16), connectivity, "fp32")
    block.values[...] = 0
    smallest = np.float32(2.0**-149)
    real = block.label_ids >= 0
    block.bias[real] = (block.label_ids[real] - 31) * smallest
    block.bias[block.label_ids == 31] = -0.0
    scores, labels = assert_exact(np.ones((B, 4), dtype=np.float32), head_of(block), 64)
    np.testing.assert_array_equal(labels, np.tile(np.arange(63, -1, -1, dtype=np.int32), (B, 1)))
    np.testing.assert_array_equal(scores[0] / smallest, np.arange(32, -32, -1))


@each_level
@each_connectivity
@pytest.mark.parametrize("B", [1, 9])
def test_huge_scores(B: int, connectivity: str, level: str) -> None:
    """Close to fp32's largest number all is well; beyond it +∞ is best, −∞ is no answer, and the row is named."""
    block = random_block(Shape(B, 3, 40, 1, 16), connectivity, "fp32")
    head, x = head_of(block), np.zeros((B, 3), dtype=np.float32)
    block.bias[...] = 0
    block.values[...] = 0
    block.values[:, 0] = np.where(block.label_ids < 20, 1, -1)
    if block.indices is not None:
        block.indices[...] = 0
    x[:, 0] = 3e38
    scores, labels = assert_exact(x, head, 20)
    assert (scores == np.float32(3e38)).all()
    assert (labels < 20).all()
    block.values[...] *= 2
    assert (kernels.topk(x, head, 20)[0] == np.inf).all()
    x[:-1] = 1  # of several rows only the last overflows
    with pytest.raises(OverflowError, match=f"^x row {B - 1}: scores overflow fp32$"):
        kernels.topk(x, head, 21)


@each_level
@pytest.mark.parametrize("B", [3, 9])
def test_topk_of_a_view(B: int, level: str) -> None:
    """x need not be contiguous, and buffers may be read-only, as memory maps are."""
    shape = Shape(B, 30, 100, 5, 16)
    x, head = random_input(shape), mixed_head(shape, "bf16")
    wide = np.zeros((B, 60), dtype=np.float32)
    wide[:, ::2] = x
    expected = kernels.topk(x, head, 10)
    for block in head.blocks:
        for array in block.buffers.values():
            array.flags.writeable = False
    for ours, theirs in zip(kernels.topk(wide[:, ::2], head, 10), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@each_level
def test_more_labels_than_threads_can_share_evenly(level: str) -> None:
    """Any number of threads gives the same scores; threads beyond the groups stay idle."""
    shape = Shape(5, 40, 3000, 6, 16)
    x, head = random_input(shape), mixed_head(shape, "fp32")
    expected = reference.topk(x, head, 50)[1]
    for count in (1, 2, 3, 5, 100):
        cpu.set_threads(count)
        np.testing.assert_array_equal(assert_exact(x, head, 50)[1], expected)


@each_level
@pytest.mark.parametrize("B", [1, 9])
def test_a_block_without_labels_takes_no_part(B: int, level: str) -> None:
    shape = Shape(B, 40, 100, 6, 16)
    block, x = random_block(shape, "shared", "fp32"), random_input(shape)
    empty = random_block(replace(shape, L=0), "private", "fp32")
    assert kernels.scores(x, empty).shape == (B, 0, 16)
    for ours, theirs in zip(
        kernels.topk(x, head_of(empty, block, empty), 10), kernels.topk(x, head_of(block), 10), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    for k in (1, 10):
        assert kernels.topk(x, head_of(empty), k)[1].shape == (B, 0)
