"""Which labels stand beside each other in a block. Grouping by similarity takes the place of `group_labels` later."""

from __future__ import annotations

import numpy as np


def group_labels(counts: np.ndarray) -> np.ndarray:
    """Labels in slot order, int32 [L]: most frequent first, so that a group's labels have seen as much training text.

    counts int [L] are training texts per label; equal counts keep label order.
    """
    return np.argsort(-counts, kind="stable").astype(np.int32)
