"""The event file has the numbers of metrics.jsonl, and still has after a run was stopped or killed and went on."""

import json
import shutil
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from tests.train.tasks import QUICK, metrics, run
from train.runs import Log
from train.tensorboard import Events


def events(folder):
    """The events of the one file in `folder`: records of a length, its checksum, the event and its checksum."""
    (path,) = folder.iterdir()
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def points(folder):
    """{(tag, step): value}; a point that is there twice is an error."""
    found = {}
    for event in events(folder):
        for value in event.summary.value:
            assert (value.tag, event.step) not in found
            found[value.tag, event.step] = value.simple_value
    return found


def assert_same_numbers(out):
    found, expected = points(out / "tensorboard"), {}
    keys = {"train": ("loss", "head_lr", "encoder_lr"), "eval": ("P@1", "PSP@5", "coverage@5", "seconds")}
    for row in metrics(out):
        if row["kind"] in keys:
            expected |= {(f"{row.get('split', 'train')}/{key}", row["step"]): row[key] for key in keys[row["kind"]]}
    assert {at: found[at] for at in expected} == pytest.approx(expected)
    assert {at for at in found if at[0] in {tag for tag, _ in expected}} == expected.keys()


def test_events_follow_the_log_from_its_first_row(tmp_path):
    log = Log(tmp_path / "metrics.jsonl")
    log.write({"kind": "train", "step": 5, "epoch": 1, "loss": 2.5})
    mirror = Events(tmp_path / "tensorboard", log)
    log.write({"kind": "rewire", "step": 6, "epoch": 1, "block": 1, "moved": 30, "survival": 0.75, "input_usage": [0, 1, 2]})
    log.write({"kind": "stage", "step": 6, "stage": "evaluation", "seconds": 1.5, "peak_memory_mb": 80.0})
    log.write({"kind": "eval", "step": 6, "epoch": 1, "split": "dev", "P@1": 0.5, "deciles": [{"P@1": 0.5}]})
    # What was written is in the file at once: a viewer may be open.
    assert points(tmp_path / "tensorboard") == {
        ("train/loss", 5): 2.5,
        ("rewire/block-1/moved", 6): 30,
        ("rewire/block-1/survival", 6): 0.75,
        ("dev/P@1", 6): 0.5,
    }
    mirror.close()
    first, second, *_ = events(tmp_path / "tensorboard")
    assert first.file_version == "brain.Event:2"
    assert second.session_log.status == SessionLog.START


def test_events_are_those_of_the_metrics_after_going_on(task, tmp_path):
    out = tmp_path / "run"
    assert run(task, out, *QUICK, "--epochs", "2", "--checkpoint-every", "7", "--keep", "100") == 0
    assert_same_numbers(out)
    whole = points(out / "tensorboard")
    # As if it had been killed after step 28, with events behind the last checkpoint and a half-written one.
    for later in (path for path in (out / "checkpoints").iterdir() if int(path.name[5:]) > 21):
        shutil.rmtree(later)
    (path,) = (out / "tensorboard").iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    assert run(None, out, "--resume") == 0
    assert_same_numbers(out)
    timed = ("seconds", "texts_per_s", "peak_memory_mb")
    again = points(out / "tensorboard")
    assert {at: value for at, value in again.items() if not at[0].endswith(timed)} == {
        at: value for at, value in whole.items() if not at[0].endswith(timed)
    }
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["kind"] == "stage"
