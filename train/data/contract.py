"""What every format gives: labels, and texts with their labels."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol


class DataError(ValueError):
    """The data cannot be used; the message names file, line or row, and reason."""


@dataclass(frozen=True)
class Labels:
    """Ids and names in label order; `position` maps an id to its place in that order, counted from 0."""

    ids: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    position: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, label: str, name: str) -> None:
        """Appends a label; one with a blank name is called by its id. ValueError when the id is there already."""
        if label in self.position:
            raise ValueError(f"label id {label!r} was on line {self.position[label] + 1} already")
        self.position[label] = len(self.ids)
        self.ids.append(label)
        self.names.append(name if name.strip() else label)


class Format(Protocol):
    """A folder in one format. Making one finds the files, and raises DataError when some are missing or there twice."""

    title: ClassVar[str]  # as users know the format
    signs: ClassVar[tuple[str, ...]]  # any of these files, plain or .gz, means that a folder is of the format
    files: dict[str, list[Path]]  # what "labels", "train" and what there is of "dev" and "test" are read from

    def __init__(self, folder: Path) -> None: ...

    def labels(self) -> Labels:
        """All labels, in the order that `texts` numbers them."""
        ...

    def texts(self, split: str, labels: Labels) -> Iterator[tuple[str, Collection[int]]]:
        """Each text with the positions of its labels, distinct."""
        ...
