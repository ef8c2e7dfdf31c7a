"""Tables with the columns "text" and "labels", wherever they are stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from train.data.contract import DataError, Labels


class Tables(ABC):
    """Splits and labels as tables. Subclasses say where the files are and how to read one.

    The column "text" holds strings; "labels", or else "label", lists of label ids or single ones, where a number stands for a
    name of a ClassLabel. Rows are counted from 1 in each file.
    """

    files: dict[str, list[Path]]

    @abstractmethod
    def _batches(self, path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Rows of a file, some thousands at a time."""

    @abstractmethod
    def _columns(self, path: Path) -> list[str]: ...

    @abstractmethod
    def _features(self, path: Path) -> dict[str, Any]:
        """The columns of a file as `datasets` describes them; empty where it did not write the file."""

    def labels(self) -> Labels:
        """Those of the labels table; without one, the names of the ClassLabel, or else the label strings as they come."""
        labels = Labels()
        if "labels" in self.files:
            self._add_table(labels)
        elif names := self._class_names("train"):
            if len(set(names)) < len(names):
                raise DataError(f"{self.files['train'][0]}: two names of the ClassLabel are the same")
            for name in names:
                labels.add(name, name)
        else:
            for split in self.files:
                self._add_strings(labels, split)
        return labels

    def texts(self, split: str, labels: Labels) -> Iterator[tuple[str, set[int]]]:
        names = self._class_names(split)
        for where, text, found in self._rows(split):
            if not isinstance(text, str) or not text.strip():
                raise DataError(f'{where}: no text: "text" must be a string that is not blank')
            positions = set()
            for label in found:
                known = names[label] if isinstance(label, int) and 0 <= label < len(names) else label
                if not isinstance(known, str) or known not in labels.position:
                    raise DataError(f"{where}: unknown label {label!r}")
                positions.add(labels.position[known])
            yield text, positions

    def _class_names(self, split: str) -> list[str]:
        """Names of the ClassLabel that the labels of a split are, alone or in lists; empty when they are none."""
        path = self.files[split][0]
        feature = self._features(path).get(self._label_column(path))
        while isinstance(feature, dict) and "feature" in feature:  # Sequence and List
            feature = feature["feature"]
        if isinstance(feature, list):  # how older versions write a list
            feature = feature[0]
        return list(feature["names"]) if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else []

    def _add_table(self, labels: Labels) -> None:
        for path in self.files["labels"]:
            columns = ["id", "name"] if "name" in self._columns(path) else ["id"]
            for row, values in self._read(path, columns):
                label, name = values["id"], values.get("name")
                if not isinstance(label, str) or not label:
                    raise DataError(f'{path}: row {row}: needs an "id" that is a string')
                if name is not None and not isinstance(name, str):
                    raise DataError(f'{path}: row {row}: "name" is not a string')
                if label in labels.position:
                    raise DataError(f"{path}: row {row}: label id {label!r} is there already")
                labels.add(label, name or label)

    def _add_strings(self, labels: Labels, split: str) -> None:
        for where, _, found in self._rows(split):
            for label in found:
                if not isinstance(label, str) or not label:
                    raise DataError(f"{where}: label {label!r} is neither a string nor the number of a ClassLabel")
                if label not in labels.position:
                    labels.add(label, label)

    def _rows(self, split: str) -> Iterator[tuple[str, Any, list[Any]]]:
        """(file and row, text, labels) of each row; a single label is a list of one, none or −1 an empty list."""
        for path in self.files[split]:
            column = self._label_column(path)
            for row, values in self._read(path, ["text", column]):
                found = values[column]
                if not isinstance(found, list):
                    found = [] if found is None or found == -1 else [found]
                yield f"{path}: row {row}", values["text"], found

    def _label_column(self, path: Path) -> str:
        names = self._columns(path)
        return "label" if "label" in names and "labels" not in names else "labels"

    def _read(self, path: Path, columns: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """(row from 1, values) of each row of a file."""
        names = self._columns(path)
        for column in columns:
            if column not in names:
                raise DataError(f"{path}: no column {column!r}; there are {', '.join(map(repr, names))}")
        row = 0
        batches = self._batches(path, columns)
        while True:
            with readable(path, row + 1):
                batch = next(batches, None)
                if batch is None:
                    return
                batch.validate(full=True)  # a damaged file could end the process otherwise
                rows = batch.to_pylist()
            for values in rows:
                row += 1
                yield row, values


@contextmanager
def readable(path: Path, row: int | None = None) -> Iterator[None]:
    """What pyarrow and json raise about a damaged file becomes a DataError that names it and the row it was read from."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        where = path if row is None else f"{path}: row {row}"
        raise DataError(f"{where}: cannot be read: {error}") from None
