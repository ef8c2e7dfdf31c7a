"""Looking labels up by name, against the obvious way of doing it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from unicodedata import normalize

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.labels import LabelTable, write_labels
from serve import labels
from serve.labels import search

NAMES = st.lists(st.text("abAB .äÄß語\0\u0308", max_size=7), min_size=1, max_size=30)


def table(folder: Path, names: Sequence[str]) -> LabelTable:
    folder.mkdir(exist_ok=True)
    return LabelTable(folder, write_labels(folder, ((str(i), name) for i, name in enumerate(names))))


def plain(names: Sequence[str], query: str, limit: int) -> list[int]:
    def folded(text: str) -> str:
        return normalize("NFC", normalize("NFD", text).casefold())

    def starts_word(name: str) -> bool:
        places = [i for i in range(1, len(name)) if name.startswith(query, i)]
        return any(name[i - 1].isascii() and not name[i - 1].isalnum() for i in places)

    query = folded(query)
    every = {i: folded(name) for i, name in enumerate(names)}
    starts = sorted((i for i in every if every[i].startswith(query)), key=lambda i: (every[i].encode(), i))
    inside = [i for i in every if query in every[i] and i not in starts]
    return (starts + sorted(inside, key=lambda i: not starts_word(every[i])))[:limit]


@settings(max_examples=200, deadline=None)
@given(
    names=NAMES, query=st.text("abAB .äÄß語\0\u0308", min_size=1, max_size=3), limit=st.integers(1, 8), chunk=st.integers(1, 20)
)
def test_search_is_the_plain_search(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], query: str, limit: int, chunk: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels, "_CHUNK", chunk)
        found = search(table(tmp_path_factory.mktemp("labels"), names), query, limit)
    assert found == plain(names, query, limit)


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("STRASSE", ["Straße", "Straßenbahn", "Hauptstraße"]),
        ("strasse", ["Straße", "Straßenbahn", "Hauptstraße"]),
        ("E\u0301cole", ["ÉCOLE normale", "grande école"]),
        ("école", ["ÉCOLE normale", "grande école"]),
        ("ecole", []),
        ("σοφός", ["ΣΟΦΌΣ"]),
        ("図書", ["図書館", "国会図書館"]),
        ("svd", ["svd", "SVD of a matrix", "numpy.linalg.svd", "the svds", "xsvd"]),
        ("nothing of the kind", []),
        ("e\n", []),
    ],
)
def test_what_people_type(tmp_path: Path, query: str, found: list[str]) -> None:
    names = [
        "Hauptstraße", "SVD of a matrix", "xsvd", "svd", "Straßenbahn", "grande école", "ÉCOLE normale", "Straße", "ΣΟΦΌΣ",
        "国会図書館", "図書館", "numpy.linalg.svd", "", "the svds",
    ]  # fmt: skip
    assert [names[label] for label in search(table(tmp_path, names), query, 20)] == found


def test_a_match_across_two_names_is_none(tmp_path: Path) -> None:
    assert search(table(tmp_path, ["ab", "cd", "xabx", "abcd"]), "bc", 5) == [3]


def test_a_letter_that_is_everywhere_still_finds_the_names_that_begin_with_it_first(tmp_path: Path) -> None:
    names = [f"bank {i}" for i in range(20_000)] + ["a", "an apple", "A"]
    found = search(table(tmp_path, names), "a", 6)
    assert [names[label] for label in found] == ["a", "A", "an apple", "bank 0", "bank 1", "bank 2"]


def test_a_word_far_behind_comes_before_letters_inside_words(tmp_path: Path) -> None:
    names = [f"xyz{i}" for i in range(5000)] + ["the yz"]
    assert search(table(tmp_path, names), "yz", 2) == [5000, 0]
