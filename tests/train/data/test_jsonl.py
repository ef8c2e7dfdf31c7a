import gzip
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.train.tasks import QUICK, command, run, write_jsonl
from train.data import Dataset

LABELS = [{"id": "a", "name": "first"}, {"id": "b"}]
GOOD = {"text": "some words", "labels": ["b", "a", "b"]}


@pytest.fixture
def data(tmp_path):
    """A folder of little, but good data."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "labels.jsonl", LABELS)
    for split in ("train", "test"):
        write_jsonl(folder / f"{split}.jsonl", [GOOD])
    return folder


def assert_refused(data: Path, capsys: pytest.CaptureFixture[str], where: str, reason: str) -> None:
    """The command exits with 2, says where and why in a line, and leaves nothing that stands in the way of another try."""
    out = data.parent / "run"
    assert run(data, out, *QUICK) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert where in message
    assert re.search(reason, message)
    assert not (out / "config.json").exists()


@pytest.mark.parametrize("name", ["dev.jsonl", "dev.jsonl.gz"])
def test_plain_and_gzipped_files_are_read(data, name):
    write_jsonl(data / name, [GOOD, {"text": "Größe", "labels": []}])
    dataset = Dataset(data)
    labels = dataset.labels()
    (text, positions), (second, none) = dataset.texts("dev", labels)
    assert (text, second) == ("some words", "Größe")
    assert positions.tolist() == [0, 1]
    assert positions.dtype == np.int32
    assert none.tolist() == []
    assert labels.ids == ["a", "b"]
    assert labels.names == ["first", "b"]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ('{"text": "x", "labels": ["a"', "broken JSON: .* at column"),
        ("", "broken JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[1]", "expected a JSON object, found list"),
        ({"labels": ["a"]}, "no text"),
        ({"text": " \t", "labels": ["a"]}, "no text"),
        ({"text": 7, "labels": ["a"]}, "no text"),
        ({"text": "x \ud800", "labels": ["a"]}, "half a surrogate pair"),
        ({"text": "x"}, '"labels" must be a list'),
        ({"text": "x", "labels": "a"}, '"labels" must be a list'),
        ({"text": "x", "labels": ["a", "zebra"]}, "unknown label 'zebra'"),
        ({"text": "x", "labels": [1]}, "unknown label 1"),
    ],
)
def test_a_bad_text_is_named_by_file_and_line(data, capsys, split, bad, reason):
    write_jsonl(data / f"{split}.jsonl", [GOOD, bad, GOOD])
    assert_refused(data, capsys, f"{split}.jsonl:2: ", reason)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"id": "a", "name": "again"}, "label id 'a' was on line 1 already"),
        ({"name": "no id"}, 'needs an "id"'),
        ({"id": 3, "name": "x"}, 'needs an "id"'),
        ({"id": "c", "name": None}, '"name" is not a string'),
        ("{", "broken JSON"),
    ],
)
def test_a_bad_label_is_named_by_file_and_line(data, capsys, bad, reason):
    write_jsonl(data / "labels.jsonl", [*LABELS, bad])
    assert_refused(data, capsys, "labels.jsonl:3: ", reason)


def test_bytes_that_are_not_utf8(data, capsys):
    (data / "train.jsonl").write_bytes(b'{"text": "x", "labels": ["a"]}\n{"text": "\xff", "labels": ["a"]}\n')
    assert_refused(data, capsys, "train.jsonl:2: ", "not UTF-8 at byte 10")


def test_a_cut_gzip_file(data, capsys):
    (data / "train.jsonl").unlink()
    rows = [{"text": f"text {i} {i * i}", "labels": ["a"]} for i in range(2000)]
    path = write_jsonl(data / "train.jsonl.gz", rows)
    path.write_bytes(path.read_bytes()[:-500])
    assert_refused(data, capsys, "train.jsonl.gz:", "cannot be read")
    path.write_bytes(gzip.compress(b"")[:5] + b"nonsense")
    assert_refused(data, capsys, "train.jsonl.gz:1: ", "cannot be read")


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_split(data, capsys, split):
    (data / f"{split}.jsonl").write_bytes(b"")
    assert_refused(data, capsys, f"{split}.jsonl", "empty, holds no text")


def test_a_split_in_which_no_text_has_a_label(data, capsys):
    write_jsonl(data / "train.jsonl", [{"text": "x", "labels": []}] * 3)
    assert_refused(data, capsys, "train.jsonl", "none of its 3 texts has a label")


def test_no_label(data, capsys):
    (data / "labels.jsonl").write_bytes(b"")
    assert_refused(data, capsys, "labels.jsonl", "holds no label")


@pytest.mark.parametrize("name", ["labels", "train", "test"])
def test_a_missing_file(data, capsys, name):
    (data / f"{name}.jsonl").unlink()
    assert_refused(data, capsys, str(data), rf"no {name}\.jsonl")


def test_a_file_that_is_there_twice(data, capsys):
    write_jsonl(data / "train.jsonl.gz", [GOOD])
    assert_refused(data, capsys, str(data), "both train.jsonl and train.jsonl.gz")


def test_a_folder_that_is_not_there(data, tmp_path, capsys):
    assert run(tmp_path / "nowhere", tmp_path / "run") == 2
    assert "nowhere: no such folder" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_command_prints_one_line_and_exits_with_2(data, tmp_path):
    write_jsonl(data / "train.jsonl", [GOOD, '{"text": '])
    done = subprocess.run(command("--data", str(data), "--out", str(tmp_path / "run")), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"python -m train: error: {data / 'train.jsonl'}:2: broken JSON")
    assert done.stderr.count("\n") == 1

    done = subprocess.run(
        command("--data", str(data), "--out", str(tmp_path / "run"), "--epochs", "0"), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--epochs" in done.stderr
