"""The GPU kernels by the three-way rule, on a CUDA device. Without one, test_interpreter.py runs them in Triton's interpreter.

The interpreter multiplies bf16 matrices wrongly, so there bf16 values meet fp32 inputs, whose products are exact, and
tensor-core arithmetic is tried in fp16. On a device bf16 takes part as well.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from models import dtypes
from models.head import Block
from models.kernels import Optimizer, Positives, gpu, reference, rounding_key
from models.kernels.gpu import DeviceBlock, DeviceHead, DeviceMoments, DevicePositives
from models.kernels.gpu.launch import INTERPRETED
from tests.kernels.cases import (
    CONNECTIVITIES,
    SHAPES,
    Shape,
    assert_close,
    copy,
    each_connectivity,
    head_of,
    random_block,
    random_input,
    random_positives,
)
from tests.kernels.test_subset import allowed_labels, random_subsets
from tests.kernels.test_train_step import exact_problem, optimizer_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device"),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
KEY = rounding_key(seed=7, step=1, block=0)
TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# values and inputs: exact arithmetic, and tensor cores
TYPES = [("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp16")] + ([] if INTERPRETED else [("bf16", "bf16")])
# One row, padding, groups that are no power of two, fan-ins of one and beyond a tile, more rows than a tile.
SMALL = (
    Shape(1, 1, 1, 1, 16),
    Shape(1, 37, 95, 5, 48),
    Shape(3, 16, 100, 16, 64),
    Shape(17, 101, 40, 40, 32),
    Shape(70, 40, 40, 9, 16),
)
shapes = pytest.mark.parametrize("shape", SMALL if INTERPRETED else SHAPES + SMALL, ids=str)
types = pytest.mark.parametrize("types", TYPES, ids="-".join)


def tensor(array: np.ndarray, dtype: str = "fp32") -> torch.Tensor:
    return torch.from_numpy(array).to(DEVICE, TORCH[dtype])


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """The array in another type and back."""
    return dtypes.decode(dtypes.encode(array, dtype), dtype)


def gradient(shape: Shape, block: Block, dtype: str) -> np.ndarray:
    rng = np.random.default_rng(3)
    grad = rng.standard_normal((shape.B, *block.bias.shape), dtype=np.float32) * (block.label_ids >= 0)
    return rounded(grad, dtype)


@each_connectivity
@types
@shapes
def test_scores_and_gradients(shape: Shape, types: tuple[str, str], connectivity: str) -> None:
    values, inputs = types
    block, x = random_block(shape, connectivity, values), rounded(random_input(shape), inputs)
    grad, ours = gradient(shape, block, inputs), DeviceBlock.of(block, DEVICE)
    results = {
        "scores": gpu.scores(tensor(x, inputs), ours),
        "∂/∂x": gpu.grad_input(tensor(grad, inputs), ours),
        "∂/∂values": gpu.grad_values(tensor(x, inputs), tensor(grad, inputs), ours),
    }
    truth, plain = (
        (reference.scores(x, block, p), reference.grad_input(grad, block, p), reference.grad_values(x, grad, block, p))
        for p in (np.float64, np.float32)
    )
    for (what, result), exact, rough in zip(results.items(), truth, plain, strict=True):
        # Sums run in another order than numpy's, which is pairwise: grant each its length in roundings, up to a few. Tensor
        # cores cut off what does not fit after every 8 or 16 products, always downwards.
        cut = 0 if inputs == "fp32" or INTERPRETED or what != "scores" else block.fan_in // 4
        assert_close(result.cpu().numpy(), rough, exact, what, roundings=8 + cut)


@types
@pytest.mark.parametrize("k", [1, 5, 40, 1000])
def test_topk_of_several_blocks(k: int, types: tuple[str, str]) -> None:
    """More labels than there are slots in a tile, fewer labels than k, padding anywhere, blocks of several group sizes."""
    values, inputs = types
    blocks, first = [], 0
    for connectivity, size, G in (("dense", 20, 16), ("shared", 75, 48), ("private", 70, 64), ("shared", 0, 32)):
        blocks.append(random_block(Shape(5, 33, size, 7, G), connectivity, values, seed=G, first=first))
        first += size
    head, x = head_of(*blocks), rounded(random_input(Shape(5, 33, 0, 0, 0)), inputs)
    scores, labels = (t.cpu().numpy() for t in gpu.topk(tensor(x, inputs), DeviceHead.of(head, DEVICE), k))
    truth, order = reference.topk(x, head, k)
    plain, _ = reference.topk(x, head, k, np.float32)
    assert scores.shape == labels.shape == (5, min(k, first))
    assert_close(scores, plain, truth, "scores", roundings=8)
    every, _ = reference.topk(x, head, first)
    every = np.take_along_axis(every, np.argsort(reference.topk(x, head, first)[1], axis=1), axis=1)
    for row in range(5):
        assert len(set(labels[row])) == labels.shape[1]
        np.testing.assert_allclose(every[row, labels[row]], scores[row], atol=1e-5)
    assert (labels == order).mean() > 0.9


@types
@pytest.mark.parametrize("k", [5, 200])
def test_topk_within_subsets(k: int, types: tuple[str, str]) -> None:
    """Rows of one batch with every kind of subset; where fewer than k labels may be given, −∞ and −1 follow."""
    values, inputs = types
    blocks, first = [], 0
    for connectivity, size, G in (("dense", 20, 16), ("shared", 75, 48), ("private", 70, 64)):
        blocks.append(random_block(Shape(9, 33, size, 7, G), connectivity, values, seed=G, first=first))
        first += size
    head, x = head_of(*blocks), rounded(random_input(Shape(9, 33, 0, 0, 0)), inputs)
    allowed = random_subsets(head, 9)
    scores, labels = (t.cpu().numpy() for t in gpu.topk(tensor(x, inputs), DeviceHead.of(head, DEVICE), k, allowed))
    truth, order = reference.topk(x, head, k, allowed=allowed)
    plain, _ = reference.topk(x, head, k, np.float32, allowed=allowed)
    assert_close(scores, plain, truth, "scores", roundings=8)
    np.testing.assert_array_equal(labels == -1, order == -1)
    assert (labels == order).mean() > 0.9
    for row, subset in enumerate(allowed):
        given = labels[row][labels[row] >= 0]
        assert len(set(given.tolist())) == len(given)
        assert allowed_labels(head, subset)[given].all()


@each_connectivity
@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("inputs", ["fp32", "fp16"])
def test_topk_of_quantized_values(inputs: str, dtype: str, connectivity: str) -> None:
    """Every finite code takes part: they are exact in x's type."""
    shape = Shape(3, 40, 90, 20, 32)
    wide, rng = random_block(shape, connectivity, "fp32"), np.random.default_rng(0)
    codes = np.array([c for c in range(256) if dtype == "int8" or c & 0x7F != 0x7F], np.uint8)
    stored = rng.choice(codes, wide.values.shape).view(dtypes.STORAGE[dtype])
    scales = (rng.uniform(0.5, 2, wide.bias.shape) / 100).astype(np.float32)
    head = head_of(replace(wide, dtype=dtype, values=stored, scales=scales))
    x = rounded(random_input(shape), inputs)
    scores, labels = (t.cpu().numpy() for t in gpu.topk(tensor(x, inputs), DeviceHead.of(head, DEVICE), 12))
    truth, order = reference.topk(x, head, 12)
    plain, _ = reference.topk(x, head, 12, np.float32)
    assert_close(scores, plain, truth, "scores", roundings=8, size=float(np.abs(truth).max()))
    np.testing.assert_array_equal(labels, order)


def run(block: Block, x: np.ndarray, positives: Positives, inputs: str = "fp32", **settings: object) -> dict[str, np.ndarray]:
    """A step on a device: loss, ∂loss/∂x, and the block's numbers and moments afterwards."""
    optimizer = settings["optimizer"]
    ours, after = DeviceBlock.of(block, DEVICE), copy(block)
    moments, theirs = DeviceMoments.zeros(optimizer, ours), optimizer.moments(block)
    loss, grad_x = gpu.train_step(tensor(x, inputs), DevicePositives.of(positives, DEVICE), ours, moments, **settings)
    ours.write_to(after)
    moments.write_to(theirs)
    return results_of(float(loss), grad_x.cpu().numpy(), after, theirs)


def by_reference(
    block: Block, x: np.ndarray, positives: Positives, precision: type, **settings: object
) -> dict[str, np.ndarray]:
    after, moments = copy(block), settings["optimizer"].moments(block)
    loss, grad_x = reference.train_step(x, positives, after, moments, precision=precision, **settings)
    return results_of(loss, grad_x, after, moments)


def results_of(loss: float, grad_x: np.ndarray, block: Block, moments) -> dict[str, np.ndarray]:
    result = {"loss": np.float64(loss), "∂loss/∂x": grad_x, "values": block.values, "bias": block.bias}
    return result | {f"moment {i}": array for i, array in enumerate(moments.values + moments.bias)}


@each_connectivity
@pytest.mark.parametrize(
    ("kind", "loss"),
    [("sgd", "squared_hinge"), ("momentum", "bce"), ("adam", "bce")]
    + ([] if INTERPRETED else [("sgd", "bce"), ("momentum", "squared_hinge"), ("adam", "squared_hinge")]),
)
@pytest.mark.parametrize("shape", SMALL[1:4] if INTERPRETED else SHAPES, ids=str)
def test_a_step_in_fp32(shape: Shape, loss: str, kind: str, connectivity: str) -> None:
    """Weighted, smoothed, and one label everybody's positive."""
    if connectivity == "private" and shape.K > 512:
        pytest.skip("more than the kernel takes")
    block, x = random_block(shape, connectivity, "fp32"), random_input(shape)
    positives = random_positives(x, block, weighted=True)
    settings = {"loss": loss, "optimizer": optimizer_for(kind, block), "smoothing": 0.1, "step": 1, "key": KEY}
    truth, plain = (by_reference(block, x, positives, p, **settings) for p in (np.float64, np.float32))
    ours = run(block, x, positives, **settings)
    for what in ours.keys() - {"loss"}:
        assert_close(ours[what], plain[what], truth[what], what, roundings=16)
    assert ours["loss"] == pytest.approx(truth["loss"], rel=1e-5, abs=1e-6)


@each_connectivity
@pytest.mark.parametrize("B", [600] if INTERPRETED else [513, 1100, 4000])
def test_a_long_batch(B: int, connectivity: str) -> None:
    shape = Shape(B, 20, 16, 9, 16)
    block, x = random_block(shape, connectivity, "fp32"), random_input(shape)
    slots = np.repeat(np.flatnonzero(block.label_ids.reshape(-1) >= 0)[:2], 2)
    positives = Positives(slots, np.array([0, B - 1, 30, B - 2], np.int32))
    settings = {"loss": "bce", "optimizer": optimizer_for("sgd", block), "step": 1, "key": KEY}
    truth, plain = (by_reference(block, x, positives, p, **settings) for p in (np.float64, np.float32))
    ours = run(block, x, positives, **settings)
    for what in ours.keys() - {"loss"}:
        assert_close(ours[what], plain[what], truth[what], what, roundings=16)


@each_connectivity
@pytest.mark.parametrize("types", [pair for pair in TYPES if pair[1] != "fp32"], ids="-".join)
def test_a_step_on_tensor_cores(types: tuple[str, str], connectivity: str) -> None:
    """The gradient of a score is rounded to x's type: that, and no more, is the error granted beyond fp32's."""
    values, inputs = types
    shape = SMALL[3]
    block, x = random_block(shape, connectivity, values), rounded(random_input(shape), inputs)
    positives, optimizer = random_positives(x, block), optimizer_for("momentum", block)
    settings = {"loss": "bce", "optimizer": optimizer, "step": 1, "key": KEY}
    truth = by_reference(block, x, positives, np.float64, **settings)
    ours = run(block, x, positives, inputs, **settings)
    place = {"fp16": 2.0**-11, "bf16": 2.0**-8}[inputs]  # the relative error of rounding a gradient
    target = np.zeros((shape.B, block.bias.size), bool)
    target[positives.rows, positives.slots] = True
    z = reference.scores(x, block)
    g = np.abs(reference.loss_and_gradient(z, target.reshape(z.shape), "bce")[1]) / shape.B * (block.label_ids >= 0)
    size = replace(block, dtype="fp32", values=np.abs(dtypes.decode(block.values, values)))
    bounds = {"∂loss/∂x": reference.grad_input(g, size), "moment 0": reference.grad_values(np.abs(x), g, size)}
    for what, bound in bounds.items():
        assert (np.abs(ours[what] - truth[what]) <= place * bound + 8 * 2.0**-24 * np.abs(bound).max()).all(), what
    assert_close(ours["bias"], truth["bias"].astype(np.float32), truth["bias"], "bias", roundings=16)
    assert ours["loss"] == pytest.approx(truth["loss"], rel=1e-5)


@each_connectivity
@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("key", [(1 << 64) - 2] if INTERPRETED else [KEY, (1 << 64) - 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_exact_arithmetic_gives_the_reference_bits(dtype: str, key: int, kind: str, connectivity: str) -> None:
    """Stochastic rounding draws the same bits as the CPU's, to the last group."""
    block, x, optimizer = exact_problem(connectivity, dtype, kind)
    positives = random_positives(x, block)
    settings = {"loss": "squared_hinge", "optimizer": optimizer, "step": 1, "key": key}
    ours, truth = run(block, x, positives, **settings), by_reference(block, x, positives, np.float64, **settings)
    for what, array in truth.items():
        np.testing.assert_array_equal(ours[what], array, err_msg=what)
    assert (ours["values"] != block.values).any()


@each_connectivity
def test_no_rows_and_no_positives(connectivity: str) -> None:
    shape = Shape(0, 20, 40, 5, 16)
    block, x = random_block(shape, connectivity, "fp32"), random_input(shape)
    nobody = Positives(np.empty(0, np.int64), np.empty(0, np.int32))
    settings = {"loss": "bce", "optimizer": Optimizer("sgd", lr=0.1, weight_decay=0.1), "step": 1, "key": KEY}
    for rows in (x, random_input(replace(shape, B=2))):
        ours, truth = run(block, rows, nobody, **settings), by_reference(block, rows, nobody, np.float64, **settings)
        for what, array in truth.items():
            np.testing.assert_allclose(ours[what], array, rtol=1e-5, atol=1e-6, err_msg=what)
    assert gpu.topk(tensor(x), DeviceHead.of(head_of(block), DEVICE), 3)[1].shape == (0, 3)


def test_more_numbers_than_32_bits_count_are_refused() -> None:
    block = DeviceBlock.of(random_block(Shape(1, 64, 16, 5, 16), "shared", "fp32"), DEVICE)
    rows = 1 << 25  # of the same numbers: no memory
    with pytest.raises(ValueError, match=r"x is \[33554432, 64\]"):
        gpu.scores(torch.zeros(1, 64, device=DEVICE).expand(rows, -1), block)
    with pytest.raises(ValueError, match=r"x is \[33554432, 64\]"):
        gpu.grad_input(torch.zeros(1, *block.bias.shape, device=DEVICE).expand(rows, -1, -1), block)


def test_layers_on_a_device_equal_those_on_the_cpu() -> None:
    from models import layer

    for connectivity in CONNECTIVITIES:
        cpu = layer.FanInLinear(30, 70, fan_in=None if connectivity == "dense" else 7, connectivity=connectivity)
        x, grad = torch.randn(5, 30), torch.randn(5, *cpu.bias.shape)
        there = [t if t is None else t.detach().to(DEVICE) for t in (x, cpu.values, cpu.bias, cpu.indices, grad)]
        torch.testing.assert_close(layer.cuda_scores(*there[:4]).cpu(), layer.scores(x, cpu.values, cpu.bias, cpu.indices))
        torch.testing.assert_close(
            layer.cuda_grad_input(there[4], there[1], there[3], 30).cpu(), layer.grad_input(grad, cpu.values, cpu.indices, 30)
        )
        torch.testing.assert_close(
            layer.cuda_grad_values(there[0], there[4], there[1], there[3]).cpu(),
            layer.grad_values(x, grad, cpu.values, cpu.indices),
        )


def test_log1p_of_the_loss() -> None:
    """Each loss is right to fp32, far from the decision as well: no label's is rounded away among millions."""
    shape = Shape(1, 1, 256, 1, 64)
    block = random_block(shape, "shared", "fp32")
    block.values[...] = 0
    for low, high in ((-80, -10), (-10, 10), (10, 80)):
        block.bias[...] = np.linspace(low, high, shape.L).reshape(block.bias.shape)
        settings = {"loss": "bce", "optimizer": Optimizer("sgd"), "step": 1, "key": KEY}
        nobody = Positives(np.empty(0, np.int64), np.empty(0, np.int32))
        loss = run(block, np.ones((1, 1), np.float32), nobody, **settings)["loss"]
        assert loss == pytest.approx(np.logaddexp(0, block.bias.astype(np.float64)).sum(), rel=1e-6)


@pytest.mark.skipif(INTERPRETED, reason="too large for the interpreter")
def test_millions_of_labels_and_offsets_beyond_32_bits() -> None:
    """2.8 M labels by 1,024 rows: scores and their gradients lie beyond 2³¹ elements.

    The truth of a few planted labels, one of them the last, is known without a matrix of all scores.
    """
    N, K, G, B = 43_750, 32, 64, 1024
    generator = torch.Generator("cuda").manual_seed(0)
    values = torch.zeros(N, K, G, dtype=torch.bfloat16, device="cuda")
    indices = torch.arange(K, dtype=torch.int32, device="cuda").to(torch.uint16).repeat(N, 1)
    ids = torch.arange(N * G, dtype=torch.int32, device="cuda").view(N, G)
    block = DeviceBlock("shared", 64, "bf16", values, torch.zeros(N, G, device="cuda"), ids, indices)
    planted = torch.tensor([0, 1_234_567, N * G - 1], device="cuda")
    weights = torch.randn(3, K, device="cuda", generator=generator).abs().bfloat16() + 1
    values[planted // G, :, planted % G] = weights
    x = torch.rand(B, 64, device="cuda", generator=generator).bfloat16()
    expected = x[:, :K].double() @ weights.double().t()
    scores, labels = gpu.topk(x, DeviceHead(64, N * G, (block,)), 3)
    order = expected.argsort(dim=1, descending=True)
    torch.testing.assert_close(scores.double(), expected.gather(1, order), rtol=1e-5, atol=1e-5)
    assert (planted[order] == labels).float().mean() > 0.99
    every = gpu.scores(x, block, torch.bfloat16)  # B · L is 2.9e9
    torch.testing.assert_close(every[-1].flatten()[planted].double(), expected[-1], rtol=1e-2, atol=1e-2)
    grad = torch.zeros_like(every)
    grad[-1, -1, -1] = 1
    torch.testing.assert_close(gpu.grad_input(grad, block)[-1, :K], weights[2].float())
    torch.testing.assert_close(gpu.grad_values(x, grad, block)[-1, :, -1], x[-1, :K].float())


@pytest.mark.skipif(INTERPRETED, reason="a graph needs a device")
def test_topk_in_a_cuda_graph() -> None:
    """Nothing waits for the device, so the whole call can be captured and replayed with another input."""
    shape = Shape(9, 48, 5000, 16, 32)
    head = DeviceHead.of(head_of(random_block(shape, "shared", "bf16")), "cuda")
    x = tensor(random_input(shape), "bf16")
    gpu.topk(x, head, 10)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gpu.topk(x, head, 10)
    x.copy_(tensor(random_input(shape, seed=9), "bf16"))
    graph.replay()
    for ours, theirs in zip(captured, gpu.topk(x, head, 10), strict=True):
        assert torch.equal(ours, theirs)
