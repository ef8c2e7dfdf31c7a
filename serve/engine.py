"""A loaded bundle that predicts: ONNX Runtime encoder, C++ head. Needs no torch.

Dimensions: B batch, S sequence length, D embedding width, k labels per text.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from export.bundle import Bundle, BundleError, open_bundle
from export.onnx_runtime import onnxruntime as ort
from models import kernels
from serve.tokens import TextTokenizer

_PROVIDER = "CPUExecutionProvider"
# Sequences are padded to one of these lengths: with few shapes ONNX Runtime's arena stays small.
_LENGTHS = (*range(8, 65, 8), *range(80, 129, 16), *range(160, 257, 32), *range(320, 513, 64), *range(640, 1025, 128))


class Engine:
    """One bundle, ready to predict, on `threads` threads. `encode` and `topk` are for one thread at a time.

    version   SHA-256 of the bundle
    """

    def __init__(self, bundle: Bundle, threads: int) -> None:
        """Loads the encoder; BundleError when it does not fit the bundle."""
        kernels.cpu.set_threads(threads)
        self.bundle = bundle
        self.version = bundle.hash
        self.threads = threads
        self.max_length = bundle.manifest.max_length
        self._lengths = [*(length for length in _LENGTHS if length < self.max_length), self.max_length]
        self._pad_id = self.new_tokenizer().pad_id
        self._session = _open_encoder(bundle, threads)

    @classmethod
    def open(cls, path: Path, threads: int | None = None) -> Engine:
        """Opens, verifies and loads the bundle in `path` (BundleError); uses all cores it may unless `threads` says less."""
        return cls(open_bundle(path), threads or kernels.cpu.default_threads())

    def new_tokenizer(self) -> TextTokenizer:
        """Each thread that tokenizes needs one of its own."""
        return TextTokenizer(self.bundle.tokenizer_file, self.max_length)

    def padded(self, length: int) -> int:
        """The length that sequences of `length` tokens are padded to."""
        return self._lengths[bisect_left(self._lengths, length)]

    def encode(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """Embeddings fp32 [B, D] of B sequences of token ids, each at most `max_length` long."""
        shape = len(sequences), self.padded(max(map(len, sequences)))
        input_ids = np.full(shape, self._pad_id, dtype=np.int64)
        attention_mask = np.zeros(shape, dtype=np.int64)
        for row, ids in enumerate(sequences):
            input_ids[row, : len(ids)] = ids
            attention_mask[row, : len(ids)] = 1
        (embedding,) = self._session.run(None, {"input_ids": input_ids, "attention_mask": attention_mask})
        return embedding

    def topk(self, x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best labels for embeddings fp32 [B, D]: scores fp32 [B, k] descending, labels int32 [B, k]."""
        return kernels.topk(x, self.bundle.head, k)

    def warm_up(self, max_inputs: int, max_tokens: int) -> float:
        """Runs small and large batches, so that the first request finds memory and pages ready; returns seconds taken."""
        started = time.perf_counter()
        for length in sorted({self.padded(min(length, self.max_length)) for length in (16, 64, self.max_length)}):
            for count in sorted({1, max(1, min(max_inputs, max_tokens // length))}):
                self.topk(self.encode([[self._pad_id] * length] * count), 1)
        return time.perf_counter() - started


def _open_encoder(bundle: Bundle, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads  # left alone, it counts the host's cores and not the cgroup's quota
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # it plans memory per shape and keeps each plan
    options.log_severity_level = 3
    # Its pool may spin between a run's operators (a quarter faster for one text) but not after it: the head needs the cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = ort.InferenceSession(bundle.encoder_file, options, providers=[_PROVIDER])
    except Exception as error:  # ONNX Runtime's exceptions have no common base but this
        raise BundleError(f"{bundle.encoder_file}: ONNX Runtime cannot load it: {error}") from error
    if session.get_providers() != [_PROVIDER]:
        raise BundleError(f"{bundle.encoder_file}: runs on {session.get_providers()}, expected {_PROVIDER}")
    inputs = sorted(node.name for node in session.get_inputs())
    outputs = session.get_outputs()
    if inputs != ["attention_mask", "input_ids"] or len(outputs) != 1:
        raise BundleError(f"{bundle.encoder_file}: takes {inputs} and gives {len(outputs)} tensors")
    if outputs[0].shape[-1] != bundle.manifest.width:
        raise BundleError(f"{bundle.encoder_file}: gives {outputs[0].shape}, the head reads {bundle.manifest.width} values")
    return session
