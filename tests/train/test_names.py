"""Training on labels' names: each is one more text of its label, and nothing that is measured counts it."""

import json
from functools import partial

import pytest

from models.encoder import Encoder, EncoderConfig
from tests.train.tasks import N_LABELS, QUICK, metrics, run, write_jsonl, write_task
from train.data import Dataset
from train.prepare import counts_and_weights
from train.settings import new
from train.tokens import label_counts, load_split


@pytest.fixture(scope="module")
def with_names(task):
    return Dataset(task, train_on_names=True)


def test_names_follow_the_texts_to_train_on(task, with_names):
    plain, labels = Dataset(task), with_names.labels()
    texts, more = list(plain.texts("train", labels)), list(with_names.texts("train", labels))
    assert [text for text, _ in more] == [text for text, _ in texts] + labels.names
    assert [found.tolist() for _, found in more[len(texts) :]] == [[position] for position in range(N_LABELS)]
    assert [text for text, _ in with_names.texts("test", labels)] == [text for text, _ in plain.texts("test", labels)]


def test_a_filter_numbers_the_texts_alone(task, tmp_path):
    for file in task.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    labels = Dataset(tmp_path).labels()
    texts = list(Dataset(tmp_path).texts("train", labels))
    first = texts[0][1]
    (tmp_path / "filter_labels_train.txt").write_text(f"0 {first[1]}\n")
    filtered = list(Dataset(tmp_path, train_on_names=True).texts("train", labels))
    assert filtered[0][1].tolist() == [first[0], first[2]]
    assert filtered[len(texts) + first[1]][1].tolist() == [first[1]], "its name stays its text"


def test_what_is_measured_does_not_count_names(task, with_names, tmp_path):
    labels = with_names.labels()
    plain = Dataset(task)
    texts = [text for text, _ in plain.texts("train", labels)]
    encoder = Encoder.small(
        texts, EncoderConfig(pooling="mean", max_length=16), vocabulary=300, width=16, layers=0, heads=2, seed=0
    )
    splits = [
        load_split(data, "train", labels, [str(data.train_on_names)], encoder.tokenize, tmp_path)
        for data in (plain, with_names)
    ]
    assert [len(split) for split in splits] == [300, 300 + N_LABELS]
    trained = [label_counts(split, labels) for split in splits]
    assert (trained[1] == trained[0] + 1).all()
    settings = new({"data": str(task), "out": str(tmp_path)})
    (counts, weights), (counts_with, weights_with) = map(partial(counts_and_weights, settings), splits, trained)
    assert (counts_with == counts).all()
    assert (weights_with == weights).all()


def test_runs_with_and_without_names_measure_alike_and_share_a_cache(task, tmp_path):
    deciles, told = [], []
    for flags in ((), ("--train-on-names",), ()):
        out = tmp_path / f"run{len(deciles)}"
        assert run(task, out, *QUICK, *flags, "--epochs", "1", "--cache", str(tmp_path / "cache")) == 0
        (row,) = (row for row in metrics(out) if row["kind"] == "eval")
        deciles.append([[decile["labels"], decile["texts"], decile["positives"]] for decile in row["deciles"]])
        told.append(json.loads((out / "config.json").read_text())["data"]["train"])
    assert deciles[0] == deciles[1] == deciles[2]
    assert told[0] | {"names": N_LABELS} == told[1]
    assert told[0] == told[2]


def test_labels_without_texts_are_found_by_their_names(tmp_path):
    """The words of five labels occur in texts to train on, without the labels."""
    data = write_task(tmp_path / "data", texts=300)
    names = Dataset(data).labels().names
    unseen = {f"id{i}" for i in range(5)}
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["labels"] = [label for label in row["labels"] if label not in unseen]
    write_jsonl(data / "train.jsonl", rows)
    (data / "test.jsonl.gz").unlink()
    noise = " ".join(sorted({word for row in rows for word in row["text"].split()} - set(names))[:2])
    write_jsonl(data / "test.jsonl", [{"text": f"{names[i]} {noise}", "labels": [f"id{i}"]} for i in range(5)])
    found = {}
    for flags in ((), ("--train-on-names",)):
        out = tmp_path / f"run{len(flags)}"
        bag = ("--small-layers", "0", "--intermediate", "0", "--fan-in", "32", "--head-init", "imprinted", "--epochs", "4")
        assert run(data, out, *QUICK, *bag, *flags) == 0
        found[flags] = [row["P@1"] for row in metrics(out) if row["kind"] == "eval"][-1]
    assert found[()] == 0
    assert found["--train-on-names",] > 0.5  # 1/40 by chance


def test_a_run_is_not_resumed_with_names(task, tmp_path, capsys):
    assert run(task, tmp_path / "run", *QUICK, "--epochs", "1") == 0
    assert run(None, tmp_path / "run", "--resume", "--train-on-names") == 2
    assert "--train-on-names (was False, now True)" in capsys.readouterr().err
