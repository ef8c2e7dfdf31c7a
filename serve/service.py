"""What is being served, and the state of the server around it: loading, ready, draining, given up. No HTTP.

All methods are for the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from serve.backend import Answer, Backend, ClientLeaves
from serve.engine import DeviceLost, Engine
from serve.host import trim_heap
from serve.labels import LabelFilter
from serve.metrics import Metrics
from serve.processes import open_engines
from serve.scheduler import Priority
from serve.settings import Settings

_log = logging.getLogger("fanin.serve")
# A healthy engine may be this much slower than at warm-up: many labels per text, a reload beside it.
_HANG_FACTOR, _HANG_TIMEOUT_S = 4, 1.5
_PROCESS_HANG_TIMEOUT_S = 10.0  # the others work on meanwhile, so patience costs less than a needless replacement
_LAST_ANSWERS_S = 5.0

Status = Literal["loading", "ready", "draining", "engine-stopped"]


class NotReady(Exception):
    """No predictions are taken now, as `status` says."""

    def __init__(self, status: Status) -> None:
        super().__init__("the engine stopped" if status == "engine-stopped" else f"the server is {status}")
        self.status = status


class ReloadUnderWay(Exception):
    """One bundle at a time is loaded beside the one that is served."""

    def __init__(self) -> None:
        super().__init__("a reload is under way")


@dataclass(frozen=True, slots=True)
class Reload:
    """A finished reload: the versions of the bundles before and after."""

    old_version: str
    new_version: str
    seconds: float


class Service:
    """Loads a bundle and answers requests with it, or with the one that took its place, until drained or given up.

    backends   the last one takes the requests, those before it finish theirs; empty until loaded
    draining   it is about to end
    failure    why the engine is given up for good, if it is
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.backends: tuple[Backend, ...] = ()
        self.failure: str | None = None
        self._path = settings.bundle
        self.draining = self._reloading = self._refusing = False
        metrics.device_memory = self._device_memory
        metrics.engine_pids = lambda: {engine.pid for backend in self.backends for engine in backend.engines}
        metrics.ready.set_function(lambda: self.status == "ready")
        metrics.draining.set_function(lambda: self.draining)
        metrics.queue_inputs.set_function(lambda: sum(b.scheduler.queue_inputs for b in self.backends))
        metrics.queue_tokens.set_function(lambda: sum(b.scheduler.queue_tokens for b in self.backends))
        metrics.queue_oldest_age.set_function(lambda: max((b.scheduler.queue_oldest_age_s for b in self.backends), default=0))
        for i in range(len(settings.devices)):
            metrics.worker_restarts.labels(str(i))
            metrics.worker_heartbeat_age.labels(str(i)).set_function(partial(self._heartbeat_age_s, i))
            metrics.batch_token_budget.labels(str(i)).set_function(partial(self._batch_token_budget, i))

    @property
    def engine(self) -> Engine:
        """The engine with its bundle; NotReady until it is loaded."""
        if not self.backends:
            raise NotReady("loading")
        return self.backends[-1].engine

    @property
    def alive(self) -> bool:
        """False once the engine has died or is given up. A server that still loads is alive."""
        return self.failure is None and all(backend.alive for backend in self.backends)

    @property
    def status(self) -> Status:
        if not self.alive:
            return "engine-stopped"
        if self.draining:
            return "draining"
        if not self.backends:
            return "loading"
        return "ready" if self.backends[-1].up else "engine-stopped"

    async def load(self) -> None:
        """Opens, verifies, loads and warms up the bundle beside the event loop, then takes requests. BundleError."""
        self._serve(await self._open(self._path))

    async def reload(self, path: Path | None = None) -> Reload:
        """Puts the bundle at `path` (default: where the present one was found) in place of the present one.

        That one answers until the new one is verified and warmed up, finishes what it has begun, and gives its memory back
        before this returns. Whatever is raised, nothing has changed: BundleError, ReloadUnderWay, NotReady.
        """
        if self.status != "ready":
            raise NotReady(self.status)
        if self._reloading:
            raise ReloadUnderWay
        self._reloading = True
        began = time.perf_counter()
        try:
            new = await self._open(path or self._path)
            if self.status != "ready":
                await asyncio.to_thread(new.close)
                raise NotReady(self.status)
            old_version, new_version = self.engine.version, new.engine.version
            old = self.backends[-1]
            self._serve(new)
            self._path = path or self._path
        except Exception:
            self.metrics.reloads.labels("failed").inc()
            raise
        else:
            self.metrics.reloads.labels("ok").inc()
            engine = weakref.ref(old.engine)
            await self._retire(old)
            del old
            await _gone(engine)
            await asyncio.to_thread(trim_heap)
        finally:
            self._reloading = False
        return Reload(old_version, new_version, time.perf_counter() - began)

    async def predict(
        self,
        texts: Sequence[str],
        *,
        k: int,
        truncate: bool,
        timeout_s: float,
        client_left: ClientLeaves,
        labels: LabelFilter | None = None,
        priority: Priority = "normal",
    ) -> Answer:
        """The k best labels of each text, of those that `labels` leaves. `client_left()` ends when nobody waits any more.

        NotReady, QueueFull, TooLong, UnknownLabels, NoLabelLeft, DeadlineExceeded, ClientLeft, Closed, or whatever the engine
        raised.
        """
        if not self.backends or self._refusing or not self.alive:
            self.metrics.rejected.labels(self.status).inc()
            raise NotReady(self.status)
        return await self.backends[-1].predict(texts, k, truncate, timeout_s, client_left, labels, priority)

    async def drain(self) -> None:
        """Says that it is not ready; after a while takes no more predictions and waits for those under way.

        The settings say how long. What is not answered by then is answered 503.
        """
        self.draining = True
        await asyncio.sleep(self.settings.drain_delay_s)
        self._refusing = True
        try:
            async with asyncio.timeout(self.settings.drain_timeout_s):
                for backend in self.backends:
                    await backend.finished()
        except TimeoutError:
            _log.warning("drain: not everything was answered within %d s; the rest gets 503", self.settings.drain_timeout_s)
            self._abort("draining")

    def fail(self) -> None:
        """Answers 503 to every request under way, once `failure` says why."""
        self._abort("engine-stopped")

    def close(self) -> None:
        """Ends the engine's thread; call it when nothing is under way."""
        for backend in self.backends:
            backend.close()

    async def _open(self, path: Path) -> Backend:
        try:
            return await asyncio.to_thread(self._open_here, path, asyncio.get_running_loop())
        except DeviceLost as lost:  # no batch is under way that could tell: whoever asked for the bundle hears of it
            raise RuntimeError(str(lost)) from lost

    def _open_here(self, path: Path, loop: asyncio.AbstractEventLoop) -> Backend:
        settings, began = self.settings, time.perf_counter()
        # Resolved once: a link may be pointed elsewhere while its bundle is read.
        engines = open_engines(
            path.resolve(),
            settings.devices,
            settings.threads,
            lambda i: self.metrics.worker_restarts.labels(str(i)).inc(),
            settings.encoder_runtime,
        )
        try:
            loaded = time.perf_counter()
            largest_batch_s = max(engine.warm_up(settings.max_batch_inputs, settings.max_batch_tokens) for engine in engines)
            self.metrics.model_load_duration.set(loaded - began)
            self.metrics.warmup_duration.set(time.perf_counter() - loaded)
            least_s = _HANG_TIMEOUT_S if len(engines) == 1 else _PROCESS_HANG_TIMEOUT_S
            hang_timeout_s = settings.hang_timeout_s or max(least_s, _HANG_FACTOR * largest_batch_s)
            return Backend(engines, settings, self.metrics, loop, hang_timeout_s)
        except BaseException:
            for engine in engines:
                engine.close()
            raise

    def _serve(self, backend: Backend) -> None:
        self.backends = (*self.backends, backend)
        engine, metrics = backend.engine, self.metrics
        manifest = engine.bundle.manifest
        metrics.model.info({"model": manifest.name, "version": engine.version})
        metrics.model_bytes.clear()
        for component, size in manifest.component_nbytes.items():
            for device in {each.device for each in backend.engines} if component in ("encoder", "head") else ["cpu"]:
                metrics.model_bytes.labels(component, device).set(size)
        for each in backend.engines:
            for component, size in each.added_bytes().items():
                metrics.model_bytes.labels(component, each.device).inc(size)

    def _device_memory(self) -> dict[str, dict[str, int]]:
        engines = [engine for backend in self.backends for engine in backend.engines]
        return {engine.device: engine.device_memory() for engine in engines if engine.device != "cpu"}

    def _heartbeat_age_s(self, worker: int) -> float:
        return max((backend.workers[worker].heartbeat_age_s for backend in self.backends), default=0.0)

    def _batch_token_budget(self, worker: int) -> float:
        return self.backends[-1].workers[worker].batch_token_budget if self.backends else 0.0

    async def _retire(self, backend: Backend) -> None:
        await backend.finished()
        self.backends = tuple(other for other in self.backends if other is not backend)
        await asyncio.to_thread(backend.close)

    def _abort(self, status: Status) -> None:
        for backend in self.backends:
            backend.abort(lambda: NotReady(status))


async def _gone(engine: weakref.ref[Engine]) -> None:
    """Waits for the last answers that are still written with its labels."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_LAST_ANSWERS_S):
            while engine() is not None:
                await asyncio.sleep(0.01)
