"""Stopping, dying and going on: the outcome is that of a run that never stopped, bit for bit."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.train.tasks import QUICK, SMALL, assert_same_training, command, metrics, run
from train.metrics import Meter
from train.trainer import Trainer

EPOCHS = ("--epochs", "3")
REWIRED = ("--rewire-every", "4", "--auxiliary", "0.5", "--meta-classes", "3")
STEPS_PER_EPOCH = 19


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--dense-labels", "0.3", "--connectivity", "private", "--head-optimizer", "momentum", "--loss", "squared_hinge"),
        ("--freeze-encoder", "--head-dtype", "fp32"),
        ("--freeze-encoder", "--intermediate", "0", "--head-optimizer", "sgd"),
        (*REWIRED, "--tiers", "dense:20%,16:40%,8:40%", "--rewire", "gradient", "--rewire-share", "0.5"),
        (*REWIRED, "--connectivity", "private", "--rewire-below", "0.3", "--new-weights", "random", "--weight-positives"),
        ("--encoder-dtype", "bf16", "--gradient-checkpointing", "--layer-decay", "0.7"),
        ("--encoder-dtype", "bf16-mixed", "--micro-batch", "6", "--schedule", "cosine"),
        ("--encoder-dtype", "bf16", "--micro-batch", "6", "--freeze-encoder"),
        ("--small-layers", "0", "--micro-batch", "6", "--head-init", "imprinted"),
    ],
    ids=[
        *("end to end", "private and dense", "frozen", "head alone", "rewired by gradient", "rewired below a threshold"),
        *("bf16", "bf16 mixed", "frozen bf16", "bag of words"),
    ],
)
def test_resuming_equals_not_stopping(task, tmp_path, flags):
    whole = tmp_path / "whole"
    flags = (*(SMALL if "--tiers" in flags else QUICK), *EPOCHS, *flags)
    assert run(task, whole, *flags, "--checkpoint-every", "7", "--keep", "100") == 0
    steps = sorted(int(path.name[5:]) for path in (whole / "checkpoints").iterdir())
    assert steps == [7, 14, 19, 21, 28, 35, 38, 42, 49, 56, 57]
    for step in (7, 19, 28):  # within the first epoch, at an epoch's end, within the second
        part = tmp_path / f"from-{step}"
        shutil.copytree(whole, part)
        shutil.rmtree(part / "cache")
        for later in (path for path in (part / "checkpoints").iterdir() if int(path.name[5:]) > step):
            shutil.rmtree(later)
        assert run(None, part, "--resume") == 0
        assert_same_training(whole, part)


def test_resuming_before_the_first_checkpoint_starts_again(task, tmp_path):
    assert run(task, tmp_path / "whole", *QUICK, *EPOCHS) == 0
    assert run(task, tmp_path / "never", *QUICK, *EPOCHS, "--resume") == 0
    assert_same_training(tmp_path / "whole", tmp_path / "never")
    shutil.rmtree(tmp_path / "never" / "checkpoints")
    assert run(None, tmp_path / "never", "--resume") == 0
    assert_same_training(tmp_path / "whole", tmp_path / "never")


def test_resuming_a_finished_run_changes_nothing(task, tmp_path):
    assert run(task, tmp_path / "run", *QUICK, *EPOCHS) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    assert run(None, tmp_path / "again", "--resume") == 0
    assert_same_training(tmp_path / "run", tmp_path / "again")


def test_a_checkpoint_put_aside_is_left_alone(task, tmp_path):
    assert run(task, tmp_path / "whole", *QUICK, *EPOCHS) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    checkpoints = tmp_path / "part" / "checkpoints"
    last = checkpoints / f"step-{3 * STEPS_PER_EPOCH:08d}"
    aside = last.rename(checkpoints / f"{last.name}-best")
    assert run(None, tmp_path / "part", "--resume") == 0
    assert aside.is_dir()
    shutil.rmtree(aside)
    assert_same_training(tmp_path / "whole", tmp_path / "part")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [3, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 1])
def test_a_signal_saves_and_stops_after_the_step(task, tmp_path, capsys, monkeypatch, signum, at):
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert run(task, whole, *QUICK, *EPOCHS) == 0
    steps, real = [], Trainer._step

    def signalled(self, rows):
        steps.append(len(steps) + 1)
        if len(steps) == at:
            os.kill(os.getpid(), signum)
        return real(self, rows)

    before = signal.getsignal(signum)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", signalled)
        assert run(task, part, *QUICK, *EPOCHS) == 128 + signum
    assert f"go on with: python -m train --out {part} --resume" in capsys.readouterr().err
    assert (part / "checkpoints" / f"step-{at:08d}").is_dir()
    assert signal.getsignal(signum) is before
    assert run(None, part, "--resume") == 0
    assert_same_training(whole, part)


def test_a_signal_during_evaluation_keeps_the_epoch(task, tmp_path, monkeypatch):
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert run(task, whole, *QUICK, *EPOCHS) == 0
    real = Meter.update

    def signalled(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Meter, "update", signalled)
        assert run(task, part, *QUICK, *EPOCHS) == 128 + signal.SIGTERM
    assert [path.name for path in (part / "checkpoints").iterdir()] == [f"step-{STEPS_PER_EPOCH:08d}"]
    assert not [row for row in metrics(part) if row["kind"] == "eval"]
    assert run(None, part, "--resume") == 0
    assert_same_training(whole, part)


# Runs the command again and again in forked processes; process n kills itself at the n-th flush of a checkpoint's file.
_DYING = """
import os, signal, sys
import train.prepare
from models import files
from train.__main__ import main

real, moments, argv = files.flush, [int(n) for n in sys.argv[1].split(",")], sys.argv[2:]
for moment in moments:
    child = os.fork()
    if child == 0:
        flushed = 0
        def flush(path):
            global flushed
            flushed += "checkpoints" in str(path)
            if flushed == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            real(path)
        files.flush = flush
        os._exit(main(argv + ["--resume"]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_kill_during_a_checkpoint_loses_nothing(task, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    often = ("--checkpoint-every", "5", "--keep", "1")
    assert run(task, whole, *QUICK, *EPOCHS, *REWIRED) == 0
    flags = ["--data", str(task), "--out", str(part), *QUICK, *EPOCHS, *REWIRED, *often]
    # A checkpoint is some ten flushes: these die within the first, in the rename's wake, and within later ones.
    moments = (1, 4, 9, 10, 11, 12, 13, 17, 25, 2)
    done = subprocess.run(
        [sys.executable, "-c", _DYING, ",".join(map(str, moments)), *flags],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.split().count(str(-signal.SIGKILL)) >= 8, done.stdout + done.stderr
    assert run(task, part, *QUICK, *EPOCHS, *REWIRED, "--resume", *often) == 0
    assert_same_training(whole, part)
    assert not list((part / "checkpoints").glob(".*"))
    assert len(list((part / "checkpoints").iterdir())) == 1


@pytest.mark.slow
def test_a_real_process_is_stopped_killed_and_continued(task, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    long = ("--epochs", "12", "--checkpoint-every", "6", *REWIRED)
    assert run(task, whole, *QUICK, *long) == 0

    def start(*flags):
        return subprocess.Popen(command("--out", str(part), *flags), stderr=subprocess.PIPE, text=True)

    def until(rows):
        deadline = time.monotonic() + 120
        while not (part / "metrics.jsonl").exists() or len(metrics_so_far()) < rows:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)

    def metrics_so_far():
        return (part / "metrics.jsonl").read_text().splitlines()

    process = start("--data", str(task), *QUICK, *long)
    until(rows=8)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=120)[1]
    assert process.returncode == 130, message
    assert message.splitlines()[-1].startswith("stopped by SIGINT, state saved; go on with: python -m train --out")

    process = start("--resume")
    until(rows=len(metrics_so_far()) + 20)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert run(None, part, "--resume") == 0
    assert_same_training(whole, part)
