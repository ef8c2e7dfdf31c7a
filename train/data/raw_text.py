"""Raw text with label strings: data sets of the Extreme Classification Repository as AttentionXML and LightXML have them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import ClassVar

from train.data.contract import Labels
from train.data.files import fault, find, find_splits, lines, require


class RawText:
    """train_raw_texts.txt or train_texts.txt, a text in each line; train_labels.txt, its labels between spaces; test likewise.

    A label is its own name. The label order is that of first appearance, in train and then in test.
    """

    title: ClassVar[str] = "raw text with label strings"
    signs: ClassVar[tuple[str, ...]] = tuple(
        f"{split}_{kind}.txt" for split in ("train", "test") for kind in ("raw_texts", "texts", "labels")
    )

    def __init__(self, folder: Path) -> None:
        # Tokenized texts often lie beside the raw ones that they were made from; the raw ones are better then.
        raw = find(folder, "train_raw_texts.txt") or find(folder, "test_raw_texts.txt")
        kind = "raw_texts" if raw else "texts"
        texts = find_splits(folder, {split: [f"{split}_{kind}.txt"] for split in ("train", "test")})
        labels = {split: require(folder, f"{split}_labels.txt") for split in texts}
        self.files = {split: [texts[split], labels[split]] for split in texts} | {"labels": list(labels.values())}

    def labels(self) -> Labels:
        labels = Labels()
        for path in self.files["labels"]:
            for _, line in lines(path):
                for label in line.split():
                    if label not in labels.position:
                        labels.add(label, label)
        return labels

    def texts(self, split: str, labels: Labels) -> Iterator[tuple[str, set[int]]]:
        """A blank line is a text without words: in published files it is the rest of one whose words were all dropped."""
        texts, strings = self.files[split]
        for text, labelled in zip_longest(lines(texts), lines(strings)):
            if text is None:
                raise fault(strings, labelled[0], f"one line more than {texts.name} has")
            if labelled is None:
                raise fault(texts, text[0], f"one line more than {strings.name} has")
            yield text[1], {labels.position[label] for label in labelled[1].split()}
