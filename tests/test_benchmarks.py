"""The benchmarks' command lines, on sizes that take no time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import head_topk, make_bundle, measure, train_step
from models.kernels import cpu

SMALL = ["--labels", "64", "--width", "32", "--fan-in", "8", "--group-size", "16", "--batch", "2", "--repeats", "1"]
each_benchmark = pytest.mark.parametrize("benchmark", [head_topk, train_step])


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No measurement that takes time or that not every machine allows, and results of its own."""
    monkeypatch.setattr(measure, "read_bandwidth", lambda: 10.0)
    monkeypatch.setattr(measure, "extra_memory", lambda call: 0)
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)


def run(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *SMALL, *flags])
    benchmark.main()


@each_benchmark
def test_rows_are_printed_and_kept_only_on_demand(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(benchmark, monkeypatch)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"shared", "private", "dense", "torch-dense-bf16"} <= {row.get("kernel", row.get("step")) for row in printed}
    assert not (tmp_path / "results").exists()
    run(benchmark, monkeypatch, "--record")
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (file,) = (tmp_path / "results").iterdir()
    assert file.stem == benchmark.__name__.partition(".")[2]
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row.items() <= whole.items() for row, whole in zip(printed, kept, strict=True)] == [True] * len(printed)
    assert all(row["threads"] == cpu.threads() and row["commit"] for row in kept)


@each_benchmark
@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--fan-in", "999"], "fan-in is 999, must be 1 to the width 32"),
        (["--group-size", "24"], "24"),
        (["--labels", "0"], "0 is not at least 1"),
        (["--connectivity", "ring"], "ring"),
        (["--dtype", "int3"], "int3"),
    ],
)
def test_a_flag_that_cannot_be_is_one_clear_error(
    benchmark: ModuleType, flags: list[str], fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(benchmark, monkeypatch, *flags)
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"python -m {benchmark.__name__}: error: ")
    assert fault in last


def test_help_of_make_bundle_says_what_it_makes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_bundle.main(["--help"])
    assert "\nA servable bundle with a random head" in capsys.readouterr().out
