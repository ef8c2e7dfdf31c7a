"""What `python -m train` says while it works, and when there is nothing to work on."""

import re

import pytest

from tests.train.tasks import QUICK, SMALL, metrics, run
from train import progress


def test_it_begins_with_the_shape_of_the_head_and_ends_with_the_next_command(task, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(task, out, *SMALL, "--epochs", "1", "--tiers", "dense:30%,16:70%") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["head:", "40", "labels,", "64", "inputs"],
        # 30 % of the labels are 12; a group has 16
        ["dense", "16", "labels", "fan-in", "64", "bf16", "2.2", "kB"],
        ["shared", "24", "labels", "fan-in", "16", "bf16", "1.3", "kB"],
    ]
    dense, shared = 1 * 16 * (64 * 2 + 4 + 4), 2 * 16 * (16 * 2 + 4 + 4) + 2 * 16 * 2  # weights, bias, label; indices
    assert lines[3].split("in all, ")[1] == f"{(dense + shared) / (40 * 65 * 4):.1%} of a dense fp32 layer's 10.4 kB"
    assert lines[-1] == f"finished: {out}; pack it for serving with: python -m export {out} --out BUNDLE"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--fan-in", "16"), True),
        (("--fan-in", "16", "--rewire-every", "3"), False),
        (("--fan-in", "16", "--rewire", "off"), False),
        (("--connectivity", "dense"), False),
    ],
)
def test_it_says_when_a_run_is_too_short_to_be_rewired(task, tmp_path, capsys, flags, said):
    assert run(task, tmp_path / "run", *SMALL, "--epochs", "1", *flags) == 0
    rewired = any(row["kind"] == "rewire" for row in metrics(tmp_path / "run"))
    assert rewired == ("3" in flags)
    assert ("no rewiring: --rewire-every 300 is too long for 19 steps" in capsys.readouterr().out) == said


def test_a_fan_in_that_no_label_has_may_be_beyond_the_width(task, tmp_path):
    # 40 labels are 3 groups of 16, and 90 % of them rounded up are all
    assert run(task, tmp_path / "run", *SMALL, "--epochs", "1", "--tiers", "dense:90%,65:10%") == 0


@pytest.mark.parametrize(("every_s", "shown"), [(0.0, slice(None)), (600.0, slice(1))])
def test_without_a_terminal_it_prints_a_line_now_and_then(task, tmp_path, capsys, monkeypatch, every_s, shown):
    monkeypatch.setattr(progress, "_EVERY_S", every_s)
    assert run(task, tmp_path / "run", *QUICK, "--epochs", "2") == 0
    rows = [row for row in metrics(tmp_path / "run") if row["kind"] == "train"]
    said = re.findall(r"^epoch (\d)/2, step (\d+): loss [\d.]+, \d+ texts/s$", capsys.readouterr().err, re.MULTILINE)
    assert said == [(str(row["epoch"]), str(row["step"])) for row in rows][shown]


def test_a_run_that_is_not_there_is_resumed_only_with_data(task, tmp_path, capsys):
    assert run(None, tmp_path / "run", "--resume") == 2
    assert capsys.readouterr().err == f"python -m train: error: --out {tmp_path / 'run'}: no run to resume\n"
    assert not (tmp_path / "run").exists()
    assert run(task, tmp_path / "run", *QUICK, "--epochs", "1", "--resume") == 0
