"""A split as numbers: tokens and labels of every text, made once and memory-mapped from then on."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from models.files import atomic_folder
from train.data import DataError, Dataset, Labels

_TEXTS_AT_ONCE = 4096
_LAYOUT = "filtered"  # part of the cache's key, to be changed with the files below
_DTYPES = {
    "tokens": np.int32, "token_starts": np.int64, "labels": np.int32, "label_starts": np.int64,
    "filtered": np.int32, "filtered_starts": np.int64,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Split:
    """Tokens and labels of n texts. Text i has tokens[token_starts[i] : token_starts[i + 1]], labels and filtered likewise.

    tokens int32, token_starts int64 [n + 1], labels int32 positions ascending within a text, label_starts int64 [n + 1].
    filtered int32 and filtered_starts int64 [n + 1] are the labels that count as neither right nor wrong, ascending.
    The last `names` of the texts are the names of all labels, if training is on names too, else it is 0.
    `key` names the contents: equal keys mean equal texts, labels and tokens.
    """

    key: str
    tokens: np.ndarray
    token_starts: np.ndarray
    labels: np.ndarray
    label_starts: np.ndarray
    filtered: np.ndarray
    filtered_starts: np.ndarray
    names: int = 0

    @classmethod
    def of_tokens(cls, texts: Sequence[Sequence[int]]) -> Split:
        """Texts of given tokens, without labels."""
        lengths = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        tokens = np.fromiter((token for text in texts for token in text), np.int32, count=lengths[-1])
        none, starts = np.empty(0, np.int32), np.zeros(len(texts) + 1, np.int64)
        return cls("", tokens, lengths, none, starts, none, starts)

    def __len__(self) -> int:
        return len(self.token_starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per text, int64 [n]."""
        return np.diff(self.token_starts)

    def labels_of(self, rows: np.ndarray) -> list[np.ndarray]:
        """Label positions of each of the texts `rows`."""
        return [self.labels[self.label_starts[row] : self.label_starts[row + 1]] for row in rows]

    def filtered_of(self, rows: np.ndarray) -> list[np.ndarray]:
        """Label positions that are no answer to each of the texts `rows`, right or wrong."""
        return [self.filtered[self.filtered_starts[row] : self.filtered_starts[row + 1]] for row in rows]

    def padded(self, rows: np.ndarray, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and attention_mask, int64 [B, S], of the texts `rows`, padded on the right to the longest of them."""
        starts, stops = self.token_starts[rows], self.token_starts[rows + 1]
        shape = (len(rows), int((stops - starts).max()))
        input_ids, mask = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.int64)
        for i, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            input_ids[i, : stop - start] = torch.from_numpy(self.tokens[start:stop].astype(np.int64))
            mask[i, : stop - start] = 1
        return input_ids, mask


def load_split(
    data: Dataset,
    name: str,
    labels: Labels,
    sources: list[str],
    tokenize: Callable[[Sequence[str]], list[list[int]]],
    cache: Path,
) -> Split:
    """The split `name` of `data`, from `cache` if it is there, else read, tokenized and put there. DataError as `data.texts`.

    `sources` are strings that must differ whenever the texts, the labels or the tokenizer do: the cache is keyed by them.
    """
    key = hashlib.sha256(json.dumps([_LAYOUT, *sources]).encode()).hexdigest()[:24]
    folder = cache / f"tokens-{key}"
    if not folder.is_dir():
        with atomic_folder(folder) as temporary:
            _write(temporary, data, name, labels, tokenize)
    try:
        names = len(labels) if data.train_on_names and name == "train" else 0
        arrays = {array: _map(folder / f"{array}.bin", dtype) for array, dtype in _DTYPES.items()}
        split = Split(key, names=names, **arrays)
        ends = (split.token_starts[-1], split.label_starts[-1], split.filtered_starts[-1])
        whole = ends == (len(split.tokens), len(split.labels), len(split.filtered))
    except (OSError, ValueError, IndexError):
        whole = False
    if not whole:
        raise DataError(f"{folder}: damaged; delete this folder, and the next run makes it again")
    return split


def label_counts(split: Split, labels: Labels) -> np.ndarray:
    """Texts per label, int64 [L]; its name is one, if training is on names too."""
    return np.bincount(split.labels, minlength=len(labels))


def _map(path: Path, dtype: type) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)


def _write(
    folder: Path, data: Dataset, name: str, labels: Labels, tokenize: Callable[[Sequence[str]], list[list[int]]]
) -> None:
    token_lengths, label_lengths = array("q", [0]), array("q", [0])
    with (
        (folder / "tokens.bin").open("wb") as tokens_file,
        (folder / "labels.bin").open("wb") as labels_file,
        tqdm(desc=f"tokenizing {name}", unit=" texts", disable=None) as bar,
    ):
        texts = data.texts(name, labels)
        while rows := list(islice(texts, _TEXTS_AT_ONCE)):
            for tokens in tokenize([text for text, _ in rows]):
                tokens_file.write(np.array(tokens, dtype=np.int32).data)
                token_lengths.append(len(tokens))
            for _, positions in rows:
                labels_file.write(positions.data)
                label_lengths.append(len(positions))
            bar.update(len(rows))
    (folder / "token_starts.bin").write_bytes(np.cumsum(token_lengths, dtype=np.int64).data)
    (folder / "label_starts.bin").write_bytes(np.cumsum(label_lengths, dtype=np.int64).data)
    pairs = data.filtered(name, labels)
    (folder / "filtered.bin").write_bytes(pairs.labels.data)
    (folder / "filtered_starts.bin").write_bytes(pairs.starts(len(label_lengths) - 1).data)
