"""Looking labels up, against the obvious way of doing it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.labels import LabelTable, write_labels
from serve import labels
from serve.labels import find, search

NAMES = st.lists(st.text("abAB äÄß語", max_size=6), min_size=1, max_size=30)


def table(folder: Path, names: list[str], ids: list[str] | None = None) -> LabelTable:
    folder.mkdir(exist_ok=True)
    count = write_labels(folder, zip(ids or [str(i) for i in range(len(names))], names, strict=True))
    return LabelTable(folder, count)


def plain(names: list[str], query: str, limit: int) -> list[int]:
    def lower(text: str) -> str:
        return "".join(c.lower() if c.isascii() else c for c in text)

    starts = [i for i, name in enumerate(names) if lower(name).startswith(lower(query))]
    inside = [i for i, name in enumerate(names) if lower(query) in lower(name) and i not in starts]
    return (starts + inside)[:limit]


@settings(max_examples=150, deadline=None)
@given(names=NAMES, query=st.text("abAB äÄß語", min_size=1, max_size=3), limit=st.integers(1, 8), chunk=st.integers(1, 7))
def test_search_is_the_plain_search(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], query: str, limit: int, chunk: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels, "_CHUNK", chunk)
        found = search(table(tmp_path_factory.mktemp("labels"), names).names, query, limit)
    assert found == plain(names, query, limit)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.text("12ä", min_size=1, max_size=4), min_size=1, max_size=30, unique=True), chunk=st.integers(1, 7))
def test_every_id_is_found_and_no_other(tmp_path_factory: pytest.TempPathFactory, ids: list[str], chunk: int) -> None:
    column = table(tmp_path_factory.mktemp("labels"), ids, ids).ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels, "_CHUNK", chunk)
        assert find(column, ids) == {text: i for i, text in enumerate(ids)}
        assert find(column, ["3", "", ids[0] + "3"]) == {}


def test_a_match_across_two_names_is_none(tmp_path: Path) -> None:
    assert search(table(tmp_path, ["ab", "cd", "xabx", "abcd"]).names, "bc", 5) == [3]


def test_many_labels(tmp_path: Path) -> None:
    names = [f"Label number {i} of many" for i in range(200_000)]
    many = table(tmp_path, names)
    assert search(many.names, "NUMBER 199999", 20) == [199_999]
    assert search(many.names, "label number 77", 3) == [77, 770, 771]
    assert find(many.ids, ["199999", "123456"]) == {"199999": 199_999, "123456": 123_456}
