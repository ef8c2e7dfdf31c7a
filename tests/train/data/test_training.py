"""A run on the same rows in any format learns the same."""

import json

import pytest

from tests.train.data import writers
from tests.train.data.writers import WRITERS, content_of, write_lines
from tests.train.tasks import QUICK, assert_same_training, metrics, run

FLAGS = (*QUICK, "--epochs", "2")


@pytest.fixture(scope="module")
def content(task):
    return content_of(task)


@pytest.fixture(scope="module")
def expected(content, tmp_path_factory):
    """A run on JSON lines."""
    folder = tmp_path_factory.mktemp("expected")
    (folder / "data").mkdir()
    writers.jsonl(folder / "data", content)
    assert run(folder / "data", folder / "run", *FLAGS) == 0
    return folder / "run"


@pytest.mark.parametrize("name", ["label-feature JSON", "raw text with label indices", "Parquet", "saved datasets"])
def test_every_format_trains_the_same(content, expected, tmp_path, name):
    (tmp_path / "data").mkdir()
    WRITERS[name](tmp_path / "data", content)
    out = tmp_path / "run"
    assert run(tmp_path / "data", out, *FLAGS) == 0
    assert_same_training(out, expected)
    assert (out / "heldout.jsonl").read_text().count("\n") == len(content.splits["test"])
    config = json.loads((out / "config.json").read_text())
    assert config["data"]["format"] == name
    assert config["data"]["sha256"].keys() == {"labels", "train", "test"}


def test_label_strings_train(content, tmp_path):
    """Their label order is their own, so the run is another one."""
    (tmp_path / "data").mkdir()
    writers.raw_text(tmp_path / "data", content)
    assert run(tmp_path / "data", tmp_path / "run", *FLAGS) == 0
    ids = [json.loads(line)["id"] for line in (tmp_path / "run" / "labels.jsonl").read_text().splitlines()]
    assert sorted(ids) == sorted(label for label, _ in content.labels)


def test_empty_texts_train(content, tmp_path):
    (tmp_path / "data").mkdir()
    train, test = content.splits["train"], content.splits["test"]
    splits = {"train": [("", [0]), *train, ("", [])], "test": [("", [1]), *test]}
    writers.label_features(tmp_path / "data", writers.Content(content.labels, splits))
    for flags in ((), ("--freeze-encoder",)):
        out = tmp_path / f"run{len(flags)}"
        assert run(tmp_path / "data", out, *FLAGS, *flags) == 0
        assert 0 <= [row for row in metrics(out) if row["kind"] == "eval"][-1]["P@1"] <= 1


def test_a_run_is_not_resumed_with_another_filter_or_other_texts(content, tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    writers.label_features(data, content)
    assert run(data, out, *FLAGS) == 0
    write_lines(data / "filter_labels_test.txt", ["0 1"])
    assert run(None, out, "--resume") == 2
    assert "the data has changed since the run began (test)" in capsys.readouterr().err
    (data / "filter_labels_test.txt").unlink()
    assert run(None, out, "--resume", "--titles-only") == 2
    assert "--titles-only (was False, now True)" in capsys.readouterr().err
    assert run(None, out, "--resume") == 0
