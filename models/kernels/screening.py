"""What is made of a block's weights, beside the block, to tell where the k best cannot be: then fewer weights are read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Screen:
    """Of a shared block: its weights in 6 bits, the upper 4 and the lower 2 apart. What csrc/screen.h describes;
    6 · ⌈K/8⌉ · G + 24 bytes a group.

    coarse  uint8 [N, 2 · ⌈K/8⌉, G, 2], the upper bits
    fine    uint8 [N, ⌈K/8⌉, G, 2]
    scale   fp32 [6, N]
    """

    coarse: np.ndarray
    fine: np.ndarray
    scale: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.coarse.nbytes + self.fine.nbytes + self.scale.nbytes


@dataclass(frozen=True, eq=False)
class Sketch:
    """Of a private block: each label's heaviest connections, 3 of 4 in pairs, with weights in 8 bits. What csrc/sketch.h
    describes; about (9/4 · K + 2) · G + 8 bytes a group.

    values   int8 [N, ⌈⌊3/4 · K⌋ / 2⌉, G, 2]
    indices  uint16, the same
    rest     bf16 [N, G]
    scale    fp32 [2, N]
    """

    values: np.ndarray
    indices: np.ndarray
    rest: np.ndarray
    scale: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.indices.nbytes + self.rest.nbytes + self.scale.nbytes
