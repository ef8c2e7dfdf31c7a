"""A drop-in replacement for `torch.nn.Linear` with a fixed fan-in, for other people's models.

The operators are registered with `torch.library` ("fanin::scores" and its two gradients), so autograd and torch.compile see
one call each. The CPU runs `models.kernels`, a CUDA device `models.kernels.gpu`.

Dimensions: B batch, D in_features, L out_features, N groups, K fan-in, G group size.
"""

from __future__ import annotations

import copy
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.library import custom_op, register_autocast

from models import kernels
from models.head import Block, Connectivity, HeadError
from models.kernels import reference

if TYPE_CHECKING:
    from models.kernels.gpu import DeviceBlock

_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class FanInLinear(nn.Module):
    """`nn.Linear(in_features, out_features)` in which every output reads only `fan_in` of the inputs.

    x [..., D] → [..., L], both of the layer's dtype: fp32, fp16, bf16, or fp64 (slow, for gradient checks).
    Padding slots at the end of the last group are zero, get no gradient and are never returned.

    values     [N, K, G]  parameter
    bias       [N, G]     parameter, or None
    indices    uint16     buffer: shared [N, K], private [N, K, G], dense None
    label_ids  int32 [N, G]  buffer: column j is label `label_ids.flatten()[j]`, by default j; −1 marks padding
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    indices: Tensor | None
    label_ids: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        fan_in: int | None = None,
        connectivity: Connectivity = "shared",
        group_size: int = 32,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Random distinct connections, values N(0, 1/K), bias zero, drawn with `generator` or torch's global one.

        `fan_in` is needed unless `connectivity` is "dense", which reads every input. `group_size` is a multiple of 16.
        """
        if out_features < 1:
            raise ValueError(f"out_features is {out_features}, must be at least 1")
        if connectivity != "dense" and fan_in is None:
            raise ValueError(f"fan_in is missing; {connectivity} connectivity needs it")
        if connectivity == "dense" and fan_in not in (None, in_features):
            raise ValueError(f"fan_in is {fan_in}, but dense connectivity reads all {in_features} inputs")
        seed = int(torch.randint(2**63 - 1, (), generator=generator))
        dtype = torch.get_default_dtype() if dtype is None else dtype
        block = Block.random(
            np.arange(out_features, dtype=np.int32),
            width=in_features,
            connectivity=connectivity,
            fan_in=in_features if fan_in is None else fan_in,
            group_size=group_size,
            dtype=_DTYPES.get(dtype, "fp32"),
            rng=np.random.default_rng(seed),
        )
        super().__init__()
        self._adopt(block)
        if not bias:
            self.bias = None
        self.to(device=device, dtype=dtype)

    @classmethod
    def from_block(cls, block: Block) -> FanInLinear:
        """A layer that computes what `block` does, from a copy of its buffers; column j is slot j.

        The block must be valid, hold fp32, fp16 or bf16 values and be padded only at its end (ValueError).
        """
        if block.dtype not in _DTYPES.values():
            raise ValueError(f"a block with {block.dtype} values has no layer; use {', '.join(_DTYPES.values())}")
        padding = block.label_ids.reshape(-1) < 0
        if (padding[:-1] & ~padding[1:]).any():
            raise ValueError(f"slot {np.argmax(padding)} is padding although labels follow; a layer is padded only at its end")
        block.validate()
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adopt(copy.deepcopy(block))
        return layer

    def to_block(self) -> Block:
        """The layer as a block of a head. On the CPU it shares the layer's memory, except a bias that is not fp32."""
        if self.values.dtype == torch.float64:
            raise ValueError("a block has no fp64 values; call .float() on the layer first")
        return _block(self.values, self.bias, self.indices, self.in_features, self.label_ids)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [..., L] for x [..., D]. Under autocast, fp32: no copy of the weights is cast."""
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"x has shape {list(x.shape)}, expected [..., {self.in_features}]")
        every = scores(x.reshape(-1, self.in_features), self.values, self.bias, self.indices)  # [B, N, G]
        return every.flatten(1)[:, : self.out_features].reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        _, k, g = self.values.shape
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, fan_in={k}, "
            f"connectivity={self.connectivity!r}, group_size={g}, bias={self.bias is not None}"
        )

    def _adopt(self, block: Block) -> None:
        self.in_features = block.width
        self.out_features = int((block.label_ids >= 0).sum())
        self.connectivity = block.connectivity
        values = torch.from_numpy(block.values)
        if block.dtype == "bf16":
            values = values.view(torch.bfloat16)
        self.values = nn.Parameter(values)
        self.bias = nn.Parameter(torch.from_numpy(block.bias).to(values.dtype))
        self.register_buffer("indices", None if block.indices is None else torch.from_numpy(block.indices))
        self.register_buffer("label_ids", torch.from_numpy(block.label_ids))
        self.register_load_state_dict_post_hook(_validate)


@custom_op("fanin::scores", mutates_args=(), device_types="cpu")
def scores(x: Tensor, values: Tensor, bias: Tensor | None, indices: Tensor | None) -> Tensor:
    """All scores [B, N, G] of x [B, D], padding slots included; see models.kernels.scores. All of one dtype."""
    if values.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype}, the layer's values are {values.dtype}")
    block = _block(values, bias, indices, x.shape[1])
    return torch.from_numpy(_operations(x).scores(_numbers(x), block)).to(x.dtype)


@custom_op("fanin::grad_input", mutates_args=(), device_types="cpu")
def grad_input(grad: Tensor, values: Tensor, indices: Tensor | None, width: int) -> Tensor:
    """∂/∂x [B, width] from the gradient of the scores [B, N, G]; see models.kernels.grad_input."""
    block = _block(values, None, indices, width)
    return torch.from_numpy(_operations(grad).grad_input(_numbers(grad), block)).to(grad.dtype)


@custom_op("fanin::grad_values", mutates_args=(), device_types="cpu")
def grad_values(x: Tensor, grad: Tensor, values: Tensor, indices: Tensor | None) -> Tensor:
    """∂/∂values [N, K, G] from x [B, D] and the gradient of the scores [B, N, G]; see models.kernels.grad_values.

    Of `values` only shape and type matter.
    """
    block = _block(values, None, indices, x.shape[1])
    return torch.from_numpy(_operations(x).grad_values(_numbers(x), _numbers(grad), block)).to(values.dtype)


@scores.register_fake
def _(x: Tensor, values: Tensor, bias: Tensor | None, indices: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[0], values.shape[2])


@grad_input.register_fake
def _(grad: Tensor, values: Tensor, indices: Tensor | None, width: int) -> Tensor:
    return grad.new_empty(grad.shape[0], width)


@grad_values.register_fake
def _(x: Tensor, grad: Tensor, values: Tensor, indices: Tensor | None) -> Tensor:
    return torch.empty_like(values)


# Triton is imported when a tensor is on a GPU, not before: `models.kernels.gpu` needs it, and this module does not.


@scores.register_kernel("cuda")
def cuda_scores(x: Tensor, values: Tensor, bias: Tensor | None, indices: Tensor | None) -> Tensor:
    from models.kernels import gpu

    if values.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype}, the layer's values are {values.dtype}")
    return gpu.scores(x, _device_block(values, bias, indices, x.shape[1]), x.dtype)


@grad_input.register_kernel("cuda")
def cuda_grad_input(grad: Tensor, values: Tensor, indices: Tensor | None, width: int) -> Tensor:
    from models.kernels import gpu

    return gpu.grad_input(grad, _device_block(values, None, indices, width)).to(grad.dtype).contiguous()


@grad_values.register_kernel("cuda")
def cuda_grad_values(x: Tensor, grad: Tensor, values: Tensor, indices: Tensor | None) -> Tensor:
    from models.kernels import gpu

    return gpu.grad_values(x, grad, _device_block(values, None, indices, x.shape[1]), values.dtype)


def _device_block(values: Tensor, bias: Tensor | None, indices: Tensor | None, width: int) -> DeviceBlock:
    from models.kernels.gpu import DeviceBlock

    if values.dtype not in _DTYPES:
        raise ValueError(f"a layer of {values.dtype} runs on the CPU only")
    n, _, g = values.shape
    return DeviceBlock(
        connectivity="dense" if indices is None else "shared" if indices.ndim == 2 else "private",
        width=width,
        dtype=_DTYPES[values.dtype],
        values=values.contiguous(),
        bias=values.new_zeros((n, g), dtype=torch.float32) if bias is None else bias.float().contiguous(),
        label_ids=None,
        indices=None if indices is None else indices.contiguous(),
    )


# The scores are linear in x and in the values, so the three operations are each other's derivatives, of any order.


def _save_scores(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, values, _, indices = inputs
    ctx.save_for_backward(x, values, indices)


def _scores_backward(ctx: Any, grad: Tensor) -> tuple:
    x, values, indices = ctx.saved_tensors
    for_x, for_values, for_bias, _ = ctx.needs_input_grad
    return (
        grad_input(grad, values, indices, x.shape[1]) if for_x else None,
        grad_values(x, grad, values, indices) if for_values else None,
        grad.sum(dim=0) if for_bias else None,
        None,
    )


def _save_grad_input(ctx: Any, inputs: tuple, output: Tensor) -> None:
    grad, values, indices, _ = inputs
    ctx.save_for_backward(grad, values, indices)


def _grad_input_backward(ctx: Any, grad_x: Tensor) -> tuple:
    grad, values, indices = ctx.saved_tensors
    for_grad, for_values, *_ = ctx.needs_input_grad
    return (
        scores(grad_x, values, None, indices) if for_grad else None,
        grad_values(grad_x, grad, values, indices) if for_values else None,
        None,
        None,
    )


def _save_grad_values(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, grad, _, indices = inputs
    ctx.save_for_backward(x, grad, indices)


def _grad_values_backward(ctx: Any, grad_w: Tensor) -> tuple:
    x, grad, indices = ctx.saved_tensors
    for_x, for_grad, *_ = ctx.needs_input_grad
    return (
        grad_input(grad, grad_w, indices, x.shape[1]) if for_x else None,
        scores(x, grad_w, None, indices) if for_grad else None,
        None,
        None,
    )


scores.register_autograd(_scores_backward, setup_context=_save_scores)
grad_input.register_autograd(_grad_input_backward, setup_context=_save_grad_input)
grad_values.register_autograd(_grad_values_backward, setup_context=_save_grad_values)
for _device in ("cpu", "cuda"):
    register_autocast(scores, _device, torch.float32)


class _DoubleBlock(Block):
    """A block with fp64 values for the reference operations; no file and no kernel knows such a type."""

    def __post_init__(self) -> None:
        """Without the layout's checks of types."""


def _block(values: Tensor, bias: Tensor | None, indices: Tensor | None, width: int, label_ids: Tensor | None = None) -> Block:
    """The block over these tensors' memory. Without label_ids no slot counts as padding, so every score is a number."""
    n, _, g = values.shape
    wide = values.dtype == torch.float64
    return (_DoubleBlock if wide else Block)(
        connectivity="dense" if indices is None else "shared" if indices.ndim == 2 else "private",
        width=width,
        dtype="fp64" if wide else _DTYPES.get(values.dtype, str(values.dtype)),
        values=_array(values.view(torch.uint16) if values.dtype == torch.bfloat16 else values),
        bias=np.zeros((n, g), dtype=np.float32) if bias is None else _numbers(bias),
        label_ids=np.zeros((n, g), dtype=np.int32) if label_ids is None else _array(label_ids),
        indices=None if indices is None else _array(indices),
    )


def _operations(x: Tensor) -> ModuleType:
    return reference if x.dtype == torch.float64 else kernels


def _numbers(tensor: Tensor) -> np.ndarray:
    return _array(tensor if tensor.dtype == torch.float64 else tensor.float())


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().numpy(force=True)


def _validate(layer: FanInLinear, _: object) -> None:
    """Checks what a state dict brought: the kernels read inputs at these indices unchecked."""
    try:
        _block(layer.values, layer.bias, layer.indices, layer.in_features, layer.label_ids).validate()
    except HeadError as error:
        raise HeadError(f"{layer}: loaded state does not fit: {error}") from None
