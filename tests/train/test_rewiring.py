"""Rewiring: which connections go, which come, and what stays as it was."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import dtypes
from models.head import Block, Head
from models.kernels import Moments, Optimizer, Positives, reference
from tests.kernels.cases import Shape, random_block, random_positives
from train.compute import OnCpu
from train.connections import Batch
from train.rewiring import Rewiring, Schedule

SHAPE = Shape(6, 40, 90, 8, 16)  # the last of six groups is half empty
ALWAYS = Schedule(every=1, until=1000, share=0.25, below=0)


def head_and_moments(connectivity: str, shape: Shape = SHAPE, dtype: str = "fp32", seed: int = 0) -> tuple[Head, list[Moments]]:
    block = random_block(shape, connectivity, dtype, seed)
    if block.indices is not None:
        block.indices.sort(axis=1)
    moments = Optimizer("adam").moments(block)
    for array in moments.values:
        array[...] = np.random.default_rng(9).standard_normal(array.shape)
    return Head(shape.D, shape.L, (block,)), [moments]


def batch_for(block: Block, seed: int = 3) -> Batch:
    x = np.random.default_rng(seed).standard_normal((SHAPE.B, block.width), dtype=np.float32)
    return Batch(torch.from_numpy(x), [random_positives(x, block, weighted=True)], "bce", 0.1)


def lists(block: Block, array: np.ndarray | None = None) -> np.ndarray:
    """[N, K] or [N, K, G] as a row for each list of connections."""
    array = block.indices if array is None else array
    return array if array.ndim == 2 else array.transpose(0, 2, 1).reshape(-1, array.shape[1])


def strengths(block: Block) -> np.ndarray:
    values = np.abs(dtypes.decode(block.values, block.dtype, np.float64))
    if block.connectivity == "private":
        return lists(block, values)
    real = (block.label_ids >= 0)[:, None, :]
    return (values * real).sum(axis=2) / real.sum(axis=2)


def weights_by_connection(block: Block, array: np.ndarray) -> dict[tuple[int, int, int], float]:
    """(group, label's place, input) → number."""
    indices = np.broadcast_to(block.indices[:, :, None] if block.indices.ndim == 2 else block.indices, array.shape)
    n, k, g = array.shape
    return {(a, c, int(indices[a, b, c])): float(array[a, b, c]) for a, b, c in product(range(n), range(k), range(g))}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("growth", ["random", "gradient"])
@pytest.mark.parametrize("connectivity", ["shared", "private"])
def test_the_weakest_give_way_and_all_else_stays(connectivity: str, growth: str, dtype: str) -> None:
    head, moments = head_and_moments(connectivity, dtype=dtype)
    block = head.blocks[0]
    before = replace(block, values=block.values.copy(), indices=block.indices.copy())
    old = [array.copy() for array in (dtypes.decode(block.values, dtype), *moments[0].values)]
    (row,) = Rewiring(OnCpu(), head.blocks, moments, ALWAYS, growth, False, seed=0).rewire(5, batch_for(block))
    head.validate()
    assert (np.diff(lists(block).astype(int), axis=1) > 0).all(), "ascending"

    count = round(0.25 * ALWAYS.decay(5) * SHAPE.K)
    assert count == 2
    moved = 0
    empty = (block.label_ids < 0).reshape(-1) if connectivity == "private" else np.zeros(block.groups, bool)
    for was, now, strength, padding in zip(lists(before), lists(block), strengths(before), empty, strict=True):
        gone, come = set(was) - set(now), set(now) - set(was)
        moved += len(come)
        assert len(gone) == len(come) == (0 if padding else count)
        assert padding or gone == set(was[np.argsort(strength)[:count]])
    assert row["moved"] == moved
    assert row["connections"] == block.indices.size
    assert row["survival"] == pytest.approx(1 - moved / block.indices.size)
    usage = np.bincount(block.indices.reshape(-1), minlength=SHAPE.D)
    assert row["input_usage"] == np.quantile(usage, [0, 0.25, 0.5, 0.75, 1]).tolist()

    # What stayed kept its weight and moments, wherever it lies now; what came starts at zero, its second moment at the mean.
    for number, (was, now) in enumerate(zip(old, (dtypes.decode(block.values, dtype), *moments[0].values), strict=True)):
        then, here = weights_by_connection(before, was), weights_by_connection(block, now)
        for connection, found in here.items():
            kept = [here[each] for each in here if each[:2] == connection[:2] and each in then]
            begin = np.mean(kept) if number == 2 else 0.0
            assert found == then.get(connection, pytest.approx(begin, rel=1e-5))


@pytest.mark.parametrize("connectivity", ["shared", "private"])
@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
def test_growth_by_gradient_takes_the_largest(connectivity: str, loss: str) -> None:
    """The gradient of every input, there or not, is that of a dense block whose missing weights are zero."""
    head, moments = head_and_moments(connectivity)
    block = head.blocks[0]
    batch = replace(batch_for(block), loss=loss)
    full = np.zeros((block.groups, SHAPE.D, SHAPE.G), np.float32)
    indices = np.broadcast_to(block.indices[:, :, None] if block.indices.ndim == 2 else block.indices, block.values.shape)
    np.put_along_axis(full, indices.astype(np.int64), block.values, axis=1)
    dense = replace(block, connectivity="dense", values=full, indices=None)
    optimizer = Optimizer("momentum", lr=0.0)
    probe = optimizer.moments(dense)
    reference.train_step(
        batch.x.numpy(), batch.positives[0], dense, probe, loss=loss, smoothing=0.1, optimizer=optimizer, step=1, key=0
    )
    gradient = np.abs(probe.values[0].astype(np.float64))  # [N, D, G]
    real = (block.label_ids >= 0)[:, None, :]
    mean = (gradient * real).sum(axis=2) / real.sum(axis=2) if connectivity == "shared" else lists(block, gradient)
    before = lists(block).copy()
    Rewiring(OnCpu(), head.blocks, moments, ALWAYS, "gradient", False, seed=0).rewire(5, batch)
    grown = 0
    for was, now, scores in zip(before, lists(block), mean, strict=True):
        come = set(now) - set(was)
        unused = np.setdiff1d(np.arange(SHAPE.D), was)
        assert come == set(unused[np.argsort(-scores[unused])[: len(come)]])
        grown += len(come)
    assert grown > 0


def test_random_growth_is_uniform_over_the_unused() -> None:
    """Over many groups every input that a group does not read comes in equally often."""
    shape = Shape(1, 12, 16 * 6000, 4, 16)
    head, moments = head_and_moments("shared", shape)
    block = head.blocks[0]
    before = block.indices.copy()
    Rewiring(OnCpu(), head.blocks, moments, replace(ALWAYS, share=0.5), "random", False, seed=0).rewire(1, batch_for(block))
    come, could = np.zeros(12), np.zeros(12)
    for was, now in zip(before, block.indices, strict=True):
        could[np.setdiff1d(np.arange(12), was)] += 1
        come[np.setdiff1d(now, was)] += 1
    np.testing.assert_allclose(come / could, 2 / 8, atol=5 * np.sqrt(0.25 * 0.75 / could.min()))


@pytest.mark.parametrize("connectivity", ["shared", "private"])
def test_a_threshold_prunes_what_is_below_it(connectivity: str) -> None:
    head, moments = head_and_moments(connectivity)
    block = head.blocks[0]
    before, strength = lists(block).copy(), strengths(block)
    schedule = Schedule(every=1, until=1000, share=0.25, below=float(2 * np.quantile(strength, 0.3)))
    Rewiring(OnCpu(), head.blocks, moments, schedule, "random", False, seed=0).rewire(500, batch_for(block))
    assert schedule.decay(500) == pytest.approx(0.5)
    gone = np.array([~np.isin(was, now) for was, now in zip(before, lists(block), strict=True)])
    padding = (block.label_ids < 0).reshape(-1) if connectivity == "private" else np.zeros(block.groups, bool)
    expected = (strength < schedule.below * 0.5) & ~padding[:, None]
    assert expected.sum(axis=1).max() < SHAPE.K, "no list loses all"
    np.testing.assert_array_equal(gone, expected)
    assert gone.any()


@pytest.mark.parametrize(("width", "fan_in"), [(8, 8), (9, 8), (8, 1)])
@pytest.mark.parametrize("growth", ["random", "gradient"])
@pytest.mark.parametrize("connectivity", ["shared", "private"])
def test_no_more_is_pruned_than_can_grow_and_a_label_is_never_cut_off(
    connectivity: str, growth: str, width: int, fan_in: int
) -> None:
    shape = Shape(SHAPE.B, width, 40, fan_in, 16)
    head, moments = head_and_moments(connectivity, shape)
    schedule = Schedule(every=1, until=10, share=1.0, below=0)
    (row,) = Rewiring(OnCpu(), head.blocks, moments, schedule, growth, False, seed=0).rewire(1, batch_for(head.blocks[0]))
    head.validate()
    each = 1 if (width, fan_in) == (9, 8) else 0
    assert row["moved"] == each * (3 if connectivity == "shared" else 40)


@pytest.mark.parametrize("connectivity", ["shared", "private"])
def test_new_weights_may_be_random(connectivity: str) -> None:
    head, moments = head_and_moments(connectivity)
    block = head.blocks[0]
    before = replace(block, values=block.values.copy(), indices=block.indices.copy())
    Rewiring(OnCpu(), head.blocks, moments, ALWAYS, "random", True, seed=0).rewire(5, batch_for(block))
    then = weights_by_connection(before, before.values)
    fresh = {key: number for key, number in weights_by_connection(block, block.values).items() if key not in then}
    real = np.array([number for (n, g, _), number in fresh.items() if block.label_ids[n, g] >= 0])
    assert len(real) > 100
    assert real.std() == pytest.approx(SHAPE.K**-0.5, rel=0.25)
    assert all(number == 0 for (n, g, _), number in fresh.items() if block.label_ids[n, g] < 0), "padding stays zero"


@pytest.mark.parametrize("growth", ["random", "gradient"])
def test_the_same_step_rewires_the_same_way(growth: str) -> None:
    results = []
    for seed, step in ((0, 5), (0, 5), (1, 5), (0, 6)):
        head, moments = head_and_moments("private")
        Rewiring(OnCpu(), head.blocks, moments, ALWAYS, growth, False, seed).rewire(step, batch_for(head.blocks[0]))
        results.append(head.blocks[0].indices)
    np.testing.assert_array_equal(results[0], results[1])
    if growth == "random":
        assert (results[0] != results[2]).any()
        assert (results[0] != results[3]).any()


def test_survival_falls_from_one_rewiring_to_the_next_and_dense_blocks_are_left_alone() -> None:
    dense = random_block(Shape(6, 40, 20, 40, 16), "dense", "fp32")
    shared, private = (random_block(SHAPE, kind, "fp32", first=20 + 90 * i) for i, kind in enumerate(("shared", "private")))
    head = Head(40, 200, (dense, shared, private))
    moments = [Optimizer("sgd").moments(block) for block in head.blocks]
    frozen = dense.values.copy()
    rewiring = Rewiring(OnCpu(), head.blocks, moments, ALWAYS, "random", False, seed=0)
    x = np.zeros((1, 40), np.float32)
    nothing = [Positives(np.empty(0, np.int64), np.empty(0, np.int32))] * 3
    survival = []
    for step in range(1, 6):
        rows = rewiring.rewire(step, Batch(torch.from_numpy(x), nothing, "bce", 0.0))
        assert [row["block"] for row in rows] == [1, 2]
        survival.append([row["survival"] for row in rows])
        for block in (shared, private):  # as training would: new connections are no longer the weakest
            block.values[...] = np.random.default_rng(step).standard_normal(block.values.shape)
    assert (np.array(survival[0]) < 1).all()
    assert (np.array(survival[-1]) < np.array(survival[0]) - 0.2).all()
    np.testing.assert_array_equal(dense.values, frozen)
    assert not Rewiring(OnCpu(), (dense,), moments[:1], ALWAYS, "random", False, 0).due(1)


@given(every=st.integers(1, 50), until=st.integers(1, 500), step=st.integers(0, 600))
@settings(deadline=None)
def test_schedule(every: int, until: int, step: int) -> None:
    schedule = Schedule(every, until, 0.2, 0)
    assert schedule.due(step) == (step in range(every, until, every))
    if step <= until:
        assert 0 <= schedule.decay(step) <= 1
    assert schedule.decay(0) == 1
    assert schedule.decay(until) == pytest.approx(0, abs=1e-12)
