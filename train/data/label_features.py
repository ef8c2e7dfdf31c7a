"""Label-feature JSON: the LF data sets of the Extreme Classification Repository."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from train.data.contract import Labels
from train.data.files import check_unicode, fault, find_splits, json_rows, require


class LabelFeatures:
    """trn.json and tst.json with {"uid", "title", "content", "target_ind"} in each line, lbl.json with {"uid", "title"}.

    `target_ind` are lines of lbl.json counted from 0. A text is title and content, or with `titles_only` the title alone,
    as the LF-…Titles sets are used although their files have contents.
    """

    title: ClassVar[str] = "label-feature JSON"
    signs: ClassVar[tuple[str, ...]] = ("trn.json", "tst.json", "lbl.json")

    def __init__(self, folder: Path, titles_only: bool = False) -> None:
        splits = find_splits(folder, {"train": ["trn.json"], "test": ["tst.json"]})
        self.files = {split: [path] for split, path in splits.items()} | {"labels": [require(folder, "lbl.json")]}
        self._fields = ("title",) if titles_only else ("title", "content")

    def labels(self) -> Labels:
        """A label's id is its uid, its name the title."""
        (path,) = self.files["labels"]
        labels = Labels()
        for line, row in json_rows(path):
            uid = row.get("uid")
            if isinstance(uid, bool) or not isinstance(uid, str | int) or uid == "":
                raise fault(path, line, 'needs a "uid"')
            title = _string(path, line, row, "title")
            check_unicode(path, line, f"{uid}{title}")
            try:
                labels.add(str(uid), title.strip())
            except ValueError as error:
                raise fault(path, line, str(error)) from None
        return labels

    def texts(self, split: str, labels: Labels) -> Iterator[tuple[str, set[int]]]:
        """A text may be empty: some products have no title, and the published splits and filters count them."""
        (path,) = self.files[split]
        for line, row in json_rows(path):
            text = " ".join(part for name in self._fields if (part := _string(path, line, row, name).strip()))
            check_unicode(path, line, text)
            targets = row.get("target_ind")
            if not isinstance(targets, list):
                raise fault(path, line, '"target_ind" must be a list of label numbers')
            for label in targets:
                if type(label) is not int or not 0 <= label < len(labels):
                    raise fault(path, line, f"target_ind {label!r} is not one of 0 … {len(labels) - 1}")
            yield text, set(targets)


def _string(path: Path, line: int, row: dict[str, Any], name: str) -> str:
    """A field that is a string; only the content may be missing."""
    value = row.get(name)
    if value is None and name == "content":
        return ""
    if not isinstance(value, str):
        raise fault(path, line, f'"{name}" must be a string')
    return value
