"""The head's operations in C++ (csrc/), for x86-64 (AVX-512 with VNNI and without, AVX2) and aarch64 (NEON), with a scalar form
for all others.

The instruction set is the best this machine has; FANIN_CPU_LEVEL=avx512vnni|avx512|avx2|neon|scalar forces one. All cores that
the process may use take part (affinity mask and cgroup quota); FANIN_THREADS=N or `set_threads` changes that. Calls let go of
the GIL.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import cast

import numpy as np

from models.head import Block, Head
from models.kernels.screening import Screen, Sketch
from models.kernels.step import Loss, Moments, Optimizer, Positives
from models.kernels.subset import EVERY, Subset

INTERFACE = 8  # of _cpu, as csrc/bindings.cpp has it
_BUILD = "run `make set-up`, or `pip install -e .`, in the project's folder"
try:
    import models.kernels._cpu as _cpu  # compiled: it has no source to look at
except ModuleNotFoundError:
    here = os.path.dirname(__file__)
    raise ImportError(
        f"the compiled kernels are missing in {here}: {_BUILD}, or start an installed fanin in another folder"
    ) from None
except ImportError as error:
    raise ImportError(f"the compiled kernels cannot be loaded ({error}): {_BUILD}") from None
if getattr(_cpu, "interface", 0) != INTERFACE:
    raise ImportError(f"the compiled kernels are of another version than the code: {_BUILD}")

LEVELS: tuple[str, ...] = tuple(_cpu.levels())  # what this machine can run, best first
default_threads = _cpu.default_threads
threads = _cpu.threads
level = _cpu.level


def use_level(name: str) -> None:
    """Switches the instruction set; ValueError when this machine cannot run it."""
    if not _cpu.use_level(name):
        raise ValueError(f"instruction set {name!r} cannot run here; this machine has {', '.join(LEVELS)}")


def set_threads(count: int) -> None:
    """Threads of every later call; ValueError below 1."""
    if count < 1:
        raise ValueError(f"threads is {count}, must be at least 1")
    _cpu.set_threads(count)


if forced := os.environ.get("FANIN_CPU_LEVEL"):
    use_level(forced)
if forced := os.environ.get("FANIN_THREADS"):
    set_threads(int(forced))


def _native(block: Block, screen: Screen | Sketch | None = None) -> _cpu.Block:
    native = _cpu.Block(
        block.connectivity, block.width, block.dtype, block.values, block.bias, block.label_ids,
        cast(np.ndarray, block.indices), cast(np.ndarray, block.scales),
    )  # fmt: skip
    if isinstance(screen, Sketch):
        native.use_sketch(screen.values, screen.offsets, screen.rest, screen.scale)
    elif screen is not None:
        native.use_screen(screen.coarse, screen.fine, screen.scale)
    return native


def screen(block: Block) -> Screen | Sketch | None:
    """See models.kernels.screen."""
    if block.connectivity == "private":
        values = np.empty((block.groups, _cpu.sketched(block.fan_in) // 2, block.group_size, 2), dtype=np.int8)
        offsets = np.empty(values.shape, dtype=np.uint16)
        rest = np.empty((block.groups, block.group_size), dtype=np.uint16)
        scale = np.empty((2, block.groups), dtype=np.float32)
        fits = _cpu.sketch(_native(block), values, offsets, rest, scale)
        return Sketch(values, offsets, rest, scale) if fits else None
    eights = -(-block.fan_in // 8)
    coarse = np.empty((block.groups, 2 * eights, block.group_size, 2), dtype=np.uint8)
    fine = np.empty((block.groups, eights, block.group_size, 2), dtype=np.uint8)
    scale = np.empty((6, block.groups), dtype=np.float32)
    return Screen(coarse, fine, scale) if _cpu.screen(_native(block), coarse, fine, scale) else None


def topk(
    x: np.ndarray,
    head: Head,
    k: int,
    allowed: Sequence[Subset | None] | None = None,
    screens: Sequence[Screen | Sketch | None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """See models.kernels.topk. OverflowError when scores of a row are not finite, so that no k best exist."""
    scores = np.empty((len(x), k), dtype=np.float32)
    labels = np.empty((len(x), k), dtype=np.int32)
    subsets = [EVERY if subset is None else subset for subset in allowed or ()]
    places, excluded = [subset.places for subset in subsets], [subset.excluded for subset in subsets]
    blocks = [_native(block, screen) for block, screen in zip(head.blocks, screens or [None] * len(head.blocks), strict=True)]
    _cpu.topk(blocks, x, k, places, excluded, scores, labels)
    if (labels < 0).any():
        wanted = np.array([min(k, subset.size(head.n_labels)) for subset in subsets or [EVERY] * len(x)])
        if (short := (labels >= 0).sum(axis=1) < wanted).any():
            raise OverflowError(f"x row {np.argmax(short)}: scores overflow fp32")
    return scores, labels


def scores(x: np.ndarray, block: Block) -> np.ndarray:
    """See models.kernels.scores."""
    out = np.empty((len(x), block.groups, block.group_size), dtype=np.float32)
    _cpu.scores(_native(block), x, out)
    return out


def train_step(
    x: np.ndarray,
    positives: Positives,
    block: Block,
    moments: Moments,
    *,
    loss: Loss,
    smoothing: float,
    optimizer: Optimizer,
    step: int,
    key: int,
) -> tuple[float, np.ndarray]:
    """See models.kernels.train_step."""
    grad_x = np.empty(x.shape, dtype=np.float32)
    total = np.zeros(1)
    weights = np.ones(len(positives.slots), dtype=np.float32) if positives.weights is None else positives.weights
    _cpu.train_step(
        _native(block), x, positives.slots, positives.rows, weights, block.values, block.bias, list(moments.values),
        list(moments.bias), grad_x, total, loss, smoothing, optimizer.kind, optimizer.lr, optimizer.beta1, optimizer.beta2,
        optimizer.eps, optimizer.weight_decay, step, key,
    )  # fmt: skip
    return float(total[0]), grad_x


def grad_input(grad: np.ndarray, block: Block) -> np.ndarray:
    """See models.kernels.grad_input."""
    grad_x = np.empty((len(grad), block.width), dtype=np.float32)
    _cpu.grad_input(_native(block), grad, grad_x)
    return grad_x


def grad_values(x: np.ndarray, grad: np.ndarray, block: Block) -> np.ndarray:
    """See models.kernels.grad_values."""
    out = np.empty(block.values.shape, dtype=np.float32)
    _cpu.grad_values(_native(block), x, grad, out)
    return out
