"""Which texts are predicted next. A queue with admission, batches, deadlines and cancellation; no HTTP and no numerics.

A *job* is a request: one or more *items*, each a text of some length in tokens. Jobs are admitted whole, items travel in
whatever batches suit them, and the job is handed back once, when its last item is done or the first one failed.

Items wait in buckets by padded length. Each batch is led by the oldest waiting item, so nothing starves; it is filled from the
leader's bucket, then from shorter ones as long as padding at most doubles an item. An item that does not fit is passed over,
and the batch leaves at once: an idle engine never waits for company.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

Stage = Literal["queue", "encoder", "head"]


class QueueFull(Exception):
    """No room for the job now. `retry_after_s`: when there should be."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("the queue is full")
        self.retry_after_s = retry_after_s


class DeadlineExceeded(Exception):
    """The job's deadline passed before its last item was done."""


class Closed(Exception):
    """The scheduler takes no more jobs, or stopped with this job unfinished."""


class Item:
    """One text of a job: an opaque payload, its length in tokens and, once done, its result."""

    __slots__ = ("bucket", "job", "length", "order", "payload", "result")

    def __init__(self, job: Job, payload: Any, length: int) -> None:
        self.job, self.payload, self.length = job, payload, length
        self.bucket = self.order = 0
        self.result: Any = None


class Job:
    """A request on its way. The scheduler writes its fields; the owner reads them once the job is handed back.

    inputs    (payload, length in tokens) of each item, at least one
    deadline  on the scheduler's clock, seconds
    k         results wanted per item, passed on to the engine
    owner     whatever the caller needs to find its waiter
    """

    __slots__ = (
        "admitted_at", "deadline", "encoder_s", "error", "finished_at", "head_s", "items", "k", "over", "owner", "remaining",
        "stage",
    )  # fmt: skip

    def __init__(self, inputs: Iterable[tuple[Any, int]], *, k: int, deadline: float = float("inf"), owner: Any = None) -> None:
        self.items = [Item(self, payload, length) for payload, length in inputs]
        self.k, self.deadline, self.owner = k, deadline, owner
        self.remaining = len(self.items)
        self.over = False  # finished, failed or cancelled: no item of it is worth any more work
        self.error: Exception | None = None
        self.stage: Stage = "queue"
        self.admitted_at = self.finished_at = 0.0
        self.encoder_s = self.head_s = 0.0  # time its batches took

    @property
    def tokens(self) -> int:
        return sum(item.length for item in self.items)


class Scheduler:
    """The queue between requests and an engine's thread. Every method may be called from any thread.

    max_queue_tokens  tokens that may wait; an empty queue takes a job of any size
    max_batch_inputs  items per batch
    max_batch_tokens  items × padded length per batch; a single longer item goes alone
    padded            length → length it is padded to, which names its bucket
    deliver           called with jobs that finished or failed, from the thread that ended them
    """

    def __init__(
        self,
        *,
        max_queue_tokens: int,
        max_batch_inputs: int,
        max_batch_tokens: int,
        padded: Callable[[int], int],
        deliver: Callable[[list[Job]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_queue_tokens = max_queue_tokens
        self._max_batch_inputs, self._max_batch_tokens = max_batch_inputs, max_batch_tokens
        self._padded, self._deliver, self._clock = padded, deliver, clock
        self._buckets: dict[int, OrderedDict[Item, None]] = {}  # by padded length, each oldest first, none empty
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._closed = False
        self._arrivals = 0
        self._token_s = 0.0  # seconds per token, lately
        self.queue_inputs = 0
        self.queue_tokens = 0

    @property
    def queue_oldest_age_s(self) -> float:
        with self._lock:
            return self._clock() - self._oldest().job.admitted_at if self._buckets else 0.0

    def check_room(self) -> None:
        """Raises what `submit` would raise for a job of one token: a cheap look before the tokens are counted."""
        with self._lock:
            self._check(1)

    def submit(self, job: Job) -> None:
        """Admits the job with all of its items, or raises QueueFull, DeadlineExceeded or Closed and keeps none."""
        with self._lock:
            self._check(job.tokens)
            job.admitted_at = self._clock()
            if job.deadline <= job.admitted_at:
                raise DeadlineExceeded
            for item in job.items:
                item.bucket, item.order = self._padded(item.length), self._arrivals
                self._arrivals += 1
                self._buckets.setdefault(item.bucket, OrderedDict())[item] = None
                self.queue_inputs += 1
                self.queue_tokens += item.length
            self._changed.notify_all()

    def take(self) -> list[Item] | None:
        """The next batch; waits while there is nothing to do. None once closed and empty."""
        while True:
            with self._lock:
                while not self._buckets and not self._closed:
                    self._changed.wait()
                late, batch = self._drop_late(), self._form()
                ended = self._closed and not batch
            self._hand_back(late)
            if batch or ended:
                return batch or None

    def still_wanted(self, items: Sequence[Item], stage: Stage) -> list[Item]:
        """Those of a batch about to enter `stage` whose jobs were not cancelled, late or failed meanwhile."""
        with self._lock:
            now = self._clock()
            late = list({item.job: None for item in items if not item.job.over and item.job.deadline <= now})
            for job in late:
                self._end(job, DeadlineExceeded())
            wanted = [item for item in items if not item.job.over]
            for item in wanted:
                item.job.stage = stage
        self._hand_back(late)
        return wanted

    def spent(self, items: Sequence[Item], encoder_s: float, head_s: float) -> None:
        """Books the time that a batch took to each of its jobs."""
        with self._lock:
            for job in {item.job: None for item in items}:
                job.encoder_s += encoder_s
                job.head_s += head_s
            per_token = (encoder_s + head_s) / sum(item.length for item in items)
            self._token_s += 0.1 * (per_token - self._token_s)

    def complete(self, items: Sequence[Item], results: Iterable[Any]) -> None:
        """Stores the results of items; jobs whose last item this was are handed back."""
        finished = []
        with self._lock:
            for item, result in zip(items, results, strict=True):
                item.result = result
                item.job.remaining -= 1
                if not item.job.remaining and not item.job.over:
                    self._end(item.job, None)
                    finished.append(item.job)
        self._hand_back(finished)

    def fail(self, job: Job, error: Exception) -> None:
        """Ends the job with `error` and hands it back; its waiting items leave the queue."""
        with self._lock:
            over = job.over
            if not over:
                self._end(job, error)
        if not over:
            self._hand_back([job])

    def cancel(self, job: Job) -> bool:
        """Nobody waits for the job any more: ends it without handing it back. False if it was over already."""
        with self._lock:
            if job.over:
                return False
            self._end(job, None)
            return True

    def close(self) -> None:
        """Takes no more jobs. Those waiting are still served; `take` returns None after the last."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()

    def abort(self) -> None:
        """Closes, and ends every waiting job with Closed."""
        self.close()
        with self._lock:
            jobs = list({item.job: None for bucket in self._buckets.values() for item in bucket})
            for job in jobs:
                self._end(job, Closed("the engine stopped"))
        self._hand_back(jobs)

    def _check(self, tokens: int) -> None:
        if self._closed:
            raise Closed("no more jobs are taken")
        if self.queue_tokens and self.queue_tokens + tokens > self._max_queue_tokens:
            raise QueueFull(self.queue_tokens * self._token_s)

    def _oldest(self) -> Item:
        return min((next(iter(bucket)) for bucket in self._buckets.values()), key=lambda item: item.order)

    def _drop_late(self) -> list[Job]:
        now = self._clock()
        late = list({item.job: None for bucket in self._buckets.values() for item in bucket if item.job.deadline <= now})
        for job in late:
            self._end(job, DeadlineExceeded())
        return late

    def _form(self) -> list[Item]:
        if not self._buckets:
            return []
        length = self._oldest().bucket
        room = max(1, min(self._max_batch_inputs, self._max_batch_tokens // length))
        batch: list[Item] = []
        for bucket in sorted((b for b in self._buckets if length / 2 < b <= length), reverse=True):
            waiting = iter(self._buckets[bucket])
            batch += [item for item, _ in zip(waiting, range(room - len(batch)), strict=False)]
        for item in batch:
            self._leave(item)
            item.job.stage = "encoder"
        return batch

    def _leave(self, item: Item) -> None:
        bucket = self._buckets[item.bucket]
        del bucket[item]
        if not bucket:
            del self._buckets[item.bucket]
        self.queue_inputs -= 1
        self.queue_tokens -= item.length

    def _end(self, job: Job, error: Exception | None) -> None:
        job.over, job.error, job.finished_at = True, error, self._clock()
        for item in job.items:
            if item in self._buckets.get(item.bucket, ()):
                self._leave(item)

    def _hand_back(self, jobs: list[Job]) -> None:
        if jobs:
            self._deliver(jobs)
