"""Raw text with labels in the Extreme Classification Repository's sparse index format."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import ClassVar

from train.data.contract import Labels
from train.data.files import fault, find_splits, lines, require, two_numbers

# As Renee and DEXML name them, and as NGAME and OAK do; in a folder of their own or beside the label files.
_TEXTS = {"train": ("trn_X.txt", "raw/trn_X.txt", "raw_data/train.raw.txt"),
          "test": ("tst_X.txt", "raw/tst_X.txt", "raw_data/test.raw.txt")}  # fmt: skip
_LABELS = ("Y.txt", "raw/Y.txt", "raw_data/label.raw.txt")
_MATRICES = {"train": "trn_X_Y.txt", "test": "tst_X_Y.txt"}


class IndexedText:
    """trn_X.txt and tst_X.txt, a text in each line; Y.txt, a label's text in each line; trn_X_Y.txt and tst_X_Y.txt.

    The last two begin with "texts labels", both counts; then each line has `label:value` for the labels of a text, labels
    counted from 0. A value of 0 means that the label does not apply. A label's id is its number.
    """

    title: ClassVar[str] = "raw text with label indices"
    signs: ClassVar[tuple[str, ...]] = (*_TEXTS["train"], *_TEXTS["test"], *_LABELS)

    def __init__(self, folder: Path) -> None:
        texts = find_splits(folder, _TEXTS)
        self.files = {split: [path, require(folder, _MATRICES[split])] for split, path in texts.items()}
        self.files["labels"] = [require(folder, *_LABELS)]

    def labels(self) -> Labels:
        (path,) = self.files["labels"]
        labels = Labels()
        for line, text in lines(path):
            labels.add(str(line - 1), text.strip())
        return labels

    def texts(self, split: str, labels: Labels) -> Iterator[tuple[str, set[int]]]:
        """A blank line is a text without words, as published files have a few."""
        texts, matrix = self.files[split]
        rows = lines(matrix)
        n_texts, n_labels = two_numbers(matrix, 1, next(rows, (1, ""))[1], "texts and labels")
        if n_labels != len(labels):
            raise fault(matrix, 1, f"{n_labels} labels, but {self.files['labels'][0].name} has {len(labels)}")
        count = 0
        for text, row in zip_longest(lines(texts), rows):
            if text is None:
                raise fault(matrix, row[0], f"labels of text {count}, but {texts.name} has {count} texts (counted from 0)")
            if row is None:
                raise fault(texts, text[0], f"a text more than {matrix.name} has rows")
            count += 1
            yield text[1], _positions(matrix, row[0], row[1], n_labels)
        if count != n_texts:
            raise fault(matrix, 1, f"{n_texts} texts, but the file has {count} rows")


def _positions(path: Path, number: int, line: str, n_labels: int) -> set[int]:
    positions = set()
    for pair in line.split():
        index, _, value = pair.partition(":")
        try:
            label, relevance = int(index), float(value)
            if not math.isfinite(relevance):
                raise ValueError
        except ValueError:
            raise fault(path, number, f"{pair!r} is not label:value") from None
        if not 0 <= label < n_labels:
            raise fault(path, number, f"label {label} is not one of 0 … {n_labels - 1}")
        if relevance > 0:
            positions.add(label)
    return positions
