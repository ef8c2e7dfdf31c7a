"""The files of a run directory beside its checkpoints and caches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from models.files import leftovers, write_text, writing
from train.data import Labels
from train.settings import SettingsError

# What a run that failed while preparing leaves behind.
_BEFORE_CONFIG = {"cache", "labels.jsonl", "heldout.jsonl", "metrics.jsonl"}


class Log:
    """metrics.jsonl, a line per log interval, evaluation, rewiring and stage: objects with "kind" and "step"."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._followers: list[Callable[[dict[str, Any]], None]] = []

    def rows(self) -> list[dict[str, Any]]:
        """The rows so far, without a last one that a killed process was writing; none when there is no file.

        SettingsError names any other line that is no row.
        """
        lines = self._path.read_bytes().splitlines() if self._path.exists() else []
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                if number == len(lines):
                    break
                row = None
            if not (isinstance(row, dict) and isinstance(row.get("step"), int) and "kind" in row):
                raise SettingsError(f"{self._path}:{number}: not a row that train writes; delete the line to go on without it")
            rows.append(row)
        return rows

    def follow(self, follower: Callable[[dict[str, Any]], None]) -> None:
        """Calls `follower` with each row that is written from now on."""
        self._followers.append(follower)

    def write(self, row: dict[str, Any]) -> None:
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for follower in self._followers:
            follower(row)

    def cut(self, step: int, evaluation_due: bool) -> None:
        """Drops lines about what comes after `step` steps, so that going on from there writes none twice."""
        kept = (
            row
            for row in self.rows()
            if row["step"] < step or (row["step"] == step and not (evaluation_due and row["kind"] == "eval"))
        )
        write_text(self._path, _lines(kept))


class Run:
    """A run directory. From the moment that config.json is there, it holds a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.log = Log(folder / "metrics.jsonl")
        self._config = folder / "config.json"

    def refuse_to_overwrite(self) -> None:
        """SettingsError when the folder holds a run, or anything else that a new run would mix with."""
        if self._config.exists():
            raise SettingsError(f"--out {self.folder} holds a run; continue it with --resume, or choose another folder")
        if self.folder.exists() and not self.folder.is_dir():
            raise SettingsError(f"--out {self.folder} is not a folder")
        known = _BEFORE_CONFIG | {path.name for path in leftovers(self.folder)}
        if self.folder.exists() and any(path.name not in known for path in self.folder.iterdir()):
            raise SettingsError(f"--out {self.folder} is not empty and holds no run; choose another folder")

    def config(self) -> dict[str, Any] | None:
        """config.json: "settings", "data", "model" and "versions". None when there is no run yet; SettingsError if damaged."""
        if not self._config.exists():
            return None
        try:
            config = json.loads(self._config.read_text(encoding="utf-8"))
            if not (isinstance(config, dict) and "settings" in config and "sha256" in config.get("data", ())):
                raise ValueError("settings or data are missing")
        except (OSError, TypeError, ValueError) as error:
            raise SettingsError(f"{self._config}: cannot be read: {error}") from error
        return dict(config)

    def write_config(self, config: dict[str, Any]) -> None:
        write_text(self._config, json.dumps(config, indent=2) + "\n")

    def write_labels(self, labels: Labels) -> None:
        rows = ({"id": label, "name": name} for label, name in zip(labels.ids, labels.names, strict=True))
        write_text(self.folder / "labels.jsonl", _lines(rows))

    def write_heldout(self, rows: Iterable[dict[str, Any]]) -> None:
        """Texts with their label ids, for checks of an exported model."""
        write_text(self.folder / "heldout.jsonl", _lines(rows))


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
