"""Training and devices, as far as no GPU and no interpreter is needed for it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.head import Block, Head, HeadError
from models.kernels import Optimizer
from models.kernels.gpu import DeviceBlock, DeviceMoments
from tests.kernels.cases import Shape, random_block
from tests.train.tasks import QUICK, assert_same_training, run
from train import prepare, report
from train.compute import OnGpu
from train.connections import HostLists
from train.gpu_connections import DeviceLists
from train.head import HeadTraining
from train.settings import Settings
from train.trainer import Trainer
from train.watch import NotFiniteError, Watch


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_one_error_and_auto_is_the_cpu(task, tmp_path, capsys):
    assert run(task, tmp_path / "run", *QUICK, "--device", "cuda") == 2
    assert "python -m train: error: --device cuda: " in capsys.readouterr().err
    for name in ("auto", "cpu"):
        assert run(task, tmp_path / name, *QUICK, "--epochs", "1", "--device", name) == 0
    assert_same_training(tmp_path / "auto", tmp_path / "cpu")
    assert json.loads((tmp_path / "auto" / "config.json").read_text())["device"] == "cpu"


def test_a_checkpoint_of_a_gpu_goes_on_on_the_cpu(task, tmp_path):
    """It has the state of the GPU's random numbers beside all that one of a CPU has."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert run(task, whole, *QUICK, "--epochs", "1", "--checkpoint-every", "7", "--keep", "9") == 0
    shutil.copytree(whole, part)
    for later in (path for path in (part / "checkpoints").iterdir() if int(path.name[5:]) > 7):
        shutil.rmtree(later)
    path = part / "checkpoints" / "step-00000007" / "trainer.safetensors"
    save_file(load_file(path) | {"cuda.rng": torch.zeros(16, dtype=torch.uint8)}, path)
    assert run(None, part, "--resume", "--device", "auto" if not torch.cuda.is_available() else "cpu") == 0
    assert_same_training(whole, part)


def test_batches_that_do_not_fit_on_the_chip_are_refused_before_training(monkeypatch):
    rng = np.random.default_rng(0)
    labels = np.arange(32, dtype=np.int32)
    dense = Head(600, 32, (Block.random(labels, width=600, connectivity="dense", fan_in=600, rng=rng),))
    private = Head(600, 32, (Block.random(labels, width=600, connectivity="private", fan_in=513, rng=rng),))
    shared = Head(600, 32, (Block.random(labels, width=600, connectivity="shared", fan_in=16, rng=rng),))
    on_gpu = OnGpu(torch.device("cpu"))
    with pytest.raises(HeadError, match=r"block 0: fan-in is 600 and the batch has 513 rows: .*; see --batch-size"):
        HeadTraining(dense, Settings(batch_size=513), 10, None, on_gpu)
    with pytest.raises(HeadError, match="block 0: private fan-in is 513"):
        HeadTraining(private, Settings(batch_size=4), 10, None, on_gpu)
    with pytest.raises(HeadError, match="the auxiliary objective: fan-in is 600 and the batch has 513 rows"):
        HeadTraining(shared, Settings(batch_size=513, auxiliary=0.5), 10, None, on_gpu)
    HeadTraining(dense, Settings(batch_size=512), 10, None, on_gpu)
    HeadTraining(shared, Settings(batch_size=513), 10, None, on_gpu)


@pytest.mark.parametrize("random_weights", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("connectivity", ["shared", "private"])
def test_connections_on_a_device_change_as_those_of_the_host(connectivity, dtype, random_weights):
    block = random_block(Shape(6, 40, 90, 8, 16), connectivity, dtype)
    block.indices.sort(axis=1)
    moments = Optimizer("adam").moments(block)
    rng = np.random.default_rng(1)
    for array in moments.values:
        array[...] = rng.random(array.shape)
    there, there_moments = DeviceBlock.of(block, "cpu"), DeviceMoments.of(moments, "cpu")
    part = slice(1, 5)
    ours, theirs = DeviceLists(there, there_moments, part), HostLists(block, moments, part)
    np.testing.assert_array_equal(ours.indices, theirs.indices)
    np.testing.assert_array_equal(ours.padding, theirs.padding)
    np.testing.assert_allclose(ours.strength(), theirs.strength(), rtol=1e-6)
    prune = rng.random(theirs.indices.shape) < 0.3
    grown = np.stack([rng.permutation(np.setdiff1d(np.arange(40), used))[:8] for used in theirs.indices]).astype(np.uint16)
    before = block.values.copy()
    for lists in (ours, theirs):
        lists.replace(prune, grown, np.random.default_rng(5) if random_weights else None)
    after = replace(block, values=np.empty_like(block.values), bias=block.bias.copy(), indices=np.empty_like(block.indices))
    there.write_to(after)
    moved = Optimizer("adam").moments(block)
    there_moments.write_to(moved)
    np.testing.assert_array_equal(after.indices, block.indices)
    np.testing.assert_array_equal(after.values, block.values)
    np.testing.assert_array_equal(moved.values[0], moments.values[0])
    np.testing.assert_allclose(moved.values[1], moments.values[1], rtol=1e-6)  # its means are sums in another order
    assert (block.values[part] != before[part]).any()
    np.testing.assert_array_equal(block.values[[0, 5]], before[[0, 5]])


def test_a_lazy_watch_tells_the_first_step_when_asked():
    watch = Watch(lazy=True)
    fine, broken = torch.zeros(3), torch.tensor([0.0, float("inf")])
    for step in range(10):
        watch.see("the loss", step, broken if step in (6, 8) else fine)
        watch.see("the gradient", step, broken if step >= 7 else fine)
        if step < 6:
            watch.check()
    with pytest.raises(NotFiniteError, match="the loss is not finite") as error:
        watch.check()
    assert error.value.step == 6
    eager = Watch(lazy=False)
    eager.see("the loss", 0, fine)
    with pytest.raises(NotFiniteError, match="the loss is not finite"):
        eager.see("the loss", 1, broken)


def test_a_gpu_without_room_is_one_line(task, tmp_path, monkeypatch, capsys):
    def refuse(self, rows):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79 GiB.")

    monkeypatch.setattr(Trainer, "_step", refuse)
    assert run(task, tmp_path / "run", *QUICK) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("python -m train: error: CUDA out of memory; see --micro-batch, --gradient-checkpointing")


def test_the_report_tells_the_memory_of_a_gpu(task, tmp_path):
    out = tmp_path / "run"
    assert run(task, out, *QUICK, "--epochs", "1") == 0
    assert "GPU memory" not in (out / "report.html").read_text()
    stage = {"kind": "stage", "step": 19, "stage": "training", "seconds": 1, "peak_memory_mb": 1, "device_peak_memory_mb": 4321}
    with (out / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(stage) + "\n")
    report.write([out], tmp_path / "report.html")
    assert "4.32 GB" in (tmp_path / "report.html").read_text()


def test_devices_have_names_in_the_record(monkeypatch):
    class Card:
        name, total_memory = "NVIDIA H100 80GB HBM3", 85_000_000_000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert prepare._hardware(torch.device("cuda", 0)) == "NVIDIA H100 80GB HBM3, 85 GB, CUDA 13.0"
