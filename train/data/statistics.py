"""Figures about a data set, from one pass over each split. Memory: some bytes for each text and label, none for words."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from train.data.contract import Labels
from train.data.dataset import Dataset

RARE = ((0, 0), (1, 1), (2, 5), (6, 10), (11, 100), (101, 1000), (1001, None))  # classes of labels by texts, both ends included
HEADS = (0.001, 0.01, 0.1, 0.5)  # shares of the labels, the most frequent ones


@dataclass
class SplitFacts:
    """What one pass over n texts finds. Sequences have an entry for each text, `counts` int64 [L] texts for each label."""

    counts: np.ndarray
    empty: int = 0
    filtered: int = 0
    labels: array[int] = field(default_factory=lambda: array("I"))
    words: array[int] = field(default_factory=lambda: array("I"))
    characters: array[int] = field(default_factory=lambda: array("I"))
    hashes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))  # of the texts, 64 bits, ascending

    @property
    def texts(self) -> int:
        return len(self.labels)

    @property
    def unlabelled(self) -> int:
        return self.labels.count(0)

    @property
    def repeated(self) -> int:
        """Texts that came before in the split."""
        return int((self.hashes[1:] == self.hashes[:-1]).sum())


def split_facts(data: Dataset, split: str, labels: Labels) -> SplitFacts:
    """Reads a split; DataError as `data.texts`."""
    facts = SplitFacts(np.zeros(len(labels), dtype=np.int64), filtered=len(data.filtered(split, labels).labels))
    hashes = array("Q")
    for text, positions in data.texts(split, labels):
        facts.counts[positions] += 1
        facts.empty += not text.strip()
        facts.labels.append(len(positions))
        facts.words.append(len(text.split()))
        facts.characters.append(len(text))
        hashes.append(int.from_bytes(blake2b(text.encode(), digest_size=8).digest()))
    facts.hashes = np.sort(np.frombuffer(hashes, dtype=np.uint64))
    return facts


def also_in(train: SplitFacts, split: SplitFacts) -> int:
    """Texts of a split that train has, too."""
    return int(np.isin(split.hashes, train.hashes).sum())


def rare_labels(counts: np.ndarray) -> list[tuple[str, int, int]]:
    """For each class of RARE: its name, how many labels have so many texts, and how many positives they have together."""
    rows = []
    for least, most in RARE:
        within = (counts >= least) & (counts <= most) if most is not None else counts >= least
        name = f"more than {least - 1:,}" if most is None else f"{least:,}" if least == most else f"{least:,}–{most:,}"
        rows.append((name, int(within.sum()), int(counts[within].sum())))
    return rows


def head_shares(counts: np.ndarray) -> list[tuple[float, int, float]]:
    """For each of HEADS: the share of the labels, how many that is (at least 1), and their share of the positives."""
    held = np.cumsum(np.sort(counts)[::-1]) / counts.sum()
    numbers = [max(1, round(share * len(counts))) for share in HEADS]
    return [(share, number, float(held[number - 1])) for share, number in zip(HEADS, numbers, strict=True)]


def gini(counts: np.ndarray) -> float:
    """Gini coefficient of the positives over the labels: 0 when all are as frequent, near 1 when a few have almost all."""
    n = len(counts)
    return float(2 * (np.arange(1, n + 1) @ np.sort(counts)) / (n * counts.sum()) - (n + 1) / n)


def unseen(counts: np.ndarray, train_counts: np.ndarray) -> tuple[int, int]:
    """Labels of a split that no training text has, and how many of the split's positives are theirs."""
    new = (train_counts == 0) & (counts > 0)
    return int(new.sum()), int(counts[new].sum())


def spread(lengths: array[int]) -> tuple[float, int, int, int, int]:
    """Mean, median, 90 and 99 % quantile and largest of some numbers; quantiles are numbers that occur."""
    values = np.frombuffer(lengths, dtype=np.uint32)
    middle, high, higher = np.quantile(values, [0.5, 0.9, 0.99], method="inverted_cdf")
    return float(values.mean()), int(middle), int(high), int(higher), int(values.max())
