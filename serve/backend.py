"""The engines of one bundle with their queue, their threads and their tokenizers: from texts to their labels. No HTTP.

A backend may be made in any thread; its methods are for the event loop's. The engines run in their own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from models.kernels import Subset
from serve.engine import Engine
from serve.labels import LabelFilter
from serve.metrics import Metrics
from serve.scheduler import DeadlineExceeded, Job, Priority, Scheduler
from serve.settings import Settings
from serve.tokens import SHORT_CHARS, Tokens
from serve.worker import Worker

_DOWN_TIMEOUT_S = 60.0  # with no engine at all for so long, starting the whole server again is what is left

_FEW_LABELS = 100  # looking them up takes about as long as handing them to a thread
ClientLeaves = Callable[[], Coroutine[Any, Any, None]]


class ClientLeft(Exception):
    """The client went away before its answer was ready."""


class TooLong(ValueError):
    """Texts of more than `max_length` tokens when truncation is refused; `positions` are theirs."""

    def __init__(self, positions: list[int], max_length: int) -> None:
        super().__init__(f"texts {positions} are longer than {max_length} tokens")
        self.positions, self.max_length = positions, max_length


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a request: per text its tokens and its (labels int32 [k], scores fp32 [k]); and where the time went.

    Labels are those of `engine`, which need not be the service's any more.
    """

    engine: Engine
    tokens: list[Tokens]
    best: list[tuple[np.ndarray, np.ndarray]]
    tokenize_s: float
    queue_s: float
    encode_s: float
    head_s: float


class Backend:
    """The engines of a bundle with everything that is tied to them, so that another one can take over while this one finishes.

    engines          one per device, at least one; the queue is common to all
    hang_timeout_s   how long a batch may make no progress before its engine counts as stuck
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        settings: Settings,
        metrics: Metrics,
        loop: asyncio.AbstractEventLoop,
        hang_timeout_s: float,
    ) -> None:
        self.engines, self._metrics, self._loop = engines, metrics, loop
        self.engine = engine = engines[0]  # to ask about the bundle
        self.hang_timeout_s = hang_timeout_s
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._waiting: set[asyncio.Future[None]] = set()
        self._tokenize_here = engine.new_tokenizer()
        self._tokenize_there = engine.new_tokenizer()
        self._tokenizing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
        self.scheduler = Scheduler(
            max_queue_tokens=settings.max_queue_tokens,
            max_late_s=settings.max_queue_ms / 1000,
            max_batch_inputs=settings.max_batch_inputs,
            padded=engine.padded,
            deliver=partial(_deliver, loop),  # not a method of self: a backend in a cycle would keep its memory
            engines=len(engines),
        )
        self.workers = [Worker(engine, self.scheduler, metrics, settings.max_batch_tokens) for engine in engines]
        for engine, worker in zip(engines, self.workers, strict=True):
            engine.hang_timeout_s = hang_timeout_s
            worker.start()

    @property
    def alive(self) -> bool:
        """False once an engine's thread has ended, or all engines are gone and stay away. A stuck one is alive: see
        `heartbeat_age_s`."""
        return all(worker.alive for worker in self.workers) and min(engine.down_s for engine in self.engines) < _DOWN_TIMEOUT_S

    @property
    def up(self) -> bool:
        """Whether an engine can take batches now; one in a process of its own may have to be replaced first."""
        return any(not engine.down_s for engine in self.engines)

    @property
    def heartbeat_age_s(self) -> float:
        """How long every engine has been at its current batch; 0 while one is idle. Where there are several, one that is stuck
        is replaced."""
        return min(worker.heartbeat_age_s for worker in self.workers)

    async def finished(self) -> None:
        """Returns once no request is under way."""
        await self._idle.wait()

    def abort(self, error: Callable[[], Exception]) -> None:
        """Ends every request with an error now, also those whose batch is stuck in the engine."""
        for future in self._waiting:
            _end(future, error())
        self.scheduler.abort()

    def close(self) -> None:
        self.scheduler.close()
        for worker, engine in zip(self.workers, self.engines, strict=True):
            worker.join(timeout_s=1)
            engine.close()
        self._tokenizing.shutdown(wait=False)

    async def predict(
        self,
        texts: Sequence[str],
        k: int,
        truncate: bool,
        timeout_s: float,
        client_left: ClientLeaves,
        labels: LabelFilter | None,
        priority: Priority,
    ) -> Answer:
        with self._under_way():
            deadline = time.monotonic() + timeout_s
            self.scheduler.check_room(priority)
            allowed = await self._find(labels)
            began = time.perf_counter()
            tokens = await self._tokenize(texts)
            tokenize_s = time.perf_counter() - began
            if not truncate and (too_long := [i for i, text in enumerate(tokens) if text.truncated]):
                raise TooLong(too_long, self.engine.max_length)
            future = self._loop.create_future()
            inputs = ((text.ids, len(text.ids)) for text in tokens)
            job = Job(inputs, k=k, allowed=allowed, priority=priority, deadline=deadline, owner=future)
            try:
                self.scheduler.submit(job)
            except DeadlineExceeded:
                self._metrics.cancelled.labels("tokenize").inc()
                raise
            self._observe(tokens, tokenize_s)
            timer = self._loop.call_later(deadline - time.monotonic(), _end, future, DeadlineExceeded())
            watch = self._loop.create_task(client_left())
            watch.add_done_callback(lambda _: _end(future, ClientLeft()))
            self._waiting.add(future)
            try:
                await future
            except (DeadlineExceeded, ClientLeft):
                self._metrics.cancelled.labels(job.stage).inc()
                raise
            finally:
                timer.cancel()
                watch.cancel()
                self._waiting.discard(future)
                self.scheduler.cancel(job)  # if it is not over
            # Several engines at a time may have been at it.
            queue_s = max(0.0, job.finished_at - job.admitted_at - job.encoder_s - job.head_s)
            self._metrics.stage["queue"].observe(queue_s)
            best = [item.result for item in job.items]
            return Answer(self.engine, tokens, best, tokenize_s, queue_s, job.encoder_s, job.head_s)

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        """Counts a request for `finished`."""
        self._active += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()

    async def _find(self, labels: LabelFilter | None) -> Subset | None:
        if labels is None:
            return None
        if len(labels) <= _FEW_LABELS:
            return labels.subset(self.engine.bundle)
        return await asyncio.to_thread(labels.subset, self.engine.bundle)

    async def _tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        if sum(map(len, texts)) <= SHORT_CHARS:  # longer ones would hold up the event loop
            return self._tokenize_here(texts)
        return await self._loop.run_in_executor(self._tokenizing, self._tokenize_there, texts)

    def _observe(self, tokens: Sequence[Tokens], tokenize_s: float) -> None:
        self._metrics.stage["tokenize"].observe(tokenize_s)
        self._metrics.inputs.inc(len(tokens))
        for text in tokens:
            self._metrics.input_tokens.observe(len(text.ids))
            if text.truncated:
                self._metrics.truncated_inputs.inc()


def _deliver(loop: asyncio.AbstractEventLoop, jobs: list[Job]) -> None:
    with suppress(RuntimeError):  # the loop is closed: the server ended before its last batch
        loop.call_soon_threadsafe(_resolve, jobs)


def _resolve(jobs: list[Job]) -> None:
    for job in jobs:
        if job.error is not None:
            _end(job.owner, job.error)
        elif not job.owner.done():
            job.owner.set_result(None)


def _end(future: asyncio.Future[None], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
