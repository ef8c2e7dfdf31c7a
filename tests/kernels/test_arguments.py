"""Wrong arguments are refused with a ValueError that says which, before any kernel reads or writes out of bounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from models import kernels
from models.kernels import Moments, Optimizer, Positives, cpu
from tests.kernels.cases import Shape, copy, head_of, random_block, random_input, random_positives
from tests.test_head import quantized_block

SHAPE = Shape(4, 20, 40, 5, 16)
BLOCK = random_block(SHAPE, "shared", "fp32")
X = random_input(SHAPE)
POSITIVES = random_positives(X, BLOCK)
ADAM = Optimizer("adam")
GRAD = np.zeros((4, 3, 16), dtype=np.float32)


def with_nan(x: np.ndarray, row: int) -> np.ndarray:
    x = x.copy()
    x[row, 3] = np.nan
    return x


def frozen(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


def zeros(shape: tuple[int, ...], dtype: type = np.float32, order: str = "C") -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(shape, dtype, order), np.zeros(shape, dtype, order)


def pairs(*wanted: tuple[int, int]) -> Positives:
    """Positives from (slot, row) pairs."""
    return Positives(np.array([slot for slot, _ in wanted], np.int64), np.array([row for _, row in wanted], np.int32))


def train(**changes: object) -> None:
    arguments = {
        "x": X, "positives": POSITIVES, "block": copy(BLOCK), "loss": "bce", "optimizer": ADAM, "step": 1, "key": 0, **changes,
    }  # fmt: skip
    arguments.setdefault("moments", ADAM.moments(BLOCK))
    kernels.train_step(**arguments)


FIRST = int(np.flatnonzero(BLOCK.label_ids.reshape(-1) >= 0)[0])
PADDING = int(np.flatnonzero(BLOCK.label_ids.reshape(-1) < 0)[0])
UNFIT = "^moments of {} do not fit the block and optimizer 'adam'$"
IN_PLACE = "^values, bias and moments change in place: they must be writable and contiguous$"
ORDER = "^positives are not distinct and in order of slot, then row$"
WEIGHTS = "^weights of positives must be fp32, one for each, finite and not negative$"
OUTSIDE = "^positives do not fit the block and batch$"
MOMENTS = ADAM.moments(BLOCK)

WRONG_STEPS = {
    "x of fp64": ({"x": X.astype(np.float64)}, r"^x is float64 \[4, 20\], expected float32 \[B, 20\]$"),
    "int8 values": (
        {"block": quantized_block(), "x": np.zeros((1, 40), np.float32)},
        "^a block with int8 values cannot be trained",
    ),
    "fp16 values": (
        {"block": random_block(SHAPE, "shared", "fp16")},
        "^a block with fp16 values cannot be trained; use fp32 or bf16$",
    ),
    "another loss": ({"loss": "softmax"}, "^loss is 'softmax', must be 'bce' or 'squared_hinge'$"),
    "another optimizer": ({"optimizer": Optimizer("lion")}, "^optimizer is 'lion', must be one of sgd, momentum, adam$"),
    "step 0": ({"step": 0}, "^step is 0, must count from 1$"),
    "no moments": ({"moments": Moments((), ())}, UNFIT.format("values")),
    "moments of momentum": ({"moments": Optimizer("momentum").moments(BLOCK)}, UNFIT.format("values")),
    "moments of another block": ({"moments": replace(MOMENTS, values=zeros((2, 5, 16)))}, UNFIT.format("values")),
    "moments in fp64": ({"moments": replace(MOMENTS, values=zeros((3, 5, 16), np.float64))}, UNFIT.format("values")),
    "bias moments missing": ({"moments": replace(MOMENTS, bias=())}, UNFIT.format("bias")),
    "bias moments too short": ({"moments": replace(MOMENTS, bias=zeros((1, 16)))}, UNFIT.format("bias")),
    "bias moments in fp64": ({"moments": replace(MOMENTS, bias=zeros((3, 16), np.float64))}, UNFIT.format("bias")),
    "moments in another order": ({"moments": replace(MOMENTS, values=zeros((3, 5, 16), order="F"))}, IN_PLACE),
    "values read-only": ({"block": replace(BLOCK, values=frozen(BLOCK.values))}, IN_PLACE),
    "bias read-only": ({"block": replace(BLOCK, bias=frozen(BLOCK.bias))}, IN_PLACE),
    "a slot too many": ({"positives": Positives(POSITIVES.slots, POSITIVES.rows[1:])}, OUTSIDE),
    "slot −1": ({"positives": pairs((-1, 0))}, OUTSIDE),
    "slot beyond the block": ({"positives": pairs((FIRST, 0), (48, 0))}, OUTSIDE),
    "row −1": ({"positives": pairs((FIRST, -1))}, OUTSIDE),
    "row beyond the batch": ({"positives": pairs((FIRST, 4))}, OUTSIDE),
    "slots descending": ({"positives": pairs((FIRST + 1, 0), (FIRST, 0))}, ORDER),
    "the same pair twice": ({"positives": pairs((FIRST, 0), (FIRST, 2), (FIRST, 2))}, ORDER),
    "a weight too many": ({"positives": replace(POSITIVES, weights=np.ones(len(POSITIVES.slots) + 1, np.float32))}, WEIGHTS),
    "weights of fp64": ({"positives": replace(POSITIVES, weights=np.ones(len(POSITIVES.slots)))}, WEIGHTS),
    "a weight below 0": ({"positives": replace(POSITIVES, weights=-np.ones(len(POSITIVES.slots), np.float32))}, WEIGHTS),
    "no target left": ({"smoothing": 1.0}, "^smoothing is 1.0, must be at least 0 and below 1$"),
    "a padding slot": ({"positives": pairs((PADDING, 0))}, "^positives name a padding slot$"),
}


@pytest.mark.parametrize(("changes", "complaint"), WRONG_STEPS.values(), ids=WRONG_STEPS)
def test_wrong_steps_are_refused(changes: dict, complaint: str) -> None:
    train()
    block = changes.get("block", copy(BLOCK))
    before = block.values.copy()
    with pytest.raises(ValueError, match=complaint):
        train(**{**changes, "block": block})
    np.testing.assert_array_equal(block.values, before)


WRONG_CALLS = {
    "x flat": (lambda: kernels.scores(X[0], BLOCK), r"^x is float32 \[20\], expected float32 \[B, 20\]$"),
    "x narrow": (lambda: kernels.topk(X[:, 1:], head_of(BLOCK), 3), r"^x is float32 \[4, 19\], expected float32 \[B, 20\]$"),
    "x of fp16": (lambda: kernels.scores(X.astype(np.float16), BLOCK), r"^x is float16 \[4, 20\], expected float32 \[B, 20\]$"),
    "x in other bytes": (lambda: kernels.scores(X.astype(">f4"), BLOCK), r"^x is >f4 \[4, 20\], expected float32 \[B, 20\]$"),
    "x NaN": (lambda: kernels.topk(with_nan(X, 2), head_of(BLOCK), 3), "^x row 2 has a value that is not finite$"),
    "x infinite": (lambda: kernels.scores(X / np.float32(0), BLOCK), "^x row 0 has a value that is not finite$"),
    "no best": (lambda: kernels.topk(X, head_of(BLOCK), 0), "^k is 0, must be at least 1$"),
    "grad flat": (
        lambda: kernels.grad_input(GRAD[0], BLOCK),
        r"^grad is float32 \[3, 16\], expected float32 \[B, 3, 16\]$",
    ),
    "grad of another block": (
        lambda: kernels.grad_input(GRAD[:, 1:], BLOCK),
        r"^grad is float32 \[4, 2, 16\], expected float32 \[B, 3, 16\]$",
    ),
    "grad of fp64": (
        lambda: kernels.grad_values(X, GRAD.astype(np.float64), BLOCK),
        r"^grad is float64 \[4, 3, 16\], expected float32 \[B, 3, 16\]$",
    ),
    "grad of fewer rows": (lambda: kernels.grad_values(X, GRAD[1:], BLOCK), "^grad has 3 rows, x has 4$"),
    "fp8 topk": (
        lambda: kernels.topk(np.zeros((1, 40), np.float32), head_of(quantized_block("fp8")), 1),
        "do not read fp8 values$",
    ),
    "no threads": (lambda: cpu.set_threads(0), "^threads is 0, must be at least 1$"),
    "another instruction set": (
        lambda: cpu.use_level("sse2"),
        f"^instruction set 'sse2' cannot run here; this machine has {', '.join(cpu.LEVELS)}$",
    ),
}


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize(("call", "complaint"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_wrong_calls_are_refused(call, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        call()
