"""The three-way rule for scores and gradients: every connectivity, dtype, shape and instruction set."""

from __future__ import annotations

import numpy as np
import pytest

from models import dtypes, kernels
from models.head import Block
from models.kernels import cpu, reference
from tests.kernels.cases import (
    DTYPES,
    SHAPES,
    Shape,
    assert_close,
    each_connectivity,
    each_level,
    random_block,
    random_input,
    three_ways,
)


def random_gradient(shape: Shape, block: Block) -> np.ndarray:
    """fp32 [B, N, G], zero in padding as autograd gives it."""
    rng = np.random.default_rng(3)
    return rng.standard_normal((shape.B, *block.bias.shape), dtype=np.float32) * (block.label_ids >= 0)


def by_reference(precision: type, shape: Shape, connectivity: str, dtype: str) -> list[np.ndarray]:
    block, x = random_block(shape, connectivity, dtype), random_input(shape)
    grad = random_gradient(shape, block)
    return [
        reference.scores(x, block, precision),
        reference.grad_input(grad, block, precision),
        reference.grad_values(x, grad, block, precision),
    ]


@each_level
@each_connectivity
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_and_gradients(shape: Shape, dtype: str, connectivity: str, level: str) -> None:
    block, x = random_block(shape, connectivity, dtype), random_input(shape)
    grad = random_gradient(shape, block)
    truth, plain = three_ways(by_reference, shape, connectivity, dtype)
    cpu.set_threads(shape.threads)
    ours = [kernels.scores(x, block), kernels.grad_input(grad, block), kernels.grad_values(x, grad, block)]
    for what, array, rough, exact in zip(["scores", "∂/∂x", "∂/∂values"], ours, plain, truth, strict=True):
        assert array.dtype == np.float32
        assert_close(array, rough, exact, what)


@each_level
@each_connectivity
@pytest.mark.parametrize("B", [1, 8])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8"])
def test_every_stored_number_is_read_exactly(dtype: str, B: int, connectivity: str, level: str) -> None:
    """All finite bit patterns, subnormals and −0 included: with one input of 1 a score is the weight itself."""
    storage = dtypes.STORAGE[dtype]
    stored = np.arange(1 << 8 * storage.itemsize).astype(f"u{storage.itemsize}").view(storage)
    stored = stored[dtypes.finite(stored, dtype)]
    shape = Shape(B, 1, len(stored), 1, 16)
    block = random_block(shape, connectivity, dtype)
    block.values[...] = stored.reshape(block.values.shape)
    block.bias[...] = 0
    scores = kernels.scores(np.ones((B, 1), dtype=np.float32), block)
    expected = block.weights(slice(None))[:, 0]
    for row in scores:
        np.testing.assert_array_equal(row, expected)


@each_level
@each_connectivity
def test_input_need_not_be_contiguous(connectivity: str, level: str) -> None:
    shape = Shape(9, 60, 100, 12, 32)
    block, x = random_block(shape, connectivity, "bf16"), random_input(shape)
    grad = random_gradient(shape, block)
    wide = np.zeros((2 * shape.B, 2 * shape.D), dtype=np.float32)
    wide[::2, ::-2] = x
    for other in (wide[::2, ::-2], np.asfortranarray(x)):
        np.testing.assert_array_equal(kernels.scores(other, block), kernels.scores(x, block))
        np.testing.assert_array_equal(kernels.grad_values(other, grad, block), kernels.grad_values(x, grad, block))
    strided = np.asfortranarray(grad)
    np.testing.assert_array_equal(kernels.grad_input(strided, block), kernels.grad_input(grad, block))
    np.testing.assert_array_equal(kernels.grad_values(x, strided, block), kernels.grad_values(x, grad, block))


@each_level
@each_connectivity
def test_padding_takes_no_part_in_scores(connectivity: str, level: str) -> None:
    block, x = random_block(Shape(3, 20, 37, 7, 48), connectivity, "fp32"), random_input(Shape(3, 20, 37, 7, 48))
    padding = np.broadcast_to(block.label_ids < 0, (3, *block.bias.shape))
    scores = kernels.scores(x, block)
    assert (scores[padding] == -np.inf).all()
    assert np.isfinite(scores[~padding]).all()
