import gzip
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from models.checkpoint import load_head
from tests.train.tasks import N_LABELS, QUICK, metrics, run, untimed, write_jsonl, write_task
from train.model import prior_bias


def last(out, kind="eval"):
    return [row for row in metrics(out) if row["kind"] == kind][-1]


@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
@pytest.mark.parametrize(
    "head",
    [
        ("--connectivity", "shared"),
        ("--connectivity", "private", "--head-dtype", "fp32"),
        ("--connectivity", "dense"),
        ("--connectivity", "shared", "--dense-labels", "0.3"),
    ],
    ids=["shared", "private", "dense", "shared and dense"],
)
def test_a_task_is_learnt(task, tmp_path, head, loss):
    flags = ("--epochs", "12", "--encoder-lr", "5e-3", "--intermediate-lr", "5e-3", "--head-lr", "1e-2", "--eval-every", "12")
    assert run(task, tmp_path / "run", *QUICK, *flags, *head, "--loss", loss) == 0
    result = last(tmp_path / "run")
    chance = 3 / N_LABELS
    assert result["P@1"] > 0.8 > 10 * chance
    assert result["recall@10"] > 0.8
    losses = [row["loss"] for row in metrics(tmp_path / "run") if row["kind"] == "train"]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("optimizer", [("momentum", "0.3"), ("sgd", "3")])
def test_other_optimizers_learn_too(task, tmp_path, optimizer):
    flags = ("--epochs", "12", "--encoder-lr", "5e-3", "--intermediate-lr", "5e-3", "--eval-every", "12")
    assert run(task, tmp_path / "run", *QUICK, *flags, "--head-optimizer", optimizer[0], "--head-lr", optimizer[1]) == 0
    assert last(tmp_path / "run")["P@1"] > 0.6


def test_a_frozen_encoder_stays_and_the_rest_learns(task, tmp_path):
    flags = ("--epochs", "12", "--freeze-encoder", "--intermediate", "512", "--intermediate-lr", "1e-2", "--head-lr", "1e-2")
    out = tmp_path / "run"
    assert run(task, out, *QUICK, *flags, "--eval-every", "4", "--keep", "12") == 0
    results = [row["P@1"] for row in metrics(out) if row["kind"] == "eval"]
    assert len(results) == 3
    assert results[-1] > 0.3 > 3 * 3 / N_LABELS, "a random encoder keeps words apart well enough for this"
    first, final = (load_file(path / "encoder" / "model.safetensors") for path in sorted((out / "checkpoints").iterdir())[::11])
    moved = {name for name in first if (first[name] != final[name]).any()}
    assert moved == {"intermediate.weight", "intermediate.bias"}


def test_frozen_encoder_without_intermediate_layer(task, tmp_path):
    flags = ("--epochs", "3", "--freeze-encoder", "--intermediate", "0", "--fan-in", "8", "--head-lr", "1e-2")
    assert run(task, tmp_path / "run", *QUICK, *flags) == 0
    losses = [row["loss"] for row in metrics(tmp_path / "run") if row["kind"] == "train"]
    assert losses[-1] < losses[0]


def test_a_bias_that_knows_label_frequencies_starts_with_a_lower_loss():
    counts, n = np.array([1, 30, 500]), 1000
    p = counts / n

    def bce(bias):
        return (np.log1p(np.exp(bias)) - p * bias).sum()

    def squared_hinge(bias):
        return (p * np.maximum(0, 1 - bias) ** 2 + (1 - p) * np.maximum(0, 1 + bias) ** 2).sum()

    for loss, value in (("bce", bce), ("squared_hinge", squared_hinge)):
        prior = prior_bias(counts, n, loss)
        assert value(prior) < 0.7 * value(np.zeros(3))
        for step in (-0.05, 0.05):
            assert value(prior) < value(prior + step)
    assert np.isfinite(prior_bias(np.array([0, 10]), 10, "bce")).all(), "labels of no text and of every text"


def test_blocks_follow_label_frequency(tmp_path):
    data = write_task(tmp_path / "data", texts=200)
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    assert run(data, tmp_path / "run", *QUICK, "--epochs", "1", "--dense-labels", "2%", "--grouping", "frequency") == 0
    head = load_head(max((tmp_path / "run" / "checkpoints").iterdir()) / "head.safetensors")
    counts = np.bincount([int(label[2:]) for row in rows for label in row["labels"]], minlength=N_LABELS)
    dense, shared = head.blocks
    assert (dense.connectivity, shared.connectivity) == ("dense", "shared")
    assert dense.label_ids.shape == (1, 16), "2 % rounded up to a whole group"
    order = np.concatenate([block.label_ids[block.label_ids >= 0] for block in head.blocks])
    assert (np.diff(counts[order]) <= 0).all()
    assert sorted(order) == list(range(N_LABELS))


def test_the_run_directory_holds_what_the_design_says(tmp_path):
    data = write_task(tmp_path / "data", texts=100, test_texts=300, dev_texts=40)
    out = tmp_path / "run"
    assert run(data, out, *QUICK, "--epochs", "3", "--eval-every", "2", "--limit-eval", "20", "--keep", "2") == 0
    assert {path.name for path in out.iterdir()} == {
        "config.json", "metrics.jsonl", "labels.jsonl", "heldout.jsonl", "checkpoints", "cache", "tensorboard",
        "report.html",
    }  # fmt: skip
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step-00000014", "step-00000021"]
    assert {path.name for path in (out / "checkpoints" / "step-00000021").iterdir()} == {
        "encoder", "head.safetensors", "trainer.safetensors", "trainer.json",
    }  # fmt: skip
    labels = [json.loads(line) for line in (out / "labels.jsonl").read_text().splitlines()]
    assert len(labels) == N_LABELS
    assert labels[3]["id"] == "id3"
    heldout = [json.loads(line) for line in (out / "heldout.jsonl").read_text().splitlines()]
    dev = [json.loads(line) for line in (data / "dev.jsonl").read_text().splitlines()]
    assert [row["text"] for row in heldout] == [row["text"] for row in dev]
    assert [set(row["labels"]) for row in heldout] == [set(row["labels"]) for row in dev]

    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["limit_eval"] == 20
    assert config["data"]["train"]["texts"] == 100
    assert config["data"]["labels"] == N_LABELS
    assert config["model"]["width"] == 64
    assert {"python", "torch", "transformers", "fanin"} <= config["versions"].keys()

    rows = metrics(out)
    evaluations = [(row["split"], row["epoch"]) for row in rows if row["kind"] == "eval"]
    assert evaluations == [("dev", 2), ("dev", 3), ("test", 3)], "dev while training, test once at the end"
    for row in rows:
        if row["kind"] == "eval":
            assert {"P@1", "P@3", "P@5", "nDCG@5", "PSP@1", "PSP@3", "PSP@5", "recall@10", "seconds"} <= row.keys()
            assert {"macro-F1@5", "coverage@5", "PSnDCG@5"} <= row.keys()
            assert sum(decile["P@5"] for decile in row["deciles"]) == pytest.approx(row["P@5"])
            assert sum(decile["labels"] for decile in row["deciles"]) == N_LABELS
        elif row["kind"] == "train":
            assert {"loss", "encoder_lr", "intermediate_lr", "head_lr", "texts_per_s", "seconds"} <= row.keys()
            assert row["peak_memory_mb"] > 0
    assert [row["step"] for row in rows if row["kind"] == "train"] == [5, 7, 10, 14, 15, 20, 21]
    stages = {row["stage"] for row in rows if row["kind"] == "stage"}
    assert stages >= {"reading", "model", "tokenization", "embedding", "training", "checkpoint", "evaluation"}


def test_heldout_texts_are_spread_over_the_split(tmp_path):
    data = write_task(tmp_path / "data", texts=40, test_texts=1000)
    assert run(data, tmp_path / "run", *QUICK, "--epochs", "1", "--limit-eval", "10") == 0
    test = gzip.decompress((data / "test.jsonl.gz").read_bytes()).decode().splitlines()
    heldout = [json.loads(line) for line in (tmp_path / "run" / "heldout.jsonl").read_text().splitlines()]
    assert len(heldout) == 256
    places = [next(i for i, line in enumerate(test) if json.loads(line)["text"] == row["text"]) for row in heldout]
    assert places[0] == 0
    assert places[-1] > 990
    assert all(set(row["labels"]) == set(json.loads(test[i])["labels"]) for row, i in zip(heldout, places, strict=True))


def test_texts_without_labels_are_trained_on_but_not_evaluated(tmp_path):
    data = write_task(tmp_path / "data", texts=40)
    empty = [{"text": "nothing here", "labels": []}] * 30
    labelled = [json.loads(line) for line in gzip.decompress((data / "test.jsonl.gz").read_bytes()).splitlines()]
    (data / "test.jsonl.gz").unlink()
    results = []
    for name, rows in (("alone", labelled), ("among", empty + labelled)):
        write_jsonl(data / "test.jsonl", rows)
        assert run(data, tmp_path / name, *QUICK, "--epochs", "1", "--limit-eval", "20") == 0
        results.append({key: value for key, value in last(tmp_path / name).items() if key != "seconds"})
    assert results[0] == results[1]
    config = json.loads((tmp_path / "among" / "config.json").read_text())
    assert config["data"]["test"]["texts_without_labels"] == 30

    with (data / "train.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in empty)
    assert run(data, tmp_path / "more", *QUICK, "--epochs", "1") == 0
    assert json.loads((tmp_path / "more" / "config.json").read_text())["data"]["train"]["texts"] == 70


def test_the_same_seed_gives_the_same_run_and_another_seed_another(task, tmp_path):
    for name, seed in (("one", "1"), ("same", "1"), ("other", "2")):
        assert run(task, tmp_path / name, *QUICK, "--epochs", "2", "--seed", seed) == 0
    one, same, other = (untimed(metrics(tmp_path / name)) for name in ("one", "same", "other"))
    assert one == same
    assert [row["loss"] for row in one if row["kind"] == "train"] != [row["loss"] for row in other if row["kind"] == "train"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--head-lr", "1e30"),
        ("--encoder-lr", "1e30", "--clip-norm", "0"),
        ("--freeze-encoder", "--head-optimizer", "sgd", "--loss", "squared_hinge", "--head-lr", "1e3"),
    ],
)
def test_divergence_is_an_error_that_says_what_to_do(task, tmp_path, capsys, flags):
    out = tmp_path / "run"
    assert run(task, out, *QUICK, "--epochs", "5", *flags) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "training diverged at step " in message
    assert "lower learning rates" in message
    for row in metrics(out):
        assert np.isfinite([value for value in row.values() if isinstance(value, float)]).all()
