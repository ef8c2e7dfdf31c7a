"""A disk that is full is one clear error, and what was trained until then is kept."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.limits import no_file_beyond
from tests.train.tasks import QUICK, assert_same_training, run
from train.trainer import Trainer

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
