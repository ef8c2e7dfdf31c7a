"""The encoder in ONNX Runtime on a GPU, between tensors of torch.

Dimensions: B batch, S sequence length, D embedding width.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from export.bundle import Bundle, BundleError
from export.onnx_runtime import onnxruntime as ort
from models.device import DeviceError
from serve.engine import check_encoder
from serve.gpu.lanes import Lane

_PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
_LOOK = (2, 32)  # the batch that shows where operators run


class OnnxEncoder:
    """Token ids → embeddings, in fp32 with products in TF32, on the lane's stream: ONNX Runtime keeps no order with others."""

    def __init__(self, bundle: Bundle, lane: Lane) -> None:
        """DeviceError when the encoder does not run on the device, BundleError when it does not fit the bundle."""
        self._lane, self._width = lane, bundle.manifest.width
        provider = _PROVIDERS[lane.device.type]
        if provider not in ort.get_available_providers():
            raise DeviceError(
                f"{lane.device}: ONNX Runtime {ort.__version__} has no {provider}; install onnxruntime-gpu for CUDA "
                f"{torch.version.cuda} in place of onnxruntime, or use --encoder-runtime torch"
            )
        with TemporaryDirectory() as folder:
            self._session = _open(bundle, lane, provider, Path(folder, "profile"))
            check_encoder(self._session, bundle)
            batch, length = _LOOK[0], min(_LOOK[1], bundle.manifest.max_length)
            ones = np.ones((batch, length), dtype=np.int64)
            with lane():
                self(ones, ones)
            astray = operators_elsewhere(Path(self._session.end_profiling()), provider, ones.nbytes)
        if astray:
            raise DeviceError(
                f"{lane.device}: ONNX Runtime runs {', '.join(astray)} of {bundle.encoder_file} on the CPU; "
                "use --encoder-runtime torch"
            )

    def __call__(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> Tensor:
        """Embeddings fp32 [B, D] from int64 [B, S], inside the lane."""
        device, index = self._lane.device, self._lane.device.index or 0
        x = torch.empty((len(input_ids), self._width), device=device)
        binding = self._session.io_binding()
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        tensors = {name: torch.from_numpy(array).to(device) for name, array in given.items()}  # held until the run has ended
        for name, tensor in tensors.items():
            binding.bind_input(name, device.type, index, np.int64, tuple(tensor.shape), tensor.data_ptr())
        output = self._session.get_outputs()[0].name
        binding.bind_output(output, device.type, index, np.float32, tuple(x.shape), x.data_ptr())
        self._session.run_with_iobinding(binding)
        return x

    def record(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> None:
        """Runs a batch of this shape, so that its memory is there."""
        self(input_ids, attention_mask)


def _open(bundle: Bundle, lane: Lane, provider: str, profile: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # only arithmetic of shapes is left for the CPU
    options.enable_mem_pattern = False  # it plans memory per shape and keeps each plan
    options.enable_profiling = True  # until end_profiling()
    options.profile_file_prefix = str(profile)
    settings = {}
    if lane.device.type == "cuda":
        settings = {
            "device_id": str(lane.device.index),
            "user_compute_stream": str(lane.handle),
            "arena_extend_strategy": "kSameAsRequested",
        }
    try:
        session = ort.InferenceSession(bundle.encoder_file, options, providers=[(provider, settings)])
    except Exception as error:  # ONNX Runtime's exceptions have no common base but this
        raise BundleError(f"{bundle.encoder_file}: ONNX Runtime cannot load it: {error}") from error
    if session.get_providers()[0] != provider:  # its libraries are missing or of another CUDA: it goes on without a word
        raise DeviceError(f"{lane.device}: ONNX Runtime cannot use it and took {session.get_providers()}")
    return session


def operators_elsewhere(profile: Path, provider: str, limit: int) -> list[str]:
    """Kinds of operators that did not run on `provider` and gave more than `limit` bytes, from a profile of ONNX Runtime.

    It leaves the arithmetic of shapes, a few numbers, to the CPU on purpose.
    """
    nodes = [event["args"] for event in json.loads(profile.read_text()) if event.get("cat") == "Node"]
    run = [node for node in nodes if "provider" in node]
    if not run:
        raise DeviceError(f"{profile.name}: ONNX Runtime's profile names no operator, so it cannot be told where they ran")
    return sorted({node["op_name"] for node in run if node["provider"] != provider and int(node["output_size"]) > limit})
