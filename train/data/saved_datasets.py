"""Folders that `save_to_disk` of Hugging Face `datasets` wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from train.data.contract import DataError
from train.data.tables import Tables, readable

_ROWS_AT_ONCE = 4096
_SPLITS = {"train": ("train",), "dev": ("dev", "validation"), "test": ("test",), "labels": ("labels",)}


class SavedDatasets(Tables):
    """A DatasetDict with the splits train and test or validation, and with the columns "text" and "labels" (or "label").

    Labels are ClassLabel numbers or strings. A split "labels" with "id" and "name" may name the strings.
    """

    title: ClassVar[str] = "saved datasets"
    signs: ClassVar[tuple[str, ...]] = ("dataset_dict.json", "state.json")

    def __init__(self, folder: Path) -> None:
        if not (folder / "dataset_dict.json").exists():
            raise DataError(f"{folder}: no dataset_dict.json: one split alone, but a DatasetDict with train and test is needed")
        saved = _json(folder / "dataset_dict.json", "splits", list)
        self.files = {}
        for split, names in _SPLITS.items():
            found = [name for name in names if name in saved]
            if len(found) > 1:
                raise DataError(f"{folder} has both {' and '.join(found)}; keep one")
            if found:
                self.files[split] = _data_files(folder / found[0])
        if "train" not in self.files or self.files.keys() <= {"train", "labels"}:
            raise DataError(f"{folder}: the splits are {', '.join(saved)}; needed are train and one of test, validation, dev")

    def _batches(self, path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
            for batch in reader:
                for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                    yield batch.slice(start, _ROWS_AT_ONCE).select(columns)

    def _columns(self, path: Path) -> list[str]:
        with readable(path), pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
            return list(reader.schema.names)

    def _features(self, path: Path) -> dict[str, Any]:
        return dict(_json(path.parent / "dataset_info.json", "features", dict))


def _data_files(folder: Path) -> list[Path]:
    state = folder / "state.json"
    entries = _json(state, "_data_files", list)
    names = [entry["filename"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("filename"), str)]
    if json.loads(state.read_text(encoding="utf-8")).get("_indices_data_files"):
        raise DataError(f"{state}: rows are picked by an index file; call flatten_indices() before save_to_disk()")
    for name in names:
        if not (folder / name).exists():
            raise DataError(f"{folder}: no {name}, which state.json names")
    if not names or len(names) < len(entries):
        raise DataError(f"{state}: names no data files, or not by their filename")
    return [folder / name for name in names]


def _json(path: Path, key: str, kind: type) -> Any:
    """The value of `key` in a JSON file of `datasets`."""
    with readable(path):
        value = json.loads(path.read_text(encoding="utf-8"))[key]
    if not isinstance(value, kind):
        raise DataError(f"{path}: {key!r} is not a {kind.__name__}")
    return value
