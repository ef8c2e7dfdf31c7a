"""What is said when a GPU cannot serve, and what decides that it can; no GPU and no interpreter is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from export.bundle import BundleError, open_bundle
from export.onnx_runtime import onnxruntime
from models.device import DeviceError
from serve.engine import Engine
from serve.gpu.engine import batch_sizes
from serve.gpu.onnx_encoder import OnnxEncoder, operators_elsewhere
from serve.gpu.torch_encoder import TorchEncoder
from tests.serve.harness import ROOT

GPU = SimpleNamespace(device=torch.device("cuda", 0))  # a lane, as far as it is looked at


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_ends_with_one_line(bundle_path: Path) -> None:
    command = [sys.executable, "-m", "serve", str(bundle_path), "--port", "0", "--device", "cuda"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("python -m serve: error: cuda: ")


def test_without_torch_the_extra_is_named(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("serve.gpu", "models.kernels.gpu"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(DeviceError, match=r"cuda:0: needs the package triton: pip install 'fanin\[gpu\]'"):
        Engine.open(bundle_path, 1, "cuda:0")


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="ONNX Runtime has CUDA")
def test_onnx_runtime_without_cuda_is_named(bundle_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"ONNX Runtime .* has no CUDAExecutionProvider; .* --encoder-runtime torch"):
        OnnxEncoder(open_bundle(bundle_path, verify=False), GPU)


def test_a_bundle_without_an_encoder_for_torch_is_named(bundle_path: Path) -> None:
    with pytest.raises(BundleError, match="has no encoder for torch; export it with --torch-encoder"):
        TorchEncoder(open_bundle(bundle_path, verify=False), GPU)


def test_operators_on_the_cpu_are_found_in_the_profile(bundle_path: Path, tmp_path: Path) -> None:
    """A real profile: on the CPU all run there, so beside shapes all are elsewhere; none is where the CPU is what is wanted."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(
        open_bundle(bundle_path, verify=False).encoder_file, options, providers=["CPUExecutionProvider"]
    )
    ones = np.ones((2, 32), dtype=np.int64)
    session.run(None, {"input_ids": ones, "attention_mask": ones})
    profile = Path(session.end_profiling())
    astray = operators_elsewhere(profile, "CUDAExecutionProvider", ones.nbytes)
    assert {"MatMul", "Softmax"} & set(astray)
    assert "Shape" not in astray
    assert operators_elsewhere(profile, "CPUExecutionProvider", ones.nbytes) == []
    profile.write_text("[]")
    with pytest.raises(DeviceError, match="names no operator"):
        operators_elsewhere(profile, "CUDAExecutionProvider", ones.nbytes)


def test_batches_are_padded_to_few_sizes() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(2) == [1, 2]
    assert batch_sizes(24) == [1, 2, 4, 8, 16, 24]
    assert batch_sizes(32) == [1, 2, 4, 8, 16, 32]
