"""Pairs that are neither right nor wrong: read, left out of the labels, kept in the cache, obeyed in evaluation."""

import numpy as np
import pytest
import torch

from models import kernels
from tests.train.data import writers
from tests.train.data.writers import WRITERS, Content, content_of, write_lines
from tests.train.tasks import QUICK, metrics, run
from train import checkpoint
from train.data import DataError, Dataset
from train.evaluation import without
from train.tokens import load_split

CONTENT = Content(
    [(str(i), f"name {i}") for i in range(4)],
    {"train": [("a", [0, 1]), ("b", [1]), ("c", [2])], "test": [("d", [1, 3]), ("e", [0]), ("f", [0, 1, 2])]},
)
TEST_PAIRS = ["2 1", "0 2", "0 3", "2 0", "0 3"]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    "filters", [("filter_labels_train.txt", "filter_labels_test.txt"), ("trn_filter_labels.txt", "tst_filter_labels.txt")]
)
def test_filtered_pairs_are_no_labels(tmp_path, name, filters):
    WRITERS[name](tmp_path, CONTENT)
    write_lines(tmp_path / filters[0], ["0 1"])
    write_lines(tmp_path / filters[1], TEST_PAIRS)
    splits = content_of(tmp_path).splits
    if name == "raw text with label strings":  # numbered as they appear: 0, 1, 2, 3
        assert Dataset(tmp_path).labels().ids == ["0", "1", "2", "3"]
    assert splits["train"] == [("a", [0]), ("b", [1]), ("c", [2])]
    assert splits["test"] == [("d", [1]), ("e", [0]), ("f", [2])]


def test_an_empty_filter_file_filters_nothing(tmp_path):
    writers.label_features(tmp_path, CONTENT)
    (tmp_path / "filter_labels_test.txt").touch()
    assert content_of(tmp_path).splits == CONTENT.splits


@pytest.mark.parametrize(
    ("lines", "where", "reason"),
    [
        (["0 1", "1"], ":2: ", "expected the numbers of a text and a label"),
        (["0 1 1"], ":1: ", "expected the numbers"),
        (["0:1"], ":1: ", "expected the numbers"),
        (["0 -1"], ":1: ", "expected the numbers"),
        (["0 1", "0 4"], ":2: ", "label 4 is not one of 0 … 3"),
        (["0 1", "3 2", "1 1"], ":2: ", "text 3 is not one of 0 … 2"),
        (["0 1", f"{10**12} 2"], ":2: ", "text 1000000000000 is not one of"),
        (["0 1", f"{10**30} 2"], ":2: ", "expected the numbers"),
    ],
)
def test_a_bad_pair_is_named_by_file_and_line(tmp_path, lines, where, reason):
    writers.label_features(tmp_path, CONTENT)
    path = write_lines(tmp_path / "filter_labels_test.txt", lines)
    with pytest.raises(DataError, match=reason) as error:
        content_of(tmp_path)
    assert f"{path}{where}" in str(error.value)


def test_two_filter_files(tmp_path):
    writers.label_features(tmp_path, CONTENT)
    write_lines(tmp_path / "filter_labels_test.txt", ["0 0"])
    write_lines(tmp_path / "tst_filter_labels.txt", ["0 0"])
    with pytest.raises(DataError, match=r"both filter_labels_test\.txt and tst_filter_labels\.txt"):
        Dataset(tmp_path)


def test_the_cache_keeps_the_filtered_labels_of_each_text(tmp_path):
    writers.indexed_text(tmp_path, CONTENT)
    write_lines(tmp_path / "filter_labels_test.txt", TEST_PAIRS)
    data = Dataset(tmp_path)
    labels = data.labels()
    for _ in range(2):  # made, then mapped
        split = load_split(data, "test", labels, ["key"], lambda texts: [[1] for _ in texts], tmp_path / "cache")
        assert [found.tolist() for found in split.filtered_of(np.array([2, 0, 1]))] == [[0, 1], [2, 3], []]
    train = load_split(data, "train", labels, ["other"], lambda texts: [[1] for _ in texts], tmp_path / "cache")
    assert [found.tolist() for found in train.filtered_of(np.arange(3))] == [[], [], []]


def test_what_follows_a_filtered_answer_moves_up():
    ranked = np.array([[5, 3, 9, 1], [2, 0, 4, 7], [8, 6, 1, 0]], dtype=np.int32)
    filtered = [np.array([3, 5], dtype=np.int32), np.array([], dtype=np.int32), np.array([0, 100], dtype=np.int32)]
    assert without(ranked, filtered).tolist() == [[9, 1, -1, -1], [2, 0, 4, 7], [8, 6, 1, -1]]


def test_evaluation_is_over_what_is_not_filtered(task, tmp_path):
    """P@k of a run on label-feature JSON equals that of all scores, sorted, without the filtered pairs."""
    content = content_of(task)
    data = tmp_path / "data"
    data.mkdir()
    writers.label_features(data, content)
    rng = np.random.default_rng(0)
    pairs = {
        (row, label)
        for row, (_, found) in enumerate(content.splits["test"])
        for label in (found[0], *rng.integers(40, size=12))
    }
    write_lines(data / "filter_labels_test.txt", [f"{row} {label}" for row, label in sorted(pairs)])

    out = tmp_path / "run"
    assert run(data, out, *QUICK, "--epochs", "4", "--encoder-lr", "5e-3", "--head-lr", "1e-2") == 0
    logged = [row for row in metrics(out) if row["kind"] == "eval"][-1]

    encoder, head, _ = checkpoint.load_model(checkpoint.latest(out / "checkpoints"))
    encoder.eval()
    sums = dict.fromkeys((1, 3, 5), 0.0)
    evaluated = 0
    for row, (text, found) in enumerate(content.splits["test"]):
        tokens = torch.tensor(encoder.tokenize([text]))
        with torch.inference_mode():
            x = encoder(tokens, torch.ones_like(tokens)).numpy()
        scores = np.full(40, -np.inf)
        for block in head.blocks:
            real = block.label_ids >= 0
            scores[block.label_ids[real]] = kernels.scores(x, block)[0][real]
        unwanted = [label for pair, label in pairs if pair == row]
        scores[unwanted] = -np.inf
        ranked, truth = np.argsort(-scores), set(found) - set(unwanted)
        evaluated += bool(truth)
        for k in sums:
            sums[k] += len(truth.intersection(ranked[:k].tolist())) / k
    assert evaluated
    for k, total in sums.items():
        assert logged[f"P@{k}"] == pytest.approx(total / evaluated, abs=1e-9)
    assert logged["P@1"] > 0.2, "the task is learnt well enough to tell"
