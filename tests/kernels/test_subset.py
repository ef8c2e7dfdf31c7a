"""Top-k within a subset of the labels: exact, whatever the subset, and row by row."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models import kernels
from models.head import Head
from models.kernels import Subset, cpu, reference
from tests.kernels.cases import (
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
from tests.kernels.test_topk import all_scores, mixed_head

examples = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
NONE = np.empty(0, dtype=np.int32)


def random_subsets(head: Head, rows: int, seed: int = 3) -> list[Subset | None]:
    """Every kind in turn: any label, a few allowed, half of them, one, a few denied, all but one denied, none."""
    rng, place_of = np.random.default_rng(seed), head.places()
    L = head.n_labels

    def some(count: int) -> np.ndarray:
        return rng.choice(L, min(count, L), replace=False)

    kinds = (
        lambda: None,
        lambda: Subset.of(place_of, some(5), NONE),
        lambda: Subset.of(place_of, some(L // 2), some(3)),
        lambda: Subset.of(place_of, some(1), NONE),
        lambda: Subset.of(place_of, None, some(5)),
        lambda: Subset.of(place_of, None, some(L - 1)),
        lambda: Subset.of(place_of, NONE, NONE),
    )
    first = int(rng.integers(len(kinds)))
    return [kinds[(first + row) % len(kinds)]() for row in range(rows)]


def allowed_labels(head: Head, subset: Subset | None) -> np.ndarray:
    """bool [L], from the places as docs/design.md defines them."""
    if subset is None:
        return np.ones(head.n_labels, dtype=bool)
    at_place = np.concatenate([block.label_ids.reshape(-1) for block in head.blocks])
    listed = np.isin(np.arange(head.n_labels), at_place[subset.places])
    return ~listed if subset.excluded else listed


def assert_exact(x: np.ndarray, head: Head, k: int, allowed: list[Subset | None]) -> np.ndarray:
    """Each row has the best of its own labels, bit for bit and best first, and then nothing."""
    every = all_scores(x, head)
    k = min(k, head.n_labels)
    for screens in (kernels.screen(head), None):
        scores, labels = kernels.topk(x, head, k, allowed, screens)
        assert (scores.shape, labels.shape) == ((len(x), k), (len(x), k))
        for row, subset in enumerate(allowed):
            mine = allowed_labels(head, subset)
            count = min(k, int(mine.sum()))
            np.testing.assert_array_equal(scores[row, :count], -np.sort(-every[row, mine])[:count])
            np.testing.assert_array_equal(every[row, labels[row, :count]], scores[row, :count])
            assert mine[labels[row, :count]].all()
            assert len(set(labels[row, :count].tolist())) == count
            assert (labels[row, count:] == -1).all()
            assert (scores[row, count:] == -np.inf).all()
    return scores


def by_reference(precision: type, shape: Shape, dtype: str, k: int) -> np.ndarray:
    head = mixed_head(shape, dtype)
    return reference.topk(random_input(shape), head, k, precision, allowed=random_subsets(head, shape.B))[0]


@each_level
@pytest.mark.parametrize("k", [1, 10, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.D < 60_000], ids=str)
def test_topk_within_subsets(shape: Shape, dtype: str, k: int, level: str) -> None:
    truth, plain = three_ways(by_reference, shape, dtype, k)
    cpu.set_threads(shape.threads)
    head = mixed_head(shape, dtype)
    scores = assert_exact(random_input(shape), head, k, random_subsets(head, shape.B))
    assert_close(scores, plain, truth, "scores")


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    D = draw(st.integers(1, 40))
    return Shape(
        B=draw(st.integers(0, 60)), D=D, L=draw(st.integers(1, 400)), K=draw(st.integers(1, D)),
        G=draw(st.sampled_from([16, 32, 48, 80])), threads=draw(st.integers(1, 3)),
    )  # fmt: skip


@each_level
@examples
@given(shape=shapes(), dtype=st.sampled_from(DTYPES), k=st.integers(1, 300), seed=st.integers(0, 1000))
def test_any_shape_and_subset_gives_the_best_of_the_allowed(level: str, shape: Shape, dtype: str, k: int, seed: int) -> None:
    cpu.set_threads(shape.threads)
    head = mixed_head(shape, dtype)
    assert_exact(random_input(shape), head, k, random_subsets(head, shape.B, seed))


@each_level
@each_connectivity
@pytest.mark.parametrize("B", [1, 9])
def test_the_others_of_a_batch_change_no_answer(B: int, connectivity: str, level: str) -> None:
    """A row in a batch has the answer that it has alone, and one without a subset that of a batch without any."""
    shape = Shape(B, 60, 1000, 12, 32, threads=2)
    head, x = head_of(random_block(shape, connectivity, "bf16")), random_input(shape)
    cpu.set_threads(shape.threads)
    allowed = random_subsets(head, B)
    together, plain = kernels.topk(x, head, 20, allowed), kernels.topk(x, head, 20)
    for row, subset in enumerate(allowed):
        alone = kernels.topk(x[row : row + 1], head, 20, [subset])
        for ours, theirs in zip(alone, together, strict=True):
            np.testing.assert_array_equal(ours[0], theirs[row])
        if subset is None:
            np.testing.assert_array_equal(together[1][row], plain[1][row])


@each_level
@each_connectivity
@pytest.mark.parametrize("B", [1, 9])
def test_groups_without_an_allowed_label_are_not_read(B: int, connectivity: str, level: str) -> None:
    """A label that does not exist, and a bias that would win, stand in groups beside those of the subset."""
    shape = Shape(B, 20, 640, 5, 16)
    block, x = random_block(shape, connectivity, "fp32"), random_input(shape)
    head = head_of(block)
    place_of = head.places()
    wanted = np.flatnonzero(np.isin(place_of // 16, [3, 17, 39]))
    expected = kernels.topk(x, head, 40, [Subset.of(place_of, wanted, NONE)] * B)
    block.label_ids[[0, 4, 16, 18, 38]] = 1 << 30
    block.bias[[0, 4, 16, 18, 38]] = 1e9
    for ours, theirs in zip(kernels.topk(x, head, 40, [Subset.of(place_of, wanted, NONE)] * B), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@each_level
@pytest.mark.parametrize("B", [2, 9])
def test_a_row_that_overflows_is_told_from_one_with_few_labels(B: int, level: str) -> None:
    shape = Shape(B, 8, 64, 8, 16)
    block, x = random_block(shape, "dense", "fp32"), np.ones((B, 8), dtype=np.float32)
    head = head_of(block)
    block.values[...] = -1
    few = Subset.of(head.places(), np.arange(3), NONE)
    x[-1] = 3e38
    with pytest.raises(OverflowError, match=f"^x row {B - 1}: scores overflow fp32$"):
        kernels.topk(x, head, 10, [few] * B)
    x[-1] = 1
    assert (kernels.topk(x, head, 10, [few] * B)[1] >= 0).sum() == 3 * B


def test_a_subset_follows_its_lists_and_denial_wins() -> None:
    place_of = np.array([5, 0, 17, 3, 16], dtype=np.uint32)
    allowed = Subset.of(place_of, np.array([4, 0, 1, 0]), np.array([1]))
    assert (allowed.places.tolist(), allowed.excluded, allowed.size(5)) == ([5, 16], False, 2)
    denied = Subset.of(place_of, None, np.array([3, 2, 3]))
    assert (denied.places.tolist(), denied.excluded, denied.size(5)) == ([3, 17], True, 3)


@pytest.mark.parametrize("places", [[3, 2], [2, 2], [-1, 4]])
def test_places_out_of_order_are_refused(places: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^places must be ascending, distinct and not negative$"):
        Subset(np.array(places))


@pytest.mark.parametrize("places", [np.array([1], dtype=np.int32), np.array([[1]]), np.arange(9)[::2]])
def test_places_of_another_layout_are_refused(places: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"^places is int.*, expected contiguous int64 \[n\]$"):
        Subset(places)


def test_subsets_that_do_not_fit_the_call_are_refused() -> None:
    shape = Shape(2, 8, 40, 3, 16)
    head, x = head_of(random_block(shape, "shared", "fp32")), random_input(shape)
    with pytest.raises(ValueError, match=r"^allowed has 1 entries, x has 2 rows$"):
        kernels.topk(x, head, 3, [None])
    with pytest.raises(ValueError, match=r"^allowed of row 1 names place 48, the head has 48 slots$"):
        kernels.topk(x, head, 3, [None, Subset(np.array([0, 48]))])


def test_places_count_on_through_the_blocks() -> None:
    head = mixed_head(replace(SHAPES[3], L=100), "fp32")
    at_place = np.concatenate([block.label_ids.reshape(-1) for block in head.blocks])
    np.testing.assert_array_equal(at_place[head.places()], np.arange(head.n_labels))
