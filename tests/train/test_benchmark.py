"""python -m benchmarks.accuracy on runs that take no time."""

import json

import pytest

from benchmarks import accuracy, measure
from tests.train.tasks import SMALL


def test_finished_runs_are_only_read(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)

    def compare(*more):
        flags = f"{' '.join(SMALL)} --epochs 1"
        heads = ["--sparse", "--fan-in 8 --dense-labels 10% --intermediate 0"]
        words = ["compare", "--data", str(task), "--runs", str(tmp_path / "runs"), *heads, "--flags", flags, *more]
        monkeypatch.setattr("sys.argv", ["accuracy", *words])
        accuracy.main()
        return {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}

    before = compare()
    first = capsys.readouterr().out
    assert compare("--record") == before
    assert capsys.readouterr().out == first
    sparse, dense = map(json.loads, (tmp_path / "accuracy.jsonl").read_text().splitlines())
    assert sparse["bytes"] < dense["bytes"]
    assert 0 < sparse["P@1"] <= 1
    assert "--fan-in 8" in sparse["flags"]
    with pytest.raises(SystemExit):
        compare("--flags", "--epochs 2")
    assert "sparse-0: cannot resume with changed settings: --epochs (was 1, now 2)" in capsys.readouterr().err
