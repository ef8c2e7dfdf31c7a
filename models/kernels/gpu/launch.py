"""Starting the kernels: tile sizes, and the choice between a few of them by the clock, made once for each kind of problem.

Dimensions: B batch, K fan-in, G group size; KB inputs, BM rows and GT labels at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

# TRITON_INTERPRET=1 runs the kernels on the CPU, slowly: for tests.
INTERPRETED = bool(triton.knobs.runtime.interpret)
REGISTERS = 255  # of a thread, at most; where ptxas is not told, it may spill some to save others
_TRIALS = 5
_HEAD_START = 1_000_000  # cycles of the GPU, half a millisecond, in which the host starts what is measured
_ROOMY = 227 * 1024  # bytes

_chosen: dict[Hashable, Config] = {}
_seconds = 0.0


@dataclass(frozen=True)
class Config:
    """Tile sizes of a launch (constants of the kernel), warps of a program and depth of its software pipeline."""

    sizes: Mapping[str, int]
    warps: int = 4
    stages: int = 2


def power_of_two(number: int, low: int, high: int) -> int:
    """The smallest power of two from `number` on, at least `low` and at most `high`."""
    return min(high, max(low, triton.next_power_of_2(number)))


def labels_at_once(group_size: int, most: int) -> int:
    """The largest power of two that divides the group size, at most `most`."""
    return min(group_size & -group_size, most)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have on `device`; those of an H100 where there is none."""
    if device.type != "cuda":
        return _ROOMY
    most: int = triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
    return most


def run(kernel: Any, programs: int, arguments: Mapping[str, Any], constants: Mapping[str, Any], config: Config) -> None:
    """Starts `programs` programs on the current stream of the device that holds the first argument."""
    if programs == 0:
        return
    first = next(iter(arguments.values()))
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        options = {"num_warps": config.warps, "num_stages": config.stages, "maxnreg": REGISTERS}
        kernel[(programs,)](**arguments, **constants, **config.sizes, **options)


def choose(x: Tensor, problem: Hashable, configs: list[Config], prepare: Callable[[], Callable[[Config], object]]) -> Config:
    """The fastest of `configs` for a kind of problem on x's device; the first if there is nothing to measure.

    When the problem is new, `prepare` returns a function that does the work once, and each config is tried a few times, except
    while a CUDA graph is captured. Configs that the device has not the shared memory or registers for are left out.
    """
    global _seconds
    if INTERPRETED or not x.is_cuda:
        return configs[0]
    if len(configs) == 1:
        return configs[0]
    key = (x.device, problem)
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return configs[0]
        start = time.perf_counter()
        with torch.cuda.device(x.device):
            trial = prepare()
            times = [_time(trial, config) for config in configs]
        if min(times) == float("inf"):
            raise RuntimeError(f"no configuration of the kernel fits {torch.cuda.get_device_name(x.device)}")
        _chosen[key] = configs[times.index(min(times))]
        _seconds += time.perf_counter() - start
    return _chosen[key]


def tuning_seconds() -> float:
    """Seconds that this process has spent on compiling and choosing: what first calls cost more than later ones."""
    return _seconds


def _time(trial: Callable[[Config], object], config: Config) -> float:
    """Milliseconds of the quickest of a few trials; infinite if the device cannot run it."""
    try:
        trial(config)  # compiles
    except OutOfResources:
        return float("inf")
    best = float("inf")
    for _ in range(_TRIALS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(_HEAD_START)  # or a small problem's time would be Python's
        start.record()
        trial(config)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end))
    return best
