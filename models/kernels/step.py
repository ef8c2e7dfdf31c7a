"""What a training step needs beside a block: its positives, the loss, the optimizer and its moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from models.head import Block, Head

Loss = Literal["bce", "squared_hinge"]
MOMENTS = {"sgd": 0, "momentum": 1, "adam": 2}  # how many each optimizer keeps of every weight
_MASK = (1 << 64) - 1


@dataclass(frozen=True, eq=False)
class Positives:
    """The (slot, row) pairs of a batch that are positive in one block.

    slots int64 [P], a slot being n · G + g; rows int32 [P], positions in the batch. Distinct, in order of slot, then row.
    weights fp32 [P] is how often the loss of each counts, once if None.
    """

    slots: np.ndarray
    rows: np.ndarray
    weights: np.ndarray | None = None

    @classmethod
    def of_batch(
        cls,
        labels: Sequence[np.ndarray],
        located: tuple[np.ndarray, np.ndarray],
        head: Head,
        weights: np.ndarray | None = None,
    ) -> list[Positives]:
        """One Positives per block of `head`, from each row's label ids; `located` is `head.slots()`.

        `weights` fp32 [L] are those of the labels, all 1 if None.
        """
        rows = np.repeat(np.arange(len(labels), dtype=np.int32), [len(row) for row in labels])
        ids = np.concatenate([np.asarray(row, dtype=np.int64) for row in labels]) if len(labels) else np.empty(0, np.int64)
        block_of, slot_of = located[0][ids], located[1][ids]
        split = []
        for i in range(len(head.blocks)):
            here = block_of == i
            slots, at, label = slot_of[here], rows[here], ids[here]
            order = np.lexsort((at, slots))
            slots, at, label = slots[order], at[order], label[order]
            fresh = np.ones(len(slots), dtype=bool)
            fresh[1:] = (slots[1:] != slots[:-1]) | (at[1:] != at[:-1])
            split.append(cls(slots[fresh], at[fresh], None if weights is None else weights[label[fresh]]))
        return split


@dataclass(frozen=True)
class Optimizer:
    """How a step's gradient changes a block.

    sgd: w −= lr·g. momentum: m = β₁·m + g, w −= lr·m. adam: Kingma & Ba 2015 with bias correction.
    `weight_decay` is decoupled (w −= lr·weight_decay·w, values only; Loshchilov & Hutter 2019).
    """

    kind: Literal["sgd", "momentum", "adam"] = "adam"
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def moments(self, block: Block) -> Moments:
        """Fresh (zero) moments for `block`."""
        count = MOMENTS[self.kind]
        return Moments(
            values=tuple(np.zeros(block.values.shape, dtype=np.float32) for _ in range(count)),
            bias=tuple(np.zeros(block.bias.shape, dtype=np.float32) for _ in range(count)),
        )


@dataclass(frozen=True, eq=False)
class Moments:
    """Optimizer moments of a block, fp32: none (sgd), first (momentum), first and second (adam)."""

    values: tuple[np.ndarray, ...]  # each [N, K, G]
    bias: tuple[np.ndarray, ...]  # each [N, G]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.values + self.bias)


def check_rule(loss: Loss, smoothing: float, optimizer: Optimizer, step: int) -> None:
    """ValueError names what of a step's rule no backend can follow."""
    if loss not in ("bce", "squared_hinge"):
        raise ValueError(f"loss is {loss!r}, must be 'bce' or 'squared_hinge'")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing is {smoothing}, must be at least 0 and below 1")
    if optimizer.kind not in MOMENTS:
        raise ValueError(f"optimizer is {optimizer.kind!r}, must be one of {', '.join(MOMENTS)}")
    if step < 1:
        raise ValueError(f"step is {step}, must count from 1")


def rounding_key(seed: int, step: int, block: int) -> int:
    """The 64-bit key of one step's stochastic rounding in one block."""
    return _splitmix(_splitmix(_splitmix(seed & _MASK) ^ step) ^ block)


def group_keys(key: int, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(k0, k1) uint32 [len(groups)]: the low and high half of splitmix64(key + group)."""
    with np.errstate(over="ignore"):
        mixed = _splitmix_array(np.uint64(key) + groups.astype(np.uint64))
    return mixed.astype(np.uint32), (mixed >> np.uint64(32)).astype(np.uint32)


def random_bits(k0: np.ndarray, k1: np.ndarray, element: np.ndarray) -> np.ndarray:
    """uint32, uniform in 0 … 65,535: the random number of an element (k · G + g) in a group with keys k0, k1.

    A counter passed through the 32-bit finalizer "lowbias32" (Wellons 2018): stateless, so any element can be drawn alone,
    on any device, in any order, and a resumed run repeats a run that was not stopped.
    """
    with np.errstate(over="ignore"):
        x = (element.astype(np.uint32) + k0) ^ k1
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x >> np.uint32(16)


def _splitmix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _splitmix_array(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
