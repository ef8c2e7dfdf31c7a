"""The order of texts: batches of similar length, drawn anew each epoch."""

from __future__ import annotations

import numpy as np

_WINDOW = 64  # batches sorted together: enough to leave little padding, few enough to mix well


def training_batches(lengths: np.ndarray, batch_size: int, *, seed: int, epoch: int) -> list[np.ndarray]:
    """Rows of each batch (int64 [≤ B]), every row once. Depends on (seed, epoch) and the lengths alone.

    Rows are shuffled, sorted by length within windows of 64 batches, cut into batches, and the batches shuffled.
    """
    rng = np.random.default_rng([seed, epoch])
    rows = rng.permutation(len(lengths))
    window = np.arange(len(rows)) // (_WINDOW * batch_size)
    rows = rows[np.lexsort((lengths[rows], window))]
    batches = cut(rows, batch_size)
    return [batches[i] for i in rng.permutation(len(batches))]


def batches_by_length(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Rows of each batch, shortest texts first, every row once: the least padding there can be."""
    return cut(np.argsort(lengths, kind="stable"), batch_size)


def cut(rows: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """`rows` in batches, in their order; the last may be smaller."""
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
