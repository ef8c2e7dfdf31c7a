"""Label ids and names as files that map from disk: UTF-8 strings end to end, and where each one starts.

    ids.bin  ids.offsets.npy  names.bin  names.offsets.npy      offsets int64 [L + 1]

Millions of labels then cost no start-up time and only the memory of the pages that are read.
"""

from __future__ import annotations

import mmap
import os
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from export.manifest import BundleError

_COLUMNS = ("ids", "names")
LABEL_FILES = tuple(f"{column}.{part}" for column in _COLUMNS for part in ("bin", "offsets.npy"))


class LabelTable:
    """Ids and names of the labels 0 … L − 1, from the folder that `write_labels` filled; BundleError names a bad file."""

    def __init__(self, folder: Path, n_labels: int) -> None:
        self.ids, self.names = (Column(folder, column, n_labels) for column in _COLUMNS)

    def __len__(self) -> int:
        return len(self.ids)

    def id(self, label: int) -> str:
        """The user's own identifier of label `label`."""
        return self.ids[label]

    def name(self, label: int) -> str:
        return self.names[label]


class Column:
    """A string per label.

    bytes    all of them in UTF-8, end to end, a read-only map
    offsets  int64 [L + 1], mapped: string i is bytes[offsets[i]:offsets[i + 1]]
    """

    def __init__(self, folder: Path, name: str, n_labels: int) -> None:
        path = folder / f"{name}.offsets.npy"
        self.offsets: np.ndarray = np.asarray(open_memmap(path, mode="r"))
        with (folder / f"{name}.bin").open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""  # nothing cannot be mapped
        if self.offsets.dtype != np.int64 or self.offsets.shape != (n_labels + 1,):
            found = f"{self.offsets.dtype} {list(self.offsets.shape)}"
            raise BundleError(f"labels/{path.name} is {found}, expected int64 [{n_labels + 1}]")
        if self.offsets[0] != 0 or self.offsets[-1] != size:
            raise BundleError(
                f"labels/{path.name} runs from {self.offsets[0]} to {self.offsets[-1]}, {name}.bin from 0 to {size}"
            )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, label: int) -> str:
        if not 0 <= label < len(self):
            raise IndexError(f"label {label}: there are {len(self)}")
        return self.bytes[self.offsets[label] : self.offsets[label + 1]].decode()


def write_labels(folder: Path, labels: Iterable[tuple[str, str]]) -> int:
    """Writes (id, name) pairs in label order and returns their number; 16 bytes of memory per label.

    BundleError when a string is not Unicode text (half a surrogate pair).
    """
    ends = tuple(array("q", [0]) for _ in _COLUMNS)
    with (folder / "ids.bin").open("wb") as ids, (folder / "names.bin").open("wb") as names:
        for label, pair in enumerate(labels):
            for text, file, end in zip(pair, (ids, names), ends, strict=True):
                try:
                    end.append(end[-1] + file.write(text.encode()))
                except UnicodeEncodeError:
                    raise BundleError(f"label {label}: {text!r} is not Unicode text") from None
    for column, end in zip(_COLUMNS, ends, strict=True):
        np.save(folder / f"{column}.offsets.npy", np.frombuffer(end, dtype=np.int64))
    return len(ends[0]) - 1
