"""That the kernels are right on this device, before anything is timed: a short form of tests/kernels/gpu.

Dimensions: B batch, D width, L labels, K fan-in, G group size.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from benchmarks.gpu_problems import Problem, as_dense, random_block, random_input
from models import dtypes
from models.head import Block, Connectivity, Head
from models.kernels import Optimizer, Positives, gpu, reference, rounding_key
from models.kernels.gpu import DeviceBlock, DeviceHead, DeviceMoments, DevicePositives

_TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_ROUNDING = {"fp32": 0.0, "fp16": 2.0**-11, "bf16": 2.0**-8}  # of a score's gradient, to the type of x
_FP32 = 1e-5  # sums in another order, relative to the largest number


def check(problem: Problem, dtype: str, device: torch.device) -> float:
    """Top-k and training steps of one block against the reference in fp64; the largest error, relative, or SystemExit."""
    rng = np.random.default_rng(0)
    block = Block.random(
        np.arange(problem.labels, dtype=np.int32), width=problem.width, connectivity=problem.connectivity,
        fan_in=problem.fan_in, group_size=problem.group_size, dtype=dtype, rng=rng,
    )  # fmt: skip
    block.bias[...] = rng.standard_normal(block.bias.shape, dtype=np.float32)
    x = dtypes.decode(dtypes.encode(rng.standard_normal((problem.batch, problem.width), dtype=np.float32), dtype), dtype)
    there = torch.from_numpy(x).to(device, _TORCH[dtype])
    name = f"{problem.connectivity} {dtype} B={problem.batch} K={problem.fan_in} G={problem.group_size}"
    errors = [_check_topk(name, block, x, there)]
    if dtype != "fp16":
        errors += [_check_step(f"{name} {kind}", block, x, there, dtype, kind, rng) for kind in ("sgd", "momentum")]
    return max(errors)


def check_large(connectivity: Connectivity, labels: int, batch: int, device: torch.device) -> float:
    """Top-k of many labels against torch, on the same numbers in fp32; the largest error, relative, or SystemExit."""
    problem = Problem(connectivity, labels, 32, batch, width=256 if device.type == "cuda" else 40)
    block, x = random_block(problem, device), random_input(problem, device, torch.float32)
    scores, found = gpu.topk(x, DeviceHead(problem.width, labels, (block,)), 10)
    every = (x.double() @ as_dense(block).double().t())[:, :labels]
    truth = every.topk(min(10, labels), dim=1).values
    _expect(f"{connectivity} L={labels:,} B={batch}: labels", every.gather(1, found.long()), truth, _FP32)
    return _expect(f"{connectivity} L={labels:,} B={batch}: scores", scores.double(), truth, _FP32)


def _check_topk(name: str, block: Block, x: np.ndarray, there: torch.Tensor) -> float:
    L = int((block.label_ids >= 0).sum())
    head = Head(block.width, L, (block,))
    scores, labels = gpu.topk(there, DeviceHead.of(head, there.device), 10)
    truth, _ = reference.topk(x, head, 10)
    every, order = reference.topk(x, head, L)
    by_label = np.take_along_axis(every, np.argsort(order, axis=1), axis=1)
    picked = np.take_along_axis(by_label, labels.cpu().numpy().astype(np.int64), axis=1)
    _expect(f"topk {name}: labels", torch.from_numpy(picked), torch.from_numpy(truth), _FP32)
    return _expect(f"topk {name}: scores", scores.double().cpu(), torch.from_numpy(truth), _FP32)


def _check_step(
    name: str, block: Block, x: np.ndarray, there: torch.Tensor, dtype: str, kind: str, rng: np.random.Generator
) -> float:
    slots = np.flatnonzero(block.label_ids.reshape(-1) >= 0)
    pairs = sorted({(int(rng.choice(slots)), row) for row in range(len(x)) for _ in range(3)})
    positives = Positives(np.array([s for s, _ in pairs]), np.array([r for _, r in pairs], np.int32))
    optimizer = Optimizer(kind, lr=1e-3)
    rule = {"loss": "bce", "optimizer": optimizer, "step": 1, "key": rounding_key(0, 1, 0)}
    expected, moments = _copy(block), optimizer.moments(block)
    loss, grad_x = reference.train_step(x, positives, expected, moments, precision=np.float64, **rule)
    ours, ours_moments = DeviceBlock.of(block, there.device), DeviceMoments.of(optimizer.moments(block), there.device)
    our_loss, our_grad = gpu.train_step(there, DevicePositives.of(positives, there.device), ours, ours_moments, **rule)
    found = _copy(block)
    ours.write_to(found)
    before, after = (torch.from_numpy(dtypes.decode(each.values, dtype)).double() for each in (found, expected))
    # Stochastic rounding may go the other way for numbers that differ in their last bits.
    _expect(f"train_step {name}: values", before, after, 2.0**-7 if dtype == "bf16" else _FP32)
    _expect(f"train_step {name}: loss", our_loss.double().cpu()[None], torch.tensor([loss], dtype=torch.float64), _FP32)
    return _expect(
        f"train_step {name}: ∂loss/∂x", our_grad.double().cpu(), torch.from_numpy(grad_x), _FP32 + 4 * _ROUNDING[dtype]
    )


def _copy(block: Block) -> Block:
    return replace(block, values=block.values.copy(), bias=block.bias.copy())


def _expect(what: str, result: torch.Tensor, truth: torch.Tensor, tolerance: float) -> float:
    """The largest error relative to the largest number; SystemExit above the tolerance or for NaN."""
    error = float((result - truth).abs().max() / truth.abs().max().clamp(min=1e-30))
    if not error <= tolerance:
        raise SystemExit(f"python -m benchmarks.gpu: wrong result: {what} differ by {error:.2e}, allowed are {tolerance:.0e}")
    return error
