"""Label ids and names come back from disk as they went in, whatever characters they hold, and are found by their ids."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export import labels
from export.labels import MARK, LabelTable, fold, write_labels
from export.manifest import BundleError

# Every code point that is not half a surrogate pair, NUL, line ends and bidirectional marks among them.
any_text = st.text(st.characters(exclude_categories=["Cs"]))
long_text = st.text("ab\0", max_size=40)


@contextmanager
def written(pairs: list[tuple[str, str]]) -> Iterator[LabelTable]:
    with tempfile.TemporaryDirectory() as folder:
        assert write_labels(Path(folder), iter(pairs)) == len(pairs)
        yield LabelTable(Path(folder), len(pairs))


@settings(deadline=None)
@given(st.lists(st.tuples(any_text, any_text)))
def test_strings_come_back(pairs: list[tuple[str, str]]) -> None:
    with written(pairs) as table:
        assert [(table.id(i), table.name(i)) for i in range(len(table))] == pairs


@settings(deadline=None)
@given(st.lists(any_text, min_size=1), st.lists(any_text))
def test_every_id_is_found_and_no_other(ids: list[str], others: list[str]) -> None:
    with written([(text, "") for text in ids]) as table:
        assert table.find(ids).tolist() == [ids.index(text) for text in ids]
        assert table.find(others).tolist() == [ids.index(text) if text in ids else -1 for text in others]
        assert table.find(["half a pair \ud83c"]).tolist() == [-1]


@pytest.mark.parametrize("hashed", [0, 1 << 63, (1 << 64) - 1])
def test_ids_of_one_hash_are_told_apart(hashed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "_hash", lambda data: hashed)
    with written([(str(i), "") for i in range(50)]) as table:
        assert table.find(["7", "49", "50", "0"]).tolist() == [7, 49, -1, 0]


@settings(deadline=None)
@given(st.lists(any_text | long_text))
def test_names_are_folded_and_in_order(names: list[str]) -> None:
    folded = [MARK + fold(name).encode() for name in names]
    with written([("", name) for name in names]) as table:
        data, offsets = table.folded.bytes[:], table.folded.offsets
        assert [data[offsets[i] : offsets[i + 1]] for i in range(len(names))] == folded
        assert table.order.tolist() == sorted(range(len(names)), key=lambda i: (folded[i], i))


def test_columns_show_the_bytes_for_searching(tmp_path: Path) -> None:
    write_labels(tmp_path, [("a", "Ärger"), ("b", ""), ("c", "x\ny")])
    names = LabelTable(tmp_path, 3).names
    assert names.bytes[:] == "Ärgerx\ny".encode()
    assert names.offsets.tolist() == [0, 6, 6, 9]


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_out_of_range_is_an_index_error(tmp_path: Path, label: int) -> None:
    write_labels(tmp_path, [("a", "A"), ("b", "B")])
    with pytest.raises(IndexError, match=f"label {label}: there are 2"):
        LabelTable(tmp_path, 2).name(label)


@pytest.mark.parametrize("pair", [("half \ud83c", "name"), ("id", "half \udf88")])
def test_half_a_surrogate_pair_is_refused_by_position(tmp_path: Path, pair: tuple[str, str]) -> None:
    with pytest.raises(BundleError, match=r"label 1: 'half .*' is not Unicode text"):
        write_labels(tmp_path, [("fine", "fine 🎈"), pair])


@pytest.mark.parametrize(
    ("file", "array", "fault"),
    [
        ("names.offsets", np.array([0, 1]), r"is int64 \[2\], expected int64 \[3\]"),
        ("names.offsets", np.array([0, 1, 2], dtype=np.int32), r"is int32 \[3\], expected int64 \[3\]"),
        ("names.offsets", np.array([0, 1, 3]), "runs from 0 to 3, names.bin from 0 to 2"),
        ("ids.index", np.array([0, 1]), r"is int64 \[2\], expected uint64 \[2\]"),
        ("folded.order", np.array([0], dtype=np.int32), r"is int32 \[1\], expected int32 \[2\]"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, file: str, array: np.ndarray, fault: str) -> None:
    write_labels(tmp_path, [("a", "A"), ("b", "B")])
    np.save(tmp_path / f"{file}.npy", array)
    with pytest.raises(BundleError, match=rf"{file}\.npy {fault}"):
        LabelTable(tmp_path, 2)
