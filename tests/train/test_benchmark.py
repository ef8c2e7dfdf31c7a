"""python -m benchmarks.accuracy on runs that take no time."""

import json

import pytest

from benchmarks import accuracy, measure
from tests.train.tasks import N_LABELS, SMALL


def test_finished_runs_are_only_read(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)

    def compare(*more):  # and what is in all files of the runs afterwards
        flags = f"{' '.join(SMALL)} --epochs 1"
        heads = ["--sparse", "--fan-in 8 --dense-labels 10% --intermediate 0 --head-dtype fp32"]
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
    assert compare("--record", "--export-dtype", "fp32") == before
    assert compare("--record", "--export-dtype", "bf16") == before
    _, _, same, still_dense, rounded, _ = map(json.loads, (tmp_path / "accuracy.jsonl").read_text().splitlines())
    for metric in (*accuracy.METRICS, "bytes"):
        assert same[metric] == sparse[metric]
        assert still_dense[metric] == dense[metric]
    assert rounded["exported"] == "bf16"
    assert rounded["bytes"] < 0.8 * sparse["bytes"]
    assert rounded["P@5"] == pytest.approx(sparse["P@5"], rel=0.05)
    assert "--fan-in 8" in sparse["flags"]
    with pytest.raises(SystemExit):
        compare("--flags", "--epochs 2")
    assert "sparse-0: cannot resume with changed settings: --epochs (was 1, now 2)" in capsys.readouterr().err


def test_a_dense_head_reads_the_sparse_ones_layer(task, tmp_path, monkeypatch, capsys):
    flags = f"{' '.join(SMALL)} --epochs 1"
    words = ["compare", "--data", str(task), "--runs", str(tmp_path / "runs"), "--flags", flags, "--export-dtype", "bf16"]
    layer = ["--sparse", "--fan-in 8 --intermediate 48", "--only", "dense", "dense, same layer"]
    monkeypatch.setattr("sys.argv", ["accuracy", *words, *layer])
    accuracy.main()
    direct, behind = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    slots = direct["bytes"] // (4 * (32 + 2))  # SMALL is 32 units wide; beside its weights a label has a bias and an id
    assert slots >= N_LABELS
    assert behind["bytes"] == slots * 4 * (48 + 2) + 48 * 4 * (32 + 1)
    assert "exported" not in behind
