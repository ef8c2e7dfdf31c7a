"""The training step: the three-way rule for every loss, optimizer and dtype, and what must hold bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from models import dtypes, kernels
from models.head import Block
from models.kernels import Optimizer, Positives, cpu, reference, rounding_key
from models.kernels.step import group_keys, random_bits
from tests.kernels.cases import (
    CONNECTIVITIES,
    SHAPES,
    Shape,
    assert_close,
    copy,
    each_connectivity,
    each_level,
    random_block,
    random_input,
    random_positives,
    three_ways,
    worst,
)

LOSSES = ("bce", "squared_hinge")
OPTIMIZERS = ("sgd", "momentum", "adam")
RULES = [(loss, kind) for loss in LOSSES for kind in OPTIMIZERS]
EVERY_RULE = SHAPES[2], SHAPES[8], SHAPES[10]  # one row, several threads, a whole vector of rows
KEY = rounding_key(seed=7, step=1, block=0)

# Shapes beyond those three take the rules in turn.
each_step = pytest.mark.parametrize(
    ("shape", "loss", "kind"),
    [
        pytest.param(shape, *rule, id=f"{shape}-{'-'.join(rule)}")
        for i, shape in enumerate(SHAPES)
        for rule in (RULES if shape in EVERY_RULE else RULES[i % 6 : i % 6 + 1])
    ],
)
each_rule = pytest.mark.parametrize(("loss", "kind"), RULES)
each_dtype = pytest.mark.parametrize("dtype", ["fp32", "bf16"])


def optimizer_for(kind: str, block: Block) -> Optimizer:
    """Steps that do not blow up rounding errors, the reference's too: short enough not to overshoot, and for Adam, which
    divides by the size of the gradient, not the smallest gradients scaled up to full size."""
    lr = 0.01 if kind == "adam" else 0.25 / block.fan_in
    return Optimizer(kind, lr=lr, eps=0.1, weight_decay=0.1)


def run(
    step,
    block: Block,
    x: np.ndarray,
    loss: str,
    optimizer: Optimizer,
    *,
    steps: int = 1,
    key: int = KEY,
    weighted: bool = False,
    **more,
) -> dict[str, np.ndarray]:
    """`steps` steps on a copy of the block: the last loss and ∂loss/∂x, then the copy's numbers and the moments."""
    positives, block, moments = random_positives(x, block, weighted=weighted), copy(block), optimizer.moments(block)
    for at in range(1, steps + 1):
        total, grad_x = step(x, positives, block, moments, loss=loss, optimizer=optimizer, step=at, key=key + at, **more)
    result = {"loss": np.float64(total), "∂loss/∂x": grad_x, "values": block.values, "bias": block.bias}
    for name, arrays in (("values", moments.values), ("bias", moments.bias)):
        result |= {f"moment {i} of {name}": array for i, array in enumerate(arrays)}
    return result


def as_fp32(block: Block) -> Block:
    return replace(block, dtype="fp32", values=dtypes.decode(block.values, block.dtype))


def by_reference(
    precision: type, shape: Shape, connectivity: str, dtype: str, loss: str, kind: str, steps: int
) -> dict[str, np.ndarray]:
    """Steps on fp32 weights; those of a bf16 block are taken over exactly, so what comes out is not yet rounded to bf16."""
    block = as_fp32(random_block(shape, connectivity, dtype))
    x, optimizer = random_input(shape), optimizer_for(kind, block)
    return run(reference.train_step, block, x, loss, optimizer, steps=steps, precision=precision)


@each_level
@each_connectivity
@each_step
def test_two_steps(shape: Shape, loss: str, kind: str, connectivity: str, level: str) -> None:
    truth, plain = three_ways(by_reference, shape, connectivity, "fp32", loss, kind, 2)
    block, x = random_block(shape, connectivity, "fp32"), random_input(shape)
    cpu.set_threads(shape.threads)
    ours = run(kernels.train_step, block, x, loss, optimizer_for(kind, block), steps=2)
    for what in ours.keys() - {"loss"}:
        # A step is a chain: score, derivative, gradient, moment, weight. Eight roundings for each of the two.
        assert_close(ours[what], plain[what], truth[what], what, roundings=16)


@each_level
@each_connectivity
@each_step
def test_a_bf16_step(shape: Shape, loss: str, kind: str, connectivity: str, level: str) -> None:
    """A bf16 step is the fp32 step from the same weights, then rounded with the random bits of models.kernels.step.

    An fp32 result a little off may round to the neighbour. So the bf16 numbers must lie between what the random bits make of
    the truth less and plus the error that the three-way rule allows.
    """
    truth, plain = three_ways(by_reference, shape, connectivity, "bf16", loss, kind, 1)
    block, x = random_block(shape, connectivity, "bf16"), random_input(shape)
    cpu.set_threads(shape.threads)
    ours = run(kernels.train_step, block, x, loss, optimizer_for(kind, block))
    for what in ours.keys() - {"loss", "values"}:
        assert_close(ours[what], plain[what], truth[what], what, roundings=8)
    exact = truth["values"].astype(np.float64)
    allowed = 2 * worst(plain["values"], exact) + 8 * 2.0**-24 * np.abs(exact).max()
    k0, k1 = group_keys(KEY + 1, np.arange(block.groups))
    element = np.arange(block.fan_in * block.group_size).reshape(block.values.shape[1:])
    bits = random_bits(k0[:, None, None], k1[:, None, None], element)
    low, high = (
        dtypes.decode(reference.round_stochastically((exact + off).astype(np.float32), bits), "bf16")
        for off in (-allowed, allowed)
    )
    rounded = dtypes.decode(ours["values"], "bf16")
    assert ((low <= rounded) & (rounded <= high)).all()
    assert (low == high).mean() > 0.9, "the interval is so wide that it proves nothing"


@each_level
@each_connectivity
@pytest.mark.parametrize("loss", LOSSES)
def test_weighted_and_smoothed_positives(loss: str, connectivity: str, level: str) -> None:
    """A positive's loss is weight · (target · l₊ + (1 − target) · l₋) with the target 1 − smoothing, and so is its gradient."""
    shape = EVERY_RULE[1]
    block, x = random_block(shape, connectivity, "fp32"), random_input(shape)
    settings = {"loss": loss, "optimizer": Optimizer("momentum", lr=0.25 / block.fan_in), "weighted": True, "smoothing": 0.1}
    truth, plain = (run(reference.train_step, block, x, **settings, precision=p) for p in (np.float64, np.float32))
    ours = run(kernels.train_step, block, x, **settings)
    for what in ours.keys() - {"loss"}:
        assert_close(ours[what], plain[what], truth[what], what, roundings=8)
    assert ours["loss"] == pytest.approx(truth["loss"], rel=1e-6)
    for other in ({"weighted": False}, {"smoothing": 0.0}):
        assert np.abs(run(kernels.train_step, block, x, **settings | other)["∂loss/∂x"] - truth["∂loss/∂x"]).max() > 1e-3


def loss_by_reference(precision: type, shape: Shape, connectivity: str, loss: str, spread: float) -> tuple[np.ndarray, float]:
    """The loss, and the size of the numbers that are summed for it: as if every label were wrong."""
    block, x = random_block(shape, connectivity, "fp32"), random_input(shape) * np.float32(spread)
    positives, real = random_positives(x, block), block.label_ids.reshape(-1) >= 0
    z = reference.scores(x, block, precision).reshape(shape.B, real.size)
    target = np.zeros(z.shape, dtype=bool)
    target[positives.rows, positives.slots] = True
    rows = max(1, shape.B)
    wrong = reference.loss_and_gradient(np.abs(z[:, real]), np.zeros(real.sum(), dtype=bool), loss)[0].sum() / rows
    return reference.loss_and_gradient(z[:, real], target[:, real], loss)[0].sum() / rows, float(wrong)


@each_level
@each_connectivity
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("spread", [1, 100], ids=["small scores", "large scores"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss(shape: Shape, spread: float, loss: str, connectivity: str, level: str) -> None:
    """The loss is the sum over real labels, averaged over the rows; none for no rows.

    The rule's tiny error is that of the numbers summed: a positive's loss is made from a negative's, which may be much larger.
    """
    (truth, size), (plain, _) = three_ways(loss_by_reference, shape, connectivity, loss, spread)
    block, x = random_block(shape, connectivity, "fp32"), random_input(shape) * np.float32(spread)
    cpu.set_threads(shape.threads)
    ours = run(kernels.train_step, block, x, loss, Optimizer("sgd", lr=0))["loss"]
    assert_close(ours, plain, truth, "loss", roundings=16, size=size)


@each_level
@pytest.mark.parametrize("connectivity", ["shared", "private"])
def test_derivatives_of_every_score(connectivity: str, level: str) -> None:
    """From −100 to 100 the derivative of the cross-entropy is right to a few last places, not only next to 1.

    Weights are zero, so a label's score is its bias, and the derivative is the first moment of the bias after one step.
    """
    shape = Shape(1, 1, 1 << 15, 1, 64)
    block = random_block(shape, connectivity, "fp32")
    block.values[...] = 0
    block.bias[...] = np.linspace(-100, 100, shape.L).reshape(block.bias.shape)
    optimizer, nothing = Optimizer("momentum"), Positives(np.empty(0, np.int64), np.empty(0, np.int32))
    moments, z = optimizer.moments(block), block.bias.astype(np.float64)
    total, _ = kernels.train_step(
        np.ones((1, 1), np.float32), nothing, block, moments, loss="bce", optimizer=optimizer, step=1, key=0
    )
    smallest = np.exp(-87.0)  # beyond it fp32 has few places left
    np.testing.assert_allclose(moments.bias[0], 1 / (1 + np.exp(-z)), rtol=4 * 2.0**-23, atol=smallest)
    assert total == pytest.approx(np.logaddexp(0, z).sum(), rel=1e-6)


def exact_problem(connectivity: str, dtype: str, kind: str) -> tuple:
    """A step whose every number fp32 holds exactly: small integers and powers of two. So its random bits decide alone."""
    shape = Shape(8, 50, 150, 40, 32)
    rng = np.random.default_rng(5)
    block = random_block(shape, connectivity, "fp32")
    real = (block.label_ids >= 0)[:, None, :]
    values = rng.integers(-32, 33, block.values.shape) / 8 * real
    block = replace(block, dtype=dtype, values=dtypes.encode(values, dtype))
    block.bias[...] = rng.integers(-8, 9, block.bias.shape) / 4
    x = rng.integers(-2, 3, (shape.B, shape.D)).astype(np.float32)
    optimizer = Optimizer(kind, lr=2.0**-6, beta1=0.5, beta2=0.75, eps=2.0**-60, weight_decay=0.5)
    return block, x, optimizer


@each_level
@each_connectivity
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("key", [KEY, (1 << 64) - 2])
@each_dtype
def test_exact_arithmetic_gives_the_reference_bits(dtype: str, key: int, kind: str, connectivity: str, level: str) -> None:
    """With the last key, key + group wraps around."""
    block, x, optimizer = exact_problem(connectivity, dtype, kind)
    cpu.set_threads(3)
    ours = run(kernels.train_step, block, x, "squared_hinge", optimizer, key=key - 1)
    truth = run(reference.train_step, block, x, "squared_hinge", optimizer, key=key - 1)
    for what, array in truth.items():
        np.testing.assert_array_equal(ours[what], array, err_msg=what)
    assert (ours["values"] != block.values).any()


@each_level
@each_connectivity
def test_stochastic_rounding_is_unbiased(connectivity: str, level: str) -> None:
    """Over many keys the mean of each bf16 weight is the fp32 weight, and only its two neighbours occur."""
    keys = 400
    block, x, optimizer = exact_problem(connectivity, "bf16", "sgd")
    x, optimizer = x * np.float32(0.3), replace(optimizer, lr=0.01)
    exact = run(kernels.train_step, as_fp32(block), x, "bce", optimizer)["values"]
    drawn = [run(kernels.train_step, block, x, "bce", optimizer, key=100 * i)["values"] for i in range(keys)]
    drawn = np.stack([dtypes.decode(values, "bf16", np.float64) for values in drawn])
    low = dtypes.decode((exact.view(np.uint32) >> 16).astype(np.uint16), "bf16", np.float64)  # nearer to zero
    high = dtypes.decode(((exact.view(np.uint32) >> 16) + 1).astype(np.uint16), "bf16", np.float64)
    assert ((drawn == low) | (drawn == high)).all()
    share = (exact - low) / (high - low)  # of the keys that round away from zero
    deviation = ((drawn == high).mean(axis=0) - share) / np.sqrt(np.maximum(share * (1 - share), 1e-9) / keys)
    free = (share > 0.05) & (share < 0.95)
    assert free.sum() > 1000
    assert np.abs(deviation[free]).max() < 5.5  # standard deviations, of a few thousand weights
    assert abs(deviation[free].mean()) < 5 / np.sqrt(free.sum())
    assert deviation[free].std() == pytest.approx(1, abs=0.1)


@each_level
@each_connectivity
@each_dtype
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_step_repeats_bit_for_bit(threads: int, dtype: str, connectivity: str, level: str) -> None:
    shape = Shape(19, 70, 500, 13, 16)
    block, x = random_block(shape, connectivity, dtype), random_input(shape)
    cpu.set_threads(threads)
    first, again = (run(kernels.train_step, block, x, "bce", Optimizer("adam", lr=0.1), steps=3) for _ in range(2))
    for what, array in first.items():
        np.testing.assert_array_equal(again[what], array, err_msg=what)
    if dtype == "bf16":
        other = run(kernels.train_step, block, x, "bce", Optimizer("adam", lr=0.1), steps=3, key=KEY + 9)
        assert (other["values"] != first["values"]).any()


@each_level
@each_connectivity
@each_dtype
@each_rule
def test_padding_never_changes(loss: str, kind: str, dtype: str, connectivity: str, level: str) -> None:
    """Whatever stands in padding slots stays, and where it is zero, as in a new block, weight decay leaves it so."""
    shape = Shape(10, 30, 70, 7, 48)
    block, x = random_block(shape, connectivity, dtype), random_input(shape)
    padding = block.label_ids < 0
    for decay in (0.0, 0.1):
        if decay:
            block.values.transpose(0, 2, 1)[padding] = 0
        after = run(kernels.train_step, block, x, loss, Optimizer(kind, lr=0.1, weight_decay=decay), steps=3)
        np.testing.assert_array_equal(after.pop("bias")[padding], block.bias[padding])
        np.testing.assert_array_equal(after.pop("values").transpose(0, 2, 1)[padding], block.values.transpose(0, 2, 1)[padding])
        for what, moment in after.items():
            if what.startswith("moment"):
                assert not (moment.transpose(0, 2, 1) if moment.ndim == 3 else moment)[padding].any(), what
        assert (after["∂loss/∂x"] != 0).any()


@each_level
@each_connectivity
def test_everybodys_positive_and_nobodys(connectivity: str, level: str) -> None:
    """A label positive in every row, in every group, and a batch without any positive."""
    shape = Shape(33, 40, 100, 9, 16)
    block, x = random_block(shape, connectivity, "fp32"), random_input(shape)
    firsts = np.flatnonzero(block.label_ids.reshape(-1) >= 0)[:: shape.G // 2]
    everybody = Positives(np.repeat(firsts, shape.B), np.tile(np.arange(shape.B, dtype=np.int32), len(firsts)))
    nobody = Positives(np.empty(0, np.int64), np.empty(0, np.int32))
    for positives in (everybody, nobody):
        results = []
        for step, more in (
            (kernels.train_step, {}),
            (reference.train_step, {"precision": np.float32}),
            (reference.train_step, {"precision": np.float64}),
        ):
            changed, optimizer = copy(block), Optimizer("sgd", lr=0.1)
            arguments = {"loss": "bce", "optimizer": optimizer, "step": 1, "key": 0}
            grad_x = step(x, positives, changed, optimizer.moments(block), **arguments, **more)[1]
            results.append((grad_x, changed.values, changed.bias))
        for what, *arrays in zip(["∂loss/∂x", "values", "bias"], *results, strict=True):
            assert_close(*arrays, what, roundings=8)


@each_level
@pytest.mark.parametrize("connectivity", CONNECTIVITIES)
def test_training_lowers_the_loss(connectivity: str, level: str) -> None:
    """Fifty bf16 steps of Adam on one batch all but learn it."""
    shape = Shape(20, 64, 100, 24, 32)
    block, x = random_block(shape, connectivity, "bf16"), random_input(shape)
    settings = {"loss": "bce", "optimizer": Optimizer("adam", lr=0.1)}
    first = run(kernels.train_step, block, x, **settings)["loss"]
    assert run(kernels.train_step, block, x, **settings, steps=50)["loss"] < first / 20
