"""Label ids and names come back from disk as they went in, whatever characters they hold."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.labels import LabelTable, write_labels
from export.manifest import BundleError

# Every code point that is not half a surrogate pair, NUL, line ends and bidirectional marks among them.
any_text = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(st.tuples(any_text, any_text)))
def test_strings_come_back(pairs: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert write_labels(Path(folder), iter(pairs)) == len(pairs)
        table = LabelTable(Path(folder), len(pairs))
        assert [(table.id(i), table.name(i)) for i in range(len(table))] == pairs


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
    ("offsets", "fault"),
    [
        (np.array([0, 1]), r"names.offsets.npy is int64 \[2\], expected int64 \[3\]"),
        (np.array([0, 1, 2], dtype=np.int32), r"names.offsets.npy is int32 \[3\], expected int64 \[3\]"),
        (np.array([0, 1, 3]), "names.offsets.npy runs from 0 to 3, names.bin from 0 to 2"),
    ],
)
def test_offsets_that_do_not_fit_are_refused(tmp_path: Path, offsets: np.ndarray, fault: str) -> None:
    write_labels(tmp_path, [("a", "A"), ("b", "B")])
    np.save(tmp_path / "names.offsets.npy", offsets)
    with pytest.raises(BundleError, match=fault):
        LabelTable(tmp_path, 2)
