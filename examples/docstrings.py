"""Real text that every machine has: what the docstrings of its Python packages say about each callable.

`python -m examples.docstrings OUT` writes train.jsonl, test.jsonl and labels.jsonl. A text is one sentence. Its labels are
the callable it describes (`numpy.linalg.svd`) and the callable's module (`numpy.linalg`). Of callables with enough to say,
one sentence is held out for test.jsonl. The same packages give the same files.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import textwrap
import zlib
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from examples.namespaces import Documented, documented
from examples.prose import sentences

_MOST_PARTS = 3  # of a name, as in datetime.datetime.now: what lies deeper is seldom called by its users
_MOST_SENTENCES = 12  # of one callable: the longest docstrings would drown the others
_MOST_OWNERS = 5  # a sentence of more callables says nothing about any of them
_ENOUGH_TO_HOLD_OUT = 3


@dataclass(frozen=True)
class Corpus:
    """Sentences with their label ids, and each label's id and display name; all in a fixed order."""

    train: list[tuple[str, list[str]]]
    test: list[tuple[str, list[str]]]
    labels: dict[str, str]

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for split in ("train", "test"):
            _write_lines(folder / f"{split}.jsonl", ({"text": text, "labels": ids} for text, ids in getattr(self, split)))
        _write_lines(folder / "labels.jsonl", ({"id": label, "name": name} for label, name in self.labels.items()))


def collect() -> Corpus:
    """The corpus of this machine's Python: the standard library and what is installed beside it."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        entries = [entry for entry in documented(pool) if entry.name.count(".") < _MOST_PARTS]
        found = list(pool.map(sentences, [entry.doc for entry in entries], chunksize=500))
    return build([(entry, texts[:_MOST_SENTENCES]) for entry, texts in zip(entries, found, strict=True) if texts])


def build(described: list[tuple[Documented, list[str]]]) -> Corpus:
    """Splits into train and test, so that each label has training text and no sentence is in both."""
    owners: dict[str, list[Documented]] = {}
    for entry, texts in described:
        for text in texts:
            owners.setdefault(text, []).append(entry)
    telling = {text for text, entries in owners.items() if len(entries) <= _MOST_OWNERS}

    held_out = set()
    for entry, texts in described:
        own = [text for text in texts[1:] if len(owners[text]) == 1]  # the first one, the summary, stays in training
        if own and entry.name != entry.module and len(telling.intersection(texts)) >= _ENOUGH_TO_HOLD_OUT:
            held_out.add(min(own, key=lambda text: zlib.crc32(text.encode())))

    rows = [(text, _labels(entries)) for text, entries in owners.items() if text in telling]
    train = [row for row in rows if row[0] not in held_out]
    known = {label for _, labels in train for label in labels}
    test = [row for row in rows if row[0] in held_out]
    summaries = {entry.name: texts[0] for entry, texts in described}
    return Corpus(train, test, {label: _display(label, summaries.get(label)) for label in sorted(known)})


def _labels(entries: list[Documented]) -> list[str]:
    return sorted({label for entry in entries for label in (entry.name, entry.module)})


def _display(label: str, summary: str | None) -> str:
    return textwrap.shorten(summary, 90, placeholder=" …") if summary else label


def _write_lines(path: Path, rows: Iterable[dict[str, object]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.docstrings", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    out = parser.parse_args().out
    corpus = collect()
    corpus.write(out)
    print(f"{len(corpus.labels):,} labels, {len(corpus.train):,} sentences to train on, {len(corpus.test):,} held out")


if __name__ == "__main__":
    main()
