"""What a run left in config.json and metrics.jsonl, as the report asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.runs import Run
from train.settings import SettingsError

_FILES = {"out", "cache"}  # settings that differ from run to run and change nothing
_FLOAT32 = 4  # bytes


class ReportError(ValueError):
    """A run cannot be reported; the message names the file."""


@dataclass(frozen=True)
class Record:
    """One run: config.json and the rows of metrics.jsonl. `name` tells it from the others of the same report."""

    name: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in self.config["settings"].items() if name not in _FILES}

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["kind"] == kind]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """One row per evaluation of the split that is evaluated while training."""
        rows = self.of_kind("eval")
        return [row for row in rows if row["split"] == rows[0]["split"]]

    @property
    def last_evaluations(self) -> list[dict[str, Any]]:
        """The rows of the last evaluation, a split each, the one that was kept for the end last."""
        rows = self.of_kind("eval")
        return [row for row in rows if row["step"] == rows[-1]["step"]]

    @property
    def stages(self) -> dict[str, tuple[float, float]]:
        """Seconds in all and peak memory in MB of each stage, in the order in which they first ended."""
        stages: dict[str, tuple[float, float]] = {}
        for row in self.of_kind("stage"):
            seconds, peak = stages.get(row["stage"], (0.0, 0.0))
            stages[row["stage"]] = seconds + row["seconds"], max(peak, row["peak_memory_mb"])
        return stages

    @property
    def seconds(self) -> float:
        """The time of training, evaluation and checkpoints so far, across all resumptions."""
        return max((float(row["seconds"]) for row in self.of_kind("train")), default=0.0)

    @property
    def peak_memory_mb(self) -> float:
        return max((row["peak_memory_mb"] for row in self.rows if "peak_memory_mb" in row), default=0.0)

    @property
    def device_peak_memory_mb(self) -> float:
        """0 for a run on a CPU."""
        return max((row["device_peak_memory_mb"] for row in self.rows if "device_peak_memory_mb" in row), default=0.0)

    @property
    def state(self) -> str:
        """ "finished", or how far the run has come."""
        epochs = self.config["settings"]["epochs"]
        done = max((row["epoch"] for row in self.of_kind("eval")), default=0)
        if done == epochs:
            return "finished"
        step = max((row["step"] for row in self.rows), default=0)
        epoch = max((row["epoch"] for row in self.of_kind("train")), default=1)
        return f"not finished: step {step:,}, epoch {epoch} of {epochs}"

    @property
    def intermediate_bytes(self) -> int:
        """Memory of the fp32 layer between the encoder and the head, 0 when there is none."""
        model = self.config["model"]
        return (model["embedding_width"] + 1) * model["width"] * _FLOAT32 if self.config["settings"]["intermediate"] else 0

    @property
    def sparse_bytes(self) -> int:
        """All that comes after the encoder: the intermediate layer and the head with its indices and biases."""
        return int(self.config["model"]["head_bytes"]) + self.intermediate_bytes

    @property
    def dense_bytes(self) -> int:
        """What a dense fp32 head with biases straight on the encoder's embedding would take."""
        model = self.config["model"]
        return dense_bytes(model["labels"], model["embedding_width"])


def dense_bytes(labels: int, width: int) -> int:
    """Memory of a dense fp32 layer with biases."""
    return labels * (width + 1) * _FLOAT32


def read(folders: Sequence[Path]) -> list[Record]:
    """The records of run directories, in their order. ReportError."""
    short = [folder.resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    return [_read(folder, name) for folder, name in zip(folders, names, strict=True)]


def _read(folder: Path, name: str) -> Record:
    run = Run(folder)
    try:
        config, rows = run.config(), run.log.rows()
    except SettingsError as error:
        raise ReportError(str(error)) from None
    if config is None or "model" not in config:
        raise ReportError(f"{folder / 'config.json'}: " + ("missing: no run is there" if config is None else "no model in it"))
    return Record(name, config, rows)
