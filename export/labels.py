"""Label ids and names as files that map from disk, and what finds labels by them.

    ids.bin     ids.offsets.npy     ids.index.npy        the labels by a hash of their id
    names.bin   names.offsets.npy
    folded.bin  folded.offsets.npy  folded.order.npy     names as they are searched, and the labels in order of these

Strings are UTF-8, end to end; offsets int64 [L + 1] say where each one starts. Millions of labels then cost no start-up time
and only the memory of the pages that are read.
"""

from __future__ import annotations

import mmap
import os
from array import array
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from unicodedata import normalize

import numpy as np
from numpy.lib.format import open_memmap

from export.manifest import BundleError
from models.files import write_array

_COLUMNS = ("ids", "names", "folded")
INDEX, ORDER = "ids.index.npy", "folded.order.npy"
LABEL_FILES = (*(f"{column}.{part}" for column in _COLUMNS for part in ("bin", "offsets.npy")), INDEX, ORDER)
MARK = b"\xff"  # before each folded name; UTF-8 has no such byte, so what is searched for never runs over into the next name
_CHUNK = 1 << 18  # labels looked at together
_STEP = 7  # bytes compared at a time


class LabelTable:
    """The labels 0 … L − 1, from the folder that `write_labels` filled; BundleError names a bad file.

    order  int32 [L], mapped: the labels in order of their folded names' bytes, equal ones ascending
    """

    def __init__(self, folder: Path, n_labels: int) -> None:
        self.ids, self.names, self.folded = (Column(folder, column, n_labels) for column in _COLUMNS)
        self.order = _map(folder, ORDER, np.dtype(np.int32), n_labels)
        self._index = _map(folder, INDEX, np.dtype(np.uint64), n_labels)

    def __len__(self) -> int:
        return len(self.ids)

    def id(self, label: int) -> str:
        """The user's own identifier of label `label`."""
        return self.ids[label]

    def name(self, label: int) -> str:
        return self.names[label]

    def find(self, ids: Sequence[str]) -> np.ndarray:
        """int32 [n]: the label with each id, the first if several have it; −1 where none has. About 2 µs an id."""
        wanted = [text.encode(errors="surrogatepass") for text in ids]  # half a surrogate pair is in no label's id
        shift = np.uint64(_label_bits(len(self)))
        hashes = np.fromiter(map(_hash, wanted), dtype=np.uint64, count=len(wanted)) >> shift
        found = np.full(len(wanted), -1, dtype=np.int32)
        at = np.searchsorted(self._index, hashes << shift)
        left = np.arange(len(wanted))
        while left.size:  # a second time only for ids whose hash another id has, too
            left = left[at[left] < len(self)]
            entries = self._index[at[left]]
            same = entries >> shift == hashes[left]
            left, labels = left[same], (entries[same] - (hashes[left][same] << shift)).astype(np.int64)
            right = self.ids.equal(labels, [wanted[i] for i in left.tolist()])
            found[left[right]] = labels[right]
            left = left[~right]
            at[left] += 1
        return found


class Column:
    """A string per label.

    bytes    all of them in UTF-8, end to end, a read-only map; MARK stands before each folded name
    offsets  int64 [L + 1], mapped: string i is bytes[offsets[i]:offsets[i + 1]]
    """

    def __init__(self, folder: Path, name: str, n_labels: int) -> None:
        file = f"{name}.offsets.npy"
        self.offsets = _map(folder, file, np.dtype(np.int64), n_labels + 1)
        with (folder / f"{name}.bin").open("rb") as data:
            size = data.seek(0, os.SEEK_END)
            self.bytes = mmap.mmap(data.fileno(), 0, access=mmap.ACCESS_READ) if size else b""  # nothing cannot be mapped
        if self.offsets[0] != 0 or self.offsets[-1] != size:
            raise BundleError(f"labels/{file} runs from {self.offsets[0]} to {self.offsets[-1]}, {name}.bin from 0 to {size}")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, label: int) -> str:
        if not 0 <= label < len(self):
            raise IndexError(f"label {label}: there are {len(self)}")
        return self.bytes[self.offsets[label] : self.offsets[label + 1]].decode()

    def equal(self, labels: np.ndarray, texts: Sequence[bytes]) -> np.ndarray:
        """bool [n]: whether the strings of `labels` [n] are these texts."""
        places = zip(self.offsets[labels].tolist(), self.offsets[labels + 1].tolist(), texts, strict=True)
        return np.fromiter((self.bytes[start:end] == text for start, end, text in places), dtype=bool, count=len(texts))


def fold(text: str) -> str:
    """What upper and lower case, and letters composed or not, have in common (Unicode 3.13, D145), composed."""
    if text.isascii():
        return text.lower()
    return normalize("NFC", normalize("NFD", text).casefold())


def write_labels(folder: Path, labels: Iterable[tuple[str, str]]) -> int:
    """Writes (id, name) pairs in label order and returns their number; about 60 bytes of memory per label.

    BundleError when a string is not Unicode text (half a surrogate pair).
    """
    ends = {column: array("q", [0]) for column in _COLUMNS}
    hashes = array("Q")
    with ExitStack() as stack:
        files = {column: stack.enter_context((folder / f"{column}.bin").open("wb")) for column in _COLUMNS}
        for label, (text, name) in enumerate(labels):
            try:
                row = text.encode(), name.encode(), MARK + fold(name).encode()
            except UnicodeEncodeError as error:
                raise BundleError(f"label {label}: {error.object!r} is not Unicode text") from None
            for column, data in zip(_COLUMNS, row, strict=True):
                ends[column].append(ends[column][-1] + files[column].write(data))
            hashes.append(_hash(row[0]))
    for column in _COLUMNS:
        write_array(folder / f"{column}.offsets.npy", np.frombuffer(ends[column], dtype=np.int64))
    del ends
    count = len(hashes)
    shift = np.uint64(_label_bits(count))
    index = np.frombuffer(hashes, dtype=np.uint64) >> shift << shift | np.arange(count, dtype=np.uint64)
    index.sort()
    write_array(folder / INDEX, index)
    del index, hashes
    write_array(folder / ORDER, _sorted(Column(folder, "folded", count)))
    return count


def _hash(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def _label_bits(n_labels: int) -> int:
    """Of an index entry the low bits are the label, the others the high bits of its id's hash."""
    return max(1, (n_labels - 1).bit_length())


def _sorted(column: Column) -> np.ndarray:
    """int32 [L]: the labels by their strings' bytes, equal ones ascending. Only those still tied are compared further."""
    order = np.arange(len(column), dtype=np.int32)
    tied = np.arange(len(column))  # positions in `order`
    run = np.zeros(len(column), dtype=np.int64)  # which tie each of these is in, ascending
    depth = 0
    while tied.size:
        keys = _keys(column, order[tied], depth)
        by_key = np.lexsort((keys, run))
        order[tied], keys = order[tied][by_key], keys[by_key]
        again = (keys[1:] == keys[:-1]) & (run[1:] == run[:-1]) & (keys[1:] & np.uint64(0xFF) > _STEP)
        run = np.cumsum(np.concatenate([[False], ~again]))
        still = np.concatenate([again, [False]]) | np.concatenate([[False], again])
        tied, run = tied[still], run[still]
        depth += _STEP
    return order


def _keys(column: Column, labels: np.ndarray, depth: int) -> np.ndarray:
    """uint64 [n] in the order of the strings' bytes from `depth` on: _STEP bytes, then how many are left, up to _STEP + 1."""
    data = np.frombuffer(column.bytes, dtype=np.uint8)
    keys = np.empty(len(labels), dtype=np.uint64)
    for first in range(0, len(labels), _CHUNK):
        part = labels[first : first + _CHUNK]
        starts = column.offsets[part] + depth
        left = column.offsets[part + 1] - starts
        key = np.zeros(len(part), dtype=np.uint64)
        for i in range(_STEP):
            byte = np.where(left > i, data[np.minimum(starts + i, len(data) - 1)], 0)
            key = key << np.uint64(8) | byte.astype(np.uint64)
        keys[first : first + _CHUNK] = key << np.uint64(8) | np.clip(left, 0, _STEP + 1).astype(np.uint64)
    return keys


def _map(folder: Path, file: str, dtype: np.dtype, count: int) -> np.ndarray:
    found = np.asarray(open_memmap(folder / file, mode="r"))
    if found.dtype != dtype or found.shape != (count,):
        raise BundleError(f"labels/{file} is {found.dtype} {list(found.shape)}, expected {dtype} [{count}]")
    return found
