"""First weights that rank before the first step: labels start as linear discriminants of their training texts.

A label's weights are w = A⁻¹ (m − m₀), A = S + σ²I: m is the mean of the head's inputs over the label's texts, m₀ that of all
labels, S the covariance over all texts, σ² the mean variance. This is linear discriminant analysis with its covariance drawn
half-way to σ²I (Friedman 1989, "Regularized Discriminant Analysis"). Means alone would be imprinted weights (Qi, Brown and Lowe
2018, "Low-Shot Learning with Imprinted Weights", section 3), which count what several inputs say several times. With random
weights a label has to learn what it is about from one text at a time, while the encoder moves.

Where labels read K of the inputs, the others are those they miss least: with the smallest w² / (A⁻¹)ᵢᵢ, the loss of fit when
the rest makes up for input i (Hassibi and Stork 1992, "Second order derivatives for network pruning: Optimal Brain Surgeon",
section 2).

Dimensions: B texts of a batch, n labels, L labels in all, D the head's width, K fan-in, N groups, G group size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from models import dtypes
from models.head import Block, Head
from train.batches import batches_by_length
from train.inputs import Inputs

_TEXTS_AT_ONCE = 128
_TEXTS_OF_MOMENTS = 100_000  # evenly spaced, where there are more
_WIDEST_COVARIANCE = 4096  # D² numbers, D³ operations; inputs of a wider head are taken for uncorrelated
_NUMBERS_AT_ONCE = 1 << 22
_SUMS_AT_ONCE = 1 << 29  # numbers, 2 GiB


def imprint(head: Head, inputs: Inputs, counts: np.ndarray, *, choose_shared: bool) -> None:
    """Overwrites the weights of the head's labels with what `inputs`, the training texts, say.

    Private labels' indices too, and with `choose_shared` those of groups. `counts` int [L] are the texts of each label; those
    without any keep their weights, and all labels their biases. The texts are embedded once for the moments and once for every
    2 GiB of the labels' sums, fp32 [L, D].
    """
    mean, covariance = _moments(inputs, counts, head.width)
    discriminant = _Discriminant.shrunken(mean, covariance)
    if discriminant is None:
        return
    for blocks in _passes(head):
        sums = _sums(blocks, inputs, head.n_labels)
        starts = np.cumsum([block.label_ids.size for block in blocks])
        for block, of_block in zip(blocks, np.split(sums, starts[:-1]), strict=True):
            _begin(block, of_block, counts, discriminant, choose_shared)


@dataclass(frozen=True, eq=False)
class _Discriminant:
    """m₀ fp64 [D] and A⁻¹ fp64 [D, D], or its diagonal [D] where that is all there is."""

    mean: np.ndarray
    inverse: np.ndarray

    @classmethod
    def shrunken(cls, mean: np.ndarray, covariance: np.ndarray) -> _Discriminant | None:
        """From S, [D, D] or its diagonal [D]; None if no input varies."""
        alone = covariance.ndim == 1
        variance = (covariance if alone else covariance.diagonal()).mean()
        if variance <= 0:
            return None
        return cls(mean, 1 / (covariance + variance) if alone else np.linalg.inv(covariance + variance * np.eye(len(mean))))

    def weights(self, means: np.ndarray) -> np.ndarray:
        """w of labels whose texts have these means, [n, D]: fp64 [n, D]."""
        differences = means - self.mean
        return differences * self.inverse if self.inverse.ndim == 1 else differences @ self.inverse

    def losses(self, weights: np.ndarray) -> np.ndarray:
        """What each input is worth to labels of these weights, fp64 [n, D], as a share of what all are."""
        losses = np.square(weights) / (self.inverse if self.inverse.ndim == 1 else self.inverse.diagonal())
        return losses / losses.sum(axis=1, keepdims=True)


def _moments(inputs: Inputs, counts: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """m₀ fp64 [D] and S fp64 [D, D], or its diagonal [D] if that is too wide; of evenly spaced texts where there are many."""
    alone = width > _WIDEST_COVARIANCE
    total, products = np.zeros(width), np.zeros(width if alone else (width, width))
    of_labels, labels = np.zeros(width), 0.0
    rows = np.arange(0, len(inputs.lengths), 1 + len(inputs.lengths) // _TEXTS_OF_MOMENTS)
    for batch, x in _embedded(inputs, rows, "moments"):
        exact = x.astype(np.float64)
        total += exact.sum(axis=0)
        products += np.square(exact).sum(axis=0) if alone else exact.T @ exact
        label, text = _positives(inputs, batch)
        shares = np.bincount(text, 1 / counts[label], minlength=len(batch))  # a label's texts count as one together
        of_labels += shares @ exact
        labels += shares.sum()
    centre = total / len(rows)
    return of_labels / (labels or 1.0), products / len(rows) - (np.square(centre) if alone else np.outer(centre, centre))


def _passes(head: Head) -> Iterator[list[Block]]:
    """The head's blocks in small parts; those together whose labels' sums take 2 GiB."""
    together: list[Block] = []
    room = _SUMS_AT_ONCE
    for block in head.blocks:
        step = max(1, _NUMBERS_AT_ONCE // (block.group_size * head.width))
        for start in range(0, block.groups, step):
            together.append(block.part(slice(start, start + step)))
            room -= together[-1].label_ids.size * head.width
            if room <= 0:
                yield together
                together, room = [], _SUMS_AT_ONCE
    if together:
        yield together


def _sums(blocks: list[Block], inputs: Inputs, n_labels: int) -> np.ndarray:
    """The head's inputs summed over the texts of each label of `blocks`, fp32 [n, D] in the order of their slots."""
    ids = np.concatenate([block.label_ids.reshape(-1) for block in blocks])
    slots = np.full(n_labels, -1)
    slots[ids[ids >= 0]] = np.flatnonzero(ids >= 0)
    sums = np.zeros((len(ids), blocks[0].width), np.float32)
    for batch, x in _embedded(inputs, np.arange(len(inputs.lengths)), "labels"):
        label, text = _positives(inputs, batch)
        slot = slots[label]
        order = np.argsort(slot, kind="stable")[np.count_nonzero(slot < 0) :]
        distinct, starts = np.unique(slot[order], return_index=True)
        if len(distinct):
            sums[distinct] += np.add.reduceat(x[text[order]], starts)
    return sums


def _embedded(inputs: Inputs, rows: np.ndarray, what: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of texts `rows` and the head's inputs for them, fp32 [B, D]."""
    batches = batches_by_length(inputs.lengths[rows], _TEXTS_AT_ONCE)
    for batch in tqdm(batches, desc=f"imprinting, {what}", unit=" batches", disable=None):
        with torch.inference_mode():
            x = inputs.embed(rows[batch]).numpy(force=True)
        yield rows[batch], x


def _positives(inputs: Inputs, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The labels of the texts `batch`, and for each the place of its text in the batch."""
    labels = inputs.split.labels_of(batch)
    return np.concatenate(labels), np.repeat(np.arange(len(batch)), [len(each) for each in labels])


def _begin(block: Block, sums: np.ndarray, counts: np.ndarray, discriminant: _Discriminant, choose_shared: bool) -> None:
    """Writes indices and values of the labels of `block`, given the sums fp32 [N · G, D] over their texts."""
    labels = block.label_ids.reshape(-1)
    slots = np.flatnonzero((labels >= 0) & (counts[labels] > 0))
    weights = discriminant.weights(sums[slots] / counts[labels[slots], None])
    says = weights.any(axis=1)
    slots, weights = slots[says], weights[says]
    groups, places = np.divmod(slots, block.group_size)
    if block.indices is not None and len(slots):
        if block.connectivity == "private":
            read = _largest(discriminant.losses(weights), block.fan_in)
            block.indices[groups, :, places] = read
        else:
            if choose_shared:
                some, starts = np.unique(groups, return_index=True)
                losses = np.add.reduceat(discriminant.losses(weights), starts)
                block.indices[some] = _largest(losses, block.fan_in)
            read = block.indices[groups].astype(np.int64)
        weights = np.take_along_axis(weights, read, axis=1)
    rms = np.sqrt(np.square(weights).mean(axis=1))
    says = rms > 0  # inputs that the label's group reads may say nothing of it
    values = weights[says] * (block.fan_in**-0.5 / rms[says, None])
    block.values[groups[says], :, places[says]] = dtypes.encode(values.astype(np.float32), block.dtype)


def _largest(losses: np.ndarray, count: int) -> np.ndarray:
    """The inputs of the `count` largest of each row, ascending: [n, D] → int64 [n, count]."""
    return np.sort(np.argpartition(losses, -count, axis=1)[:, -count:], axis=1)
