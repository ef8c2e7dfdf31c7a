"""Reads a data folder: labels.jsonl and the splits train, dev and test, each plain or gzipped.

Files are read line by line, so a split needs no memory of its own. Every fault is a DataError that names file and line.

A text without labels is allowed. In training it is a negative example of every label; metrics leave it out. A split in
which no text has a label is an error.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


class DataError(ValueError):
    """The data cannot be used; the message names file, line and reason."""


@dataclass(frozen=True)
class Labels:
    """Ids and names in label order; `position` maps an id to its line in labels.jsonl, counted from 0."""

    ids: list[str]
    names: list[str]
    position: dict[str, int]

    def __len__(self) -> int:
        return len(self.ids)


def find(folder: Path, split: str) -> Path | None:
    """The file of a split (or of "labels"), plain or gzipped; None when there is none, DataError when there are both."""
    plain, packed = folder / f"{split}.jsonl", folder / f"{split}.jsonl.gz"
    if plain.exists() and packed.exists():
        raise DataError(f"{folder} has both {plain.name} and {packed.name}; keep one")
    return plain if plain.exists() else packed if packed.exists() else None


def require(folder: Path, split: str) -> Path:
    """As `find`, but a missing file is a DataError."""
    path = find(folder, split)
    if path is None:
        raise DataError(f"{folder}: no {split}.jsonl or {split}.jsonl.gz")
    return path


def read_labels(path: Path) -> Labels:
    """Labels of a {"id", "name"} file; a label without a name is called by its id."""
    labels = Labels([], [], {})
    for line, row in _rows(path):
        label = row.get("id")
        if not isinstance(label, str) or not label:
            raise _error(path, line, 'needs an "id" that is a string')
        name = row.get("name", label)
        if not isinstance(name, str):
            raise _error(path, line, '"name" is not a string')
        _check_unicode(path, line, label + name)
        if label in labels.position:
            raise _error(path, line, f"label id {label!r} was on line {labels.position[label] + 1} already")
        labels.position[label] = len(labels.ids)
        labels.ids.append(label)
        labels.names.append(name)
    if not labels.ids:
        raise DataError(f"{path}: holds no label")
    return labels


def read_split(path: Path, labels: Labels) -> Iterator[tuple[str, np.ndarray]]:
    """Each text with its labels: (text, distinct label positions, int32 ascending)."""
    count = labelled = 0
    for line, row in _rows(path):
        text, ids = row.get("text"), row.get("labels")
        if not isinstance(text, str) or not text.strip():
            raise _error(path, line, 'no text: "text" must be a string that is not blank')
        if not isinstance(ids, list):
            raise _error(path, line, '"labels" must be a list of label ids')
        _check_unicode(path, line, text)
        positions = set()
        for label in ids:
            if not isinstance(label, str) or label not in labels.position:
                raise _error(path, line, f"unknown label {label!r}: not in the labels file")
            positions.add(labels.position[label])
        count += 1
        labelled += bool(positions)
        yield text, np.array(sorted(positions), dtype=np.int32)
    if not count:
        raise DataError(f"{path}: empty, holds no text")
    if not labelled:
        raise DataError(f"{path}: none of its {count} texts has a label")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of each line."""
    line = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for line, raw in enumerate(file, start=1):
                try:
                    row = json.loads(raw.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise _error(path, line, f"not UTF-8 at byte {error.start}") from None
                except json.JSONDecodeError as error:
                    raise _error(path, line, f"broken JSON: {error.msg} at column {error.colno}") from None
                except RecursionError:
                    raise _error(path, line, "broken JSON: nested too deeply") from None
                if not isinstance(row, dict):
                    raise _error(path, line, f"expected a JSON object, found {type(row).__name__}")
                yield line, row
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(f"{path}:{line + 1}: cannot be read: {error}") from None


def _check_unicode(path: Path, line: int, text: str) -> None:
    """JSON can escape half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _error(path, line, "holds half a surrogate pair, which is not Unicode text") from None


def _error(path: Path, line: int, reason: str) -> DataError:
    return DataError(f"{path}:{line}: {reason}")
