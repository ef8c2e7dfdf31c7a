"""Every fault is one DataError that names the file, the line or row, and the reason."""

import contextlib
import gzip
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.data import writers
from tests.train.data.writers import WRITERS, Content, content_of, write_lines
from tests.train.tasks import write_jsonl
from train.data import DataError, Dataset

CONTENT = Content([("0", "a"), ("1", "b"), ("2", "c")], {"train": [("one", [0, 1]), ("two", [2])], "test": [("three", [1])]})


def assert_fault(folder, where, reason):
    with pytest.raises(DataError) as error:
        content_of(folder)
    assert str(error.value).startswith(str(folder))
    assert where in str(error.value)
    assert re.search(reason, str(error.value)), error.value


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("JSON lines", "labels.jsonl"),
        ("label-feature JSON", "lbl.json"),
        ("label-feature JSON", "trn.json"),
        ("label-feature JSON", "tst.json"),
        ("raw text with label indices", "raw/Y.txt"),
        ("raw text with label indices", "trn_X_Y.txt"),
        ("raw text with label indices", "raw/tst_X.txt"),
        ("raw text with label strings", "train_labels.txt"),
        ("raw text with label strings", "test_labels.txt"),
        ("raw text with label strings", "test_raw_texts.txt"),
        ("Parquet", "labels.parquet"),
        ("Parquet", "train.parquet"),
        ("Parquet", "test.parquet"),
        ("saved datasets", "dataset_info.json"),
        ("saved datasets", "state.json"),
        ("saved datasets", "data-00001-of-00002.arrow"),
    ],
)
def test_a_missing_file_is_named(tmp_path, name, missing):
    WRITERS[name](tmp_path, CONTENT)
    found = [
        path for path in tmp_path.rglob("*") if missing in (str(path.relative_to(tmp_path)).removesuffix(".gz"), path.name)
    ]
    assert found
    found[0].unlink()
    assert_fault(tmp_path, missing, "no |No such file")


def test_a_folder_without_data_names_what_is_expected(tmp_path):
    assert_fault(
        tmp_path, "no data found", r"JSON lines: train\.jsonl.*Parquet: .*saved datasets: .*trn\.json.*trn_X\.txt.*train_raw"
    )


@pytest.mark.parametrize("other", [name for name in WRITERS if name != "Parquet"])
def test_two_data_sets_in_a_folder_are_named(tmp_path, other):
    WRITERS[other](tmp_path, CONTENT)
    writers.parquet(tmp_path, CONTENT)
    assert_fault(tmp_path, "several data sets", rf"(?=.*{other} \()(?=.*Parquet \(train\.parquet\))")


def test_plain_and_packed(tmp_path):
    writers.label_features(tmp_path, CONTENT)
    (tmp_path / "trn.json").write_text("")
    assert_fault(tmp_path, "both trn.json and trn.json.gz", "keep one")


def test_one_saved_split_alone(tmp_path):
    writers.saved_datasets(tmp_path, CONTENT)
    assert_fault(tmp_path / "train", "no dataset_dict.json", "one split alone")


@pytest.mark.parametrize(
    ("splits", "reason"),
    [
        (["train"], "the splits are train; needed"),
        (["test"], "the splits are test"),
        (["train", "dev", "validation"], "both dev and"),
    ],
)
def test_splits_that_are_not_enough_or_doubled(tmp_path, splits, reason):
    for split in splits:
        writers.save_split(tmp_path / split, pa.table({"text": ["a"], "labels": [["x"]]}), {})
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    assert_fault(tmp_path, "", reason)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "broken JSON"),
        ({"title": 3, "target_ind": [0]}, '"title" must be a string'),
        ({"target_ind": [0]}, '"title" must be a string'),
        ({"title": "x", "content": 7, "target_ind": [0]}, '"content" must be a string'),
        ({"title": "x"}, '"target_ind" must be a list'),
        ({"title": "x", "target_ind": 0}, '"target_ind" must be a list'),
        ({"title": "x", "target_ind": [0, 3]}, r"target_ind 3 is not one of 0 … 2"),
        ({"title": "x", "target_ind": [-1]}, r"target_ind -1 is not one of"),
        ({"title": "x", "target_ind": [1.0]}, r"target_ind 1\.0 is not one of"),
        ({"title": "x", "target_ind": [True]}, r"target_ind True is not one of"),
        ({"title": "x \ud800", "target_ind": [0]}, "half a surrogate pair"),
        ('{"title": "x", "target_ind": [' + "9" * 5000 + "]}", "broken JSON: .*digits"),
    ],
)
def test_a_bad_text_in_label_feature_json(tmp_path, row, reason):
    writers.label_features(tmp_path, CONTENT)
    write_jsonl(tmp_path / "trn.json.gz", [{"title": "x", "target_ind": [0]}, row])
    assert_fault(tmp_path, "trn.json.gz:2: ", reason)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"title": "x"}, 'needs a "uid"'),
        ({"uid": "", "title": "x"}, 'needs a "uid"'),
        ({"uid": "9"}, '"title" must be a string'),
        ({"uid": 1, "title": "x"}, "label id '1' was on line 2 already"),
    ],
)
def test_a_bad_label_in_label_feature_json(tmp_path, row, reason):
    writers.label_features(tmp_path, CONTENT)
    write_jsonl(tmp_path / "lbl.json.gz", [{"uid": i, "title": "x"} for i in range(3)] + [row])
    assert_fault(tmp_path, "lbl.json.gz:4: ", reason)


@pytest.mark.parametrize(
    ("lines", "where", "reason"),
    [
        ([], ":1: ", "expected the numbers of texts and labels, found ''"),
        (["2 3 4", "0:1", "1:1"], ":1: ", "expected the numbers"),
        (["0:1", "1:1"], ":1: ", "expected the numbers"),
        (["2 4", "0:1", "1:1"], ":1: ", r"4 labels, but Y\.txt has 3"),
        (["3 3", "0:1", "1:1"], ":1: ", "3 texts, but the file has 2 rows"),
        (["2 3", "0:1", "1:1 3:1"], ":3: ", "label 3 is not one of 0 … 2"),
        (["2 3", "0:1", "-1:1"], ":3: ", "label -1 is not one of"),
        (["2 3", "0:1", "1"], ":3: ", "'1' is not label:value"),
        (["2 3", "0:1", "x:1"], ":3: ", "'x:1' is not label:value"),
        (["2 3", "0:1", "1:nan"], ":3: ", "'1:nan' is not label:value"),
        (["2 3", "0:1", "1:1", "2:1"], ":4: ", r"labels of text 2, but trn_X\.txt has 2 texts"),
    ],
)
def test_a_bad_index_file(tmp_path, lines, where, reason):
    writers.indexed_text(tmp_path, CONTENT)
    write_lines(tmp_path / "trn_X_Y.txt", lines)
    assert_fault(tmp_path, f"trn_X_Y.txt{where}", reason)


def test_a_text_without_a_row(tmp_path):
    writers.indexed_text(tmp_path, CONTENT)
    write_lines(tmp_path / "trn_X_Y.txt", ["1 3", "0:1"])
    assert_fault(tmp_path, "trn_X.txt:2: ", r"a text more than trn_X_Y\.txt has rows")


@pytest.mark.parametrize(
    ("more", "fewer"), [("train_labels.txt", "train_raw_texts.txt"), ("train_raw_texts.txt", "train_labels.txt")]
)
def test_texts_and_label_strings_of_unequal_length(tmp_path, more, fewer):
    writers.raw_text(tmp_path, CONTENT)
    with (tmp_path / more).open("a") as file:
        file.write("1\n")
    assert_fault(tmp_path, f"{more}:3: ", f"one line more than {fewer} has")


@pytest.mark.parametrize("name", [name for name in WRITERS if name not in ("Parquet", "saved datasets")])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_is_a_data_error_or_harmless(tmp_path_factory, name, data):
    """Whatever stands in a text file, reading it ends in rows or in a DataError."""
    folder = tmp_path_factory.mktemp("damaged")
    WRITERS[name](folder, CONTENT)
    write_lines(folder / "filter_labels_test.txt", ["0 2"])
    path = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    whole = path.read_bytes()
    packed = path.suffix == ".gz" and data.draw(st.booleans())
    whole = gzip.decompress(whole) if packed else whole
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
    piece = data.draw(
        st.one_of(st.binary(max_size=8), st.sampled_from([b"\n", b"0", b"-1", b"9" * 20, b"9" * 5000, b"null", b'"']))
    )
    damaged = whole[:start] + piece + whole[stop:]
    path.write_bytes(gzip.compress(damaged) if packed else damaged)
    with contextlib.suppress(DataError):
        content_of(folder)


@pytest.mark.parametrize("name", ["Parquet", "saved datasets"])
def test_damaged_tables(tmp_path, name):
    """Any byte of a table may be wrong: the process lives on, with rows or a DataError."""
    rng = np.random.default_rng(0)
    WRITERS[name](tmp_path, CONTENT)
    path = tmp_path / ("train.parquet" if name == "Parquet" else "train/data-00000-of-00002.arrow")
    whole = path.read_bytes()
    refused = 0
    for place in rng.permutation(len(whole))[:300]:
        damaged = bytearray(whole)
        damaged[place] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            content_of(tmp_path)
        except DataError:
            refused += 1
    assert refused > 50


def test_bytes_that_are_not_utf8(tmp_path):
    writers.indexed_text(tmp_path, CONTENT)
    (tmp_path / "raw" / "trn_X.txt").write_bytes(b"one\ncaf\xe9\n")
    assert_fault(tmp_path, "trn_X.txt:2: ", "not UTF-8 at byte 3")


@pytest.mark.parametrize("name", WRITERS)
def test_an_empty_split(tmp_path, name):
    WRITERS[name](tmp_path, Content(CONTENT.labels, CONTENT.splits | {"test": []}))
    assert_fault(tmp_path, "test" if "index" not in name and "feature" not in name else "tst", "empty, holds no text")


@pytest.mark.parametrize("name", WRITERS)
def test_a_split_in_which_no_text_has_a_label(tmp_path, name):
    WRITERS[name](tmp_path, Content(CONTENT.labels, CONTENT.splits | {"test": [("x", []), ("y", [])]}))
    assert_fault(tmp_path, "", "none of its 2 texts has a label")


TEXTS, FOUND = ["a", "b"], [["0"], ["1"]]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"text": ["a", None], "labels": FOUND}, "row 2: no text"),
        ({"text": ["a", " "], "labels": FOUND}, "row 2: no text"),
        ({"text": [1, 2], "labels": FOUND}, "row 1: no text"),
        ({"text": TEXTS, "labels": [["0"], ["1", "9"]]}, "row 2: unknown label '9'"),
        ({"text": TEXTS, "labels": [[0], [1]]}, "row 1: unknown label 0"),
        ({"text": TEXTS, "labels": [["0"], [None]]}, "row 2: unknown label None"),
        ({"text": TEXTS, "labels": [[["0"]], [["1"]]]}, "row 1: unknown label"),
        ({"title": TEXTS, "labels": FOUND}, "no column 'text'; there are 'title', 'labels'"),
        ({"text": TEXTS, "tags": FOUND}, "no column 'labels'; there are 'text', 'tags'"),
    ],
)
def test_a_bad_table(tmp_path, columns, reason):
    writers.parquet(tmp_path, CONTENT)
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    assert_fault(tmp_path, "train.parquet: ", reason)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"id": [0, 1]}, 'row 1: needs an "id"'),
        ({"id": ["0", None]}, 'row 2: needs an "id"'),
        ({"id": ["0", "0"]}, "row 2: label id '0' is there already"),
        ({"id": ["0", "1"], "name": [4, 5]}, 'row 1: "name" is not a string'),
        ({"name": ["a"]}, "no column 'id'"),
        ({"id": pa.array([], pa.string())}, "holds no label"),
    ],
)
def test_a_bad_label_table(tmp_path, columns, reason):
    writers.parquet(tmp_path, CONTENT)
    pq.write_table(pa.table(columns), tmp_path / "labels.parquet")
    assert_fault(tmp_path, "labels.parquet", reason)


@pytest.mark.parametrize("cut", [0, 10, -200, -20])
def test_a_cut_parquet_file(tmp_path, cut):
    writers.parquet(tmp_path, CONTENT)
    path = tmp_path / "train.parquet"
    path.write_bytes(path.read_bytes()[:cut])
    assert_fault(tmp_path, "train.parquet", "cannot be read")


@pytest.mark.parametrize("cut", [0, 10, -150])
def test_a_cut_arrow_file(tmp_path, cut):
    writers.saved_datasets(tmp_path, CONTENT)
    path = tmp_path / "train" / "data-00000-of-00002.arrow"
    path.write_bytes(path.read_bytes()[:cut])
    assert_fault(tmp_path, "train/data-00000-of-00002.arrow", "cannot be read")


def test_a_damaged_parquet_page(tmp_path):
    writers.parquet(tmp_path, CONTENT)
    path = tmp_path / "train.parquet"
    damaged = np.frombuffer(path.read_bytes(), np.uint8).copy()
    damaged[4:40] = 255
    path.write_bytes(damaged.tobytes())
    assert_fault(tmp_path, "train.parquet: row 1: ", "cannot be read")


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("{", "cannot be read"),
        ("{}", "cannot be read: '_data_files'"),
        ('{"_data_files": {}}', "'_data_files' is not a list"),
        ('{"_data_files": []}', "names no data files"),
        ('{"_data_files": [{"file": 3}]}', "names no data files"),
        ('{"_data_files": [], "_indices_data_files": [{"filename": "i"}]}', "flatten_indices"),
    ],
)
def test_a_bad_state(tmp_path, state, reason):
    writers.saved_datasets(tmp_path, CONTENT)
    (tmp_path / "train" / "state.json").write_text(state)
    assert_fault(tmp_path, "train/state.json", reason)


def test_a_number_that_is_no_class(tmp_path):
    writers.saved_datasets(tmp_path, CONTENT)
    info = tmp_path / "test" / "dataset_info.json"
    info.write_text(info.read_text().replace('"0", "1", "2"', '"0"'))
    assert_fault(tmp_path, "test/data-00000-of-00002.arrow: row 1: ", "unknown label 1")
    for split in ("train", "test"):
        (tmp_path / split / "dataset_info.json").write_text('{"features": {}}')
    assert_fault(
        tmp_path, "train/data-00000-of-00002.arrow: row 1: ", "label 0 is neither a string nor the number of a ClassLabel"
    )


def test_class_names_that_are_the_same(tmp_path):
    writers.saved_datasets(tmp_path, Content([("a", "a"), ("a", "a")], CONTENT.splits))
    assert_fault(tmp_path, "train/data-00000-of-00002.arrow", "two names of the ClassLabel are the same")


def test_training_data_that_changes_has_another_hash(tmp_path):
    for name, write in WRITERS.items():
        folder = tmp_path / name
        folder.mkdir()
        write(folder, CONTENT)
        before = Dataset(folder).hashes()
        write_lines(folder / "filter_labels_test.txt", ["0 2"])
        after = Dataset(folder).hashes()
        assert {part for part in before if before[part] != after[part]} == {"test"}, name
        (folder / "filter_labels_test.txt").unlink()
        assert Dataset(folder).hashes() == before
