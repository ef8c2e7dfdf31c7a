"""What is being served, and the state of the server around it: loading, ready, draining. No HTTP.

All methods are for the event loop's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

from serve.backend import Answer, Backend, ClientLeaves
from serve.engine import Engine
from serve.metrics import Metrics
from serve.settings import Settings

Status = Literal["loading", "ready", "draining", "engine-stopped"]


class NotReady(Exception):
    """No predictions are taken now, as `status` says."""

    def __init__(self, status: Status) -> None:
        super().__init__("the engine stopped" if status == "engine-stopped" else f"the server is {status}")
        self.status = status


class Service:
    """Loads one bundle and answers requests with it until drained."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self._draining = False
        self._backend: Backend | None = None
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()
        metrics.ready.set_function(lambda: self.status == "ready")
        metrics.draining.set_function(lambda: self._draining)

    @property
    def engine(self) -> Engine:
        """The engine with its bundle; NotReady until it is loaded."""
        if self._backend is None:
            raise NotReady("loading")
        return self._backend.engine

    @property
    def alive(self) -> bool:
        """False once the engine's thread is gone or stuck. A server that still loads is alive."""
        return self._backend is None or self._backend.alive

    @property
    def status(self) -> Status:
        if self._draining:
            return "draining"
        if self._backend is None:
            return "loading"
        return "ready" if self._backend.alive else "engine-stopped"

    async def load(self) -> None:
        """Opens, verifies, loads and warms up the bundle beside the event loop, then takes requests. BundleError."""
        settings, began = self.settings, time.perf_counter()
        engine = await asyncio.to_thread(Engine.open, settings.bundle, settings.threads)
        self.metrics.model_load_duration.set(time.perf_counter() - began)
        warm_up_s = await asyncio.to_thread(engine.warm_up, settings.max_batch_inputs, settings.max_batch_tokens)
        self.metrics.warmup_duration.set(warm_up_s)
        self._backend = Backend(engine, settings, self.metrics)

    async def predict(
        self, texts: Sequence[str], *, k: int, truncate: bool, timeout_s: float, client_left: ClientLeaves
    ) -> Answer:
        """The k best labels of each text. `client_left()` ends when nobody waits for the answer any more.

        NotReady, QueueFull, TooLong, DeadlineExceeded, ClientLeft, Closed, or whatever the engine raised.
        """
        if self._backend is None or self.status != "ready":
            self.metrics.rejected.labels(self.status).inc()
            raise NotReady(self.status)
        self._active += 1
        self._idle.clear()
        try:
            return await self._backend.predict(texts, k, truncate, timeout_s, client_left)
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()

    async def drain(self) -> None:
        """Takes no more predictions and waits for those under way, as long as the settings allow."""
        self._draining = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), self.settings.drain_timeout_s)

    def close(self) -> None:
        """Ends the engine's thread; call it when nothing is under way."""
        if self._backend is not None:
            self._backend.close()
