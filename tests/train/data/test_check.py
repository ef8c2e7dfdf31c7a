"""The figures of `python -m train.data check` are those of a slow count in plain Python."""

import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.data import writers
from tests.train.data.writers import WRITERS, Content, write_lines
from tests.train.tasks import write_jsonl
from train.data import Dataset, statistics
from train.data.__main__ import main
from train.data.statistics import SplitFacts, split_facts

LABELS = 6


def check(capsys: pytest.CaptureFixture[str], *flags: object) -> tuple[int, str, str]:
    code = main(["check", *map(str, flags)])
    return code, *capsys.readouterr()


rows = st.lists(
    st.tuples(
        st.sampled_from(["", "a", "a b", "über  uns alle", "x y z"]),
        st.lists(st.integers(0, LABELS - 1), unique=True).map(sorted),
    ),
    max_size=12,
).map(lambda rows: [("first", [0]), *rows])


@settings(max_examples=40, deadline=None)
@given(train=rows, test=rows)
def test_the_facts_are_those_of_a_plain_count(tmp_path_factory, train, test):
    folder = tmp_path_factory.mktemp("data")
    writers.label_features(folder, Content([(str(i), "") for i in range(LABELS)], {"train": train, "test": test}))
    data = Dataset(folder)
    labels = data.labels()
    facts = {split: split_facts(data, split, labels) for split in data.splits}
    given = {split: Counter(i for _, found in rows for i in found) for split, rows in (("train", train), ("test", test))}
    for split, rows in (("train", train), ("test", test)):
        each, texts = facts[split], [text for text, _ in rows]
        assert each.texts == len(rows)
        assert each.unlabelled == sum(not found for _, found in rows)
        assert each.empty == texts.count("")
        assert each.repeated == len(texts) - len(set(texts))
        assert each.counts.tolist() == [given[split][i] for i in range(LABELS)]
        assert list(each.labels) == [len(found) for _, found in rows]
        assert list(each.words) == [len(text.split()) for text in texts]
        assert list(each.characters) == [len(text) for text in texts]
    assert statistics.also_in(facts["train"], facts["test"]) == sum(text in {text for text, _ in train} for text, _ in test)
    new = [i for i in given["test"] if i not in given["train"]]
    assert statistics.unseen(facts["test"].counts, facts["train"].counts) == (len(new), sum(given["test"][i] for i in new))


counts = (
    st.lists(st.integers(0, 3000), min_size=1, max_size=60).filter(any).map(lambda values: np.array(values, dtype=np.int64))
)


@given(counts)
def test_classes_of_rare_labels_are_a_partition(counts):
    rows = statistics.rare_labels(counts)
    assert sum(number for _, number, _ in rows) == len(counts)
    assert sum(positives for _, _, positives in rows) == counts.sum()
    by_name = {name: number for name, number, _ in rows}
    assert by_name["0"] == (counts == 0).sum()
    assert by_name["1"] == (counts == 1).sum()
    assert by_name["2–5"] == np.isin(counts, [2, 3, 4, 5]).sum()
    assert by_name["more than 1,000"] == (counts > 1000).sum()


@given(counts)
def test_skew(counts):
    ordered = sorted(counts.tolist(), reverse=True)
    for share, number, held in statistics.head_shares(counts):
        assert number == max(1, round(share * len(counts)))
        assert held == pytest.approx(sum(ordered[:number]) / sum(ordered))
    differences = sum(abs(a - b) for a in ordered for b in ordered)  # the definition
    assert statistics.gini(counts) == pytest.approx(differences / (2 * len(ordered) * sum(ordered)), abs=1e-12)


def test_gini_of_equal_labels_and_of_one_that_has_all():
    assert statistics.gini(np.full(1000, 7)) == pytest.approx(0, abs=1e-12)
    assert statistics.gini(np.eye(1, 1000, dtype=np.int64)[0]) == pytest.approx(0.999)


def test_spread_is_of_numbers_that_occur():
    facts = SplitFacts(np.zeros(1))
    facts.words.extend(range(1, 101))
    assert statistics.spread(facts.words) == (50.5, 50, 90, 99, 100)


CONTENT = Content(
    [(str(i), name) for i, name in enumerate(("sun", "moon", "star", "new", "none"))],
    {
        "train": [("one two", [0, 1]), ("one two", [0]), ("three", [0, 2]), ("four", [])],
        "test": [("three", [0]), ("five", [1, 3]), ("six", [3])],
    },
)


def figures(out: str, name: str) -> list[str]:
    """What stands after a name at the beginning of a line."""
    (line,) = re.findall(rf"^  {re.escape(name)} +(.*)$", out, flags=re.MULTILINE)
    return line.split()


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "raw text with label strings"])
def test_the_report(tmp_path, capsys, name):
    WRITERS[name](tmp_path, CONTENT)
    write_lines(tmp_path / "filter_labels_test.txt", ["2 0", "1 4"])
    code, out, _ = check(capsys, tmp_path)
    assert code == 0
    assert out.startswith(f"{tmp_path}: {name}\n")
    assert "filter_labels_test.txt" in out
    assert re.findall(r"^  all +(.*)$", out, flags=re.MULTILINE)[0].split() == ["4", "3"]
    assert figures(out, "without labels") == ["1", "25.0%", "0", "0.0%"]
    assert figures(out, "repeated in the split") == ["1", "25.0%", "0", "0.0%"]
    assert figures(out, "also in train") == ["1", "33.3%"]
    assert figures(out, "labels given") == ["5", "4"]
    assert figures(out, "filtered pairs") == ["0", "2"]
    assert figures(out, "labels, train") == ["1.2", "1", "2", "2", "2"]
    assert figures(out, "words, train") == ["1.5", "1", "2", "2", "2"]
    assert figures(out, "characters, test") == ["4.0", "4", "5", "5", "5"]
    assert figures(out, "in 0") == ["2", "40.0%", "0", "0.0%"]
    assert figures(out, "in 1") == ["2", "40.0%", "2", "40.0%"]
    assert figures(out, "in 2–5") == ["1", "20.0%", "3", "60.0%"]
    assert figures(out, "the 50% most frequent") == ["2", "80.0%"]
    assert "Gini coefficient 0.560" in out
    assert figures(out, "of test") == ["1", "33.3%", "2", "50.0%"]
    assert not [line for line in out.splitlines() if len(line) > 100 and str(tmp_path) not in line and ".arrow" not in line]


def test_titles_only_reads_other_texts(tmp_path, capsys):
    writers.label_features(tmp_path, CONTENT)
    write_jsonl(tmp_path / "trn.json.gz", [{"uid": "1", "title": "a", "content": "b c", "target_ind": [0]}])
    assert figures(check(capsys, tmp_path)[1], "words, train")[0] == "3.0"
    assert figures(check(capsys, tmp_path, "--titles-only")[1], "words, train")[0] == "1.0"


def test_bad_data_is_refused_as_training_refuses_it(tmp_path, capsys):
    writers.jsonl(tmp_path, CONTENT)
    with (tmp_path / "test.jsonl").open("a") as file:
        file.write("{\n")
    code, out, error = check(capsys, tmp_path)
    assert (code, out) == (2, "")
    assert error.startswith(f"python -m train.data: error: {tmp_path / 'test.jsonl'}:4: broken JSON")
    code, out, error = check(capsys, tmp_path / "nowhere")
    assert (code, out) == (2, "")
    assert "nowhere: no such folder" in error


@pytest.mark.slow
def test_the_command_runs_by_its_name(tmp_path):
    writers.jsonl(tmp_path, CONTENT)
    command = [sys.executable, "-m", "train.data"]
    done = subprocess.run([*command, "check", str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Gini" in done.stdout
    assert "check" in subprocess.run([*command, "--help"], capture_output=True, text=True).stdout
    assert subprocess.run(command, capture_output=True).returncode == 2
