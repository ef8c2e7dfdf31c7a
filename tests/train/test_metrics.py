"""Metrics against their definitions written out text by text, and against scikit-learn where it has them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, ndcg_score

from train.metrics import Meter, frequency_deciles, inverse_propensities

CUTS = (1, 3, 5, 10)


def meter_of(ranked, truth, weights, counts=None):
    meter = Meter(np.asarray(weights, dtype=np.float64), np.ones(len(weights), dtype=np.int64) if counts is None else counts)
    meter.update(ranked, truth)
    return meter


def test_inverse_propensities_by_hand():
    # A = 1, B = 1, N = e²: C = (2 − 1)·2 = 2 and 1/p = 1 + 2 / (n + 1).
    weights = inverse_propensities(np.array([0, 1, 3, 9]), math.e**2, a=1.0, b=1.0)
    assert weights == pytest.approx([3.0, 2.0, 1.5, 1.2])


def test_inverse_propensities_fall_with_frequency_and_stay_above_one():
    weights = inverse_propensities(np.arange(1000), 5000, a=0.55, b=1.5)
    assert (np.diff(weights) < 0).all()
    assert weights[-1] > 1
    # Jain et al. 2016: p = 1 / (1 + C·e^(−A·log(n + B))), C = (log N − 1)·(B + 1)^A
    c = (math.log(5000) - 1) * 2.5**0.55
    assert weights[7] == pytest.approx(1 + c * math.exp(-0.55 * math.log(7 + 1.5)))
    assert (inverse_propensities(np.array([0, 1]), 1, a=0.55, b=1.5) == 1).all()


def test_metrics_by_hand():
    # First text: truth 0, 2; ranks 1 and 3 hit. Second: truth 1; only rank 10 hits.
    ranked = np.array([[0, 3, 2, 4, 5, 6, 7, 8, 9, 10], [0, 3, 2, 4, 5, 6, 7, 8, 9, 1]])
    result = meter_of(ranked, [np.array([0, 2]), np.array([1])], [1, 2, 4, 1, 1, 1, 1, 1, 1, 1, 1]).result()
    assert result["P@1"] == pytest.approx(1 / 2)
    assert result["P@3"] == pytest.approx((2 / 3) / 2)
    assert result["P@5"] == pytest.approx((2 / 5) / 2)
    assert result["nDCG@1"] == pytest.approx(1 / 2)
    assert result["nDCG@5"] == pytest.approx((1 + 1 / math.log2(4)) / (1 + 1 / math.log2(3)) / 2)
    assert result["recall@5"] == pytest.approx(1 / 2)
    assert result["recall@10"] == pytest.approx(1.0)
    assert result["PSP@1"] == pytest.approx(1 / (4 + 2))
    assert result["PSP@3"] == pytest.approx((1 + 4) / (5 + 2))
    assert result["PSP@5"] == pytest.approx((1 + 4) / (5 + 2))
    # The first text could have 4 + 1/log₂3 of an ideal 1 + 1/log₂3, the second 2 of 1.
    two = 1 + 1 / math.log2(3)
    assert result["PSnDCG@3"] == pytest.approx((1 + 4 / 2) / two / ((4 + 1 / math.log2(3)) / two + 2))
    # Within 5: label 0 is answered twice and true once, 2 once wrong and once right, 1 never, 3, 4 and 5 wrongly.
    assert result["macro-F1@5"] == pytest.approx((2 / 3 + 2 / 3 + 0 + 0 + 0 + 0) / 6)
    assert result["coverage@1"] == pytest.approx(1 / 3)
    assert result["coverage@5"] == pytest.approx(2 / 3)
    assert result["coverage@10"] == 1


def test_texts_without_labels_do_not_count():
    nothing = np.array([], dtype=np.int32)
    result = meter_of(np.array([[0, 1, 2], [1, 0, 2]]), [nothing, np.array([1])], np.ones(3)).result()
    assert result["P@1"] == result["macro-F1@1"] == 1
    empty = meter_of(np.array([[0, 1, 2]]), [nothing], np.ones(3))
    for ask in (empty.result, empty.deciles):
        with pytest.raises(ValueError, match="no text with labels"):
            ask()


def test_a_place_without_an_answer_is_neither_right_nor_wrong():
    # −1 must not be taken for the last label, nor for the last label of the text before.
    ranked, truth = np.array([[2, -1, 0], [-1, -1, -1]]), [np.array([0, 2]), np.array([0])]
    result = meter_of(ranked, truth, np.ones(3)).result()
    assert result["P@1"] == 1 / 2
    assert result["P@3"] == pytest.approx(2 / 3 / 2)
    assert result["macro-F1@3"] == pytest.approx((2 / 3 + 1) / 2)
    assert result["recall@3"] == pytest.approx(1 / 2)


def test_deciles_hold_a_tenth_of_the_positives_each():
    counts = np.array([1] * 50 + [5] * 10 + [0] * 7)
    deciles = frequency_deciles(counts)
    assert (deciles[50:60] == np.repeat(np.arange(5), 2)).all()  # the ten frequent labels are half of all
    assert (deciles[:50] == np.repeat(np.arange(5, 10), 10)).all()
    assert (deciles[60:] == 9).all()
    # One label is 8 of 10: it is the first decile, and those it reaches over are empty.
    assert (frequency_deciles(np.array([1, 8, 1])) == [8, 0, 9]).all()
    assert (frequency_deciles(np.zeros(3, dtype=np.int64)) <= 9).all()


def test_deciles_by_hand():
    counts = np.array([8, 1, 1])
    ranked, truth = np.array([[0, 1], [0, 1]]), [np.array([0]), np.array([1, 2])]
    rows = meter_of(ranked, truth, np.ones(3), counts).deciles()
    assert [row["labels"] for row in rows] == [1, 0, 0, 0, 0, 0, 0, 0, 1, 1]
    assert [rows[i]["texts"] for i in (0, 1, 8)] == [[8, 8], None, [1, 1]]
    assert [rows[i]["positives"] for i in (0, 1, 8, 9)] == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])
    assert [rows[i]["P@1"] for i in (0, 8, 9)] == pytest.approx([1 / 2, 0, 0])
    assert [rows[i]["P@3"] for i in (0, 8, 9)] == pytest.approx([1 / 6, 1 / 6, 0])
    assert [rows[i]["recall@10"] for i in (0, 1, 8, 9)] == [1, None, 1, 0]


def plain_metrics(ranked, truth, weights):
    """The definitions, text by text and label by label."""
    texts = [([a if a >= 0 else None for a in row], set(labels)) for row, labels in zip(ranked, truth, strict=True)]
    texts = [(row, labels) for row, labels in texts if labels]
    true_labels = set().union(*(labels for _, labels in texts))
    metrics = {}
    for k in CUTS:
        discount = [1 / math.log2(rank + 2) for rank in range(k)]
        hit = [[label in labels for label in row[:k]] for row, labels in texts]
        ideal = [sum(discount[: len(labels)]) for _, labels in texts]
        gain = [[weights[a] if a in labels else 0 for a in row[:k]] for row, labels in texts]
        best = [sorted((weights[label] for label in labels), reverse=True)[:k] for _, labels in texts]

        def mean(values):
            return math.fsum(values) / len(texts)

        def dcg(rows, discount=discount, ideal=ideal):
            return math.fsum(
                sum(g * d for g, d in zip(row, discount, strict=False)) / most for row, most in zip(rows, ideal, strict=True)
            )

        metrics[f"P@{k}"] = mean(sum(row) / k for row in hit)
        metrics[f"recall@{k}"] = mean(sum(row) / len(labels) for row, (_, labels) in zip(hit, texts, strict=True))
        metrics[f"nDCG@{k}"] = dcg(hit) / len(texts)
        metrics[f"PSP@{k}"] = math.fsum(map(sum, gain)) / math.fsum(map(sum, best))
        metrics[f"PSnDCG@{k}"] = dcg(gain) / dcg(best)
        f1 = []
        for label in true_labels | {a for row, _ in texts for a in row[:k] if a is not None}:
            right = sum(label in row[:k] and label in labels for row, labels in texts)
            answered = sum(label in row[:k] for row, _ in texts)
            true = sum(label in labels for _, labels in texts)
            precision, recall = right / answered if answered else 0, right / true if true else 0
            f1.append(2 * precision * recall / (precision + recall) if right else 0)
        metrics[f"macro-F1@{k}"] = math.fsum(f1) / len(f1)
        metrics[f"coverage@{k}"] = len({a for row, labels in texts for a in row[:k] if a in labels}) / len(true_labels)
    return metrics


def plain_deciles(ranked, truth, counts):
    """Labels in order of frequency, cut wherever another tenth of the training positives has gone by."""
    order = sorted(range(len(counts)), key=lambda label: (-counts[label], label))
    members, gone = [set() for _ in range(10)], 0
    for label in order:
        members[min(9, 10 * gone // max(1, sum(counts)))].add(label)
        gone += counts[label]
    texts = [(row, set(labels)) for row, labels in zip(ranked, truth, strict=True) if len(labels)]
    positives = sum(len(labels) for _, labels in texts)
    rows = []
    for decile in members:
        mine = sum(len(labels & decile) for _, labels in texts)
        found = {k: sum(len(set(row[:k]) & labels & decile) for row, labels in texts) for k in CUTS}
        seen = [counts[label] for label in decile]
        rows.append(
            {"labels": len(decile), "texts": [min(seen), max(seen)] if seen else None, "positives": mine / positives}
            | {f"P@{k}": found[k] / k / len(texts) for k in (1, 3, 5)}
            | {"recall@10": found[10] / mine if mine else None}
        )
    return rows


@st.composite
def evaluations(draw):
    """(ranked [n, ≤ 12] with some −1, truth, counts) over up to 25 labels."""
    n_labels, n_texts = draw(st.integers(1, 25)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ranked = np.array([rng.permutation(n_labels) for _ in range(n_texts)])[:, : draw(st.integers(1, 12))]
    ranked[rng.random(ranked.shape) < draw(st.sampled_from([0, 0.3]))] = -1
    sizes = rng.integers(0, n_labels + 1, n_texts)
    sizes[0] = max(1, sizes[0])
    truth = [np.sort(rng.choice(n_labels, size, replace=False)).astype(np.int32) for size in sizes]
    return ranked, truth, (rng.pareto(0.5, n_labels) % 10**6).astype(np.int64)


@given(evaluations(), st.data())
def test_metrics_equal_their_definitions(evaluation, data):
    ranked, truth, counts = evaluation
    weights = inverse_propensities(counts, 10_000, a=0.55, b=1.5)
    meter = Meter(weights, counts)
    cut = data.draw(st.integers(0, len(truth)))
    for part in (slice(0, cut), slice(cut, None)):
        meter.update(ranked[part], truth[part])
    result, deciles = meter.result(), meter.deciles()
    assert result == pytest.approx(plain_metrics(ranked, truth, weights))
    for row, expected in zip(deciles, plain_deciles(ranked, truth, counts.tolist()), strict=True):
        assert row.pop("texts") == expected.pop("texts")
        assert row == pytest.approx(expected)
    for k in (1, 3, 5):
        assert sum(row[f"P@{k}"] for row in deciles) == pytest.approx(result[f"P@{k}"])
    assert sum(row["labels"] for row in deciles) == len(counts)


def test_macro_f1_and_ndcg_equal_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    n_texts, n_labels = 60, 300
    true = rng.random((n_texts, n_labels)) < 0.02
    true[np.arange(n_texts), rng.integers(0, n_labels, n_texts)] = True
    scores = rng.random((n_texts, n_labels)) + 0.7 * true * rng.random((n_texts, n_labels))
    ranked = np.argsort(-scores, axis=1)[:, :10]
    result = meter_of(ranked, [np.flatnonzero(row) for row in true], np.ones(n_labels)).result()
    for k in CUTS:
        answers = np.zeros_like(true)
        np.put_along_axis(answers, ranked[:, :k], True, axis=1)
        present = np.flatnonzero((true | answers).any(axis=0))
        assert len(present) < n_labels or k > 3
        assert result[f"macro-F1@{k}"] == pytest.approx(
            f1_score(true, answers, labels=present, average="macro", zero_division=0)
        )
        if k > 1:
            assert result[f"nDCG@{k}"] == pytest.approx(ndcg_score(true, scores, k=k))


def test_three_million_labels_take_memory_by_label_only():
    n_labels = 3_000_000
    rng = np.random.default_rng(0)
    meter = Meter(np.ones(n_labels), rng.integers(0, 50, n_labels))
    for _ in range(3):
        truth = [rng.choice(n_labels, 5, replace=False) for _ in range(128)]
        meter.update(np.array(truth)[:, ::-1], truth)
    counters = [value for value in vars(meter).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in counters) <= (8 + 8 + 4 + 2 * 16) * n_labels
    result = meter.result()
    assert result["P@5"] == result["macro-F1@5"] == result["coverage@5"] == 1
    assert sum(row["P@5"] for row in meter.deciles()) == pytest.approx(1)
