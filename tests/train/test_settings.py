import json
import re
import shutil
from dataclasses import fields

import pytest

from tests.train.tasks import QUICK, SMALL, run
from train import settings
from train.flags import parse
from train.presets import PRESETS
from train.settings import Settings


def test_help_explains_every_setting_and_the_exit_codes(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for spec in fields(Settings):
        assert f"--{spec.name.replace('_', '-')}" in text
        if not isinstance(spec.default, bool) and spec.default not in ("", None):
            shown = f"{spec.default:g}" if isinstance(spec.default, float) else str(spec.default)
            assert f"(default: {shown}" in text
    assert "130 stopped by Ctrl-C" in text
    assert "or 2% (default" in text


@pytest.mark.parametrize(("given", "share"), [("2%", 0.02), ("0.02", 0.02), ("0", 0.0), ("100%", 1.0), ("12.5%", 0.125)])
def test_shares(given, share):
    assert parse(["--out", "x", "--dense-labels", given])[0]["dense_labels"] == pytest.approx(share)


def test_defaults_depend_on_the_encoder_and_flags_win(tmp_path):
    given = {"data": str(tmp_path), "out": "run"}
    assert settings.new(given) == Settings(**given)
    pretrained = settings.new(given | {"encoder": "some/model"})
    assert pretrained.encoder_lr < Settings.encoder_lr
    assert pretrained.dropout > Settings.dropout
    assert settings.new(given | {"encoder": "some/model", "dropout": 0.0}).dropout == 0
    beside_preset = settings.new(given | {"encoder": "some/model", "preset": "cpu"})
    assert beside_preset.encoder_lr == pretrained.encoder_lr
    assert beside_preset.intermediate == pretrained.intermediate > 0
    assert beside_preset.fan_in == PRESETS["cpu"]["fan_in"]
    small = settings.new(given | {"encoder": "small", "preset": "amazon-3m"})
    assert (small.encoder_lr, small.dropout, small.intermediate) == (Settings.encoder_lr, Settings.dropout, 0)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole_settings_that_flags_override(tmp_path, name):
    given = {"data": str(tmp_path), "out": "run", "preset": name}
    chosen = settings.new(given)
    assert {key: getattr(chosen, key) for key in PRESETS[name]} == PRESETS[name]
    changed = settings.new(given | {"batch_size": 7, "tiers": "dense:10%,8:90%"})
    assert changed.batch_size == 7
    assert [tier.fan_in for tier in changed.head_tiers] == [None, 8]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "mnist"], "invalid choice: 'mnist'"),
        (["--dense-labels", "101%"], "101% is not a share"),
        (["--dense-labels", "-1"], "--dense-labels"),
        (["--epochs", "0"], "0 is not at least 1"),
        (["--intermediate", "-1"], "-1 is negative"),
        (["--head-lr", "nan"], "nan is not a number from 0 up"),
        (["--propensity-b", "0"], "0 is not a number above 0"),
        (["--seed", str(1 << 63)], "9223372036854775808 is not below 2^63"),
        (["--threads", "100000"], "100000 is more than 1,024"),
        (["--epochs", "ten"], "invalid whole number value: 'ten'"),
        (["--dropout", "1,5"], "invalid share value: '1,5'"),
        (["--fan-in", "many"], "--fan-in"),
        (["--loss", "hinge"], "--loss"),
        (["--pooling", "max"], "--pooling"),
        (["--unknown", "1"], "--unknown"),
    ],
)
def test_a_bad_flag_is_named(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        parse(["--data", "x", "--out", "y", *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--group-size", "24"], "--group-size 24 is not a multiple of 16"),
        (["--tiers", "dense:2%,16:90%"], "--tiers dense:2%,16:90%: the shares add up to 92%, not 100%"),
        (["--tiers", "16:100%", "--fan-in", "16"], "--tiers takes the place of --fan-in; give one of them"),
        (["--tiers", "16:100%", "--dense-labels", "0"], "--tiers takes the place of --dense-labels; give one of them"),
        (["--tiers", "16:100%", "--connectivity", "dense"], "--tiers does not go with --connectivity dense"),
        (["--label-smoothing", "1"], "--label-smoothing 1 would leave no target"),
        (["--dropout", "1"], "--dropout 1 would drop every input"),
        (["--intermediate-dropout", "1"], "--intermediate-dropout 1 would drop every input"),
        (["--fan-in", "65"], "--fan-in 65: a label cannot read 65 inputs, the intermediate layer has 64 outputs"),
        (["--fan-in", "65", "--intermediate", "0"], "a label cannot read 65 inputs, the encoder has 32 outputs"),
        (["--tiers", "dense:10%,65:90%"], "--tiers dense:10%,65:90%: a label cannot read 65 inputs"),
        (["--intermediate", "70000"], "intermediate is 70000"),
        (["--max-length", "2"], "max_length is 2"),
        (["--small-heads", "3"], "width is 32, must be a multiple of the 3 heads"),
        (["--encoder", "/no/such/encoder"], "/no/such/encoder: no such folder"),
    ],
)
def test_settings_that_cannot_work_are_named(task, tmp_path, capsys, flags, message):
    assert run(task, tmp_path / "run", *SMALL, *flags) == 2
    assert message in capsys.readouterr().err


def test_out_and_data_are_needed(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(["--data", str(tmp_path)])
    assert "--out is missing" in capsys.readouterr().err
    assert run(None, tmp_path / "run") == 2
    assert "--data is missing" in capsys.readouterr().err


def test_a_run_is_not_overwritten(task, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(task, out, *QUICK, "--epochs", "1") == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(task, out, *QUICK, "--epochs", "1") == 2
    assert "holds a run; continue it with --resume" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before

    other = tmp_path / "papers"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    assert run(task, other, *QUICK) == 2
    assert "not empty and holds no run" in capsys.readouterr().err
    assert run(task, other / "thesis.tex", *QUICK) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_a_run_is_not_resumed_with_other_settings_or_data(task, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(task, out, *QUICK, "--epochs", "1") == 0
    assert run(None, out, "--resume", "--fan-in", "8", "--seed", "3", "--keep", "1") == 2
    message = capsys.readouterr().err
    assert re.search(
        r"cannot resume with changed settings: --fan-in \(was 16, now 8\), --seed \(was 0, now 3\)$", message.strip()
    )
    assert run(None, out, "--resume", "--fan-in", "16", "--keep", "1") == 0

    moved = tmp_path / "moved"
    moved.mkdir()
    for path in task.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    assert run(moved, out, "--resume") == 0, "the same data elsewhere is the same data"
    with (moved / "train.jsonl").open("a") as file:
        file.write(json.dumps({"text": "more", "labels": []}) + "\n")
    assert run(moved, out, "--resume") == 2
    assert "the data has changed since the run began (train)" in capsys.readouterr().err

    config = json.loads((out / "config.json").read_text())
    damaged = {
        "{": "config.json: cannot be read",
        json.dumps(config | {"data": {}}): "config.json: cannot be read: settings or data are missing",
        json.dumps(config | {"settings": config["settings"] | {"epochs": "x"}}): "config.json: epochs is 'x'",
    }
    for text, message in damaged.items():
        (out / "config.json").write_text(text)
        assert run(None, out, "--resume") == 2
        assert message in capsys.readouterr().err


def test_metrics_are_not_lost_by_a_damaged_line(task, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(task, out, *QUICK, "--epochs", "1") == 0
    log = out / "metrics.jsonl"
    whole = log.read_bytes()
    first, second, *rest = whole.splitlines(keepends=True)
    for bad in (b"garbage\n", b"[1]\n", b'{"a": 1}\n', b"\xff\n"):
        log.write_bytes(first + bad + b"".join(rest))
        assert run(None, out, "--resume") == 2
        assert f"{log}:2: not a row that train writes" in capsys.readouterr().err
        assert log.read_bytes() == first + bad + b"".join(rest)
    log.write_bytes(whole + second[:-9])
    assert run(None, out, "--resume") == 0
    assert log.read_bytes().startswith(whole + b"{"), "half of a last line, which a killed process leaves, is gone"


def test_what_a_process_killed_while_preparing_left_is_taken_over(task, tmp_path):
    out = tmp_path / "run"
    (out / "cache" / ".tokens-0123.0123abcd.tmp").mkdir(parents=True)
    for name in (".labels.jsonl.0123abcd.tmp", "labels.jsonl", "metrics.jsonl"):
        (out / name).touch()
    assert run(task, out, *QUICK, "--epochs", "1") == 0
    assert not list(out.rglob("*.tmp"))


def test_damaged_checkpoints_are_named(task, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(task, out, *QUICK, "--epochs", "1") == 0
    checkpoint = max((out / "checkpoints").iterdir())
    for name in (
        "trainer.json",
        "trainer.safetensors",
        "head.safetensors",
        "encoder/model.safetensors",
        "encoder/encoder.json",
    ):
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(whole[: len(whole) // 2])
        assert run(None, out, "--resume") == 2
        assert str(checkpoint / name) in capsys.readouterr().err
        (checkpoint / name).write_bytes(whole)
    progress = checkpoint / "trainer.json"
    whole = progress.read_text()
    for name, value in {"epoch": "x", "step": -1, "batch": True, "seconds": None}.items():
        progress.write_text(json.dumps(json.loads(whole) | {name: value}))
        assert run(None, out, "--resume") == 2
        assert f"{progress}: {name} is {value!r}" in capsys.readouterr().err
    progress.write_text(whole)
    assert run(None, out, "--resume") == 0


@pytest.mark.parametrize("name", ["head.safetensors", "trainer.safetensors"])
def test_beside_a_damaged_checkpoint_an_older_one_is_named(task, tmp_path, capsys, name):
    out = tmp_path / "run"
    assert run(task, out, *QUICK, "--epochs", "2", "--keep", "2") == 0
    older, newest = sorted((out / "checkpoints").iterdir())
    (newest / name).write_bytes(b"")
    assert run(None, out, "--resume") == 2
    assert capsys.readouterr().err.endswith(f"; delete {newest} to go on from {older.name}\n")
    shutil.rmtree(newest)
    assert run(None, out, "--resume") == 0
    assert sorted((out / "checkpoints").iterdir()) == [older, newest]
