"""A shared block's weights in 8 bits, beside the block: a first look that tells where the k best cannot be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Screen:
    """What csrc/screen.h describes; (K + 2) · G + 16 bytes a group.

    values  int8 [N, ⌈K/2⌉, G, 2]
    start   int16 [N, G]
    scale   fp32 [N, 4]
    """

    values: np.ndarray
    start: np.ndarray
    scale: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.start.nbytes + self.scale.nbytes
