"""Every kernel compiles for A100, H100 and B200: no spills, shared memory within theirs, tensor cores where expected.

The shapes are those of the benchmarks: K = 128, G = 64, and a batch of 64 and more; only the number of groups is small. Where a
card has little shared memory, the first of the configurations must fit: others are left out there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.kernels import Optimizer, Subset, gpu
from models.kernels.gpu import DeviceBlock, DeviceHead, DeviceMoments, DevicePositives, train
from models.kernels.gpu.launch import INTERPRETED
from tests.kernels.cases import Shape, random_block
from tests.kernels.gpu.compiled import SHARED, compile_for, record

pytestmark = [pytest.mark.slow, pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter")]
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EXPECTED = {80: "mma.sync", 86: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
each_target = pytest.mark.parametrize("capability", SHARED, ids="sm_{}".format)
POSITIVES = DevicePositives(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32), torch.ones(1))


def a_block(connectivity: str, dtype: str, K: int = 128) -> DeviceBlock:
    shape = Shape(0, 256 if connectivity == "dense" else 768, 128, K, 64)
    block = DeviceBlock.of(random_block(shape, connectivity, dtype if dtype in TYPES else "fp32"), "cpu")
    if dtype in TYPES:
        return block
    values = block.values.to(gpu.head.STORAGE[dtype])
    return replace(block, dtype=dtype, values=values, scales=torch.ones_like(block.bias))


def an_input(B: int, block: DeviceBlock, inputs: str) -> torch.Tensor:
    return torch.zeros(B, block.width, dtype=TYPES[inputs])


def assert_fits(
    call: Callable[[], object], monkeypatch: pytest.MonkeyPatch, capability: int, tensor_cores: bool, every_config: bool = False
) -> None:
    monkeypatch.setattr(train, "shared_memory", lambda device: SHARED[capability])
    launches = record(monkeypatch, call, every_config and capability != 86)
    assert launches
    for launch in launches:
        needs = compile_for(capability, launch)
        what = f"{launch.kernel.__name__} {launch.config} on sm_{capability}: {needs}"
        assert needs.spilled == 0, what
        assert needs.registers <= 255, what
        assert needs.shared <= SHARED[capability], what
        if tensor_cores and launch.kernel.__name__ != "chosen_scores":
            assert needs.tensor_cores, what
        if not tensor_cores:  # fp32 must not become tf32
            assert not needs.tensor_cores, what
    if tensor_cores:
        assert EXPECTED[capability] in frozenset().union(*(compile_for(capability, each).tensor_cores for each in launches))


@each_target
@pytest.mark.parametrize(
    ("connectivity", "dtype", "inputs"),
    [
        ("shared", "bf16", "bf16"), ("shared", "fp32", "fp32"), ("shared", "fp8", "bf16"), ("shared", "int8", "fp16"),
        ("dense", "bf16", "bf16"), ("private", "bf16", "bf16"), ("private", "fp8", "bf16"),
    ],
)  # fmt: skip
def test_topk(connectivity: str, dtype: str, inputs: str, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    block = a_block(connectivity, dtype)
    head, x = DeviceHead(block.width, 128, (block,)), an_input(64, block, inputs)
    cores = connectivity != "private" and inputs != "fp32"
    assert_fits(lambda: gpu.topk(x, head, 10), monkeypatch, capability, cores, every_config=dtype == "bf16")


@each_target
@pytest.mark.parametrize("connectivity", ["shared", "private"])
def test_topk_within_subsets(connectivity: str, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    block = a_block(connectivity, "bf16")
    head, x = DeviceHead(block.width, 128, (block,)), an_input(64, block, "bf16")
    allowed = [Subset(np.arange(20)), None] * 32
    assert_fits(lambda: gpu.topk(x, head, 10, allowed), monkeypatch, capability, tensor_cores=connectivity != "private")


@each_target
@pytest.mark.parametrize("connectivity", ["shared", "private"])
def test_gradients(connectivity: str, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    block = a_block(connectivity, "bf16")
    x = an_input(64, block, "bf16")
    grad = torch.zeros(64, *block.bias.shape, dtype=torch.bfloat16)

    def call() -> None:
        gpu.scores(x, block)
        gpu.grad_input(grad, block)
        gpu.grad_values(x, grad, block)

    assert_fits(call, monkeypatch, capability, connectivity == "shared")


@each_target
@pytest.mark.parametrize(
    ("connectivity", "dtype", "inputs", "K", "B", "loss", "kind"),
    [
        ("shared", "bf16", "bf16", 128, 128, "bce", "adam"),
        ("shared", "bf16", "bf16", 128, 256, "squared_hinge", "sgd"),
        ("shared", "bf16", "bf16", 128, 1024, "bce", "momentum"),
        ("shared", "fp32", "fp32", 128, 128, "bce", "adam"),
        ("dense", "bf16", "bf16", 256, 64, "bce", "adam"),
        ("private", "bf16", "bf16", 32, 128, "bce", "adam"),
        ("private", "bf16", "bf16", 512, 100, "bce", "adam"),
    ],
)
def test_training_steps(
    connectivity: str, dtype: str, inputs: str, K: int, B: int, loss: str, kind: str, capability: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    block, optimizer = a_block(connectivity, dtype, K), Optimizer(kind)
    x, moments = an_input(B, block, inputs), DeviceMoments.zeros(optimizer, block)

    def call() -> None:
        gpu.train_step(x, POSITIVES, block, moments, loss=loss, optimizer=optimizer, step=1, key=5)

    assert_fits(call, monkeypatch, capability, connectivity != "private" and inputs != "fp32")
