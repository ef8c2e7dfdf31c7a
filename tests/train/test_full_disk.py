"""A disk that is full is one clear error, and what was trained until then is kept."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.limits import no_file_beyond
from tests.train.tasks import QUICK, assert_same_training, run
from train import inputs
from train.runs import Log
from train.tensorboard import Events
from train.trainer import DivergedError, Trainer

EPOCHS = ("--epochs", "2")


@pytest.mark.parametrize(
    ("what", "size", "flags"),
    [
        ("cache/tokens-*", 8_006, ()),  # the last bytes of one of its files
        ("cache/pooled-*", 20_000, ("--freeze-encoder",)),
        ("checkpoints/step-00000019", 60_000, ()),  # the encoder
        ("checkpoints/step-00000019", 120_000, ()),  # the optimizers' moments
    ],
)
def test_what_has_no_room_is_named_and_made_later(task, tmp_path, capsys, what, size, flags):
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert run(task, whole, *QUICK, *EPOCHS, *flags) == 0
    capsys.readouterr()
    with no_file_beyond(size):
        assert run(task, part, *QUICK, *EPOCHS, *flags) == 2
    *_, message = capsys.readouterr().err.splitlines()
    reason, name = message.removesuffix("'").split(": '")
    assert reason == "python -m train: error: [Errno 27] File too large"
    assert name in [str(part / path.relative_to(whole)) for path in whole.glob(what)]
    assert not Path(name).exists()
    assert not list(part.rglob("*.tmp")), "nothing half-written is left"
    assert run(task, part, *QUICK, *EPOCHS, *flags, "--resume") == 0
    assert_same_training(whole, part)


def test_room_for_embeddings_is_taken_before_they_are_made(task, tmp_path, monkeypatch):
    """A mapped page without room on the disk would end the process."""
    asked, real = [], inputs.reserve
    monkeypatch.setattr(inputs, "reserve", lambda path, size: (asked.append((path.name, size)), real(path, size)))
    assert run(task, tmp_path / "run", *QUICK, "--epochs", "1", "--freeze-encoder") == 0
    sizes = sorted(path.stat().st_size for path in (tmp_path / "run" / "cache").glob("pooled-*/pooled.bin"))
    assert sorted(asked) == [("pooled.bin", size) for size in sizes]
    assert len(sizes) == 2


def test_a_log_without_room_is_named(tmp_path):
    log = Log(tmp_path / "metrics.jsonl")
    with no_file_beyond(1), pytest.raises(OSError, match=f"File too large: '{tmp_path / 'metrics.jsonl'}'"):
        log.write({"kind": "train", "step": 1})


def test_events_without_room_are_named(tmp_path):
    log = Log(tmp_path / "metrics.jsonl")
    events = Events(tmp_path / "tensorboard", log)
    with no_file_beyond(50), pytest.raises(OSError, match=f"File too large: '{tmp_path / 'tensorboard'}'"):
        log.write({"kind": "train", "step": 1, "loss": 1.0})
    events.close()


def test_what_stopped_a_run_is_told_and_not_that_its_report_has_no_room(task, tmp_path, capsys, monkeypatch):
    def diverge(self):
        raise DivergedError("the loss is not finite")

    monkeypatch.setattr(Trainer, "run", diverge)
    with no_file_beyond(10_000):
        assert run(task, tmp_path / "run", *QUICK, *EPOCHS) == 1
    assert capsys.readouterr().err.endswith("error: the loss is not finite\n")
    assert not list((tmp_path / "run").glob("*report*"))


def test_the_checkpoint_before_is_gone_on_from(task, tmp_path, capsys, monkeypatch):
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert run(task, whole, *QUICK, *EPOCHS) == 0
    steps, real = [], Trainer._step
    with ExitStack() as stack, monkeypatch.context() as patch:

        def filling(self, rows):
            steps.append(rows)
            if len(steps) == 25:
                stack.enter_context(no_file_beyond(60_000))
            return real(self, rows)

        patch.setattr(Trainer, "_step", filling)
        assert run(task, part, *QUICK, *EPOCHS, "--keep", "1") == 2
    assert capsys.readouterr().err.endswith(f"File too large: '{part / 'checkpoints' / 'step-00000038'}'\n")
    assert [path.name for path in (part / "checkpoints").iterdir()] == ["step-00000019"]
    assert run(None, part, "--resume") == 0
    assert_same_training(whole, part)
