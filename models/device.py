"""Whether there is a GPU that this program can use."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_LEAST = (8, 0)  # compute capability: the first with bf16, and what the kernels are compiled and tested for


class DeviceError(ValueError):
    """A device cannot be used; the message says why."""


def cuda_device(name: str) -> torch.device:
    """The CUDA device called "cuda" (the first) or "cuda:N"; DeviceError when it is not there or cannot run the kernels."""
    import torch  # not before a GPU is asked for: this module is also read where there is none

    number = name.removeprefix("cuda").removeprefix(":") or "0"
    if not name.startswith("cuda") or not number.isdecimal():
        raise DeviceError(f"{name} is no CUDA device; they are called cuda:0, cuda:1, …")
    if torch.version.cuda is None:
        raise DeviceError(f"{name}: this PyTorch ({torch.__version__}) is built without CUDA")
    if not torch.cuda.is_available():
        raise DeviceError(f"{name}: PyTorch finds no CUDA device; does nvidia-smi show one?")
    if int(number) >= torch.cuda.device_count():
        raise DeviceError(f"{name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    device = torch.device("cuda", int(number))
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST:
        facts = f"{torch.cuda.get_device_name(device)} has compute capability {'.'.join(map(str, capability))}"
        raise DeviceError(f"{name}: {facts}, at least {'.'.join(map(str, _LEAST))} is needed")
    if find_spec("triton") is None:
        raise DeviceError(f"{name}: needs the package triton: pip install 'fanin[gpu]'")
    return device
