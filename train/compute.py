"""Where a head is trained: in numpy arrays with the C++ kernels, or on a GPU in tensors with Triton's.

Both take and give the same tensors; blocks and moments are opaque to whoever holds them (models.head and models.kernels, or
models.kernels.gpu). Dimensions: B batch, D head input width.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from models import kernels
from models.head import Block, Head
from models.kernels import Optimizer, Positives
from train.connections import HostLists, Lists


class Compute(Protocol):
    """The operations of models.kernels on one device."""

    def place(self, head: Head) -> Any:
        """The head, or a copy of it, where it is trained: an object with `blocks`."""

    def store(self, placed: Any, head: Head) -> None:
        """Brings `head`, which `place` was given, up to date."""

    def check(self, block: Block, batch_size: int) -> None:
        """ValueError when a block cannot be trained on batches of this size."""

    def moments(self, optimizer: Optimizer, block: Any) -> Any:
        """Fresh moments for a block, an object with tuples `values` and `bias` and with `nbytes`."""

    def step(self, x: Tensor, positives: Positives, block: Any, moments: Any, **rule: Any) -> tuple[Tensor, Tensor]:
        """models.kernels.train_step: the loss fp64 [] and ∂loss/∂x fp32 [B, D], both where x is."""

    def topk(self, x: Tensor, placed: Any, k: int) -> np.ndarray:
        """The k best labels int32 [B, k] of x fp32 [B, D]; ValueError or OverflowError when numbers are not finite."""

    def indices(self, block: Any) -> np.ndarray | None:
        """What a block reads, uint16, in host memory; None if it is dense."""

    def lists(self, block: Any, moments: Any, part: slice) -> Lists:
        """The connections of some groups, for rewiring."""


class OnCpu:
    """numpy and C++. Nothing is copied."""

    def place(self, head: Head) -> Head:
        return head

    def store(self, placed: Head, head: Head) -> None:
        """Nothing to do: they are one."""

    def check(self, block: Block, batch_size: int) -> None:
        """Every size will do."""

    def moments(self, optimizer: Optimizer, block: Any) -> Any:
        return optimizer.moments(block)

    def step(self, x: Tensor, positives: Positives, block: Any, moments: Any, **rule: Any) -> tuple[Tensor, Tensor]:
        loss, grad_x = kernels.train_step(x.numpy(), positives, block, moments, **rule)
        return torch.tensor(loss, dtype=torch.float64), torch.from_numpy(grad_x)

    def topk(self, x: Tensor, placed: Head, k: int) -> np.ndarray:
        return kernels.topk(x.numpy(), placed, k)[1]

    def indices(self, block: Any) -> np.ndarray | None:
        indices: np.ndarray | None = block.indices
        return indices

    def lists(self, block: Any, moments: Any, part: slice) -> Lists:
        return HostLists(block, moments, part)


class OnGpu:
    """Tensors and Triton. Nothing here makes the host wait but `store`, `topk`, `indices` and rewiring.

    Products of a training step are in the type of the block's values, those of `topk` exact, as they are when the model serves.
    """

    def __init__(self, device: torch.device) -> None:
        """ImportError without Triton."""
        from models.kernels import gpu
        from train import gpu_connections

        self._device, self._gpu, self._connections = device, gpu, gpu_connections

    def place(self, head: Head) -> Any:
        return self._gpu.DeviceHead.of(head, self._device)

    def store(self, placed: Any, head: Head) -> None:
        placed.write_to(head)

    def check(self, block: Block, batch_size: int) -> None:
        self._gpu.check_sizes(batch_size, block.connectivity, block.fan_in)

    def moments(self, optimizer: Optimizer, block: Any) -> Any:
        return self._gpu.DeviceMoments.zeros(optimizer, block)

    def step(self, x: Tensor, positives: Positives, block: Any, moments: Any, **rule: Any) -> tuple[Tensor, Tensor]:
        there = self._gpu.DevicePositives.of(positives, self._device)
        loss, grad_x = self._gpu.train_step(x.to(block.values.dtype), there, block, moments, **rule)
        return loss, grad_x

    def topk(self, x: Tensor, placed: Any, k: int) -> np.ndarray:
        if not x.isfinite().all():
            raise ValueError("x has a value that is not finite")
        labels: np.ndarray = self._gpu.topk(x, placed, k)[1].numpy(force=True)
        if (labels < 0).any():
            raise OverflowError("scores overflow fp32")
        return labels

    def indices(self, block: Any) -> np.ndarray | None:
        return None if block.indices is None else block.indices.numpy(force=True)

    def lists(self, block: Any, moments: Any, part: slice) -> Lists:
        lists: Lists = self._connections.DeviceLists(block, moments, part)
        return lists


def compute_on(device: torch.device) -> Compute:
    """How to compute on `device`."""
    return OnGpu(device) if device.type == "cuda" else OnCpu()
