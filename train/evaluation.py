"""Exact evaluation of an encoder and a head on a split."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.encoder import Encoder
from train.batches import batches_by_length
from train.inputs import Inputs
from train.interrupt import Interrupt
from train.metrics import RANKED, Meter

TopK = Callable[[Tensor, int], np.ndarray]
_TEXTS_AT_ONCE = 128


def evaluate(
    encoder: Encoder, topk: TopK, inputs: Inputs, meter: Meter, *, limit: int, name: str, interrupt: Interrupt
) -> None:
    """Shows `meter` the exact top 10 of `limit` of the texts that have labels (0 for all).

    `topk` gives the k best labels int32 [B, k] of head inputs fp32 [B, D], as train.head.HeadTraining.topk does.
    Raises StoppedError on a signal, and FloatingPointError when embeddings or scores are not finite.
    """
    labelled = np.flatnonzero(np.diff(inputs.split.label_starts))
    chosen = labelled[sample(len(labelled), limit)]
    encoder.eval()
    with (
        torch.inference_mode(),
        tqdm(total=len(chosen), desc=f"evaluating {name}", unit=" texts", disable=None, leave=False) as bar,
    ):
        for places in batches_by_length(inputs.lengths[chosen], _TEXTS_AT_ONCE):
            rows = chosen[places]
            filtered = inputs.split.filtered_of(rows)
            try:
                ranked = topk(inputs.embed(rows), RANKED + max(len(labels) for labels in filtered))
            except (ValueError, OverflowError) as error:
                raise FloatingPointError(str(error)) from error
            meter.update(without(ranked, filtered), inputs.split.labels_of(rows))
            bar.update(len(rows))
            interrupt.check()


def without(ranked: np.ndarray, filtered: Sequence[np.ndarray]) -> np.ndarray:
    """`ranked` int [B, k] without each text's `filtered` labels: what follows moves up, and −1 fills the end."""
    dropped = np.stack([np.isin(labels, unwanted) for labels, unwanted in zip(ranked, filtered, strict=True)])
    order = np.argsort(dropped, axis=1, kind="stable")
    return np.take_along_axis(np.where(dropped, -1, ranked), order, axis=1)


def sample(n: int, limit: int) -> np.ndarray:
    """`limit` of the rows 0 … n − 1, evenly spaced; all of them when limit is 0 or not below n."""
    return np.arange(n) if not 0 < limit < n else np.arange(limit) * n // limit
