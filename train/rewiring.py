"""Rewiring: while training, each label's (or group's) weakest connections give way to inputs it does not read yet.

Sparse evolutionary training (Mocanu et al. 2018) grows new connections at random, RigL (Evci et al. 2020) where the loss
gradient is largest. What a connection's strength and gradient are is told in train/connections.py. Dense blocks have nothing to
rewire.

Every draw comes from (seed, step, block) alone, so a resumed run rewires as the run that was not stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from models.head import random_indices
from train.compute import Compute
from train.connections import Batch, Lists

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


class Rewiring:
    """Rewires blocks in place, with the moments of their optimizer; `compute` says where they lie.

    first  the first connections of some groups of each block that can be rewired, by the block's place
    """

    def __init__(
        self,
        compute: Compute,
        blocks: Sequence[Any],
        moments: Sequence[Any],
        schedule: Schedule,
        growth: Growth,
        random_weights: bool,
        seed: int,
    ) -> None:
        self._compute = compute
        self._blocks = blocks
        self._moments = moments
        self._schedule = schedule
        self._growth = growth
        self._random_weights = random_weights
        self._seed = seed
        every = (compute.indices(block) for block in blocks)
        self.first = {i: indices[_watched(indices)] for i, indices in enumerate(every) if indices is not None}

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
            moved = self._rewire_block(i, step, batch)
            indices = self._compute.indices(self._blocks[i])
            assert indices is not None
            usage = np.bincount(indices.reshape(-1), minlength=self._blocks[i].width)
            rows.append(
                {
                    "block": i,
                    "moved": moved,
                    "connections": indices.size,
                    "survival": _overlap(first, indices[_watched(indices)]),
                    "input_usage": np.quantile(usage, (0, 0.25, 0.5, 0.75, 1)).tolist(),
                }
            )
        return rows

    def _rewire_block(self, i: int, step: int, batch: Batch) -> int:
        block = self._blocks[i]
        rng = np.random.default_rng([self._seed, step, i])
        decay, moved = self._schedule.decay(step), 0
        # Growth by gradient looks at every input of every label, growth at random at the labels' connections.
        row = block.group_size * (max(block.width, len(batch.x)) if self._growth == "gradient" else block.fan_in)
        for part in _parts(block.groups, max(1, _ELEMENTS // row)):
            lists = self._compute.lists(block, self._moments[i], part)
            prune = self._weakest(lists, decay)
            counts = prune.sum(axis=1)
            if not counts.any():
                continue
            if self._growth == "gradient":
                grown = _largest(lists.gradient(batch, batch.positives[i]), lists.indices, int(counts.max()))
            else:
                grown = _unused(lists.indices, int(counts.max()), block.width, rng)
            lists.replace(prune, grown, rng if self._random_weights else None)
            moved += int(counts.sum())
        return moved

    def _weakest(self, lists: Lists, decay: float) -> np.ndarray:
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


def _watched(indices: np.ndarray) -> np.ndarray:
    """Groups whose first connections are remembered: all, or 4,096 spread evenly."""
    count = min(len(indices), _WATCHED)
    return np.arange(count) * len(indices) // count


def _parts(groups: int, size: int) -> Iterator[slice]:
    for start in range(0, groups, size):
        yield slice(start, min(start + size, groups))
