"""The reference itself, against torch in fp64: dense matrices, autograd and torch's optimizers, which share no code with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models import dtypes
from models.head import Block
from models.kernels import Optimizer, reference
from tests.kernels.cases import Shape, copy, each_connectivity, head_of, random_block, random_input, random_positives

SHAPE = Shape(9, 23, 70, 6, 32)


def positions(block: Block) -> torch.Tensor:
    """int64 [N, K, G]: the input that each weight reads."""
    if block.indices is None:
        indices = np.arange(block.width)[None, :, None]
    else:
        indices = block.indices if block.indices.ndim == 3 else block.indices[:, :, None]
    return torch.from_numpy(np.broadcast_to(indices, block.values.shape).astype(np.int64))


def dense_scores(x: torch.Tensor, weights: torch.Tensor, block: Block) -> torch.Tensor:
    """[B, N, G] through a dense matrix [N, D, G] that holds each weight [N, K, G] at its input."""
    n, _, g = block.values.shape
    matrix = torch.zeros(n, block.width, g, dtype=torch.float64).scatter(1, positions(block), weights)
    scale = 1 if block.scales is None else torch.from_numpy(block.scales).double()
    return torch.einsum("bd,ndg->bng", x, matrix) * scale


each_dtype = pytest.mark.parametrize("dtype", list(dtypes.STORAGE))


@each_connectivity
@each_dtype
def test_scores_topk_and_gradients(dtype: str, connectivity: str) -> None:
    block, x = random_block(SHAPE, connectivity, dtype), random_input(SHAPE)
    inputs = torch.from_numpy(x).double().requires_grad_()
    weights = torch.from_numpy(dtypes.decode(block.values, dtype, np.float64)).requires_grad_()
    scores = dense_scores(inputs, weights, block) + torch.from_numpy(block.bias).double()
    grad = np.random.default_rng(4).standard_normal(scores.shape)
    scores.backward(torch.from_numpy(grad))

    expected = scores.detach().masked_fill(torch.from_numpy(block.label_ids < 0), -torch.inf)
    np.testing.assert_allclose(reference.scores(x, block), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(reference.grad_input(grad, block), inputs.grad, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(reference.grad_values(x, grad, block), weights.grad, rtol=1e-12, atol=1e-12)

    best = expected.flatten(1).topk(5)
    ours, labels = reference.topk(x, head_of(block), 5)
    np.testing.assert_allclose(ours, best.values, rtol=1e-12)
    np.testing.assert_array_equal(labels, block.label_ids.reshape(-1)[best.indices])


def torch_optimizer(kind: str, settings: Optimizer, weights: torch.Tensor, bias: torch.Tensor) -> list[torch.optim.Optimizer]:
    """Weight decay is decoupled; torch's SGD has none, so there the test decays the weights itself."""
    if kind == "adam":
        rates = {"lr": settings.lr, "betas": (settings.beta1, settings.beta2), "eps": settings.eps}
        return [
            torch.optim.AdamW([weights], weight_decay=settings.weight_decay, **rates),
            torch.optim.AdamW([bias], weight_decay=0.0, **rates),
        ]
    momentum = settings.beta1 if kind == "momentum" else 0.0
    return [torch.optim.SGD([weights, bias], lr=settings.lr, momentum=momentum)]


@each_connectivity
@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
def test_training_steps(kind: str, loss: str, connectivity: str) -> None:
    block, x = random_block(SHAPE, connectivity, "fp32"), random_input(SHAPE)
    positives = random_positives(x, block)
    settings = Optimizer(kind, lr=0.05, beta1=0.7, beta2=0.9, eps=1e-4, weight_decay=0.3)
    real = torch.from_numpy(block.label_ids >= 0)
    target = torch.zeros(len(x), real.numel(), dtype=torch.float64)
    target[positives.rows, positives.slots] = 1
    target = target.reshape(len(x), *real.shape)[:, real]

    weights = torch.from_numpy(block.values).double().requires_grad_()
    bias = torch.from_numpy(block.bias).double().requires_grad_()
    start = weights.detach().clone()
    optimizers = torch_optimizer(kind, settings, weights, bias)
    ours, moments = copy(block), settings.moments(block)
    for step in range(1, 4):
        inputs = torch.from_numpy(x).double().requires_grad_()
        z = (dense_scores(inputs, weights, block) + bias)[:, real]
        if loss == "bce":
            total = torch.nn.functional.binary_cross_entropy_with_logits(z, target, reduction="sum")
        else:
            total = (1 - (2 * target - 1) * z).clamp(min=0).square().sum()
        total = total / len(x)
        for optimizer in optimizers:
            optimizer.zero_grad()
        total.backward()
        if kind != "adam":
            weights.data *= 1 - settings.lr * settings.weight_decay
        for optimizer in optimizers:
            optimizer.step()

        value, grad_x = reference.train_step(
            x, positives, ours, moments, loss=loss, optimizer=settings, step=step, key=0, precision=np.float64
        )
        # fp32 storage of weights, biases and moments is all that separates the two.
        assert value == pytest.approx(total.item(), rel=1e-5)
        np.testing.assert_allclose(grad_x, inputs.grad, rtol=1e-4, atol=1e-5)
        kept = real[:, None, :].expand_as(weights)
        np.testing.assert_allclose(ours.values[kept], weights.detach()[kept], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(ours.bias[real], bias.detach()[real], rtol=1e-4, atol=1e-5)
    assert (weights.detach() - start).abs().max() > 0.01


def test_stochastic_rounding_keeps_what_bf16_holds_and_what_is_not_finite() -> None:
    numbers = np.float32([0, -0.0, 1, -2.5, np.inf, -np.inf, np.nan, 2.0**-133])
    for bits in (0, 1, 0x7FFF, 0xFFFF):
        rounded = dtypes.decode(reference.round_stochastically(numbers, np.uint32(bits)), "bf16")
        np.testing.assert_array_equal(rounded, numbers)


@pytest.mark.parametrize("number", [1.001, -1.001, 3e-39, 1e30, -7.77e-5])
def test_stochastic_rounding_goes_up_with_the_share_of_bits_that_carry(number: float) -> None:
    exact = np.float32(number)
    every = reference.round_stochastically(np.full(1 << 16, exact), np.arange(1 << 16, dtype=np.uint32))
    decoded = dtypes.decode(every, "bf16", np.float64)
    assert len(np.unique(decoded)) == 2
    assert decoded.mean() == pytest.approx(float(exact), rel=1e-12)
