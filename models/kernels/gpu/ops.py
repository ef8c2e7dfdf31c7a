"""Top-k, scores and the gradients of scores on a GPU.

Dimensions: B batch, D width, L labels, N groups, K fan-in, G group size; KB inputs, BM rows and GT labels at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from models.kernels.gpu import backward, score
from models.kernels.gpu.head import DeviceBlock, DeviceHead
from models.kernels.gpu.launch import INTERPRETED, Config, choose, labels_at_once, power_of_two, run
from models.kernels.subset import EVERY, Subset, check_allowed

_HELD = 1 << 28  # numbers of 4 bytes held at once; more rows are taken in parts
_SAMPLE = 1 << 14  # groups that trials run on


def topk(x: Tensor, head: DeviceHead, k: int, allowed: Sequence[Subset | None] | None = None) -> tuple[Tensor, Tensor]:
    """The k best labels per row of x [B, D], exactly: scores fp32 [B, k] descending, label ids int32 [B, k].

    Every k best label is in one of the k tiles of labels with the largest maxima: so those are found first, and only their
    labels are compared. Memory is 4 bytes a row for each tile, which is up to 64 labels, and 8 for each label of k tiles. Equal
    scores come in any order. With fewer than k labels, all of them. `allowed` as in models.kernels; it costs L / 8 bytes a row.
    """
    check_input(x, head.width)
    if k < 1:
        raise ValueError(f"k is {k}, must be at least 1")
    k = min(k, head.n_labels)
    columns = sum(block.groups * (block.group_size // _labels(block, x)) for block in head.blocks)
    widest = max(_labels(block, x) for block in head.blocks)
    rows = max(16, _HELD // max(1, columns, 2 * min(k, columns) * widest) // 16 * 16)
    bits = None
    if allowed is not None:
        slots = sum(block.bias.numel() for block in head.blocks)
        check_allowed(allowed, len(x), slots)
        bits = _bits(allowed, slots, x.device)
    parts = [
        _topk(part, head, k, columns, widest, None if bits is None else bits[i * rows :])
        for i, part in enumerate(x.split(rows))
    ]
    return (
        (torch.cat([scores for scores, _ in parts]), torch.cat([labels for _, labels in parts])) if len(parts) > 1 else parts[0]
    )


def _topk(x: Tensor, head: DeviceHead, k: int, columns: int, widest: int, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """`columns` is how many tiles the head has, `widest` the labels of its widest ones."""
    B = len(x)
    maxima = x.new_empty((B, columns), dtype=torch.float32)
    first, place, starts = 0, 0, []
    for block in head.blocks:
        starts.append((first, place))
        tiles = block.groups * (block.group_size // _labels(block, x))
        if tiles and B:
            _maxima(x, block, maxima[:, first : first + tiles], allowed, place)
        first += tiles
        place += block.groups * block.group_size
    per_row = min(k, columns)
    chosen = torch.topk(maxima, per_row, dim=1, sorted=False).indices
    found = x.new_full((B, per_row, widest), float("-inf"), dtype=torch.float32)
    labels = x.new_full((B, per_row, widest), -1, dtype=torch.int32)
    for block, (first, place) in zip(head.blocks, starts, strict=True):
        _rescore(x, block, chosen, first, found, labels, allowed, place)
    best, at = torch.topk(found.flatten(1), k, dim=1)
    answer = labels.flatten(1).gather(1, at)
    return best, answer if allowed is None else answer.masked_fill(best.isneginf(), -1)


def _bits(allowed: Sequence[Subset | None], slots: int, device: torch.device) -> Tensor:
    """int32 [B, words]: bit i of word j of a row says whether it may give the label in place 32 · j + i."""
    words = triton.cdiv(slots, 32)
    subsets = [EVERY if subset is None else subset for subset in allowed]
    at = [row * words + (subset.places >> 5) for row, subset in enumerate(subsets)]
    bit = [(1 << (subset.places & 31)).astype(np.uint32) for subset in subsets]
    bits = torch.zeros(len(subsets) * words, dtype=torch.int32, device=device)
    if subsets:
        listed, one = torch.from_numpy(np.concatenate(at)), torch.from_numpy(np.concatenate(bit).view(np.int32))
        bits.index_add_(0, listed.to(device), one.to(device))  # places are distinct: a sum of bits sets each of them
    bits = bits.view(len(subsets), words)
    excluded = torch.tensor([subset.excluded for subset in subsets], dtype=torch.bool, device=device)
    return torch.where(excluded[:, None], ~bits, bits)


def _maxima(x: Tensor, block: DeviceBlock, maxima: Tensor, allowed: Tensor | None, place: int) -> None:
    """maxima [B, tiles], a view of rows that may be longer, from x [B, D]."""
    dtype, GT = block.compute_type(x.dtype), _labels(block, x)
    BM = _rows(len(x), dtype, block)
    constants = _constants(block) | {"GT": GT, "KB": _inputs(block, dtype), "BM": BM}
    if block.connectivity == "private":
        configs = [Config({"SPAN": 1}, warps, stages=1) for warps in ((1, 2) if GT * BM <= 1024 else (4, 8))]
    elif dtype == torch.float32:
        configs = [Config({"SPAN": 1}, 4)]
    else:
        configs = [Config({"SPAN": 1}, 4), Config({"SPAN": 4}, 4, stages=3), Config({"SPAN": 4}, 8, stages=3)]
    xt = transposed(x, dtype, BM)

    def launch(config: Config, block: DeviceBlock = block) -> None:
        tiles = block.groups * (block.group_size // GT)
        arguments = {
            "xt": xt, **_buffers(block), "allowed": allowed, "maxima": maxima, "B": len(x), "ldx": xt.shape[1],
            "columns": maxima.stride(0), "tiles": tiles, "words": 0 if allowed is None else allowed.stride(0), "place": place,
        }  # fmt: skip
        programs = triton.cdiv(tiles, config.sizes["SPAN"]) * triton.cdiv(len(x), BM)
        run(score.tile_maxima, programs, arguments, constants, config)

    problem = ("maxima", block.dtype, dtype, allowed is None, *constants.values())
    launch(choose(x, problem, configs, lambda: lambda config: launch(config, block.part(slice(_SAMPLE)))))


def _rescore(
    x: Tensor, block: DeviceBlock, chosen: Tensor, first: int, found: Tensor, labels: Tensor, allowed: Tensor | None, place: int
) -> None:
    GT = _labels(block, x)
    arguments = {
        "x": x.to(block.compute_type(x.dtype)).contiguous(), "chosen": chosen, **_buffers(block), "allowed": allowed,
        "out": found, "labels": labels, "first": first, "tiles": block.groups * (block.group_size // GT), "width": block.width,
        "per_row": chosen.shape[1], "words": 0 if allowed is None else allowed.stride(0), "place": place,
    }  # fmt: skip
    constants = _constants(block) | {"GT": GT, "KB": power_of_two(block.fan_in, 1, 64), "SLOTS": found.shape[2]}
    run(score.chosen_scores, chosen.numel(), arguments, constants, Config({}, 4, stages=1))


def scores(x: Tensor, block: DeviceBlock, dtype: torch.dtype = torch.float32) -> Tensor:
    """All scores of a block, [B, N, G] of type `dtype`, for x [B, D]; padding slots score −inf."""
    check_input(x, block.width)
    out = x.new_empty((len(x), block.groups, block.group_size), dtype=dtype)
    compute, GT = block.compute_type(x.dtype), _labels(block, x)
    BM = _rows(len(x), compute, block)
    xt = transposed(x, compute, BM)
    arguments = {"xt": xt, **_buffers(block), "out": out, "B": len(x), "ldx": xt.shape[1], "N": block.groups}
    constants = _constants(block) | {"GT": GT, "KB": _inputs(block, compute), "BM": BM}
    programs = block.groups * (block.group_size // GT) * triton.cdiv(len(x), BM)
    run(score.tile_scores, programs, arguments, constants, Config({}, 4))
    return out


def grad_input(grad: Tensor, block: DeviceBlock) -> Tensor:
    """∂/∂x fp32 [B, D] from the gradient of the scores [B, N, G], fp32 or of the values' type. It is summed in any order."""
    _check_gradient(grad, block)
    B, GT = len(grad), _labels(block, grad)
    sizes = _gradient_sizes(block, grad, GT)
    _check_count(B, block.width)
    grad_xt = grad.new_zeros((block.width, B), dtype=torch.float32)
    arguments = {
        "grad": grad.contiguous(), "values": block.values, "indices": block.indices, "grad_xt": grad_xt, "B": B, "ldx": B,
        "N": block.groups,
    }  # fmt: skip
    programs = block.groups * (block.group_size // GT) * triton.cdiv(block.fan_in, sizes["KB"]) * triton.cdiv(B, sizes["BM"])
    run(backward.by_inputs, programs, arguments, _shape(block) | sizes, Config({}, 4))
    return grad_xt.t()


def grad_values(x: Tensor, grad: Tensor, block: DeviceBlock, dtype: torch.dtype = torch.float32) -> Tensor:
    """∂/∂values [N, K, G] of type `dtype` from x [B, D] and the gradient of the scores [B, N, G], both of one type."""
    check_input(x, block.width)
    _check_gradient(grad, block)
    if len(grad) != len(x) or grad.dtype != x.dtype:
        raise ValueError(f"grad is {grad.dtype} with {len(grad)} rows, x is {x.dtype} with {len(x)}")
    GT = _labels(block, grad)
    sizes = _gradient_sizes(block, grad, GT)
    xt = transposed(x, x.dtype, sizes["BM"])
    out = torch.empty_like(block.values, dtype=dtype)
    arguments = {
        "xt": xt, "grad": grad.contiguous(), "indices": block.indices, "out": out, "B": len(x), "ldx": xt.shape[1],
        "N": block.groups,
    }  # fmt: skip
    programs = block.groups * (block.group_size // GT) * triton.cdiv(block.fan_in, sizes["KB"])
    run(backward.by_values, programs, arguments, _shape(block) | sizes, Config({}, 4))
    return out


def check_input(x: Tensor, width: int) -> None:
    """ValueError unless x is [B, width] of a type and on a device that the kernels read."""
    if x.ndim != 2 or x.shape[1] != width or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"x is {x.dtype} {list(x.shape)}, expected float32, float16 or bfloat16 [B, {width}]")
    if not (x.is_cuda or INTERPRETED):
        raise ValueError(f"x is on {x.device}, these kernels run on a CUDA device")


def transposed(x: Tensor, dtype: torch.dtype, BM: int) -> Tensor:
    """x [B, D] as [D, B] of another type, with columns of zeros up to a whole number of BM."""
    columns = max(1, triton.cdiv(len(x), BM)) * BM
    _check_count(columns, x.shape[1])
    xt = x.new_zeros((x.shape[1], columns), dtype=dtype)
    xt[:, : len(x)] = x.t()
    return xt


def _check_count(B: int, width: int) -> None:
    if B * width >= 1 << 31:
        raise ValueError(f"x is [{B}, {width}]: the kernels count its numbers in 32 bits; give them fewer rows at once")


def _buffers(block: DeviceBlock) -> dict[str, Tensor | None]:
    return {name: getattr(block, name) for name in ("values", "scales", "bias", "label_ids", "indices")}


def _shape(block: DeviceBlock) -> dict[str, Any]:
    return {"K": block.fan_in, "G": block.group_size, "CONNECTIVITY": block.connectivity}


def _constants(block: DeviceBlock) -> dict[str, Any]:
    return _shape(block) | {"FP8": block.dtype == "fp8"}


def _labels(block: DeviceBlock, x: Tensor) -> int:
    """GT: fewer in fp32, whose products take more registers."""
    return labels_at_once(block.group_size, 32 if block.compute_type(x.dtype) == torch.float32 else 64)


def _rows(B: int, dtype: torch.dtype, block: DeviceBlock) -> int:
    """BM: what tensor cores take at least, and what registers hold at most."""
    if block.connectivity == "private":
        return power_of_two(B, 1, 64)
    return power_of_two(B, 16, 32 if dtype == torch.float32 else 128)


def _inputs(block: DeviceBlock, dtype: torch.dtype) -> int:
    return power_of_two(block.fan_in, 16, 32 if dtype == torch.float32 else 128)


def _gradient_sizes(block: DeviceBlock, grad: Tensor, GT: int) -> dict[str, int]:
    if block.connectivity == "private":
        return {"GT": GT, "KB": max(1, 128 // GT), "BM": power_of_two(len(grad), 1, 16)}
    most = 32 if grad.dtype == torch.float32 else 64
    return {"GT": GT, "KB": power_of_two(block.fan_in, 16, most), "BM": power_of_two(len(grad), 16, most)}


def _check_gradient(grad: Tensor, block: DeviceBlock) -> None:
    if grad.ndim != 3 or grad.shape[1:] != block.bias.shape or grad.dtype not in (torch.float32, block.values.dtype):
        raise ValueError(
            f"grad is {grad.dtype} {list(grad.shape)}, expected float32 or {block.values.dtype} "
            f"[B, {block.groups}, {block.group_size}]"
        )
    if block.scales is not None:
        raise ValueError(f"a block with {block.dtype} values has no gradient")
    if not (grad.is_cuda or INTERPRETED):
        raise ValueError(f"grad is on {grad.device}, these kernels run on a CUDA device")
