"""First weights that rank before the first step: a label starts as the mean of its training texts' embeddings.

Imprinted weights (Qi, Brown and Lowe 2018, "Low-Shot Learning with Imprinted Weights", section 3), less the mean of all labels,
and as long as random ones. With those, a label has to learn what it is about from one text at a time, while the encoder moves.
A private label also reads the inputs that say most of it, in place of random ones.

Dimensions: B texts of a batch, P positives among them, L labels, D the head's width, K fan-in, N groups, G group size.
"""

from __future__ import annotations

import numpy as np
import torch
from tqdm import tqdm

from models import dtypes
from models.head import Block, Head
from train.batches import batches_by_length
from train.inputs import Inputs

_TEXTS_AT_ONCE = 128
_NUMBERS_AT_ONCE = 1 << 22


def imprint(head: Head, inputs: Inputs, counts: np.ndarray) -> None:
    """Overwrites the weights of the head's labels, and private ones' indices, with what `inputs`, the training texts, say.

    `counts` int [L] are the texts of each label; those without any keep what they have. Biases and indices that labels share
    stay. One pass over the texts, with fp32 sums as large as the weights, or of D numbers for each private label.
    """
    block_of, slot_of = head.slots()
    sums = [
        np.zeros((block.bias.size, block.fan_in if block.connectivity == "shared" else head.width), np.float32)
        for block in head.blocks
    ]
    mean = np.zeros(head.width)  # of the labels' means
    batches = batches_by_length(inputs.lengths, _TEXTS_AT_ONCE)
    for rows in tqdm(batches, desc="imprinting", unit=" batches", disable=None):
        with torch.inference_mode():
            x = inputs.embed(rows).numpy(force=True)
        labels = inputs.split.labels_of(rows)
        of_label = np.concatenate(labels)
        of_text = np.repeat(np.arange(len(rows)), [len(each) for each in labels])
        mean += np.bincount(of_text, 1 / counts[of_label], minlength=len(rows)) @ x
        for i, block in enumerate(head.blocks):
            ours = block_of[of_label] == i
            _add(sums[i], block, x, of_text[ours], slot_of[of_label[ours]])
    mean /= max(1, int(np.count_nonzero(counts)))
    for block, total in zip(head.blocks, sums, strict=True):
        chosen = _choose_inputs(block, total, mean, counts) if block.connectivity == "private" else total
        _write(block, chosen, mean.astype(np.float32), counts)


def _add(sums: np.ndarray, block: Block, x: np.ndarray, rows: np.ndarray, slots: np.ndarray) -> None:
    """Adds to `sums` fp32 [N · G, K or D] what slots [P] read, or may come to read, of rows [P] of x fp32 [B, D]."""
    order = np.argsort(slots, kind="stable")
    distinct, starts = np.unique(slots[order], return_index=True)
    if len(distinct):
        texts = rows[order]
        read = _read(block, x, texts, slots[order]) if block.connectivity == "shared" else x[texts]
        sums[distinct] += np.add.reduceat(read, starts)


def _choose_inputs(block: Block, sums: np.ndarray, mean: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Lets each label of a private block read the K inputs in which it differs most from `mean` fp64 [D], by what is usual.

    Of `sums` fp32 [N · G, D] returns those that the block reads now, [N · G, K].
    """
    assert block.indices is not None
    labels = block.label_ids.reshape(-1)
    slots = np.flatnonzero((labels >= 0) & (counts[labels] > 0))
    parts = np.array_split(slots, 1 + len(slots) * block.width // _NUMBERS_AT_ONCE)

    def squares(part: np.ndarray) -> np.ndarray:
        return np.square(sums[part] / counts[labels[part], None] - mean)

    usual = sum((squares(part).sum(axis=0) for part in parts), np.zeros(block.width))
    for part in parts:
        size = squares(part) / np.where(usual > 0, usual, 1)
        differs = size.any(axis=1)
        groups, places = np.divmod(part[differs], block.group_size)
        largest = np.argsort(-size[differs], axis=1, kind="stable")[:, : block.fan_in]
        block.indices[groups, :, places] = np.sort(largest, axis=1)
    by_slot = block.indices.swapaxes(1, 2).reshape(len(sums), block.fan_in)
    return np.take_along_axis(sums, by_slot.astype(np.int64), axis=1)


def _read(block: Block, x: np.ndarray, rows: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """What slots [P] read of rows [P] of x [B, D]: [P, K]."""
    if block.indices is None:
        return x[rows]
    groups, places = np.divmod(slots, block.group_size)
    return x[rows[:, None], block.indices[groups] if block.connectivity == "shared" else block.indices[groups, :, places]]


def _write(block: Block, sums: np.ndarray, mean: np.ndarray, counts: np.ndarray) -> None:
    """Makes the values of `sums` fp32 [N · G, K]: means over texts, less `mean` fp32 [D], of mean square 1/K per label."""
    step = max(1, _NUMBERS_AT_ONCE // (block.fan_in * block.group_size))
    for start in range(0, block.groups, step):
        part = block.part(slice(start, start + step))
        labels = part.label_ids.reshape(-1)
        slots = np.flatnonzero((labels >= 0) & (counts[labels] > 0))
        weights = sums[start * block.group_size + slots] / counts[labels[slots]].astype(np.float32)[:, None]
        weights -= _read(part, mean[None], np.zeros_like(slots), slots)
        rms = np.sqrt(np.square(weights).mean(axis=1))
        slots, weights, rms = slots[rms > 0], weights[rms > 0], rms[rms > 0]
        weights *= block.fan_in**-0.5 / rms[:, None]
        groups, places = np.divmod(slots, block.group_size)
        part.values[groups, :, places] = dtypes.encode(weights, block.dtype)
