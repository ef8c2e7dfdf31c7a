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
    """Of a private block: each label's heaviest connections, an even number K', with weights in 8 bits. What csrc/sketch.h
    describes; (3 · K' + 2) · G + 8 bytes a group. K' is 3 of 4, or 7 of 8 where several rows look together (AVX-512 VNNI).

    values   int8 [N, K' / 2, G, 2]
    offsets  uint16, the same, 2 · input
    rest     bf16 [N, G]
    scale    fp32 [2, N]
    """

    values: np.ndarray
    offsets: np.ndarray
    rest: np.ndarray
    scale: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.offsets.nbytes + self.rest.nbytes + self.scale.nbytes
