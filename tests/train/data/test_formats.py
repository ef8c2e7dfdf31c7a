"""What is written in a format is what is read from it."""

import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.train.data import writers
from tests.train.data.writers import WRITERS, Content, content_of
from tests.train.tasks import write_jsonl
from train.data import DataError, Dataset

PUBLISHED = ("label-feature JSON", "raw text with label indices", "raw text with label strings")
# A line may hold anything but a line feed, and a carriage return only within.
_line = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=12)
_word = st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs", "Z", "Cc", "Cf"]), min_size=1, max_size=5)


@st.composite
def contents(draw, texts):
    """At least a labelled text in each split, and each label somewhere in train, in order: some formats list no others."""
    ids = draw(st.lists(_word, min_size=1, max_size=5, unique=True))
    positions = st.lists(st.integers(0, len(ids) - 1), unique=True, max_size=4).map(sorted)
    rows = st.lists(st.tuples(texts, positions), max_size=9)
    all_labels = (draw(texts), list(range(len(ids))))
    return Content([(label, label) for label in ids], {"train": [all_labels, *draw(rows)], "test": [all_labels, *draw(rows)]})


def read_back(write, content: Content) -> Content:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), content)
        return content_of(Path(folder))


def assert_equal(read: Content, written: Content) -> None:
    """Splits and label names are equal; ids have a test of their own, as not every format has any."""
    assert read.splits == written.splits
    assert [name for _, name in read.labels] == [name for _, name in written.labels]


@pytest.mark.parametrize("write", [*WRITERS.values(), writers.class_label_parquet, writers.saved_strings])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(content=contents(_line.map(str.strip).filter(bool)))
def test_texts_and_labels_come_back(write, content):
    assert_equal(read_back(write, content), content)


@pytest.mark.parametrize("name", PUBLISHED)
@settings(max_examples=25, deadline=None)
@given(content=contents(st.one_of(st.just(""), _line.map(str.strip))))
def test_published_formats_may_have_empty_texts(name, content):
    assert_equal(read_back(WRITERS[name], content), content)


@pytest.mark.parametrize("write", [writers.jsonl, writers.parquet])
@settings(max_examples=25, deadline=None)
@given(content=contents(st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(str.strip)))
def test_texts_with_line_breaks_come_back(write, content):
    assert_equal(read_back(write, content), content)


CONTENT = Content(
    [("7", "seven"), ("x", "an x"), ("unused", "never")],
    {"train": [("a b", [0, 1]), ("c", [])], "test": [("d", [1])]},
)


@pytest.mark.parametrize("name", WRITERS)
def test_the_format_is_recognised_by_the_files(tmp_path, name):
    WRITERS[name](tmp_path, CONTENT)
    data = Dataset(tmp_path)
    assert data.format == name
    assert data.splits == ["train", "test"]
    assert data.hashes().keys() == {"labels", "train", "test"}


def test_label_names_and_ids_of_each_format(tmp_path):
    expected = {
        "JSON lines": CONTENT.labels,
        "Parquet": CONTENT.labels,
        "label-feature JSON": CONTENT.labels,
        "raw text with label indices": [("0", "seven"), ("1", "an x"), ("2", "never")],
        "raw text with label strings": [("7", "7"), ("x", "x")],
        "saved datasets": [("7", "7"), ("x", "x"), ("unused", "unused")],
    }
    for name, write in WRITERS.items():
        folder = tmp_path / name
        folder.mkdir()
        write(folder, CONTENT)
        assert content_of(folder) == Content(expected[name], CONTENT.splits), name


@pytest.mark.parametrize("raw", ["", "raw/"])
def test_raw_text_lies_in_a_folder_of_its_own_or_not(tmp_path, raw):
    writers.indexed_text(tmp_path, CONTENT, raw)
    assert content_of(tmp_path).splits == CONTENT.splits


def test_label_strings_come_from_all_splits(tmp_path):
    writers.raw_text(tmp_path, Content([(i, i) for i in "abc"], {"train": [("t", [2]), ("u", [0])], "test": [("v", [1, 2])]}))
    labels = Dataset(tmp_path).labels()
    assert labels.ids == ["c", "a", "b"]


def test_raw_texts_are_preferred_to_tokenized_ones(tmp_path):
    writers.raw_text(tmp_path, CONTENT)
    for split in ("train", "test"):
        (tmp_path / f"{split}_texts.txt").write_text("tokenized\n" * len(CONTENT.splits[split]))
    assert content_of(tmp_path).splits == CONTENT.splits
    for split in ("train", "test"):
        (tmp_path / f"{split}_raw_texts.txt").unlink()
    assert content_of(tmp_path).splits["test"] == [("tokenized", [1])]


def test_titles_and_contents(tmp_path):
    writers.label_features(tmp_path, CONTENT)
    rows = [{"title": " A title\n", "content": "and what it is about"}, {"title": "alone", "content": " "}, {"title": "bare"}]
    write_jsonl(tmp_path / "trn.json.gz", [row | {"uid": "1", "target_ind": [0, 0]} for row in rows])
    for titles_only, expected in ((False, "A title and what it is about"), (True, "A title")):
        data = Dataset(tmp_path, titles_only=titles_only)
        read = [(text, found.tolist()) for text, found in data.texts("train", data.labels())]
        assert read == [(expected, [0]), ("alone", [0]), ("bare", [0])]


def test_titles_only_is_for_label_features(tmp_path):
    writers.jsonl(tmp_path, CONTENT)
    with pytest.raises(DataError, match="titles only is for label-feature JSON, but this is JSON lines"):
        Dataset(tmp_path, titles_only=True)


def test_zero_in_a_sparse_row_is_no_label(tmp_path):
    writers.indexed_text(tmp_path, CONTENT)
    (tmp_path / "tst_X_Y.txt").write_text("1 3\n0:0 1:0.5 2:0.0\n")
    assert content_of(tmp_path).splits["test"] == [("d", [1])]


def test_single_class_labels_and_validation(tmp_path):
    features = {"text": {"_type": "Value"}, "label": {"names": ["no", "yes"], "_type": "ClassLabel"}}
    for split, numbers in (("train", [1, 0, -1]), ("validation", [None, 1, 1])):
        table = pa.table({"text": ["a", "b", "c"], "label": pa.array(numbers, pa.int64()), "other": [1, 2, 3]})
        writers.save_split(tmp_path / split, table, features)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "validation", "extra"]}')
    content = content_of(tmp_path)
    assert content.labels == [("no", "no"), ("yes", "yes")]
    assert content.splits == {"train": [("a", [1]), ("b", [0]), ("c", [])], "dev": [("a", []), ("b", [1]), ("c", [1])]}


def test_older_descriptions_of_lists_are_understood(tmp_path):
    writers.saved_datasets(tmp_path, CONTENT)
    info = tmp_path / "train" / "dataset_info.json"
    for described in (
        '[{"names": ["7", "x", "unused"], "_type": "ClassLabel"}]',
        '{"feature": {"names": ["7", "x", "unused"], "_type": "ClassLabel"}, "length": -1, "_type": "Sequence"}',
    ):
        info.write_text(f'{{"features": {{"labels": {described}}}}}')
        assert content_of(tmp_path).splits == CONTENT.splits


def test_label_strings_without_a_table_are_taken_as_they_come(tmp_path):
    writers.saved_strings(tmp_path, CONTENT)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert content_of(tmp_path).labels == [("7", "7"), ("x", "x")]
