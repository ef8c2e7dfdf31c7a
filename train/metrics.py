"""Ranking metrics of extreme classification, exact and accumulated batch by batch in memory that grows with the labels alone.

P@k, nDCG@k, PSP@k and PSnDCG@k are defined as in the Extreme Classification Repository (Bhatia et al. 2016), the
propensity-scored ones divided by the best that any ranking could reach, as its evaluation code (pyxclib) does; propensities
as in Jain et al. 2016 (KDD, "Extreme multi-label loss functions", eq. 10). Macro-F1@k and coverage@k are those of Schultheis
et al. 2023 (NeurIPS, "Generalized test utilities for long-tail performance in extreme multi-label classification"), averaged
over the labels that the evaluated texts say something about, not over all L. Deciles of label frequency are those of
pyxclib's decile plots. Texts without labels are left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

RANKED = 10  # labels per text that the metrics look at
DECILES = 10
_CUTS = (1, 3, 5, RANKED)
_CUT_OF_RANK = np.searchsorted(_CUTS, np.arange(1, RANKED + 1))  # the first cut that a rank counts for
_DISCOUNTS = 1 / np.log2(np.arange(2, RANKED + 2))
_IDEAL = np.cumsum(_DISCOUNTS)


def inverse_propensities(counts: np.ndarray, n_texts: int, *, a: float, b: float) -> np.ndarray:
    """1/p of each label, fp64 [L]: 1 + C·(counts + b)^−a with C = (log n_texts − 1)·(b + 1)^a.

    counts int [L] are training texts per label. C is kept from falling below 0, which needs fewer than 3 texts.
    """
    c = max(0.0, np.log(n_texts) - 1) * (b + 1) ** a
    return 1 + c * (np.asarray(counts, dtype=np.float64) + b) ** -a


def frequency_deciles(counts: np.ndarray) -> np.ndarray:
    """The decile of each label, uint8 [L]: 0 the most frequent labels, each decile about a tenth of the training positives.

    counts int [L] are training texts per label. A label belongs to the tenth in which it begins when labels stand in order of
    frequency, equal ones in label order; so a label of over a tenth leaves deciles empty. Labels never seen are in the last.
    """
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    deciles = np.empty(len(counts), dtype=np.uint8)
    deciles[order] = np.minimum(before * DECILES // max(1, counts.sum()), DECILES - 1)
    return deciles


class Meter:
    """Metrics of one split. `weights` are the inverse propensities, fp64 [L]; `counts` training texts per label, int [L]."""

    def __init__(self, weights: np.ndarray, counts: np.ndarray) -> None:
        self._weights = weights
        self._counts = counts
        self._texts = 0
        self._sums: defaultdict[str, float] = defaultdict(float)  # over texts, of "nDCG@k", "recall@k", "PSnDCG@k"
        self._most: defaultdict[str, float] = defaultdict(float)  # what "PSP@k" and "PSnDCG@k" could be at most
        self._true = np.zeros(len(counts), dtype=np.int32)  # texts that have the label
        # Texts that it is an answer to, and a right one; row c counts ranks beyond cut c − 1 and up to cut c.
        self._answers = np.zeros((len(_CUTS), len(counts)), dtype=np.int32)
        self._hits = np.zeros((len(_CUTS), len(counts)), dtype=np.int32)

    def update(self, ranked: np.ndarray, truth: Sequence[np.ndarray]) -> None:
        """Adds texts: `ranked` int [B, any] distinct label positions, best first, −1 where there is no answer.

        `truth` has the distinct true labels of each text.
        """
        kept = np.array([len(labels) > 0 for labels in truth], dtype=bool)
        truth = [labels for labels in truth if len(labels)]
        if not truth:
            return
        sizes = np.array([len(labels) for labels in truth])
        texts = np.repeat(np.arange(len(truth)), sizes)
        true = np.concatenate(truth).astype(np.int64)
        answers = np.full((len(truth), RANKED), -1, dtype=np.int64)
        answers[:, : ranked.shape[1]] = ranked[kept, :RANKED]
        given = answers >= 0
        n_labels = len(self._counts)
        hits = given & np.isin(np.arange(len(truth))[:, None] * n_labels + answers, texts * n_labels + true)

        self._texts += len(truth)
        np.add.at(self._true, true, 1)
        for counters, where in ((self._answers, given), (self._hits, hits)):
            np.add.at(counters, (np.broadcast_to(_CUT_OF_RANK, where.shape)[where], answers[where]), 1)

        best = np.zeros((len(truth), RANKED))  # weights of each text's labels, rarest first
        order = np.lexsort((-self._weights[true], texts))
        place = np.arange(len(true)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        near = place < RANKED
        best[texts[near], place[near]] = self._weights[true[order[near]]]
        gained = np.where(hits, self._weights[answers], 0)
        for k in _CUTS:
            ideal = _IDEAL[np.minimum(sizes, k) - 1]
            self._sums[f"nDCG@{k}"] += float((hits[:, :k] @ _DISCOUNTS[:k] / ideal).sum())
            self._sums[f"recall@{k}"] += float((hits[:, :k].sum(axis=1) / sizes).sum())
            self._sums[f"PSnDCG@{k}"] += float((gained[:, :k] @ _DISCOUNTS[:k] / ideal).sum())
            self._most[f"PSnDCG@{k}"] += float((best[:, :k] @ _DISCOUNTS[:k] / ideal).sum())
            self._most[f"PSP@{k}"] += float(best[:, :k].sum())

    def result(self) -> dict[str, float]:
        """The metrics, each from 0 to 1; ValueError when no text had a label.

        macro-F1@k: mean of 2·hits / (answers + true) over labels that are an answer or true somewhere.
        coverage@k: the share of the true labels that are a right answer to at least one text.
        """
        if not self._texts:
            raise ValueError("no text with labels to evaluate on")
        metrics: dict[str, float] = {}
        hits, seen = np.zeros_like(self._true), self._true.copy()
        for k, more_hits, more_answers in zip(_CUTS, self._hits, self._answers, strict=True):
            hits += more_hits
            seen += more_answers
            metrics[f"P@{k}"] = hits.sum() / (k * self._texts)
            metrics[f"nDCG@{k}"] = self._sums[f"nDCG@{k}"] / self._texts
            metrics[f"PSP@{k}"] = hits @ self._weights / self._most[f"PSP@{k}"]
            metrics[f"PSnDCG@{k}"] = self._sums[f"PSnDCG@{k}"] / self._most[f"PSnDCG@{k}"]
            metrics[f"recall@{k}"] = self._sums[f"recall@{k}"] / self._texts
            metrics[f"macro-F1@{k}"] = (
                2 * np.divide(hits, seen, where=seen > 0, out=np.zeros(len(seen))).sum() / np.sum(seen > 0)
            )
            metrics[f"coverage@{k}"] = np.sum(hits > 0) / np.sum(self._true > 0)
        return {name: float(value) for name, value in metrics.items()}

    def deciles(self) -> list[dict[str, Any]]:
        """What each decile of label frequency adds, most frequent labels first; ValueError as `result`.

        labels: how many; texts: the least and most training texts of one (None where there is no label); positives: the share
        of the split's true labels that are theirs; P@k: their part in P@k, so the deciles' sum is P@k; recall@10: the share of
        their positives that is among the 10 answers (None where there are no positives).
        """
        if not self._texts:
            raise ValueError("no text with labels to evaluate on")
        decile = frequency_deciles(self._counts)
        hits = np.cumsum([np.bincount(decile, weights=row, minlength=DECILES) for row in self._hits], axis=0)
        true = np.bincount(decile, weights=self._true, minlength=DECILES)
        rows = []
        for i in range(DECILES):
            counts = self._counts[decile == i]
            rows.append(
                {"labels": len(counts), "texts": [int(counts.min()), int(counts.max())] if len(counts) else None}
                | {"positives": float(true[i] / true.sum())}
                | {f"P@{k}": float(hits[c, i] / (k * self._texts)) for c, k in enumerate(_CUTS[:-1])}
                | {f"recall@{RANKED}": float(hits[-1, i] / true[i]) if true[i] else None}
            )
        return rows
