"""The operations on a head. `reference` says what each means; `cpu` (C++) is what these functions run.

Arguments are checked here, once, for every backend: a wrong shape or type is a ValueError that names the argument.
Dimensions: B batch, D width, L labels, N groups, K fan-in, G group size.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np

from models.head import Block, Head
from models.kernels.screening import Screen, Sketch
from models.kernels.step import MOMENTS, Loss, Moments, Optimizer, Positives, check_rule, rounding_key
from models.kernels.subset import Subset, check_allowed

__all__ = [
    "Loss", "Moments", "Optimizer", "Positives", "Screen", "Sketch", "Subset", "grad_input", "grad_values", "rounding_key",
    "scores", "screen", "topk", "train_step",
]  # fmt: skip


def screen(head: Head) -> list[Screen | Sketch | None]:
    """For each block what makes `topk` faster, or None, for as long as the weights stay as they are.

    Shared blocks of a fan-in of at most 128, on a processor with AVX2 (groups of a multiple of 16) or AVX-512 (of 32), have
    their weights in 6 bits: three eighths of a bf16 block's memory. Private blocks of a fan-in from 16 to 256 and a width of
    at most 32,768 have their heaviest connections with weights in 8 bits: a little more than half of a bf16 block's memory,
    used for up to 7 rows, and with AVX-512 VNNI two thirds, used for any number. The first take about 0.15 s for a million
    labels, the second, whose weights are compared with each other, about half a second.
    """
    return [_compiled().screen(block) for block in head.blocks]


def topk(
    x: np.ndarray,
    head: Head,
    k: int,
    allowed: Sequence[Subset | None] | None = None,
    screens: Sequence[Screen | Sketch | None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k best labels per row of x fp32 [B, D], exactly: scores fp32 [B, k] descending, label ids int32 [B, k].

    No [B, L] matrix is made. Equal scores come in any order. With fewer than k labels, all of them (k = L).

    `allowed` has an entry per row: the labels that it may give, None for all. A row that may give fewer than k labels has all
    of them, then score −inf and label −1. Groups of which no row may give a label are not read.

    `screens` is screen(head), of these very weights: the answer is the same, sooner.
    """
    x = _input(x, head.width)
    if k < 1:
        raise ValueError(f"k is {k}, must be at least 1")
    if allowed is not None:
        check_allowed(allowed, len(x), sum(block.bias.size for block in head.blocks))
    if screens is not None and len(screens) != len(head.blocks):
        raise ValueError(f"screens has {len(screens)} entries, the head has {len(head.blocks)} blocks")
    return _compiled().topk(x, head, min(k, head.n_labels), allowed, screens)


def scores(x: np.ndarray, block: Block) -> np.ndarray:
    """All scores of a block, fp32 [B, N, G], for x fp32 [B, D]; padding slots score −inf."""
    return _compiled().scores(_input(x, block.width), block)


def train_step(
    x: np.ndarray,
    positives: Positives,
    block: Block,
    moments: Moments,
    *,
    loss: Loss,
    smoothing: float = 0.0,
    optimizer: Optimizer,
    step: int,
    key: int,
) -> tuple[float, np.ndarray]:
    """Forward, loss, gradients and weight update in one pass: returns the loss and ∂loss/∂x fp32 [B, D].

    The loss is summed over the block's labels and averaged over the rows; that of a positive counts `positives.weights` times,
    and its target is 1 − `smoothing`. Negatives keep target 0: among millions of labels any other adds up to noise.

    Values, bias and moments change in place; bf16 values are rounded stochastically with `key` (see `rounding_key`). `step`
    counts from 1. Values must be fp32 or bf16. Results are the same bit for bit for the same number of threads.
    """
    x = _input(x, block.width)
    if block.dtype not in ("fp32", "bf16"):
        raise ValueError(f"a block with {block.dtype} values cannot be trained; use fp32 or bf16")
    check_rule(loss, smoothing, optimizer, step)
    for name, arrays in (("values", moments.values), ("bias", moments.bias)):
        shape = getattr(block, name).shape
        if len(arrays) != MOMENTS[optimizer.kind] or any(m.shape != shape or m.dtype != np.float32 for m in arrays):
            raise ValueError(f"moments of {name} do not fit the block and optimizer {optimizer.kind!r}")
    for array in (block.values, block.bias, *moments.values, *moments.bias):
        if not (array.flags.writeable and array.flags.c_contiguous):
            raise ValueError("values, bias and moments change in place: they must be writable and contiguous")
    _check_positives(positives, block, len(x))
    return _compiled().train_step(
        x, positives, block, moments, loss=loss, smoothing=smoothing, optimizer=optimizer, step=step, key=key
    )


def grad_input(grad: np.ndarray, block: Block) -> np.ndarray:
    """∂/∂x fp32 [B, D] from the gradient of the scores, fp32 [B, N, G]."""
    return _compiled().grad_input(_gradient(grad, block), block)


def grad_values(x: np.ndarray, grad: np.ndarray, block: Block) -> np.ndarray:
    """∂/∂values fp32 [N, K, G] from x fp32 [B, D] and the gradient of the scores, fp32 [B, N, G]."""
    if len(grad) != len(x):
        raise ValueError(f"grad has {len(grad)} rows, x has {len(x)}")
    return _compiled().grad_values(_input(x, block.width), _gradient(grad, block), block)


def _compiled() -> ModuleType:
    """The compiled kernels, looked for when first used: models.kernels.gpu, inside this package, needs none."""
    from models.kernels import cpu

    return cpu


def _input(x: np.ndarray, width: int) -> np.ndarray:
    if x.ndim != 2 or x.shape[1] != width or x.dtype != np.float32:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}, expected float32 [B, {width}]")
    if not np.isfinite(x).all():
        raise ValueError(f"x row {np.argwhere(~np.isfinite(x))[0][0]} has a value that is not finite")
    return np.ascontiguousarray(x)


def _gradient(grad: np.ndarray, block: Block) -> np.ndarray:
    if grad.ndim != 3 or grad.shape[1:] != block.bias.shape or grad.dtype != np.float32:
        raise ValueError(
            f"grad is {grad.dtype} {list(grad.shape)}, expected float32 [B, {', '.join(map(str, block.bias.shape))}]"
        )
    return np.ascontiguousarray(grad)


def _check_positives(positives: Positives, block: Block, rows: int) -> None:
    slot, row = positives.slots, positives.rows
    if len(slot) != len(row) or (len(slot) and not (_within(slot, block.bias.size) and _within(row, rows))):
        raise ValueError("positives do not fit the block and batch")
    if not ((slot[1:] > slot[:-1]) | ((slot[1:] == slot[:-1]) & (row[1:] > row[:-1]))).all():
        raise ValueError("positives are not distinct and in order of slot, then row")
    if (block.label_ids.reshape(-1)[slot] < 0).any():
        raise ValueError("positives name a padding slot")
    weights = positives.weights
    if weights is not None and not (
        weights.shape == slot.shape and weights.dtype == np.float32 and np.isfinite(weights).all() and (weights >= 0).all()
    ):
        raise ValueError("weights of positives must be fp32, one for each, finite and not negative")


def _within(array: np.ndarray, stop: int) -> bool:
    return bool(array.min() >= 0 and array.max() < stop)
