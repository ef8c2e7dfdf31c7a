"""A head's buffers as tensors on a device, in the layout of models.head.

Dimensions: B batch, D width, L labels, K fan-in, G group size, N groups, P positives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.dtypes import QUANTIZED
from models.head import Block, Connectivity, Head
from models.kernels.step import MOMENTS, Moments, Optimizer, Positives

# fp8 stays uint8: the kernels read its bits, since sm_80 has no such type.
STORAGE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.uint8}


@dataclass(frozen=True, eq=False)
class DeviceBlock:
    """A `models.head.Block` on a device: the same shapes, contiguous; bf16 values have torch's type, fp8 ones uint8.

    label_ids may be None where no slot is padding; only `topk` and `train_step` need them.
    """

    connectivity: Connectivity
    width: int
    dtype: str
    values: Tensor
    bias: Tensor
    label_ids: Tensor | None
    indices: Tensor | None = None
    scales: Tensor | None = None

    @classmethod
    def of(cls, block: Block, device: torch.device | str) -> DeviceBlock:
        """A copy of the block on `device`."""
        arrays = {name: _tensor(array, device) for name, array in block.buffers.items()}
        arrays["values"] = arrays["values"].view(STORAGE[block.dtype])
        return cls(block.connectivity, block.width, block.dtype, **arrays)

    def write_to(self, block: Block) -> None:
        """Copies values, bias and indices, which training changes, into the block's memory; waits for the device."""
        if (block.connectivity, block.dtype, block.values.shape) != (self.connectivity, self.dtype, tuple(self.values.shape)):
            raise ValueError("the block is of another kind or shape than the one on the device")
        values = self.values.view(torch.uint16) if self.dtype == "bf16" else self.values
        block.values[...] = values.numpy(force=True)
        block.bias[...] = self.bias.numpy(force=True)
        if block.indices is not None and self.indices is not None:
            block.indices[...] = self.indices.numpy(force=True)

    @property
    def groups(self) -> int:
        return self.values.shape[0]

    @property
    def fan_in(self) -> int:
        return self.values.shape[1]

    @property
    def group_size(self) -> int:
        return self.values.shape[2]

    def compute_type(self, x: torch.dtype) -> torch.dtype:
        """The type of products for inputs of type `x`: fp32 stays, and so does any 16-bit type that holds the values exactly.

        Other inputs are rounded to the values' own type, those of int8 and fp8 blocks to bf16.
        """
        own = torch.bfloat16 if self.dtype in QUANTIZED else self.values.dtype
        exact = {own, torch.float32} | ({torch.float16} if self.dtype in QUANTIZED else set())
        return x if x in exact else own

    def part(self, groups: slice) -> DeviceBlock:
        """The block of these groups alone, a view."""
        return self._each(lambda tensor: tensor[groups])

    def copy(self) -> DeviceBlock:
        """The block with memory of its own."""
        return self._each(Tensor.clone)

    def _each(self, change: Callable[[Tensor], Tensor]) -> DeviceBlock:
        return DeviceBlock(
            self.connectivity,
            self.width,
            self.dtype,
            values=change(self.values),
            bias=change(self.bias),
            label_ids=None if self.label_ids is None else change(self.label_ids),
            indices=None if self.indices is None else change(self.indices),
            scales=None if self.scales is None else change(self.scales),
        )


@dataclass(frozen=True, eq=False)
class DeviceHead:
    """A `models.head.Head` on a device."""

    width: int
    n_labels: int
    blocks: tuple[DeviceBlock, ...]

    @classmethod
    def of(cls, head: Head, device: torch.device | str) -> DeviceHead:
        """A copy of the head on `device`."""
        return cls(head.width, head.n_labels, tuple(DeviceBlock.of(block, device) for block in head.blocks))

    def write_to(self, head: Head) -> None:
        """Copies what training changes into the head's memory; waits for the device."""
        for ours, theirs in zip(self.blocks, head.blocks, strict=True):
            ours.write_to(theirs)


@dataclass(frozen=True, eq=False)
class DeviceMoments:
    """Optimizer moments of a block on a device, fp32: see models.kernels.Moments."""

    values: tuple[Tensor, ...]  # each [N, K, G]
    bias: tuple[Tensor, ...]  # each [N, G]

    @classmethod
    def zeros(cls, optimizer: Optimizer, block: DeviceBlock) -> DeviceMoments:
        """Fresh moments."""
        count = range(MOMENTS[optimizer.kind])
        return cls(*(tuple(torch.zeros_like(t, dtype=torch.float32) for _ in count) for t in (block.values, block.bias)))

    @classmethod
    def of(cls, moments: Moments, device: torch.device | str) -> DeviceMoments:
        """A copy of the moments on `device`."""
        return cls(*(tuple(_tensor(array, device) for array in arrays) for arrays in (moments.values, moments.bias)))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.values + self.bias)

    def part(self, groups: slice) -> DeviceMoments:
        """Those of these groups, a view."""
        return DeviceMoments(*(tuple(tensor[groups] for tensor in tensors) for tensors in (self.values, self.bias)))

    def copy(self) -> DeviceMoments:
        """The same with memory of their own."""
        return DeviceMoments(*(tuple(tensor.clone() for tensor in tensors) for tensors in (self.values, self.bias)))

    def write_to(self, moments: Moments) -> None:
        """Copies them into the moments' memory; waits for the device."""
        for tensor, array in zip(self.values + self.bias, moments.values + moments.bias, strict=True):
            array[...] = tensor.numpy(force=True)


@dataclass(frozen=True, eq=False)
class DevicePositives:
    """The positives of a batch in one block, on a device, in order of slot: see models.kernels.Positives."""

    slots: Tensor  # int64 [P]
    rows: Tensor  # int32 [P]
    weights: Tensor | None = None  # fp32 [P]

    @classmethod
    def of(cls, positives: Positives, device: torch.device | str) -> DevicePositives:
        """A copy on `device`, from pinned memory, so that nobody waits."""
        weights = None if positives.weights is None else _tensor(positives.weights, device)
        return cls(_tensor(positives.slots, device), _tensor(positives.rows, device), weights)


def _tensor(array: np.ndarray, device: torch.device | str) -> Tensor:
    tensor = torch.from_numpy(np.array(array, copy=not array.flags.writeable))  # torch warns of read-only memory
    if torch.device(device).type == "cpu":
        return tensor.clone()
    return tensor.pin_memory().to(device, non_blocking=True) if tensor.nbytes < 1 << 20 else tensor.to(device)
