"""A data folder of any format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from train.data.contract import DataError, Format, Labels
from train.data.files import files_hash
from train.data.filters import Filter, check_texts, find_filter, no_filter, read_filter
from train.data.indexed_text import IndexedText
from train.data.jsonl import JsonLines
from train.data.label_features import LabelFeatures
from train.data.parquet import Parquet
from train.data.raw_text import RawText
from train.data.saved_datasets import SavedDatasets

_FORMATS: tuple[type[Format], ...] = (JsonLines, Parquet, SavedDatasets, LabelFeatures, IndexedText, RawText)


class Dataset:
    """Labels and splits of a folder, in the format that its files show.

    A text without labels is allowed. In training it is a negative example of every label; metrics leave it out. A split in
    which no text has a label is an error.
    """

    def __init__(self, folder: Path, *, titles_only: bool = False, train_on_names: bool = False) -> None:
        """DataError when the format is not clear, or files are missing. `titles_only`: see LabelFeatures.

        With `train_on_names`, the texts to train on are followed by each label's name as a text of that label.
        """
        self.folder = folder
        self.train_on_names = train_on_names
        self._format = _recognise(folder, titles_only)
        self.format = self._format.title
        self.splits: list[str] = [split for split in ("train", "dev", "test") if split in self._format.files]
        self._filters = {split: path for split in self.splits if (path := find_filter(folder, split))}

    def files(self, part: str) -> list[Path]:
        """What "labels" or a split is read from, its filter file included."""
        paths = self._format.files.get(part) or [path for split in self.splits for path in self._format.files[split]]
        return [*paths, self._filters[part]] if part in self._filters else paths

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the files of "labels" and of each split: equal ones mean equal data."""
        return {part: files_hash(self.files(part)) for part in ("labels", *self.splits)}

    def labels(self) -> Labels:
        """All labels; DataError when there is none."""
        labels = self._format.labels()
        if not len(labels):
            raise DataError(f"{self.files('labels')[0]}: holds no label")
        return labels

    def filtered(self, split: str, labels: Labels) -> Filter:
        """Pairs of text and label that are neither right nor wrong."""
        path = self._filters.get(split)
        return read_filter(path, len(labels)) if path else no_filter()

    def texts(self, split: str, labels: Labels) -> Iterator[tuple[str, np.ndarray]]:
        """Each text with its labels: (text, distinct label positions, int32 ascending). Filtered pairs are left out.

        With `train_on_names`, "train" goes on with the labels' names, in label order.
        """
        pairs = self.filtered(split, labels)
        count = labelled = 0
        for text, found in self._format.texts(split, labels):
            positions = np.array(sorted(found), dtype=np.int32)
            if len(pairs.texts):
                positions = np.setdiff1d(positions, pairs.labels_of(count), assume_unique=True)
            count += 1
            labelled += len(positions) > 0
            yield text, positions
        first = self._format.files[split][0]
        if not count:
            raise DataError(f"{first}: empty, holds no text")
        if split in self._filters:
            check_texts(self._filters[split], pairs, count)
        if not labelled:
            raise DataError(f"{first}: none of its {count} texts has a label")
        if self.train_on_names and split == "train":
            for position, name in enumerate(labels.names):
                yield name, np.array([position], dtype=np.int32)


def _recognise(folder: Path, titles_only: bool) -> Format:
    found = {
        kind: next((name for name in kind.signs if (folder / name).exists() or (folder / f"{name}.gz").exists()), None)
        for kind in _FORMATS
    }
    kinds = [kind for kind in _FORMATS if found[kind]]
    if not kinds:
        listed = "; ".join(f"{kind.title}: {', '.join(kind.signs)}" for kind in _FORMATS)
        raise DataError(f"{folder}: no data found. Expected files are, by format: {listed}")
    if len(kinds) > 1:
        listed = " and ".join(f"{kind.title} ({found[kind]})" for kind in kinds)
        raise DataError(f"{folder} holds several data sets: {listed}; keep one")
    if not titles_only:
        return kinds[0](folder)
    if kinds[0] is not LabelFeatures:
        raise DataError(f"{folder}: titles only is for label-feature JSON, but this is {kinds[0].title}")
    return LabelFeatures(folder, titles_only)
