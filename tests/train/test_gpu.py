"""Training with the GPU's kernels, on a GPU; without one, tests/test_interpreted.py runs this file in Triton's interpreter.

There, tensors stay on the CPU and only what computes the head is the GPU's.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from export.__main__ import main as export
from models.head import Block, Head
from models.kernels.gpu.launch import INTERPRETED
from tests.train.tasks import QUICK, assert_same_training, metrics, run
from train import prepare
from train.compute import OnCpu, OnGpu, compute_on
from train.head import HeadTraining
from train.settings import Settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device"),
]
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# fp32: the interpreter multiplies bf16 matrices wrongly
TASK = (*QUICK, "--head-dtype", "fp32", "--device", "auto", "--epochs", "2", "--limit-eval", "20")


@pytest.fixture(autouse=True)
def _gpu_kernels(monkeypatch):
    monkeypatch.setattr(prepare, "compute_on", lambda device: OnGpu(DEVICE))


def three_blocks() -> Head:
    rng = np.random.default_rng(0)
    labels = rng.permutation(72).astype(np.int32)
    sizes = {"dense": 16, "shared": 30, "private": 26}
    blocks, first = [], 0
    for connectivity, size in sizes.items():
        part = labels[first : first + size]
        blocks.append(Block.random(part, width=24, connectivity=connectivity, fan_in=6, group_size=16, rng=rng))
        first += size
    return Head(24, 72, tuple(blocks))


@pytest.mark.parametrize("growth", ["random", "gradient"])
@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
def test_the_head_learns_and_rewires_as_on_the_cpu(growth, loss):
    """Three connectivities, weighted and smoothed positives, the auxiliary objective, two rewirings."""
    settings = Settings(
        batch_size=5, loss=loss, rewire=growth, rewire_every=2, rewire_share=0.4, auxiliary=0.5, meta_classes=3,
        label_smoothing=0.1, head_weight_decay=0.01,
    )  # fmt: skip
    weights = np.linspace(0.5, 2, 72, dtype=np.float32)
    here = HeadTraining(three_blocks(), settings, 8, weights, OnCpu())
    there = HeadTraining(three_blocks(), settings, 8, weights, OnGpu(DEVICE))
    rng = np.random.default_rng(1)
    rewired = 0
    for step in range(6):
        x = torch.from_numpy(rng.standard_normal((5, 24), dtype=np.float32))
        labels = [rng.choice(72, 3, replace=False) for _ in range(5)]
        events = here.rewire(x, labels, step), there.rewire(x.to(DEVICE), labels, step)
        assert events[0] == events[1]
        rewired += len(events[0])
        loss_here, grad_here = here.step(x, labels, step, 1.0)
        loss_there, grad_there = there.step(x.to(DEVICE), labels, step, 1.0)
        assert float(loss_there) == pytest.approx(float(loss_here), rel=1e-5)
        torch.testing.assert_close(grad_there.cpu(), grad_here, rtol=1e-4, atol=1e-5)
    assert rewired == 4
    for one, other in zip(here.head.blocks, there.head.blocks, strict=True):
        for name, array in one.buffers.items():
            np.testing.assert_allclose(other.buffers[name], array, rtol=1e-3, atol=1e-4, err_msg=name)
    memory = here.tensors(), there.tensors()
    assert memory[0].keys() == memory[1].keys()
    for name, tensor in memory[0].items():
        torch.testing.assert_close(memory[1][name].cpu(), tensor, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(there.topk(x.to(DEVICE), 5), here.topk(x, 5))
    assert sum(each.nbytes for each in there.moments) == sum(each.nbytes for each in here.moments)


def test_numbers_that_are_not_finite_have_no_best_labels():
    training = HeadTraining(three_blocks(), Settings(batch_size=5), 8, None, OnGpu(DEVICE))
    x = torch.zeros(2, 24, device=DEVICE)
    x[1, 3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        training.topk(x, 3)


REWIRED = ("--rewire-every", "6", "--auxiliary", "0.5", "--meta-classes", "3", "--dense-labels", "0.3")


def test_a_run_stops_resumes_changes_device_and_is_exported(task, tmp_path, monkeypatch):
    whole, part, moved = (tmp_path / name for name in ("whole", "part", "moved"))
    assert run(task, whole, *TASK, *REWIRED, "--checkpoint-every", "8", "--keep", "100") == 0
    rows = metrics(whole)
    assert rows[-1]["kind"] in ("stage", "eval")
    assert [row for row in rows if row["kind"] == "rewire"]
    first, *_, last = (row["loss"] for row in rows if row["kind"] == "train")
    assert last < first
    for copy in (part, moved):
        shutil.copytree(whole, copy)
        for later in (path for path in (copy / "checkpoints").iterdir() if int(path.name[5:]) > 24):
            shutil.rmtree(later)
    assert run(None, part, "--resume") == 0
    if INTERPRETED:  # a GPU adds gradients up in any order
        assert_same_training(whole, part)
    monkeypatch.setattr(prepare, "compute_on", compute_on)
    assert run(None, moved, "--resume", "--device", "cpu") == 0
    losses = [[row["loss"] for row in metrics(out) if row["kind"] == "train"] for out in (whole, moved)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3 if INTERPRETED else 0.2)  # other devices drop other numbers
    assert export([str(whole), "--out", str(tmp_path / "bundle"), "--torch-encoder"]) == 0, "its parity check included"
    assert (tmp_path / "bundle" / "encoder" / "model.safetensors").is_file()


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["bf16-mixed", "bf16"])
def test_a_task_is_learnt_on_a_gpu(task, tmp_path, dtype):
    learning = (
        *("--epochs", "12", "--eval-every", "12"),
        *("--encoder-lr", "5e-3", "--intermediate-lr", "5e-3", "--head-lr", "1e-2"),
    )
    flags = (*QUICK, *learning, "--device", "cuda", "--encoder-dtype", dtype, "--gradient-checkpointing", "--micro-batch", "9")
    assert run(task, tmp_path / "run", *flags) == 0
    rows = metrics(tmp_path / "run")
    assert [row for row in rows if row["kind"] == "eval"][-1]["P@1"] > 0.8
    assert all(row["device_peak_memory_mb"] > 0 for row in rows if row.get("stage") == "training")


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_dropout_goes_on_after_a_stop(task, tmp_path):
    """With a frozen encoder nothing is added up in any order, so a resumed run on a GPU is the same bit for bit."""
    flags = (*QUICK, "--device", "cuda", "--epochs", "2", "--freeze-encoder", "--intermediate", "0", "--checkpoint-every", "8")
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert run(task, whole, *flags, "--keep", "100") == 0
    shutil.copytree(whole, part)
    for later in (path for path in (part / "checkpoints").iterdir() if int(path.name[5:]) > 24):
        shutil.rmtree(later)
    assert run(None, part, "--resume") == 0
    last = [max((out / "checkpoints").iterdir()) for out in (whole, part)]
    for name in ("head.safetensors", "trainer.safetensors"):
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes(), name
