"""Time and memory of calls on a GPU. Without one, in dry runs, the host's clock and no memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

_FLUSH_BYTES = 256 << 20  # beyond any L2 cache
_MOST_MS = 1_000.0  # of all repeats of one call


class Clock:
    """Medians of repeats with CUDA events; before each one the L2 cache is filled with something else.

    That is read, not written: or what the cache has still to write would be part of what is timed.
    """

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self._repeats = device, repeats
        self._flush = torch.zeros(_FLUSH_BYTES // 4 if device.type == "cuda" else 1, device=device)

    def times_ms(self, call: Callable[[], Any], *, graph: bool) -> list[float]:
        """Milliseconds of each repeat, after two calls that compile and choose kernels.

        With `graph` the call is recorded as a CUDA graph first, so that launches from Python are not what is measured.
        """
        if self.device.type != "cuda":
            return [self._once(call)]
        call()
        warm_ms = self._once(call)
        if graph:
            call = self._recorded(call)
            self._once(call)
        repeats = max(3, min(self._repeats, int(_MOST_MS / max(warm_ms, 1e-3))))
        return [self._once(call) for _ in range(repeats)]

    def extra_bytes(self, call: Callable[[], Any]) -> int:
        """The most memory allocated during a call beyond what was there before."""
        held = torch.cuda.memory_allocated(self.device) - self._flush.nbytes if self.device.type == "cuda" else 0
        return self.peak_bytes(call) - held

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        """The most memory allocated during a call, this clock's own left out."""
        if self.device.type != "cuda":
            call()
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - self._flush.nbytes

    def _once(self, call: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            began = time.perf_counter()
            call()
            return (time.perf_counter() - began) * 1e3
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.sum()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def _recorded(self, call: Callable[[], Any]) -> Callable[[], Any]:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):  # back to it also after a failure
                call()
        except RuntimeError as error:
            print(f"# launched from Python, as it cannot be recorded: {str(error).splitlines()[0]}")
            return call
        return graph.replay
