"""The training step on a GPU.

Dimensions: B batch, D width, N groups, K fan-in, G group size; KB inputs, BM rows and GT labels at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from models.head import Connectivity
from models.kernels.gpu import step as kernels
from models.kernels.gpu.head import DeviceBlock, DeviceMoments, DevicePositives
from models.kernels.gpu.launch import Config, choose, labels_at_once, power_of_two, run, shared_memory
from models.kernels.gpu.ops import check_input, transposed
from models.kernels.gpu.update import rates_of
from models.kernels.step import MOMENTS, Loss, Optimizer, check_rule

_SAMPLE = 1 << 25  # numbers of the values that trials run on, in a copy, since a step changes them
_LONG = 512  # the longest side of a tile: of a batch or of a fan-in, one must fit
_PRIVATE = 1 << 12  # numbers of a tile of private inputs
_LARGE = 128 * 1024  # bytes of shared memory for batches beyond 128 rows; GeForce cards, A10 and L4 have 99 KiB
# Tiles that the registers hold, with 8 warps, on every target: tests/kernels/gpu/test_compiled.py. "Exact" ones are fp32.
_BATCH = {64: (64, 64), 128: (64, 32), 256: (16, 64), 512: (16, 32)}  # BM up to this: GT, KB
_EXACT_BATCH = {64: (32, 32), 128: (16, 32), 256: (16, 32), 512: (16, 16)}
_FAN_IN = {128: (32, 64), 256: (32, 32), 512: (16, 16)}  # KB up to this: GT, BM
_EXACT_FAN_IN = {128: (32, 16), 256: (16, 16), 512: (16, 16)}


def train_step(
    x: Tensor,
    positives: DevicePositives,
    block: DeviceBlock,
    moments: DeviceMoments,
    *,
    loss: Loss,
    smoothing: float = 0.0,
    optimizer: Optimizer,
    step: int,
    key: int,
) -> tuple[Tensor, Tensor]:
    """Forward, loss, gradients and weight update in one pass: the loss, fp64 [], and ∂loss/∂x, fp32 [B, D], on the device.

    See models.kernels.train_step; the random numbers of `key` are the same. Values may be fp32, bf16 or fp16, and fp16 ones
    are rounded to nearest. Beside what it returns it needs x once more and N + 1 integers. Positives in padding slots count
    for nothing. ∂loss/∂x is summed in any order; the weights repeat bit for bit. A batch above 512 rows with a fan-in above 512
    is a ValueError, since neither side fits on the chip, and so is a private fan-in above 512.
    """
    _check(x, block, moments, loss, smoothing, optimizer, step)
    dtype = block.compute_type(x.dtype)
    kernel, configs = _kernel(x, block, dtype)
    # One width for all configs, so that their tiles are whole.
    xt = transposed(x, dtype, max(config.sizes["BM"] for config in configs))
    rows = max(1, len(x))
    key_low, key_high = (half - (half >> 31 << 32) for half in (key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF))
    constants = {"K": block.fan_in, "G": block.group_size, "LOSS": loss, "OPTIMIZER": optimizer.kind}
    if block.connectivity != "private":
        constants["DENSE"] = block.connectivity == "dense"

    def launch(config: Config, block: DeviceBlock = block, moments: DeviceMoments = moments) -> tuple[Tensor, Tensor]:
        grad_xt = torch.zeros(xt.shape, dtype=torch.float32, device=x.device)
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        starts = torch.arange(block.groups + 1, device=x.device) * block.group_size
        arguments: dict[str, Any] = {
            "xt": xt, "grad_xt": grad_xt, "values": block.values, "bias": block.bias, "label_ids": block.label_ids,
            "indices": block.indices, **_pointers("value", moments.values), **_pointers("bias", moments.bias),
            "firsts": torch.searchsorted(positives.slots, starts, out_int32=True), "slots": positives.slots,
            "rows": positives.rows, "weights": positives.weights, "loss": total, "B": len(x), "ldx": xt.shape[1],
            "scale": 1 / rows, "target": 1.0 - smoothing, "key_low": key_low, "key_high": key_high,
            "rates": rates_of(optimizer, step),
        }  # fmt: skip
        run(kernel, block.groups * (block.group_size // config.sizes["GT"]), arguments, constants, config)
        return total / rows, grad_xt[:, : len(x)].t()

    def trial() -> Callable[[Config], object]:
        part = slice(max(1, _SAMPLE // (block.fan_in * block.group_size)))
        sample = block.part(part).copy(), moments.part(part).copy()
        return lambda config: launch(config, *sample)

    problem = ("step", block.dtype, dtype, block.connectivity, xt.shape[1], *constants.values())
    return launch(choose(x, problem, configs, trial))


def check_sizes(B: int, connectivity: Connectivity, K: int) -> None:
    """ValueError when neither a batch of B rows nor a fan-in of K fits on the chip, so that `train_step` would refuse them."""
    if connectivity == "private" and K > _LONG:
        raise ValueError(f"private fan-in is {K}, a training step on the GPU takes at most {_LONG}")
    if connectivity != "private" and K > _LONG and B > _LONG:
        raise ValueError(f"fan-in is {K} and the batch has {B} rows: on the GPU one of them must be at most {_LONG}")


def _kernel(x: Tensor, block: DeviceBlock, dtype: torch.dtype) -> tuple[Any, list[Config]]:
    """The kernel for a batch x, and what is worth trying: it sums in the same order in all of them, so that runs repeat."""
    B, K, G = len(x), block.fan_in, block.group_size
    check_sizes(B, block.connectivity, K)
    if block.connectivity == "private":
        KB = triton.next_power_of_2(K)
        BM = power_of_two(B, 1, min(16, _PRIVATE // KB))
        GT = labels_at_once(G, min(32, _PRIVATE // KB // BM))
        return kernels.step_private, [Config({"GT": GT, "KB": KB, "BM": BM}, 8, stages=1)]
    exact = dtype == torch.float32
    if B <= _LONG:
        BM = power_of_two(B, 16, _LONG)
        GT, KB = (_EXACT_BATCH if exact else _BATCH)[max(BM, 64)]
        if BM > 128 and shared_memory(x.device) < _LARGE:
            KB //= 2
        KB = power_of_two(K, 16, max(16, KB))
        kernel = kernels.step
    else:
        KB = power_of_two(K, 16, _LONG)
        GT, BM = (_EXACT_FAN_IN if exact else _FAN_IN)[max(KB, 128)]
        kernel = kernels.step_long
    return kernel, [Config({"GT": labels_at_once(G, GT), "KB": KB, "BM": BM}, 8, stages=stages) for stages in (1, 2)]


def _pointers(name: str, moments: tuple[Tensor, ...]) -> dict[str, Tensor | None]:
    return {f"{name}_moment{i + 1}": moments[i] if i < len(moments) else None for i in range(2)}


def _check(
    x: Tensor, block: DeviceBlock, moments: DeviceMoments, loss: Loss, smoothing: float, optimizer: Optimizer, step: int
) -> None:
    check_input(x, block.width)
    if block.scales is not None:
        raise ValueError(f"a block with {block.dtype} values cannot be trained; use fp32, bf16 or fp16")
    check_rule(loss, smoothing, optimizer, step)
    for name, tensors in (("values", moments.values), ("bias", moments.bias)):
        shape = getattr(block, name).shape
        if len(tensors) != MOMENTS[optimizer.kind] or any(m.shape != shape or m.dtype != torch.float32 for m in tensors):
            raise ValueError(f"moments of {name} do not fit the block and optimizer {optimizer.kind!r}")
