"""A loaded bundle that predicts. On a CPU: ONNX Runtime encoder, C++ head, no torch. On a GPU: serve.gpu.

Dimensions: B batch, S sequence length, D embedding width, k labels per text.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from export.bundle import Bundle, BundleError, open_bundle
from export.onnx_runtime import onnxruntime as ort
from models import kernels
from models.device import DeviceError
from models.extras import missing
from models.kernels import Subset, cpu
from serve.tokens import TextTokenizer

EncoderRuntime = Literal["onnx", "torch"]
_PROVIDER = "CPUExecutionProvider"
# On the CPU the fused Add + LayerNormalization takes four times as long as the two: a tenth of MiniLM.
_SLOW_FUSIONS = ["SkipLayerNormFusion"]
# Sequences are padded to one of these lengths: with few shapes ONNX Runtime's arena stays small.
_LENGTHS = (*range(8, 65, 8), *range(80, 129, 16), *range(160, 257, 32), *range(320, 513, 64), *range(640, 1025, 128))


class DeviceLost(BaseException):
    """A device has failed, and so will all that this process asks of it: only a new process can go on.

    Not an Exception, which would be taken for the fault of a text, or of a batch that was too large.
    """


class Engine(ABC):
    """One bundle on one device, ready to predict. `encode` and `topk` are for one thread at a time, and may raise DeviceLost.

    version   SHA-256 of the bundle
    threads   of the CPU that it uses
    device    "cpu" or "cuda:0", …
    overlaps  whether one thread in `encode` and another in `topk` get more done than one after the other
    hang_timeout_s   of each call to an engine in a process of its own, which is replaced then
    """

    device = "cpu"
    overlaps = False
    hang_timeout_s = float("inf")

    def __init__(self, bundle: Bundle, threads: int) -> None:
        cpu.set_threads(threads)
        self.bundle = bundle
        self.version = bundle.hash
        self.threads = threads
        self.max_length = bundle.manifest.max_length
        self.lengths = [*(length for length in _LENGTHS if length < self.max_length), self.max_length]
        self._pad_id = self.new_tokenizer().pad_id

    @staticmethod
    def open(path: Path, threads: int | None = None, device: str = "cpu", encoder_runtime: EncoderRuntime = "onnx") -> Engine:
        """Opens, verifies and loads the bundle in `path` for "cpu" or "cuda:0", …; BundleError, and DeviceError for a GPU.

        threads          of the CPU, all cores it may use if None
        encoder_runtime  what runs the encoder on a GPU
        """
        return Engine.load(open_bundle(path), threads or cpu.default_threads(), device, encoder_runtime)

    @staticmethod
    def load(bundle: Bundle, threads: int, device: str = "cpu", encoder_runtime: EncoderRuntime = "onnx") -> Engine:
        """As `open`, for a bundle that is open."""
        if device == "cpu":
            return CpuEngine(bundle, threads)
        try:
            from serve.gpu.engine import open_engine  # torch and Triton are imported when a GPU is asked for, not before
        except ModuleNotFoundError as error:
            raise DeviceError(f"{device}: {missing(error, 'gpu')}") from None
        return open_engine(bundle, threads, device, encoder_runtime)

    def new_tokenizer(self) -> TextTokenizer:
        """Each thread that tokenizes needs one of its own."""
        return TextTokenizer(self.bundle.tokenizer_file, self.max_length)

    def padded(self, length: int) -> int:
        """The length that sequences of `length` tokens are padded to."""
        return self.lengths[bisect_left(self.lengths, length)]

    def padded_batch(self, sequences: Sequence[Sequence[int]], count: int) -> tuple[np.ndarray, np.ndarray]:
        """input_ids and attention_mask, int64 [count, S], of at most `count` sequences; rows beyond them hold one token."""
        shape = count, self.padded(max(map(len, sequences)))
        input_ids = np.full(shape, self._pad_id, dtype=np.int64)
        attention_mask = np.zeros(shape, dtype=np.int64)
        attention_mask[len(sequences) :, 0] = 1
        for row, ids in enumerate(sequences):
            input_ids[row, : len(ids)] = ids
            attention_mask[row, : len(ids)] = 1
        return input_ids, attention_mask

    @abstractmethod
    def encode(self, sequences: Sequence[Sequence[int]]) -> Any:
        """Embeddings fp32 [B, D], on the engine's device, of B sequences of token ids, each at most `max_length` long."""

    @abstractmethod
    def topk(self, x: Any, k: int, allowed: Sequence[Subset | None] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k best labels for embeddings of `encode`: scores fp32 [B, k] descending, labels int32 [B, k].

        `allowed` says of each row which labels it may give; where these are fewer than k, it ends in score −inf, label −1.
        """

    @abstractmethod
    def warm_up(self, max_inputs: int, max_tokens: int) -> float:
        """Runs batches of up to `max_inputs` texts and `max_tokens` tokens, so that the first request finds memory, pages and
        kernels ready. The last one is the largest; returns the seconds that it took."""

    def wait_until_up(self) -> bool:
        """Returns True once batches can be run, False if never again."""
        return True

    @property
    def down_s(self) -> float:
        """For how long no batches could be run."""
        return 0.0

    def close(self) -> None:  # noqa: B027
        """Ends what the engine runs in, if that is its own, and frees what it computes with. Its bundle stays open."""

    def added_bytes(self) -> dict[str, int]:
        """Memory, by name, of what the engine has made of the bundle to compute with, as far as it knows."""
        return {}

    @property
    def pid(self) -> int:
        """The process that the engine computes in."""
        return os.getpid()

    def device_memory(self) -> dict[str, int]:
        """Bytes of the device's memory: "used" and "total" of all processes, "allocated", "reserved" and "peak" of this one's
        allocator. Empty on a CPU."""
        return {}


class CpuEngine(Engine):
    """A bundle on the CPU, on `threads` threads."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        """Loads the encoder; BundleError when it does not fit the bundle."""
        super().__init__(bundle, threads)
        self._session = _open_encoder(bundle, threads)
        self._screens = kernels.screen(bundle.head)

    def close(self) -> None:
        del self._session, self._screens

    def encode(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        input_ids, attention_mask = self.padded_batch(sequences, len(sequences))
        (embedding,) = self._session.run(None, {"input_ids": input_ids, "attention_mask": attention_mask})
        return embedding

    def topk(self, x: np.ndarray, k: int, allowed: Sequence[Subset | None] | None = None) -> tuple[np.ndarray, np.ndarray]:
        return kernels.topk(x, self.bundle.head, k, allowed, self._screens)

    def added_bytes(self) -> dict[str, int]:
        return {"screen": sum(screen.nbytes for screen in self._screens if screen)}

    def warm_up(self, max_inputs: int, max_tokens: int) -> float:
        for length in sorted({self.padded(min(length, self.max_length)) for length in (16, 64, self.max_length)}):
            for count in sorted({1, max(1, min(max_inputs, max_tokens // length))}):
                started = time.perf_counter()
                self.topk(self.encode([[self._pad_id] * length] * count), 1)
        return time.perf_counter() - started


def _open_encoder(bundle: Bundle, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads  # left alone, it counts the host's cores and not the cgroup's quota
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # it plans memory per shape and keeps each plan
    options.log_severity_level = 3
    # Its pool may spin between a run's operators (a quarter faster for one text), not long (while a thread that was interrupted
    # catches up, the event loop can use the core) and not after the run: the head needs the cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", "200")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = ort.InferenceSession(bundle.encoder_file, options, providers=[_PROVIDER], disabled_optimizers=_SLOW_FUSIONS)
    except Exception as error:  # ONNX Runtime's exceptions have no common base but this
        raise BundleError(f"{bundle.encoder_file}: ONNX Runtime cannot load it: {error}") from error
    if session.get_providers() != [_PROVIDER]:
        raise BundleError(f"{bundle.encoder_file}: runs on {session.get_providers()}, expected {_PROVIDER}")
    check_encoder(session, bundle)
    return session


def check_encoder(session: ort.InferenceSession, bundle: Bundle) -> None:
    """BundleError unless the encoder takes what `Engine.padded_batch` gives and gives what the head takes."""
    inputs = sorted(node.name for node in session.get_inputs())
    outputs = session.get_outputs()
    if inputs != ["attention_mask", "input_ids"] or len(outputs) != 1:
        raise BundleError(f"{bundle.encoder_file}: takes {inputs} and gives {len(outputs)} tensors")
    if outputs[0].shape[-1] != bundle.manifest.width:
        raise BundleError(f"{bundle.encoder_file}: gives {outputs[0].shape}, the head reads {bundle.manifest.width} values")
