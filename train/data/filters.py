"""Pairs of text and label that are neither right nor wrong.

Where texts and labels are of one kind, say products, a text's own label is trivially its best answer. The data sets with
label features name such pairs, and for test also those whose reverse is in train, in files that evaluation must obey
(Extreme Classification Repository, "reciprocal pairs"). Published code drops them from the truth and from the predictions.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.data.files import fault, find, lines, two_numbers

_NAMES = {
    "train": ("filter_labels_train.txt", "trn_filter_labels.txt"),
    "dev": ("filter_labels_dev.txt",),
    "test": ("filter_labels_test.txt", "tst_filter_labels.txt"),
}

_MOST_TEXTS = 2**31  # keeps text × labels + label within int64


def find_filter(folder: Path, split: str) -> Path | None:
    """The filter file of a split, if there is one."""
    return find(folder, *_NAMES[split])


@dataclass(frozen=True, eq=False)
class Filter:
    """Distinct pairs in order of text, then label: texts int64 [P], labels int32 [P], both counted from 0."""

    texts: np.ndarray
    labels: np.ndarray

    def labels_of(self, text: int) -> np.ndarray:
        """Labels that do not count for a text, int32 ascending."""
        start, stop = np.searchsorted(self.texts, [text, text + 1])
        return self.labels[start:stop]

    def starts(self, n_texts: int) -> np.ndarray:
        """Where the labels of each of `n_texts` texts start, int64 [n_texts + 1]."""
        return np.searchsorted(self.texts, np.arange(n_texts + 1)).astype(np.int64)


def no_filter() -> Filter:
    return Filter(np.empty(0, np.int64), np.empty(0, np.int32))


def read_filter(path: Path, n_labels: int) -> Filter:
    """Lines of "text label", both counted from 0. An empty file is an empty filter."""
    pairs = array("q")
    for number, line in lines(path):
        text, label = two_numbers(path, number, line, "a text and a label")
        if label >= n_labels:
            raise fault(path, number, f"label {label} is not one of 0 … {n_labels - 1}")
        if text >= _MOST_TEXTS:
            raise fault(path, number, f"text {text} is not one of 0 … {_MOST_TEXTS - 1}")
        pairs.append(text * n_labels + label)
    texts, labels = np.divmod(np.unique(np.array(pairs, dtype=np.int64)), n_labels)
    return Filter(texts, labels.astype(np.int32))


def check_texts(path: Path, pairs: Filter, n_texts: int) -> None:
    """DataError when a pair names a text that is not there."""
    if len(pairs.texts) and pairs.texts[-1] >= n_texts:
        largest = int(pairs.texts[-1])
        number = next(number for number, line in lines(path) if int(line.split()[0]) == largest)
        raise fault(path, number, f"text {largest} is not one of 0 … {n_texts - 1}")
