"""Labels by id or by part of their name, straight in the bundle's files: no start-up, no memory but the pages that are read."""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import stringzilla

from export.bundle import Bundle
from export.labels import MARK, LabelTable, fold
from models.kernels import Subset

_CHUNK = 1 << 22  # bytes looked through at once, with the GIL held: below a millisecond
_REST_S = 10e-6  # after which whoever waits for the GIL has got it
_MATCHES = 10_000  # places of a query that are looked at
_BETWEEN_WORDS = np.array([chr(byte).isascii() and not chr(byte).isalnum() for byte in range(256)])


class UnknownLabels(ValueError):
    """No label has some ids of a filter; `unknown` has (list, position in it, id) of each: ("allow", 3, "id")."""

    def __init__(self, unknown: list[tuple[str, int, str]]) -> None:
        super().__init__(f"no label has id {', '.join(repr(text) for _, _, text in unknown)}")
        self.unknown = unknown


class NoLabelLeft(ValueError):
    """A filter leaves no label to give."""


@dataclass(frozen=True, slots=True)
class LabelFilter:
    """The labels that an answer may give, by id: those in `allow`, all if that is None, without those in `deny`."""

    allow: Sequence[str] | None
    deny: Sequence[str]

    def __len__(self) -> int:
        return len(self.allow or ()) + len(self.deny)

    def subset(self, bundle: Bundle) -> Subset:
        """These labels of `bundle`. UnknownLabels, NoLabelLeft."""
        allow, deny = bundle.labels.find(self.allow or ()), bundle.labels.find(self.deny)
        lists = ("allow", self.allow or (), allow), ("deny", self.deny, deny)
        if unknown := [(name, i, ids[i]) for name, ids, labels in lists for i in np.flatnonzero(labels < 0).tolist()]:
            raise UnknownLabels(unknown)
        subset = Subset.of(bundle.places, None if self.allow is None else allow, deny)
        if not subset.size(len(bundle.labels)):
            raise NoLabelLeft("allow and deny leave no label")
        return subset


def search(table: LabelTable, query: str, limit: int) -> list[int]:
    """Up to `limit` labels whose names contain the query, whatever the case of letters.

    First come names that begin with it, in their order, so that the very name is before all; then those where a word begins
    with it, then the others, each in label order. Only the first 10,000 places where it occurs are told apart like that.
    """
    text = fold(query).encode()
    found = _beginning_with(table, text, limit)
    return found + _containing(table, text, limit - len(found), besides=found) if len(found) < limit else found


def _beginning_with(table: LabelTable, text: bytes, limit: int) -> list[int]:
    offsets, text = table.folded.offsets, MARK + text

    def start(label: int) -> bytes:
        return table.folded.bytes[offsets[label] : min(offsets[label] + len(text), offsets[label + 1])]

    first = bisect_left(table.order, text, key=start)
    last = bisect_right(table.order, text, lo=first, hi=min(first + limit, len(table)), key=start)
    return table.order[first:last].tolist()


def _containing(table: LabelTable, text: bytes, limit: int, besides: list[int]) -> list[int]:
    words: list[int] = []
    others: list[int] = []
    with memoryview(table.folded.bytes) as data:
        for places in _occurrences(data, text):
            labels = np.searchsorted(table.folded.offsets, places, side="right") - 1
            starts_word = _BETWEEN_WORDS[np.frombuffer(data, dtype=np.uint8)[places - 1]]
            new = ~np.isin(labels, besides)
            words += labels[new & starts_word].tolist()
            others += labels[new].tolist()
            if len(words) >= limit and len(set(words)) >= limit:
                break
    return list(dict.fromkeys(words + others))[:limit]


def _occurrences(data: memoryview, text: bytes) -> Iterator[np.ndarray]:
    """Positions of the text, ascending, a part of the data at a time, up to _MATCHES."""
    left = _MATCHES
    for begin in range(0, len(data), _CHUNK):
        end = min(begin + _CHUNK + len(text) - 1, len(data))
        found: list[int] = []
        at = stringzilla.find(data, text, begin, end)
        while at >= 0 and left:
            found.append(at)
            left -= 1
            at = stringzilla.find(data, text, at + 1, end)
        if found:
            yield np.array(found)
        if not left:
            return
        time.sleep(_REST_S)
