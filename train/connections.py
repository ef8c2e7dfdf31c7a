"""The connections of a block's groups, as rewiring sees and changes them.

In a shared block a connection belongs to the group: its strength is the mean |w| over the group's labels, its gradient the mean
|∂loss/∂w|. Where the numbers lie is up to the subclass. Dimensions: R lists, n groups, D width, K fan-in, G group size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from models import dtypes, kernels
from models.head import Block
from models.kernels import Loss, Moments, Positives
from models.kernels.reference import loss_and_gradient


@dataclass(frozen=True, eq=False)
class Batch:
    """What growth by gradient looks at: inputs fp32 [B, D], on any device, the positives of each block, and the loss."""

    x: Tensor
    positives: list[Positives]
    loss: Loss
    smoothing: float


class Lists(ABC):
    """The lists of connections of some groups: one per group (shared) or per label (private).

    width    D
    indices  uint16 [R, K]
    padding  bool [R], lists of no label
    """

    def __init__(self, indices: np.ndarray, label_ids: np.ndarray, width: int) -> None:
        """indices uint16 [n, K] or [n, K, G], label_ids int32 [n, G]: copies that stay as they are."""
        self.width = width
        self._private = indices.ndim == 3
        self.indices = self._rows(indices)
        self._real = label_ids >= 0
        self.padding = ~self._real.reshape(-1) if self._private else ~self._real.any(axis=1)

    @abstractmethod
    def strength(self) -> np.ndarray:
        """|w| of each connection, fp32 [R, K]: the mean over a group's labels where they share it."""

    @abstractmethod
    def gradient(self, batch: Batch, positives: Positives) -> np.ndarray:
        """|∂loss/∂w| of every input, there or not, fp32 [R, D]: the mean over a group's labels where they share it."""

    def replace(self, prune: np.ndarray, grown: np.ndarray, rng: np.random.Generator | None) -> None:
        """Replaces the connections `prune` bool [R, K], never all of a list, by the first of `grown` uint16 [R, ≥ count]; lists
        stay ascending.

        New weights are zero, or N(0, 1/K) from `rng`. Their first moment starts at zero, the second at the mean of those that
        the label keeps: from zero, with its bias correction long over, Adam would step three to six learning rates at a time.
        """
        rank = np.cumsum(prune, axis=1) - 1  # a pruned connection's place among its list's
        fresh = np.where(prune, np.take_along_axis(grown, np.maximum(rank, 0), axis=1), self.indices)
        order = np.argsort(fresh, axis=1)
        indices = self._columns(np.take_along_axis(fresh, order, axis=1))
        order, new = self._columns(order), self._columns(np.take_along_axis(prune, order, axis=1))
        if not self._private:
            order, new = order[:, :, None], new[:, :, None]
        weights = None
        if rng is not None:
            groups, G = self._real.shape
            K = self.indices.shape[1]
            weights = rng.standard_normal((groups, K, G), dtype=np.float32) * K**-0.5
            weights *= self._real[:, None, :]
        self._write(indices, order, new, weights)

    @abstractmethod
    def _write(self, indices: np.ndarray, order: np.ndarray, new: np.ndarray, weights: np.ndarray | None) -> None:
        """Sets the block's indices to `indices`, and moves weights and moments along K: place k gets what was at order[:, k].

        order int64 and new bool are [n, K, G], or [n, K, 1] for all labels of a group. Where `new`, weights become `weights`
        fp32 [n, K, G], zero if None, and moments as `replace` says.
        """

    def _rows(self, array: np.ndarray) -> np.ndarray:
        """[n, K] as it is; [n, K, G] as [n · G, K]."""
        return array.transpose(0, 2, 1).reshape(-1, array.shape[1]) if self._private else array.copy()

    def _columns(self, array: np.ndarray) -> np.ndarray:
        """The opposite of `_rows`."""
        if not self._private:
            return array
        return array.reshape(-1, self._real.shape[1], array.shape[1]).transpose(0, 2, 1)


class HostLists(Lists):
    """Connections of the groups `part` of a block in host memory, with its optimizer's moments."""

    def __init__(self, block: Block, moments: Moments, part: slice) -> None:
        assert block.indices is not None
        super().__init__(block.indices[part], block.label_ids[part], block.width)
        self._block, self._moments, self._part = block, moments, part

    def strength(self) -> np.ndarray:
        values = np.abs(dtypes.decode(self._block.values[self._part], self._block.dtype, np.float32))  # [n, K, G]
        return self._rows(values) if self._private else self._mean(values)

    def gradient(self, batch: Batch, positives: Positives) -> np.ndarray:
        block, x = self._block, batch.x.numpy()
        z = kernels.scores(x, block.part(self._part))  # [B, n, G]
        target, weight = np.zeros_like(z), np.ones_like(z)
        here, slots = within(positives, self._part, block.group_size)
        at = positives.rows[here], slots
        target.reshape(len(z), -1)[at] = 1 - batch.smoothing
        if positives.weights is not None:
            weight.reshape(len(z), -1)[at] = positives.weights[here]
        _, grad = loss_and_gradient(z, target, batch.loss)
        grad *= weight
        grad[:, ~self._real] = 0
        every = np.abs(x.T @ grad.reshape(len(z), -1)).reshape(block.width, -1, block.group_size)  # [D, n, G]
        if self._private:
            return np.ascontiguousarray(every.reshape(block.width, -1).T)
        return self._mean(every.transpose(1, 0, 2))

    def _write(self, indices: np.ndarray, order: np.ndarray, new: np.ndarray, weights: np.ndarray | None) -> None:
        block, part = self._block, self._part
        assert block.indices is not None
        block.indices[part] = indices
        values = block.values[part]
        begin = dtypes.encode(np.zeros(values.shape, np.float32) if weights is None else weights, block.dtype)
        block.values[part] = np.where(new, begin, np.take_along_axis(values, order, axis=1))
        for number, moment in enumerate(self._moments.values):
            kept = np.where(new, np.float32(0), np.take_along_axis(moment[part], order, axis=1))
            if number:
                kept = np.where(new, kept.sum(axis=1, keepdims=True) / (~new).sum(axis=1, keepdims=True), kept)
            moment[part] = kept

    def _mean(self, numbers: np.ndarray) -> np.ndarray:
        """fp32 [n, …] from [n, …, G], over the labels of each group; padding does not count."""
        real = self._real.astype(np.float32)
        return np.einsum("nkg,ng->nk", numbers, real / real.sum(axis=1, keepdims=True).clip(min=1))


def within(positives: Positives, part: slice, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which positives, bool [P], lie in the groups `part`, and their slots counted from the first of these."""
    start, stop = part.start * group_size, part.stop * group_size
    here = (positives.slots >= start) & (positives.slots < stop)
    return here, positives.slots[here] - start
