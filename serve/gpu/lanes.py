"""The order of work on a device: streams, and graphs of work that is always the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from serve.engine import DeviceLost


class Lane:
    """A CUDA stream: what is started inside `with lane():` runs in order, beside other lanes. A CPU, in tests, has none.

    handle   the stream's address, for libraries that take one; 0 on a CPU
    """

    def __init__(self, device: torch.device, priority: int = 0) -> None:
        """Work of a lower `priority` number goes first."""
        self.device = device
        self._stream = torch.cuda.Stream(device, priority) if device.type == "cuda" else None
        self.handle = 0 if self._stream is None else int(self._stream.cuda_stream)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        try:
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                yield
        except Exception:
            self.wait()  # whoever raised it: after a failure of the device this fails too
            raise

    def wait(self) -> None:
        """Returns when all that was started is done; DeviceLost."""
        if self._stream is None:
            return
        try:
            self._stream.synchronize()
        except RuntimeError as error:
            raise DeviceLost(f"{self.device}: {error}") from error


class Graphs:
    """A function of tensors, recorded for some shapes and replayed from then on: one launch instead of hundreds.

    For one thread, inside the lane. All graphs share their memory, so what `replay` returns is gone with the next one.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._recorded: dict[tuple[torch.Size, ...], _Graph] = {}
        self._pool: Any = None

    def record(self, *inputs: Tensor) -> None:
        """Records the function on inputs like these, which are kept."""
        graph = _Graph(self._function, inputs, self._pool)
        self._pool = graph.pool
        self._recorded[tuple(each.shape for each in inputs)] = graph

    def replay(self, *inputs: Tensor) -> Any:
        """The function's results for inputs of the same shapes as recorded ones; of any other, by calling it."""
        graph = self._recorded.get(tuple(each.shape for each in inputs))
        if graph is None:
            return self._function(*inputs)
        for static, new in zip(graph.inputs, inputs, strict=True):
            static.copy_(new, non_blocking=True)
        return graph.run()


class _Graph:
    def __init__(self, function: Callable[..., Any], inputs: tuple[Tensor, ...], pool: Any) -> None:
        self.inputs, self.pool = inputs, pool
        outputs = function(*inputs)  # kernels are compiled and chosen, which no recording may do
        if not inputs[0].is_cuda:
            self.run = lambda: function(*inputs)
            return
        graph = torch.cuda.CUDAGraph()
        # Other threads may ask the device for its memory meanwhile.
        stream = torch.cuda.current_stream(inputs[0].device)
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            outputs = function(*inputs)
        self.pool = graph.pool()

        def run() -> Any:
            graph.replay()
            return outputs

        self.run = run
