"""The timeline of a run: the wall seconds and the peak memory of its stages, as rows of kind "stage" in metrics.jsonl."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

from train.checkpoint import Progress
from train.runs import Log

_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass
class _Stage:
    name: str
    seconds: float = 0.0
    peak_mb: float = 0.0


class Stages:
    """Measures stages. One may hold another, whose seconds count for the inner one alone.

    Linux tells each stage's own peak of resident memory; elsewhere it is the peak of the process so far.
    """

    def __init__(self) -> None:
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
            self._ended.append({"stage": stage.name, "seconds": round(stage.seconds, 3), "peak_memory_mb": stage.peak_mb})
            self._write()

    def _settle(self) -> None:
        """Gives the innermost open stage what was measured since the last call."""
        now, peak = time.monotonic(), peak_memory_mb()
        if self._open:
            self._open[-1].seconds += now - self._since
            self._open[-1].peak_mb = max(self._open[-1].peak_mb, peak)
        self._since = now
        _forget_peak()

    def _write(self) -> None:
        if self._log is not None:
            for row in self._ended:
                self._log.write({"kind": "stage", "step": self._progress.step} | row)
            self._ended.clear()


def peak_memory_mb() -> float:
    """The most memory that this process has held since its stage began or went on, in MB (10⁶ bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(getrusage(RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


def _forget_peak() -> None:
    """Linux: sets the peak to what is held now ("5" in proc_pid_clear_refs(5))."""
    with suppress(OSError):  # another system, or /proc is read-only: peaks are those of the process so far
        _CLEAR_REFS.write_text("5")
