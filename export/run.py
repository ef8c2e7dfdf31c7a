"""Reads what `train` wrote: a checkpoint's encoder and head, labels, metrics and held-out texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from models.checkpoint import checkpoints_in, load_head, step_of
from models.encoder import Encoder
from models.head import Head

_T = TypeVar("_T")


class RunError(ValueError):
    """A run directory cannot be exported; the message names the file and the fault."""


@dataclass(frozen=True)
class HeldOut:
    """A text that was not trained on, and the ids of its true labels."""

    text: str
    labels: frozenset[str]


class Run:
    """A run directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def checkpoint(self, name: str | None = None) -> Path:
        """The checkpoint called `name` (step-…), or that of the most steps."""
        if not self.folder.is_dir():
            raise RunError(f"{self.folder}: no such folder")
        checkpoints = checkpoints_in(self.folder / "checkpoints")
        if not checkpoints:
            raise RunError(f"{self.folder}: no checkpoint in checkpoints/")
        if name is None:
            return checkpoints[-1]
        if name not in {path.name for path in checkpoints}:
            raise RunError(f"{self.folder}: no checkpoint {name}; there is {', '.join(path.name for path in checkpoints)}")
        return self.folder / "checkpoints" / name

    def labels(self) -> Iterator[tuple[str, str]]:
        """(id, name) in label order."""
        return self._rows("labels.jsonl", lambda row: (_text(row, "id"), _text(row, "name")))

    def heldout(self) -> list[HeldOut]:
        """The held-out texts; RunError when there are none."""
        rows = list(self._rows("heldout.jsonl", lambda row: HeldOut(_text(row, "text"), frozenset(row["labels"]))))
        if not rows:
            raise RunError(f"{self.folder / 'heldout.jsonl'}: holds no text to compare the bundle on")
        return rows

    def metrics(self, checkpoint: Path) -> dict[str, Any]:
        """Rows of the last evaluation up to `checkpoint`, by split; empty when there was none. NaN becomes null."""
        # Its last line may be one that a killed process was writing.
        logged = self._rows("metrics.jsonl", lambda row: (int(row["step"]), row.get("split"), row), broken_end=True)
        last = step_of(checkpoint)
        evaluations = [(step, split, row) for step, split, row in logged if split is not None and step <= last]
        return {split: row for step, split, row in evaluations if step == evaluations[-1][0]}

    def _rows(self, name: str, parse: Callable[[dict[str, Any]], _T], broken_end: bool = False) -> Iterator[_T]:
        path = self.folder / name
        if not path.is_file():
            raise RunError(f"{path}: missing")
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = parse(json.loads(line.decode(), parse_constant=lambda _: None))
                except (ValueError, KeyError, TypeError) as error:
                    if broken_end and not line.endswith(b"\n"):
                        return
                    raise RunError(f"{path}:{number}: not a line that train writes: {error}") from error
                yield row


def load_model(checkpoint: Path) -> tuple[Encoder, Head]:
    """The trained encoder and head; EncoderError or HeadError names a bad file, RunError a pair that does not fit."""
    encoder, head = Encoder.load(checkpoint / "encoder"), load_head(checkpoint / "head.safetensors")
    if encoder.width != head.width:
        raise RunError(f"{checkpoint}: the encoder gives {encoder.width} numbers, the head takes {head.width}")
    return encoder, head


def _text(row: dict[str, Any], key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise TypeError(f'"{key}" is not a string')
    return value
