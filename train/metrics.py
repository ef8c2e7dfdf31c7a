"""Ranking metrics of extreme classification, exact and accumulated batch by batch.

P@k, nDCG@k and PSP@k are defined as in the Extreme Classification Repository (Bhatia et al. 2016), propensities as in
Jain et al. 2016 (KDD, "Extreme multi-label loss functions", eq. 10). Texts without labels are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RANKED = 10  # labels per text that the metrics look at


def inverse_propensities(counts: np.ndarray, n_texts: int, *, a: float, b: float) -> np.ndarray:
    """1/p of each label, fp64 [L]: 1 + C·(counts + b)^−a with C = (log n_texts − 1)·(b + 1)^a.

    counts int [L] are training texts per label. C is kept from falling below 0, which needs fewer than 3 texts.
    """
    c = max(0.0, np.log(n_texts) - 1) * (b + 1) ** a
    return 1 + c * (np.asarray(counts, dtype=np.float64) + b) ** -a


class Meter:
    """Sums of per-text metrics. `weights` are the inverse propensities, fp64 [L]."""

    def __init__(self, weights: np.ndarray) -> None:
        self._weights = weights
        self._texts = 0
        self._sums = dict.fromkeys(("P@1", "P@3", "P@5", "nDCG@5", "recall@10"), 0.0)
        self._psp = {k: [0.0, 0.0] for k in (1, 3, 5)}  # propensity-scored hits, and the most there could be

    def update(self, ranked: np.ndarray, truth: Sequence[np.ndarray]) -> None:
        """Adds texts: `ranked` int [B, ≤ 10] label positions, best first; `truth` the distinct true labels of each."""
        kept = np.array([len(labels) > 0 for labels in truth], dtype=bool)
        ranked, truth = ranked[kept, :RANKED].astype(np.int64), [labels for labels in truth if len(labels)]
        if not truth:
            return
        sizes = np.array([len(labels) for labels in truth])
        rows = np.repeat(np.arange(len(truth)), sizes)
        true = np.concatenate(truth).astype(np.int64)
        n_labels = len(self._weights)
        hits = np.isin(np.arange(len(truth))[:, None] * n_labels + ranked, rows * n_labels + true)

        self._texts += len(truth)
        for k in (1, 3, 5):
            self._sums[f"P@{k}"] += hits[:, :k].sum() / k
            self._psp[k][0] += (hits[:, :k] * self._weights[ranked[:, :k]]).sum() / k
        discounts = 1 / np.log2(np.arange(2, 7))
        ideal = np.cumsum(discounts)[np.minimum(sizes, 5) - 1]
        self._sums["nDCG@5"] += (hits[:, :5] @ discounts[: hits[:, :5].shape[1]] / ideal).sum()
        self._sums["recall@10"] += (hits.sum(axis=1) / sizes).sum()

        best = true[np.lexsort((-self._weights[true], rows))]  # each text's labels, rarest first
        place = np.arange(len(best)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        for k in (1, 3, 5):
            self._psp[k][1] += self._weights[best[place < k]].sum() / k

    def result(self) -> dict[str, float]:
        """The metrics, each from 0 to 1; ValueError when no text had a label."""
        if not self._texts:
            raise ValueError("no text with labels to evaluate on")
        means = {name: float(total / self._texts) for name, total in self._sums.items()}
        return means | {f"PSP@{k}": float(got / most) for k, (got, most) in self._psp.items()}
