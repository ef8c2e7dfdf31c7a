"""A bundle on a GPU: encoder by ONNX Runtime or torch, head in Triton. Embeddings stay on the device.

Each stage has a stream of its own, the head's going first, and ends when its work is done; so one thread may encode a batch
while another finds the labels of the one before.

Dimensions: B batch, S sequence length, D embedding width, k labels per text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.bundle import Bundle
from models.device import cuda_device
from models.kernels import Subset
from serve.engine import EncoderRuntime, Engine
from serve.gpu.lanes import Lane
from serve.gpu.search import Search


class Embeddings:
    """Rows of a tensor fp32 [·, D] on a device. Sent to another process, it becomes an array."""

    def __init__(self, x: Tensor, rows: np.ndarray) -> None:
        self._x, self._rows = x, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, kept: Sequence[bool] | slice) -> Embeddings:
        """Those of the rows that are kept. Nothing is copied here, where nobody knows of the engine's streams."""
        return Embeddings(self._x, self._rows[kept])

    def tensor(self) -> Tensor:
        """[B, D], made on the current stream."""
        return self._x[torch.from_numpy(self._rows).to(self._x.device)]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[np.ndarray]]:
        return np.asarray, (self._x.numpy(force=True)[self._rows],)


def open_engine(bundle: Bundle, threads: int, device: str, encoder_runtime: EncoderRuntime) -> GpuEngine:
    """The engine on "cuda:0", …; DeviceError when that cannot be used, BundleError when the bundle cannot be served there."""
    return GpuEngine(bundle, threads, cuda_device(device), encoder_runtime)


class GpuEngine(Engine):
    """A bundle on one GPU."""

    overlaps = True

    def __init__(self, bundle: Bundle, threads: int, device: torch.device, encoder_runtime: EncoderRuntime) -> None:
        super().__init__(bundle, threads)
        self.device = str(device)
        self._place = device
        self._encoding, self._searching = Lane(device), Lane(device, priority=-1)
        if encoder_runtime == "onnx":
            from serve.gpu.onnx_encoder import OnnxEncoder

            self._encoder: Any = OnnxEncoder(bundle, self._encoding)
        else:
            from serve.gpu.torch_encoder import TorchEncoder

            self._encoder = TorchEncoder(bundle, self._encoding)
        self._search = Search(bundle.head, device)
        self._batches: list[int] = []  # sizes that are recorded, ascending
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # what was copied there was not copied in a lane

    def encode(self, sequences: Sequence[Sequence[int]]) -> Embeddings:
        with self._encoding():
            x = self._encoder(*self.padded_batch(sequences, self._rows(len(sequences))))[: len(sequences)].clone()
        self._encoding.wait()
        return Embeddings(x, np.arange(len(x)))

    def topk(
        self, x: Embeddings | np.ndarray, k: int, allowed: Sequence[Subset | None] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        L = self.bundle.manifest.labels
        with self._searching():
            there = x.tensor() if isinstance(x, Embeddings) else torch.from_numpy(x).to(self._place)
            rows = there.isfinite().all(dim=1)  # a GPU's maximum passes over NaN
            finite, scores, labels = (part.numpy(force=True) for part in (rows, *self._search(there, k, allowed)))
        wanted = [min(k, L if subset is None else subset.size(L)) for subset in allowed or [None] * len(x)]
        bad = ~finite | ((np.isfinite(scores) & (labels >= 0)).sum(axis=1) < wanted)
        if bad.any():
            raise OverflowError(f"x row {np.argmax(bad)}: it or its scores are not finite")
        return scores, labels

    def warm_up(self, max_inputs: int, max_tokens: int) -> float:
        """Compiles the kernels and records every shape of a batch that the limits allow."""
        self._batches = batch_sizes(max_inputs)
        for count in self._batches:
            with self._searching():
                self._search.record(count)
            self._searching.wait()
        for length in self.lengths:
            most = max(1, min(max_inputs, max_tokens // length))
            for count in (size for size in self._batches if size < 2 * most):
                input_ids = np.full((count, length), self._pad_id, dtype=np.int64)
                attention_mask = np.ones_like(input_ids)
                attention_mask[:, length // 2 + 1 :] = 0  # as most batches have: it decides which kernels attention takes
                with self._encoding():
                    self._encoder.record(input_ids, attention_mask)
                self._encoding.wait()
        started = time.perf_counter()
        self.topk(self.encode([[self._pad_id] * length] * most), 1)
        return time.perf_counter() - started

    def device_memory(self) -> dict[str, int]:
        free, total = torch.cuda.mem_get_info(self._place)
        return {
            "used": total - free,
            "total": total,
            "allocated": torch.cuda.memory_allocated(self._place),
            "reserved": torch.cuda.memory_reserved(self._place),
            "peak": torch.cuda.max_memory_allocated(self._place),
        }

    def _rows(self, count: int) -> int:
        """The recorded size of a batch that `count` texts are padded to; `count` if there is none."""
        return next((size for size in self._batches if size >= count), count)


def batch_sizes(most: int) -> list[int]:
    """Sizes that batches of up to `most` texts are padded to: powers of two, and `most`."""
    return [*(1 << i for i in range((most - 1).bit_length())), most]
