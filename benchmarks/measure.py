"""Timing, memory and results shared by the benchmarks. Quote medians and ratios: single times on shared machines mislead."""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each call, run in turn (a b c a b c …) so that a slow moment hits all of them; one warm-up each."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def summary(times_ms: list[float]) -> dict[str, float]:
    """Median and spread (fastest and slowest)."""
    return {"median_ms": statistics.median(times_ms), "min_ms": min(times_ms), "max_ms": max(times_ms)}


def paired_ratio(slow_ms: list[float], fast_ms: list[float]) -> float:
    """Median of the ratios of calls that ran side by side."""
    return statistics.median(a / b for a, b in zip(slow_ms, fast_ms, strict=True))


def read_bandwidth() -> float:
    """GB/s at which all threads together read memory: the best of several sums over 2 GiB."""
    data = torch.ones(1 << 29)
    best = 0.0
    for _ in range(7):
        start = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - start) / 1e9)
    return best


def extra_memory(call: Callable[[], object]) -> int:
    """Bytes by which the first `call` raises the process's peak resident memory over what it held before (Linux, glibc)."""
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that malloc keeps would hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(match[1]) * 1024


def environment(hardware: dict[str, object] | None = None) -> dict[str, object]:
    """Device, versions and commit: what a row needs to be compared with another. `hardware`: the processor's facts if None."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **(processor() if hardware is None else hardware),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "commit": _commit(),
    }


Row = dict[str, object]


def show(rows: list[Row]) -> None:
    """Prints each row as a JSON line."""
    for row in rows:
        print(json.dumps(_rounded(row)), flush=True)


def record(benchmark: str, rows: list[Row], facts: dict[str, object] | None = None) -> None:
    """Appends each row, with `facts` or the environment, to benchmarks/results/<benchmark>.jsonl."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    facts = environment() if facts is None else facts
    with open(RESULTS / f"{benchmark}.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(_rounded(row) | facts) + "\n" for row in rows)


def count(text: str) -> int:
    """A flag's value that is at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _rounded(row: Row) -> Row:
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}


def processor() -> dict[str, object]:
    """What the kernels of the CPU run on."""
    from models.kernels import cpu  # compiled: benchmarks.gpu runs where it is not

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    name = f"{match[1] if match else platform.machine()}, {cpu.default_threads()} cores"
    return {"device": name, "threads": cpu.threads(), "level": cpu.level()}


def _commit() -> str:
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10"], cwd=folder, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # no git
        return "unknown"
    return done.stdout.strip() or "unknown"
