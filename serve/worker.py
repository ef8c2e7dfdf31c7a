"""An engine's threads: they take batches from the scheduler, run both stages and give the results back."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np

from serve.metrics import Metrics
from serve.scheduler import Item, Scheduler, Stage

_log = logging.getLogger("fanin.serve")
_RECOVERY_BATCHES = 256  # that the token budget takes to grow from nothing to its full size
_OUT_OF_MEMORY = ("failed to allocate memory", "out of memory", "bad_alloc")  # ONNX Runtime has no exception of its own for it


class EngineLost(Exception):
    """The engine's process ended or was stuck; another takes its place. `begun`: it had got the batch."""

    def __init__(self, begun: bool) -> None:
        super().__init__("the engine's process was lost")
        self.begun = begun


class TwoStages(Protocol):
    """What a worker needs of an engine (serve.engine.Engine)."""

    overlaps: bool  # whether encoding the next batch while this one is in the head makes both faster

    def wait_until_up(self) -> bool:
        """Returns True once batches can be run, False if never again."""

    def encode(self, payloads: Sequence[Any]) -> Any:
        """Embeddings fp32 [B, D]; EngineLost."""

    def topk(self, x: Any, k: int, allowed: Sequence[Any] | None) -> tuple[np.ndarray, np.ndarray]:
        """Scores fp32 [B, k] descending and labels int32 [B, k], of row i those that `allowed[i]` allows; EngineLost."""


class _Encoded(NamedTuple):
    """A batch between the stages."""

    items: list[Item]
    x: Any  # [B, D], as the engine gave it
    encoder_s: float


class Worker:
    """The threads around one engine. An item's result is its (labels int32 [k], scores fp32 [k]).

    Where the stages overlap, each has a thread, and one encoded batch may wait between them; else one thread runs both.
    A batch that fails is halved until the item at fault is alone, and only that item's job fails. When the memory did not
    suffice, later batches are smaller, and grow again little by little.
    """

    def __init__(self, engine: TwoStages, scheduler: Scheduler, metrics: Metrics, max_batch_tokens: int) -> None:
        self._engine, self._scheduler, self._metrics = engine, scheduler, metrics
        self._max_batch_tokens = max_batch_tokens
        self.batch_token_budget = float(max_batch_tokens)
        self._busy_since: dict[Stage, float] = {}
        self._between: queue.Queue[_Encoded | None] = queue.Queue(maxsize=1)
        self._threads = [threading.Thread(target=self._guard, args=[self._run_encoder], name="encoder", daemon=True)]
        if engine.overlaps:
            self._threads.append(threading.Thread(target=self._guard, args=[self._run_head], name="head", daemon=True))

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self, timeout_s: float) -> None:
        """Waits for the threads to end, which they do once the scheduler is closed and empty."""
        end = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    @property
    def alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    @property
    def heartbeat_age_s(self) -> float:
        """How long the engine has been at a stage of its current batch; 0 while it is idle."""
        since = min(self._busy_since.copy().values(), default=None)
        return 0.0 if since is None else time.monotonic() - since

    def _guard(self, run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException:
            _log.exception("a thread of the engine ends")
            self._scheduler.abort()

    def _run_encoder(self) -> None:
        forward = self._between.put if self._engine.overlaps else self._score
        try:
            while self._engine.wait_until_up() and (batch := self._scheduler.take(int(self.batch_token_budget))):
                self._encode(batch, forward)
        finally:
            self._between.put(None)

    def _run_head(self) -> None:
        try:
            while encoded := self._between.get():
                self._score(encoded)
        except BaseException:
            self._scheduler.abort()
            while self._between.get():  # so that the encoder's thread can end
                pass
            raise

    def _encode(self, items: list[Item], forward: Callable[[_Encoded], None]) -> None:
        self._metrics.observe_batch([item.length for item in items], _padded(items))
        began = time.perf_counter()
        try:
            with self._at("encoder"):
                x = self._engine.encode([item.payload for item in items])
        except EngineLost as lost:
            return self._scheduler.give_back(items, lost=lost.begun)
        except Exception as error:
            halves = self._split(items, error)
        else:
            encoder_s = time.perf_counter() - began
            self._metrics.stage["encoder"].observe(encoder_s)
            return forward(_Encoded(items, x, encoder_s))
        for half in halves:  # not while the exception is handled: it holds on to the memory of what failed
            if wanted := self._scheduler.still_wanted(items[half], "encoder"):
                self._encode(wanted, forward)

    def _score(self, encoded: _Encoded) -> None:
        items, x, encoder_s = encoded
        wanted = self._scheduler.still_wanted(items, "head")
        if not wanted:
            return
        if len(wanted) < len(items):
            keep = set(wanted)
            x = x[[item in keep for item in items]]
        allowed = [item.job.allowed for item in wanted]
        nothing_barred = all(each is None for each in allowed)
        began = time.perf_counter()
        try:
            with self._at("head"):
                scores, labels = self._engine.topk(x, max(item.job.k for item in wanted), None if nothing_barred else allowed)
        except EngineLost as lost:
            return self._scheduler.give_back(wanted, lost=lost.begun)
        except Exception as error:
            halves = self._split(wanted, error)
        else:
            head_s = time.perf_counter() - began
            self._scheduler.spent(wanted, encoder_s, head_s)
            self._scheduler.complete(
                wanted, ((labels[i, : item.job.k], scores[i, : item.job.k]) for i, item in enumerate(wanted))
            )
            self._metrics.stage["head"].observe(head_s)
            self.batch_token_budget = min(
                self._max_batch_tokens, self.batch_token_budget + self._max_batch_tokens / _RECOVERY_BATCHES
            )
            return
        for half in halves:
            self._score(_Encoded(wanted[half], x[half], encoder_s))

    def _split(self, items: list[Item], error: Exception) -> list[slice]:
        """The halves in which to try again what failed; for a lone item none: its job ends."""
        if len(items) == 1:
            self._scheduler.fail(items[0].job, error)
            return []
        memory = out_of_memory(error)
        if memory:
            self.batch_token_budget = min(self.batch_token_budget, len(items) * _padded(items) / 2)
        self._metrics.batch_splits.labels("memory" if memory else "error").inc()
        middle = len(items) // 2
        return [slice(middle), slice(middle, None)]

    @contextmanager
    def _at(self, stage: Stage) -> Iterator[None]:
        self._busy_since[stage] = time.monotonic()
        try:
            yield
        finally:
            del self._busy_since[stage]


def out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice, of the host or of a device; torch, which has an exception for it, need not be there."""
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return named or isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def _padded(items: list[Item]) -> int:
    return max(item.bucket for item in items)
