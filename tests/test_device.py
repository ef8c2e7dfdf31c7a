"""What is said of a GPU that cannot be used. No GPU is needed: torch is made to tell of one."""

from __future__ import annotations

import pytest
import torch

from models import device
from models.device import DeviceError, cuda_device


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: (9, 0))


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_that_can_be_used_is_found(name: str) -> None:
    assert cuda_device(name) == torch.device("cuda", 0)


@pytest.mark.usefixtures("one_gpu")
def test_every_reason_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match="cuda:1: there are 1 CUDA devices, counted from 0"):
        cuda_device("cuda:1")
    for name in ("gpu", "cuda:x", "cpu"):
        with pytest.raises(DeviceError, match=f"{name} is no CUDA device"):
            cuda_device(name)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda place: (7, 5))
        with pytest.raises(DeviceError, match=r"cuda: NVIDIA H100 has compute capability 7\.5, at least 8\.0 is needed"):
            cuda_device("cuda")
    with monkeypatch.context() as patch:
        patch.setattr(device, "find_spec", lambda package: None)
        with pytest.raises(DeviceError, match=r"cuda: needs the package triton: pip install 'fanin\[gpu\]'"):
            cuda_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="cuda: PyTorch finds no CUDA device"):
        cuda_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(DeviceError, match=r"cuda: this PyTorch \(.*\) is built without CUDA"):
        cuda_device("cuda")
