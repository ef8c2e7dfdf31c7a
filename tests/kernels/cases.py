"""What the kernel tests share: shapes worth trying, blocks and batches for them, and the three-way rule.

Dimensions: B batch, D width, L labels, K fan-in, G group size, N groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import numpy as np
import pytest

from models.head import Block, Head
from models.kernels import Positives, cpu

T = TypeVar("T")
CONNECTIVITIES = ("dense", "shared", "private")
DTYPES = ("fp32", "fp16", "bf16", "int8")
# Where shared blocks have a first look in few bits.
SCREENING = [level for level in cpu.LEVELS if level in ("avx2", "avx512", "avx512vnni")]

# Above other parameters, so that the instruction sets of one case follow each other and share its truth (three_ways).
each_level = pytest.mark.parametrize("level", cpu.LEVELS, indirect=True)
each_connectivity = pytest.mark.parametrize("connectivity", CONNECTIVITIES)


@dataclass(frozen=True)
class Shape:
    B: int
    D: int
    L: int
    K: int  # ignored by dense blocks
    G: int
    threads: int = 1  # take part only where there are 8 groups for each

    def __str__(self) -> str:
        return f"B{self.B}-D{self.D}-L{self.L}-K{self.K}-G{self.G}-T{self.threads}"


# Every register tile, strip and remainder of the kernels occurs: batches around 8, 16 and 48 rows, K of one, odd, above 256
# and equal to D, one label, a last group that is nearly empty, the largest width, more threads than groups.
SHAPES = (
    Shape(0, 16, 40, 4, 16),
    Shape(1, 1, 1, 1, 16),
    Shape(1, 16, 50, 16, 32),
    Shape(1, 37, 95, 5, 48, threads=2),
    Shape(1, 768, 900, 32, 32, threads=3),
    Shape(2, 37, 1, 1, 16),
    Shape(2, 65_536, 17, 70, 16),
    Shape(3, 16, 100, 16, 64),
    Shape(7, 384, 530, 17, 16, threads=3),
    Shape(8, 384, 129, 32, 64, threads=2),
    Shape(16, 101, 420, 33, 16, threads=3),
    Shape(17, 384, 97, 300, 48),
    Shape(33, 90, 600, 64, 32, threads=2),
    Shape(64, 768, 33, 768, 16),
    Shape(130, 101, 300, 25, 32),
)


def random_block(shape: Shape, connectivity: str, dtype: str, seed: int = 0, first: int = 0) -> Block:
    """A block of labels first … first + L − 1 with biases, in random slots: padding lies anywhere.

    Padding slots hold weights and a large bias, so that one that takes part shows.
    """
    rng = np.random.default_rng(seed)
    padded = -(-shape.L // shape.G) * shape.G
    block = Block.random(
        np.arange(padded, dtype=np.int32), width=shape.D, connectivity=connectivity, fan_in=shape.K, group_size=shape.G,
        dtype=dtype, rng=rng,
    )  # fmt: skip
    labels = rng.permutation(padded).astype(np.int32) + first
    labels[labels >= first + shape.L] = -1
    block.label_ids[...] = labels.reshape(block.label_ids.shape)
    block.bias[...] = rng.standard_normal(block.bias.shape, dtype=np.float32)
    block.bias[block.label_ids < 0] = 10
    return block


def random_input(shape: Shape, seed: int = 1) -> np.ndarray:
    """fp32 [B, D]"""
    return np.random.default_rng(seed).standard_normal((shape.B, shape.D), dtype=np.float32)


def head_of(*blocks: Block) -> Head:
    return Head(blocks[0].width, sum(int((block.label_ids >= 0).sum()) for block in blocks), blocks)


def copy(block: Block, **changes: object) -> Block:
    """The block with values and bias of its own, for a step to change."""
    return replace(block, **{"values": block.values.copy(), "bias": block.bias.copy(), **changes})


def random_positives(x: np.ndarray, block: Block, seed: int = 2, weighted: bool = False) -> Positives:
    """Up to three positives per row, none in the first of several rows; the first label is positive in all the others.

    Weights are 0.25 to 4, the first of them 0, or none.
    """
    rng = np.random.default_rng(seed)
    slots = np.flatnonzero(block.label_ids.reshape(-1) >= 0)
    pairs = {(int(slots[0]), row) for row in range(1, len(x))}
    pairs |= {(int(slot), row) for row in range(int(len(x) > 1), len(x)) for slot in rng.choice(slots, 3)}
    ordered = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)
    weights = (4 ** rng.uniform(-1, 1, len(ordered))).astype(np.float32) if weighted else None
    if weighted:
        weights[:1] = 0
    return Positives(ordered[:, 0].copy(), ordered[:, 1].astype(np.int32), weights)


@lru_cache(maxsize=4)  # so that every instruction set is held against the same work, done once
def three_ways(compute: Callable[..., T], *case: object) -> tuple[T, T]:
    """The truth, compute(fp64, *case), and the same in the kernels' precision, compute(fp32, *case)."""
    return compute(np.float64, *case), compute(np.float32, *case)


def assert_close(
    kernel: np.ndarray, plain: np.ndarray, truth: np.ndarray, what: str, roundings: int = 4, size: float | None = None
) -> None:
    """The three-way rule: err(kernel) ≤ 2·err(reference) + tiny, where err is the largest distance to the fp64 truth.

    `plain` is the reference in fp32; it may be right by luck where few numbers are compared. `tiny` therefore grants a few
    `roundings`, 2⁻²⁴ each, of a number of the given size, by default the largest of the result. Four are: multiply, add,
    bias, store.
    """
    assert kernel.shape == truth.shape, what
    finite = np.isfinite(truth)
    np.testing.assert_array_equal(kernel[~finite], truth[~finite], err_msg=what)
    largest = np.max(np.abs(truth[finite]), initial=0) if size is None else size
    allowed = 2 * worst(plain, truth) + roundings * 2.0**-24 * largest
    assert worst(kernel, truth) <= allowed, (
        f"{what}: the kernel is off by {worst(kernel, truth):.3e}, the reference by {worst(plain, truth):.3e}, "
        f"allowed are {allowed:.3e}"
    )


def worst(numbers: np.ndarray, truth: np.ndarray) -> float:
    """The largest distance of finite truths; NaN if any number is."""
    finite = np.isfinite(truth)
    return float(np.max(np.abs(np.asarray(numbers, dtype=np.float64)[finite] - truth[finite]), initial=0))
