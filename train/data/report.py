"""The tables that `python -m train.data check` prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from train.data import statistics
from train.data.contract import Labels
from train.data.dataset import Dataset
from train.data.statistics import SplitFacts

_FREQUENT = 5
_NAME_WIDTH = 60


def report(data: Dataset, labels: Labels, facts: dict[str, SplitFacts]) -> str:
    """What is in a data set, from the facts about each of its splits, for people."""
    sections = [_files(data), _texts(facts), _lengths(facts), _frequencies(facts["train"], labels), _unseen(facts)]
    return "\n\n".join("\n".join(section) for section in sections)


def _files(data: Dataset) -> list[str]:
    parts = [(part, data.files(part)) for part in ("labels", *data.splits)]
    names = [(part, ", ".join(str(path.relative_to(data.folder)) for path in paths)) for part, paths in parts]
    return [f"{data.folder}: {data.format}", *(f"  {part:<8}{listed}" for part, listed in names)]


def _texts(facts: dict[str, SplitFacts]) -> list[str]:
    train = facts["train"]

    def shares(name: str, figure: Callable[[SplitFacts], int]) -> list[str]:
        return [name, *(_share(figure(each), each.texts) for each in facts.values())]

    def numbers(name: str, figure: Callable[[SplitFacts], int]) -> list[str]:
        return [name, *(_number(figure(each)) for each in facts.values())]

    return _table(
        ["texts", *facts],
        numbers("all", lambda each: each.texts),
        shares("without labels", lambda each: each.unlabelled),
        shares("empty", lambda each: each.empty),
        shares("repeated in the split", lambda each: each.repeated),
        ["also in train", "", *shares("", lambda each: statistics.also_in(train, each))[2:]],
        numbers("labels given", lambda each: int(each.counts.sum())),
        numbers("filtered pairs", lambda each: each.filtered),
    )


def _lengths(facts: dict[str, SplitFacts]) -> list[str]:
    rows = [
        [f"{what}, {split}", f"{mean:,.1f}", *(f"{number:,}" for number in numbers)]
        for what in ("labels", "words", "characters")
        for split, each in facts.items()
        for mean, *numbers in [statistics.spread(getattr(each, what))]
    ]
    return _table(["in a text", "mean", "median", "90 %", "99 %", "most"], *rows)


def _frequencies(train: SplitFacts, labels: Labels) -> list[str]:
    counts, given = train.counts, int(train.counts.sum())
    rows = [
        [f"in {name}", _share(number, len(labels)), _share(positives, given)]
        for name, number, positives in statistics.rare_labels(counts)
    ]
    heads = [
        [f"the {share * 100:g}% most frequent", f"{number:,}", f"{held:.1%}"]
        for share, number, held in statistics.head_shares(counts)
    ]
    frequent = [
        [labels.names[i][:_NAME_WIDTH], f"{counts[i]:,}"] for i in np.argsort(-counts, kind="stable")[:_FREQUENT].tolist()
    ]
    return [
        *_table(
            ["labels, by texts in train", "labels", "labels given"],
            ["all", _number(len(labels)), _number(given)],
            *rows,
        ),
        "",
        *_table(["skew in train", "labels", "of labels given"], *heads),
        f"  Gini coefficient {statistics.gini(counts):.3f} (0: all labels as frequent, 1: one has all)",
        "",
        *_table(["most frequent in train", "texts"], *frequent),
    ]


def _unseen(facts: dict[str, SplitFacts]) -> list[str]:
    rows = []
    for split, each in facts.items():
        if split != "train":
            number, positives = statistics.unseen(each.counts, facts["train"].counts)
            present, given = int((each.counts > 0).sum()), int(each.counts.sum())
            rows.append([f"of {split}", _share(number, present), _share(positives, given)])
    return _table(["labels that train lacks", "labels", "labels given"], *rows)


def _number(number: int) -> str:
    """A number without a share, in line with those that have one."""
    return f"{number:,}{'':8}"


def _share(number: int, whole: int) -> str:
    return f"{number:,} {f'{number / max(1, whole):.1%}':>7}"


def _table(header: Sequence[str], *rows: Sequence[str]) -> list[str]:
    """Lines with columns of one width each: the first to the left, the others to the right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "   ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]) for row in cells
    ]
    return [lines[0].rstrip(), *(f"  {line}".rstrip() for line in lines[1:])]
