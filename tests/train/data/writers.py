"""Writes the same rows in every format that is read."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.train.tasks import write_jsonl
from train.data import Dataset

Row = tuple[str, list[int]]  # a text and the positions of its labels


@dataclass(frozen=True)
class Content:
    """Labels as (id, name), and rows by split."""

    labels: list[tuple[str, str]]
    splits: dict[str, list[Row]]


def content_of(folder: Path) -> Content:
    """What a folder of any format holds."""
    data = Dataset(folder)
    labels = data.labels()
    splits = {split: [(text, found.tolist()) for text, found in data.texts(split, labels)] for split in data.splits}
    return Content(list(zip(labels.ids, labels.names, strict=True)), splits)


def write_lines(path: Path, lines: Iterable[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def jsonl(folder: Path, content: Content) -> None:
    write_jsonl(folder / "labels.jsonl", [{"id": label, "name": name} for label, name in content.labels])
    for split, rows in content.splits.items():
        texts = [{"text": text, "labels": [content.labels[i][0] for i in found]} for text, found in rows]
        write_jsonl(folder / f"{split}.jsonl", texts)


def label_features(folder: Path, content: Content) -> None:
    write_jsonl(folder / "lbl.json.gz", [{"uid": label, "title": name} for label, name in content.labels])
    for split, name in (("train", "trn"), ("test", "tst")):
        rows = [
            {"uid": f"t{i}", "title": text, "content": "", "target_ind": found, "target_rel": [1.0] * len(found)}
            for i, (text, found) in enumerate(content.splits[split])
        ]
        write_jsonl(folder / f"{name}.json.gz", rows)


def indexed_text(folder: Path, content: Content, raw: str = "raw/") -> None:
    write_lines(folder / f"{raw}Y.txt", [name for _, name in content.labels])
    for split, name in (("train", "trn"), ("test", "tst")):
        rows = content.splits[split]
        write_lines(folder / f"{raw}{name}_X.txt", [text for text, _ in rows])
        matrix = [" ".join(f"{i}:{'1' if i % 2 else '1.00000'}" for i in found) for _, found in rows]
        write_lines(folder / f"{name}_X_Y.txt", [f"{len(rows)} {len(content.labels)}", *matrix])


def raw_text(folder: Path, content: Content) -> None:
    for split in ("train", "test"):
        rows = content.splits[split]
        write_lines(folder / f"{split}_raw_texts.txt", [text for text, _ in rows])
        write_lines(folder / f"{split}_labels.txt", [" ".join(content.labels[i][0] for i in found) for _, found in rows])


def parquet(folder: Path, content: Content) -> None:
    columns = {"id": [label for label, _ in content.labels], "name": [name for _, name in content.labels]}
    pq.write_table(pa.table(columns), folder / "labels.parquet")
    for split, rows in content.splits.items():
        found = pa.array([[content.labels[i][0] for i in found] for _, found in rows], pa.list_(pa.string()))
        table = pa.table({"text": pa.array([text for text, _ in rows], pa.string()), "labels": found})
        pq.write_table(table, folder / f"{split}.parquet", row_group_size=3)


def class_label_parquet(folder: Path, content: Content) -> None:
    """As `datasets.Dataset.to_parquet` writes a Sequence(ClassLabel): numbers, and names in the metadata."""
    names = [label for label, _ in content.labels]
    for split, rows in content.splits.items():
        described = json.dumps({"info": {"features": {"text": _TEXT, "labels": _list_of(names)}}})
        pq.write_table(_numbers(rows).replace_schema_metadata({"huggingface": described}), folder / f"{split}.parquet")


def saved_datasets(folder: Path, content: Content) -> None:
    """As `datasets.DatasetDict.save_to_disk` writes a Sequence(ClassLabel), with several files and several batches in each."""
    names = [label for label, _ in content.labels]
    for split, rows in content.splits.items():
        save_split(folder / split, _numbers(rows), {"text": _TEXT, "labels": _list_of(names)})
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(content.splits)}))


def saved_strings(folder: Path, content: Content) -> None:
    """As `saved_datasets`, with label strings and a split that names them."""
    for split, rows in content.splits.items():
        found = pa.array([[content.labels[i][0] for i in found] for _, found in rows], pa.list_(pa.string()))
        save_split(folder / split, pa.table({"text": pa.array([text for text, _ in rows], pa.string()), "labels": found}), {})
    columns = {"id": [label for label, _ in content.labels], "name": [name for _, name in content.labels]}
    save_split(folder / "labels", pa.table(columns), {})
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": [*content.splits, "labels"]}))


def save_split(folder: Path, table: pa.Table, features: dict[str, Any], shards: int = 2) -> None:
    folder.mkdir()
    size = -(-len(table) // shards)
    names = [f"data-{i:05}-of-{shards:05}.arrow" for i in range(shards)]
    for i, name in enumerate(names):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            for batch in table.slice(i * size, size).to_batches(max_chunksize=2):
                writer.write(batch)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_format_type": None, "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))


_TEXT = {"dtype": "string", "_type": "Value"}


def _list_of(names: list[str]) -> dict[str, Any]:
    return {"feature": {"names": names, "_type": "ClassLabel"}, "_type": "List"}


def _numbers(rows: list[Row]) -> pa.Table:
    found = pa.array([found for _, found in rows], pa.list_(pa.int64()))
    return pa.table({"text": pa.array([text for text, _ in rows], pa.string()), "labels": found})


WRITERS: dict[str, Callable[[Path, Content], None]] = {
    "JSON lines": jsonl,
    "label-feature JSON": label_features,
    "raw text with label indices": indexed_text,
    "raw text with label strings": raw_text,
    "Parquet": parquet,
    "saved datasets": saved_datasets,
}
