"""Rewiring: while training, each label's (or group's) weakest connections give way to inputs it does not read yet.

Sparse evolutionary training (Mocanu et al. 2018) grows new connections at random, RigL (Evci et al. 2020) where the loss
gradient is largest. In a shared block a connection belongs to the group: its strength is the mean |w| over the group's
labels, its gradient the mean |∂loss/∂w|. Dense blocks have nothing to rewire.

Every draw comes from (seed, step, block) alone, so a resumed run rewires as the run that was not stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from models import dtypes, kernels
from models.head import Block, Head, random_indices
from models.kernels import Loss, Moments, Positives
from models.kernels.reference import loss_and_gradient

Growth = Literal["random", "gradient"]
_ELEMENTS = 1 << 22  # numbers looked at together, so that memory does not grow with the labels
_WATCHED = 4096  # groups of a block whose first connections are remembered


@dataclass(frozen=True)
class Schedule:
    """When to rewire and how much. Steps count from 0.

    Rewiring happens before every `every`-th step below `until`. At step t it prunes the weakest `share` of each list of
    connections or, if `below` > 0, those of strength under `below`; both decay as (1 + cos(π·t/until)) / 2.
    """

    every: int
    until: int
    share: float
    below: float

    def due(self, step: int) -> bool:
        return 0 < step < self.until and step % self.every == 0

    def decay(self, step: int) -> float:
        return (1 + math.cos(math.pi * step / self.until)) / 2


@dataclass(frozen=True, eq=False)
class Batch:
    """What growth by gradient looks at: inputs fp32 [B, D], the positives of each block, and the loss."""

    x: np.ndarray
    positives: list[Positives]
    loss: Loss
    smoothing: float


class Rewiring:
    """Rewires the blocks of a head in place, with the moments of their optimizer."""

    def __init__(
        self, head: Head, moments: list[Moments], schedule: Schedule, growth: Growth, random_weights: bool, seed: int
    ) -> None:
        self._head = head
        self._moments = moments
        self._schedule = schedule
        self._growth = growth
        self._random_weights = random_weights
        self._seed = seed
        self.first = {i: block.indices[_watched(block)] for i, block in enumerate(head.blocks) if block.indices is not None}

    def due(self, step: int) -> bool:
        """Whether to call `rewire` before step `step` (from 0)."""
        return bool(self.first) and self._schedule.due(step)

    def rewire(self, step: int, batch: Batch) -> list[dict[str, Any]]:
        """Rewires every block that is not dense; returns what happened, a dict per block.

        "moved" of "connections" changed; "survival" is the share of the first connections still there (of 4,096 groups);
        "input_usage" are the minimum, quartiles and maximum over the inputs of how many lists of connections read each.
        """
        rows = []
        for i, first in self.first.items():
            block = self._head.blocks[i]
            assert block.indices is not None
            moved = self._rewire_block(i, block, step, batch)
            usage = np.bincount(block.indices.reshape(-1), minlength=block.width)
            rows.append(
                {
                    "block": i,
                    "moved": moved,
                    "connections": block.indices.size,
                    "survival": _overlap(first, block.indices[_watched(block)]),
                    "input_usage": np.quantile(usage, (0, 0.25, 0.5, 0.75, 1)).tolist(),
                }
            )
        return rows

    def _rewire_block(self, i: int, block: Block, step: int, batch: Batch) -> int:
        rng = np.random.default_rng([self._seed, step, i])
        decay, moved = self._schedule.decay(step), 0
        # Growth by gradient looks at every input of every label, growth at random at the labels' connections.
        row = block.group_size * (max(block.width, len(batch.x)) if self._growth == "gradient" else block.fan_in)
        for part in _parts(block.groups, max(1, _ELEMENTS // row)):
            lists = _Lists(block, part)
            prune = self._weakest(lists, decay)
            counts = prune.sum(axis=1)
            if not counts.any():
                continue
            if self._growth == "gradient":
                grown = _largest(lists.gradient(batch, batch.positives[i]), lists.indices, int(counts.max()))
            else:
                grown = _unused(lists.indices, int(counts.max()), block.width, rng)
            lists.replace(prune, grown, self._moments[i], rng if self._random_weights else None)
            moved += int(counts.sum())
        return moved

    def _weakest(self, lists: _Lists, decay: float) -> np.ndarray:
        """Which connections to prune, bool [R, K]."""
        strength = lists.strength()
        fan_in = strength.shape[1]
        # Each needs an unused input in its place, and every list keeps at least one connection.
        most = min(lists.width - fan_in, fan_in - 1)
        if not self._schedule.below:
            most = min(most, round(self._schedule.share * decay * fan_in))
        prune = np.zeros(strength.shape, dtype=bool)
        if most:
            np.put_along_axis(prune, np.argpartition(strength, most - 1, axis=1)[:, :most], True, axis=1)
        if self._schedule.below:
            prune &= strength < self._schedule.below * decay
        prune[lists.padding] = False
        return prune


class _Lists:
    """The lists of connections of the groups `part` of a block: one per group (shared) or per label (private).

    indices  uint16 [R, K], a copy
    padding  bool [R], lists of no label
    """

    def __init__(self, block: Block, part: slice) -> None:
        assert block.indices is not None
        self._block = block
        self._part = part
        self._private = block.connectivity == "private"
        self.width = block.width
        self.indices = self._rows(block.indices[part])
        empty = block.label_ids[part] < 0
        self.padding = empty.reshape(-1) if self._private else empty.all(axis=1)

    def strength(self) -> np.ndarray:
        """|w| of each connection, fp32 [R, K]: the mean over a group's labels where they share it."""
        values = np.abs(dtypes.decode(self._block.values[self._part], self._block.dtype, np.float32))  # [n, K, G]
        if self._private:
            return self._rows(values)
        return self._mean(values)

    def gradient(self, batch: Batch, positives: Positives) -> np.ndarray:
        """|∂loss/∂w| of every input, there or not, fp32 [R, D]: the mean over a group's labels where they share it."""
        block, part = self._block, self._part
        piece = block.part(part)
        z = kernels.scores(batch.x, piece)  # [B, n, G]
        target, weight = np.zeros_like(z), np.ones_like(z)
        G = block.group_size
        here = (positives.slots >= part.start * G) & (positives.slots < part.stop * G)
        at = positives.rows[here], positives.slots[here] - part.start * G
        target.reshape(len(z), -1)[at] = 1 - batch.smoothing
        if positives.weights is not None:
            weight.reshape(len(z), -1)[at] = positives.weights[here]
        _, grad = loss_and_gradient(z, target, batch.loss)
        grad *= weight
        grad[:, piece.label_ids < 0] = 0
        every = np.abs(batch.x.T @ grad.reshape(len(z), -1)).reshape(block.width, -1, G)  # [D, n, G]
        if self._private:
            return np.ascontiguousarray(every.reshape(block.width, -1).T)
        return self._mean(every.transpose(1, 0, 2))

    def replace(self, prune: np.ndarray, grown: np.ndarray, moments: Moments, rng: np.random.Generator | None) -> None:
        """Replaces the connections `prune` bool [R, K] by the first of `grown` uint16 [R, ≥ count]; lists stay ascending.

        New weights are zero, or N(0, 1/K) from `rng`. Their moments start at zero.
        """
        block, part = self._block, self._part
        assert block.indices is not None
        rank = np.cumsum(prune, axis=1) - 1  # a pruned connection's place among its list's
        fresh = np.where(prune, np.take_along_axis(grown, np.maximum(rank, 0), axis=1), self.indices)
        order = np.argsort(fresh, axis=1)
        block.indices[part] = self._columns(np.take_along_axis(fresh, order, axis=1))
        order, new = self._columns(order), self._columns(np.take_along_axis(prune, order, axis=1))
        if not self._private:
            order, new = order[:, :, None], new[:, :, None]
        weights: float | np.ndarray = 0.0
        if rng is not None:
            weights = rng.standard_normal(block.values[part].shape, dtype=np.float32) * block.fan_in**-0.5
            weights *= (block.label_ids[part] >= 0)[:, None, :]
        zeros = dtypes.encode(np.broadcast_to(np.float32(weights), block.values[part].shape), block.dtype)
        block.values[part] = np.where(new, zeros, np.take_along_axis(block.values[part], order, axis=1))
        for moment in moments.values:
            moment[part] = np.where(new, np.float32(0), np.take_along_axis(moment[part], order, axis=1))

    def _mean(self, numbers: np.ndarray) -> np.ndarray:
        """fp32 [n, …] from [n, …, G], over the labels of each group; padding does not count."""
        real = (self._block.label_ids[self._part] >= 0).astype(np.float32)
        return np.einsum("nkg,ng->nk", numbers, real / real.sum(axis=1, keepdims=True).clip(min=1))

    def _rows(self, array: np.ndarray) -> np.ndarray:
        """[n, K] as it is; [n, K, G] as [n · G, K]."""
        return array.transpose(0, 2, 1).reshape(-1, array.shape[1]) if self._private else array.copy()

    def _columns(self, array: np.ndarray) -> np.ndarray:
        """The opposite of `_rows`."""
        if not self._private:
            return array
        return array.reshape(-1, self._block.group_size, array.shape[1]).transpose(0, 2, 1)


def _unused(indices: np.ndarray, count: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """uint16 [R, count]: for each row distinct random inputs in random order, none of `indices` [R, K] ascending."""
    ranks = rng.permuted(random_indices(len(indices), count, width - indices.shape[1], rng), axis=1).astype(np.int32)
    # The r-th unused input is r plus the number of used ones below it: used u_i lies below if u_i − i ≤ r.
    offset = indices.astype(np.int32) - np.arange(indices.shape[1], dtype=np.int32)
    below = np.stack([(offset <= ranks[:, j : j + 1]).sum(axis=1, dtype=np.int32) for j in range(count)], axis=1)
    return (ranks + below).astype(np.uint16)


def _largest(gradient: np.ndarray, indices: np.ndarray, count: int) -> np.ndarray:
    """uint16 [R, count]: for each row the inputs with the largest gradient [R, D] that are not in `indices`, largest first."""
    np.put_along_axis(gradient, indices.astype(np.int64), -1, axis=1)
    best = np.argpartition(-gradient, count - 1, axis=1)[:, :count]
    order = np.argsort(-np.take_along_axis(gradient, best, axis=1), axis=1, kind="stable")
    return np.take_along_axis(best, order, axis=1).astype(np.uint16)


def _overlap(first: np.ndarray, now: np.ndarray) -> float:
    """The share of connections [n, K] or [n, K, G] of `first` that are also in `now`."""
    both = np.sort(np.concatenate([first, now], axis=1), axis=1)
    return float((both[:, 1:] == both[:, :-1]).sum() / first.size)


def _watched(block: Block) -> np.ndarray:
    """Groups whose first connections are remembered: all, or 4,096 spread evenly."""
    return np.arange(min(block.groups, _WATCHED)) * block.groups // min(block.groups, _WATCHED)


def _parts(groups: int, size: int) -> Iterator[slice]:
    for start in range(0, groups, size):
        yield slice(start, min(start + size, groups))
