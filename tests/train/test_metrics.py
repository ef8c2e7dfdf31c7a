import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.metrics import Meter, inverse_propensities


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
    meter = Meter(np.array([1.0, 2.0, 4.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]))
    # First text: truth 0, 2; ranks 1 and 3 hit. Second: truth 1; only rank 10 hits.
    ranked = np.array([[0, 3, 2, 4, 5, 6, 7, 8, 9, 10], [0, 3, 2, 4, 5, 6, 7, 8, 9, 1]])
    meter.update(ranked, [np.array([0, 2]), np.array([1])])
    result = meter.result()
    assert result["P@1"] == pytest.approx(1 / 2)
    assert result["P@3"] == pytest.approx((2 / 3) / 2)
    assert result["P@5"] == pytest.approx((2 / 5) / 2)
    assert result["nDCG@5"] == pytest.approx((1 + 1 / math.log2(4)) / (1 + 1 / math.log2(3)) / 2)
    assert result["recall@10"] == pytest.approx(1.0)
    assert result["PSP@1"] == pytest.approx(1 / (4 + 2))
    assert result["PSP@3"] == pytest.approx((1 + 4) / (5 + 2))
    assert result["PSP@5"] == pytest.approx((1 + 4) / (5 + 2))


def test_texts_without_labels_do_not_count():
    meter = Meter(np.ones(3))
    meter.update(np.array([[0, 1, 2], [1, 0, 2]]), [np.array([], dtype=np.int32), np.array([1])])
    assert meter.result()["P@1"] == 1
    empty = Meter(np.ones(3))
    empty.update(np.array([[0, 1, 2]]), [np.array([], dtype=np.int32)])
    with pytest.raises(ValueError, match="no text with labels"):
        empty.result()


def plain_metrics(ranked, truth, weights):
    """The definitions, text by text."""
    sums = dict.fromkeys(("P@1", "P@3", "P@5", "nDCG@5", "recall@10"), 0.0)
    scaled, most = dict.fromkeys((1, 3, 5), 0.0), dict.fromkeys((1, 3, 5), 0.0)
    texts = [(list(row), set(labels)) for row, labels in zip(ranked, truth, strict=True) if len(labels)]
    for row, labels in texts:
        for k in (1, 3, 5):
            sums[f"P@{k}"] += sum(label in labels for label in row[:k]) / k
            scaled[k] += sum(weights[label] for label in row[:k] if label in labels) / k
            most[k] += sum(sorted((weights[label] for label in labels), reverse=True)[:k]) / k
        gain = sum(1 / math.log2(rank + 2) for rank, label in enumerate(row[:5]) if label in labels)
        sums["nDCG@5"] += gain / sum(1 / math.log2(rank + 2) for rank in range(min(5, len(labels))))
        sums["recall@10"] += len(labels & set(row[:10])) / len(labels)
    means = {name: total / len(texts) for name, total in sums.items()}
    return means | {f"PSP@{k}": scaled[k] / most[k] for k in (1, 3, 5)}


@given(st.data())
def test_metrics_equal_their_definitions(data):
    n_labels = data.draw(st.integers(1, 25))
    n_texts = data.draw(st.integers(1, 12))
    labels = st.permutations(range(n_labels))
    ranked = np.array([data.draw(labels)[:10] for _ in range(n_texts)])
    sizes = [data.draw(st.integers(0, n_labels)) for _ in range(n_texts)]
    sizes[0] = max(1, sizes[0])
    truth = [np.sort(np.array(data.draw(labels)[:size], dtype=np.int32)) for size in sizes]
    counts = np.array(data.draw(st.lists(st.integers(0, 10**6), min_size=n_labels, max_size=n_labels)))
    weights = inverse_propensities(counts, 10_000, a=0.55, b=1.5)
    meter = Meter(weights)
    cut = data.draw(st.integers(0, n_texts))
    for part in (slice(0, cut), slice(cut, None)):
        if len(truth[part]):
            meter.update(ranked[part], truth[part])
    assert meter.result() == pytest.approx(plain_metrics(ranked, truth, weights))
