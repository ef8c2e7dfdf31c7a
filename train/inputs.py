"""What the head reads: a split's texts, turned into the head's inputs by the encoder or from cached embeddings."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.encoder import Encoder
from models.files import atomic_folder, reserve
from train.batches import batches_by_length
from train.tokens import Split

_TEXTS_AT_ONCE = 128
INTERMEDIATE = "intermediate."  # names of the intermediate layer's parameters in an Encoder begin so


class Inputs(Protocol):
    """A split the head can be trained or evaluated on. `lengths` int64 [n] says how texts are best put together."""

    split: Split
    lengths: np.ndarray

    def embed(self, rows: np.ndarray) -> Tensor:
        """The head's inputs fp32 [B, D] of texts `rows`, with gradient where the encoder is trained."""
        ...


class TextInputs:
    """Texts that pass through the whole encoder each time."""

    def __init__(self, encoder: Encoder, split: Split) -> None:
        self.split = split
        self.lengths = split.lengths
        self._encoder = encoder

    def embed(self, rows: np.ndarray) -> Tensor:
        return self._encoder(*_there(self._encoder, *self.split.padded(rows, self._encoder.pad_id)))


class PooledInputs:
    """Texts that a frozen encoder embedded once; only the intermediate layer is computed each time."""

    def __init__(self, encoder: Encoder, split: Split, cache: Path, name: str) -> None:
        """Pooled embeddings come from `cache` where they are there, else they are computed and put there."""
        self.split = split
        self.lengths = np.zeros(len(split), dtype=np.int64)  # embeddings are all as long
        self._encoder = encoder
        self._pooled = pooled_embeddings(encoder, split, cache, name)

    def embed(self, rows: np.ndarray) -> Tensor:
        return self._encoder.project(*_there(self._encoder, torch.tensor(self._pooled[rows])))


def pooled_embeddings(encoder: Encoder, split: Split, cache: Path, name: str) -> np.memmap:
    """The encoder's pooled embeddings of all texts, fp32 [n, H]: from `cache` if they are there, else made and put there."""
    folder = cache / f"pooled-{split.key}-{_fingerprint(encoder)}"
    shape = (len(split), encoder.embedding_width)
    if not folder.is_dir():
        with atomic_folder(folder) as temporary:
            file = temporary / "pooled.bin"
            reserve(file, 4 * shape[0] * shape[1])
            out = np.memmap(file, np.float32, "r+", shape=shape)
            embed_texts(encoder, split, out, name)
            out.flush()
    return np.memmap(folder / "pooled.bin", np.float32, "r", shape=shape)


def embed_texts(encoder: Encoder, split: Split, out: np.ndarray, name: str) -> None:
    """Fills `out` fp32 [n, H] with the pooled embeddings of all texts."""
    encoder.eval()
    with torch.inference_mode(), tqdm(total=len(split), desc=f"embedding {name}", unit=" texts", disable=None) as bar:
        for rows in batches_by_length(split.lengths, _TEXTS_AT_ONCE):
            out[rows] = encoder.pooled(*_there(encoder, *split.padded(rows, encoder.pad_id))).numpy(force=True)
            bar.update(len(rows))


def _there(encoder: Encoder, *tensors: Tensor) -> list[Tensor]:
    """The tensors where the encoder is. On the way to a GPU they pass through pinned memory, so that the host does not wait."""
    device = encoder.device
    return [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors] if device.type == "cuda" else [*tensors]


def _fingerprint(encoder: Encoder) -> str:
    """A hash of all that decides pooled embeddings: the weights before the intermediate layer, the pooling, the device."""
    digest = hashlib.sha256(encoder.config.pooling.encode())
    if encoder.device.type != "cpu":  # last bits differ
        digest.update(encoder.device.type.encode())
    for name, tensor in encoder.state_dict().items():
        if not name.startswith(INTERMEDIATE):
            digest.update(name.encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy(force=True))  # bytes: numpy has no bf16
    return digest.hexdigest()[:16]
