"""Which labels an answer may come from: a list of places in the head, or all but these.

*Place* means a slot counted through all blocks of a head, in order: n · G + g, and before it the slots of the blocks before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Subset:
    """The labels in the given places, or with `excluded` all others. Its memory follows the list and never L.

    places  int64 [n], ascending and distinct, none of them padding (ValueError when they are not in order)
    """

    places: np.ndarray
    excluded: bool = False

    def __post_init__(self) -> None:
        places = self.places
        if places.ndim != 1 or places.dtype != np.int64 or not places.flags.c_contiguous:
            raise ValueError(f"places is {places.dtype} {list(places.shape)}, expected contiguous int64 [n]")
        if (places[1:] <= places[:-1]).any() or (places[:1] < 0).any():
            raise ValueError("places must be ascending, distinct and not negative")

    @classmethod
    def of(cls, place_of: np.ndarray, allow: np.ndarray | None, deny: np.ndarray) -> Subset:
        """The labels in `allow`, all if that is None, without those in `deny`; place_of [L] is Head.places()."""
        chosen = np.unique(deny) if allow is None else np.setdiff1d(allow, deny)
        return cls(np.sort(place_of[chosen].astype(np.int64)), excluded=allow is None)

    def size(self, n_labels: int) -> int:
        """How many of a head's labels there are to choose from."""
        return n_labels - len(self.places) if self.excluded else len(self.places)


EVERY = Subset(np.empty(0, dtype=np.int64), excluded=True)


def check_allowed(allowed: Sequence[Subset | None], rows: int, slots: int) -> None:
    """ValueError unless there is an entry for each of the rows, and every place is among the head's slots."""
    if len(allowed) != rows:
        raise ValueError(f"allowed has {len(allowed)} entries, x has {rows} rows")
    for row, subset in enumerate(allowed):
        if subset is not None and (subset.places[-1:] >= slots).any():
            raise ValueError(f"allowed of row {row} names place {subset.places[-1]}, the head has {slots} slots")
