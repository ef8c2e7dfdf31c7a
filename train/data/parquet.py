"""Parquet files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from train.data.contract import DataError
from train.data.files import find_splits
from train.data.tables import Tables, readable

_ROWS_AT_ONCE = 4096


class Parquet(Tables):
    """train.parquet, dev.parquet, test.parquet with "text" and "labels", label ids; labels.parquet with "id" and "name".

    Without labels.parquet, the labels must be ClassLabel numbers as `datasets` writes them, which tell their names.
    """

    title: ClassVar[str] = "Parquet"
    signs: ClassVar[tuple[str, ...]] = ("train.parquet", "dev.parquet", "test.parquet", "labels.parquet")

    def __init__(self, folder: Path) -> None:
        splits = find_splits(folder, {split: [f"{split}.parquet"] for split in ("train", "dev", "test")})
        self.files = {split: [path] for split, path in splits.items()}
        labels = folder / "labels.parquet"
        if labels.exists():
            self.files["labels"] = [labels]
        elif not self._class_names("train"):
            raise DataError(f"{folder}: no labels.parquet, and the labels of train.parquet are not ClassLabel numbers")

    def _batches(self, path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns)

    def _columns(self, path: Path) -> list[str]:
        with readable(path):
            return list(pq.read_schema(path).names)

    def _features(self, path: Path) -> dict[str, Any]:
        with readable(path):
            described = (pq.read_schema(path).metadata or {}).get(b"huggingface")
            return dict(json.loads(described)["info"]["features"]) if described else {}
