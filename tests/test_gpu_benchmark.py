"""The GPU's benchmark before there is a GPU: every line of it, on tiny shapes, with torch, Triton and numpy alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import plots
from benchmarks.gpu_problems import DenseLayer, Problem, as_dense, random_block, random_positives
from benchmarks.gpu_targets import TARGETS, verdicts

ROOT = Path(__file__).parents[1]
# What a bare machine lacks: an import of any of these fails. The compiled kernels are not there either.
ABSENT = (
    *("transformers", "tokenizers", "safetensors", "scipy", "optimi", "onnx", "onnxruntime", "onnxscript", "pyarrow"),
    *("fastapi", "prometheus_client", "tqdm", "matplotlib", "pytest", "models.kernels._cpu"),
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the rows of a dry run."""
    folder = tmp_path_factory.mktemp("gpu")
    bare = folder / "bare"
    bare.mkdir()
    (bare / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n")
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--device",
        "cpu",
        "--results",
        str(folder / "results"),
        "--commit",
        "abc",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(bare)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# correct: errors up to " in done.stdout
    assert done.stdout.count("not measured") == len(TARGETS)
    return folder / "results"


def of(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_dry_run_measures_every_kind_of_row_on_a_bare_machine(rows: Path) -> None:
    assert {row["kernel"] for row in of(rows, "gpu_topk")} == {"shared", "private", "torch-dense-bf16"}
    assert {row["step"] for row in of(rows, "gpu_train_step")} == {"shared", "private", "torch-dense-bf16-chunked"}
    assert len(of(rows, "gpu_whole_step")) == len(of(rows, "gpu_ceilings")) == 1
    for name in ("gpu_topk", "gpu_train_step", "gpu_whole_step", "gpu_ceilings"):
        for row in of(rows, name):
            assert row["commit"] == "abc"
            assert row["device"].endswith("interpreted")
            assert {"date", "torch", "triton", "numpy", "python"} <= row.keys()
    for row in of(rows, "gpu_topk"):
        if row["kernel"] != "torch-dense-bf16":
            assert row["dense_is_slower"] > 0
            assert row["share_of_copy"] > 0


@pytest.mark.slow
def test_plots_of_the_rows_are_drawn(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "plots"
    monkeypatch.setattr(sys, "argv", ["plots", "--results", str(rows), "--out", str(out)])
    plots.main()
    assert {path.name for path in out.iterdir()} == {f"{name}.{kind}" for name in plots.PLOTS for kind in ("svg", "png")}
    assert all(path.stat().st_size > 5000 for path in out.iterdir())


def test_the_newest_row_of_a_shape_and_device_counts() -> None:
    rows = [
        {"kernel": "shared", "batch": 1, "device": "A", "median_ms": 1.0},
        {"kernel": "shared", "batch": 1, "device": "B", "median_ms": 2.0},
        {"kernel": "shared", "batch": 1, "device": "B", "median_ms": 3.0},
    ]
    assert [row["median_ms"] for row in plots.newest(rows, None)] == [3.0]
    assert [row["median_ms"] for row in plots.newest(rows, "A")] == [1.0]
    assert plots.newest([], None) == []


def test_verdicts_compare_with_the_targets() -> None:
    shape = {"labels": 2_800_000, "fan_in": 128, "group_size": 64}
    step = {"step": "shared", **shape, "batch": 128, "optimizer": "sgd"}
    rows = [
        ("gpu_topk", {"kernel": "shared", **shape, "batch": 256, "median_ms": 0.7}),
        ("gpu_train_step", {**step, "median_ms": 3.0, "dense_is_slower": None}),
    ]
    lines = verdicts(rows).splitlines()
    assert len(lines) == len(TARGETS)
    assert [line.rpartition(": ")[2] for line in lines if "batch=256" in line] == ["0.7, reached"]
    assert [line.rpartition(": ")[2] for line in lines if "gpu_train_step" in line] == ["3, missed", "not measured"]


def test_the_dense_layer_in_parts_is_the_dense_layer() -> None:
    torch.manual_seed(0)
    problem = Problem("shared", 90, 8, 6, width=16, group_size=16)
    parts = DenseLayer(90, 16, CPU, logit_bytes=2 * 6 * 25, step_labels=32)
    x = torch.randn(6, 16).bfloat16()
    logits = x @ parts.weight.t()
    scores, labels = parts.topk(x, 10)
    assert torch.equal(scores, logits.topk(10).values)
    assert torch.equal(logits.gather(1, labels), scores)

    positives = random_positives(problem, CPU)
    assert torch.equal(positives.slots, positives.slots.sort().values)
    weight = parts.weight.double().requires_grad_()
    inputs = x.double().requires_grad_()
    target = torch.zeros(6, 90, dtype=torch.float64)
    target[positives.rows.long(), positives.slots] = 1
    loss = torch.nn.functional.binary_cross_entropy_with_logits(inputs @ weight.t(), target, reduction="sum") / 6
    loss.backward()
    grad_x = parts.train_step(x, parts.places(positives), 0.5)
    torch.testing.assert_close(grad_x.double(), inputs.grad, rtol=0, atol=0.02 * float(inputs.grad.abs().max()))
    expected = weight.detach() - 0.5 * weight.grad
    torch.testing.assert_close(parts.weight.double(), expected, rtol=0, atol=0.01)
    assert (parts.weight.double() - weight).abs().max() > 0.02


@pytest.mark.parametrize("connectivity", ["shared", "private", "dense"])
def test_random_blocks_keep_the_layout(connectivity: str) -> None:
    problem = Problem(connectivity, 70, 16 if connectivity == "dense" else 5, 2, width=16, group_size=32)
    block = random_block(problem, CPU)
    assert block.values.shape == (3, problem.fan_in, 32)
    assert problem.nbytes == sum(
        each.nbytes for each in (block.values, block.bias, block.label_ids, block.indices) if each is not None
    )
    assert block.label_ids.flatten().tolist() == [*range(70), *[-1] * 26]
    matrix = as_dense(block)
    assert matrix.shape == (96, 16)
    assert ((matrix != 0).sum(dim=1) == problem.fan_in).all(), "distinct inputs"
    torch.testing.assert_close(matrix.view(3, 32, 16).sum(dim=2), block.values.float().sum(dim=1))
