"""Fanin's own format: JSON lines for the labels and for the splits train, dev and test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from train.data.contract import Labels
from train.data.files import check_unicode, fault, find_splits, json_rows, require


class JsonLines:
    """labels.jsonl with {"id", "name"}; train.jsonl, dev.jsonl, test.jsonl with {"text", "labels": [id, …]}."""

    title: ClassVar[str] = "JSON lines"
    signs: ClassVar[tuple[str, ...]] = ("train.jsonl", "dev.jsonl", "test.jsonl", "labels.jsonl")

    def __init__(self, folder: Path) -> None:
        self.files = {"labels": [require(folder, "labels.jsonl")]}
        splits = find_splits(folder, {split: [f"{split}.jsonl"] for split in ("train", "dev", "test")})
        self.files |= {split: [path] for split, path in splits.items()}

    def labels(self) -> Labels:
        """A label without a name is called by its id."""
        (path,) = self.files["labels"]
        labels = Labels()
        for line, row in json_rows(path):
            label = row.get("id")
            if not isinstance(label, str) or not label:
                raise fault(path, line, 'needs an "id" that is a string')
            name = row.get("name", label)
            if not isinstance(name, str):
                raise fault(path, line, '"name" is not a string')
            check_unicode(path, line, label + name)
            try:
                labels.add(label, name)
            except ValueError as error:
                raise fault(path, line, str(error)) from None
        return labels

    def texts(self, split: str, labels: Labels) -> Iterator[tuple[str, set[int]]]:
        (path,) = self.files[split]
        for line, row in json_rows(path):
            text, ids = row.get("text"), row.get("labels")
            if not isinstance(text, str) or not text.strip():
                raise fault(path, line, 'no text: "text" must be a string that is not blank')
            if not isinstance(ids, list):
                raise fault(path, line, '"labels" must be a list of label ids')
            check_unicode(path, line, text)
            positions = set()
            for label in ids:
                if not isinstance(label, str) or label not in labels.position:
                    raise fault(path, line, f"unknown label {label!r}: not in the labels file")
                positions.add(labels.position[label])
            yield text, positions
