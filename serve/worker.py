"""The engine's thread: takes batches from the scheduler, runs both stages and gives the results back."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from serve.metrics import Metrics
from serve.scheduler import Closed, Item, Scheduler

_log = logging.getLogger("fanin.serve")


class TwoStages(Protocol):
    """What a worker needs of an engine (serve.engine.Engine)."""

    def encode(self, payloads: Sequence[Any]) -> np.ndarray:
        """Embeddings fp32 [B, D]."""

    def topk(self, x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores fp32 [B, k] descending and labels int32 [B, k]."""


class Worker:
    """One thread around one engine. An item's result is its (labels int32 [k], scores fp32 [k]).

    A batch that fails is halved until the item at fault is alone, and only that item's job fails.
    """

    def __init__(self, engine: TwoStages, scheduler: Scheduler, metrics: Metrics) -> None:
        self._engine, self._scheduler, self._metrics = engine, scheduler, metrics
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Waits for the thread to end, which it does once the scheduler is closed and empty."""
        self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def heartbeat_age_s(self) -> float:
        """How long the thread has been at its current batch; 0 while it is idle."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def _run(self) -> None:
        batch: list[Item] | None = None
        try:
            while (batch := self._scheduler.take()) is not None:
                self._busy_since = time.monotonic()
                self._predict(batch)
                self._busy_since = None
        except BaseException:
            _log.exception("the engine's thread ends")
            for item in batch or ():
                self._scheduler.fail(item.job, Closed("the engine stopped"))
            self._scheduler.abort()

    def _predict(self, batch: list[Item]) -> None:
        try:
            self._run_stages(batch)
        except Exception as error:
            if len(batch) == 1:
                self._scheduler.fail(batch[0].job, error)
                return
            self._metrics.batch_splits.labels("memory" if isinstance(error, MemoryError) else "error").inc()
            middle = len(batch) // 2
            for half in (batch[:middle], batch[middle:]):
                if wanted := self._scheduler.still_wanted(half, "encoder"):
                    self._predict(wanted)

    def _run_stages(self, batch: list[Item]) -> None:
        self._metrics.observe_batch([item.length for item in batch], batch[0].bucket)
        started = time.perf_counter()
        x = self._engine.encode([item.payload for item in batch])
        encoded = time.perf_counter()
        wanted = self._scheduler.still_wanted(batch, "head")
        self._metrics.stage["encoder"].observe(encoded - started)
        if not wanted:
            return
        if len(wanted) < len(batch):
            keep = set(wanted)
            x = x[[item in keep for item in batch]]
        began = time.perf_counter()
        scores, labels = self._engine.topk(x, max(item.job.k for item in wanted))
        ended = time.perf_counter()
        self._scheduler.spent(wanted, encoded - started, ended - began)
        self._scheduler.complete(wanted, ((labels[i, : item.job.k], scores[i, : item.job.k]) for i, item in enumerate(wanted)))
        self._metrics.stage["head"].observe(ended - began)
