"""The timeline of a run: the wall seconds and the peak memory of its stages, as rows of kind "stage" in metrics.jsonl."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import torch

from train.checkpoint import Progress
from train.runs import Log

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@dataclass
class _Stage:
    name: str
    seconds: float = 0.0
    peaks_mb: dict[str, float] = field(default_factory=dict)


class Stages:
    """Measures stages. One may hold another, whose seconds count for the inner one alone.

    Linux tells each stage's own peak of resident memory; elsewhere it is the peak of the process so far. On a GPU a stage ends
    when its work is done there, and its rows also have the peak of what torch allocated.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: list[_Stage] = []
        self._ended: list[dict[str, Any]] = []
        self._log: Log | None = None
        self._progress = Progress()
        self._since = 0.0

    def log_to(self, log: Log, progress: Progress) -> None:
        """Writes the stages that have ended, and from now on each as it ends, with the step of `progress`."""
        self._log, self._progress = log, progress
        self._write()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._settle()
        self._open.append(_Stage(name))
        try:
            yield
        finally:
            self._settle()
            stage = self._open.pop()
            self._ended.append({"stage": stage.name, "seconds": round(stage.seconds, 3), **stage.peaks_mb})
            self._write()

    def peaks_mb(self) -> dict[str, float]:
        """The most memory held since the stage began or went on, in MB (10⁶ bytes), by its name in the rows."""
        peaks = {"peak_memory_mb": peak_memory_mb()}
        if self._device.type == "cuda":
            peaks["device_peak_memory_mb"] = round(torch.cuda.max_memory_allocated(self._device) / 1e6, 1)
        return peaks

    def _settle(self) -> None:
        """Gives the innermost open stage what was measured since the last call."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.monotonic()
        if self._open:
            stage = self._open[-1]
            stage.seconds += now - self._since
            for name, peak in self.peaks_mb().items():
                stage.peaks_mb[name] = max(stage.peaks_mb.get(name, 0.0), peak)
        self._since = now
        _forget_peak()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def _write(self) -> None:
        if self._log is not None:
            for row in self._ended:
                self._log.write({"kind": "stage", "step": self._progress.step} | row)
            self._ended.clear()


def peak_memory_mb() -> float:
    """The most memory that this process has held since its stage began or went on, in MB (10⁶ bytes)."""
    with suppress(OSError, StopIteration):  # getrusage's figure cannot be reset, and begins at that of the parent process
        status = _STATUS.read_text().splitlines()
        return round(int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6, 1)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(getrusage(RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


def _forget_peak() -> None:
    """Linux: sets the peak to what is held now ("5" in proc_pid_clear_refs(5))."""
    with suppress(OSError):  # another system, or /proc is read-only: peaks are those of the process so far
        _CLEAR_REFS.write_text("5")
