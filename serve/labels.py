"""Looking labels up by id or by part of their name, straight in the bundle's files: no index, no memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from export.labels import Column

_CHUNK = 1 << 16  # labels looked at together: a few milliseconds, after which other threads get their turn


def find(ids: Column, wanted: Iterable[str]) -> dict[str, int]:
    """The labels with the wanted ids; an id that no label has is left out."""
    found = {text: _find(ids, text.encode()) for text in wanted}
    return {text: label for text, label in found.items() if label is not None}


def search(names: Column, query: str, limit: int) -> list[int]:
    """Up to `limit` labels whose names contain the query, those that begin with it first, each kind in label order.

    ASCII letters match in either case.
    """
    text = query.encode().lower()  # of bytes, this changes ASCII letters only and keeps every position
    at_start: list[int] = []
    inside: list[int] = []
    for label, prefix in _matches(names, text):
        if prefix:
            at_start.append(label)
            if len(at_start) == limit:
                return at_start
        elif len(inside) < limit:
            inside.append(label)
    return (at_start + inside)[:limit]


def _matches(names: Column, text: bytes) -> Iterator[tuple[int, bool]]:
    """Labels whose names contain the text (lower case), in order, and whether they begin with it."""
    offsets = names.offsets
    for first in range(0, len(names), _CHUNK):
        starts = offsets[first : min(first + _CHUNK, len(names)) + 1]
        base = int(starts[0])
        chunk = names.bytes[base : int(starts[-1])].lower()
        at = chunk.find(text)
        while at >= 0:
            row = int(np.searchsorted(starts, base + at, side="right")) - 1
            start, end = int(starts[row]) - base, int(starts[row + 1]) - base
            if at + len(text) <= end:
                yield first + row, at == start
                at = chunk.find(text, end)  # one match per name
            else:
                at = chunk.find(text, at + 1)  # it ran over into the next name


def _find(ids: Column, wanted: bytes) -> int | None:
    data = np.frombuffer(ids.bytes, dtype=np.uint8)
    for first in range(0, len(ids), _CHUNK):
        starts = ids.offsets[first : min(first + _CHUNK, len(ids)) + 1]
        left = np.flatnonzero(np.diff(starts) == len(wanted))
        for i, byte in enumerate(wanted):
            left = left[data[starts[left] + i] == byte]
            if not left.size:
                break
        if left.size:
            return first + int(left[0])
    return None
