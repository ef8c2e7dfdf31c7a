"""Which texts are predicted next. A queue with admission, batches, priorities, deadlines, cancellation; no HTTP, no numerics.

A *job* is a request: one or more *items*, each a text of some length in tokens. Jobs are admitted whole, items travel in
whatever batches suit them, and the job is handed back once, when its last item is done or the first one failed. An item's
batch goes through two stages, encoder and head; what nobody waits for any more is dropped before each.

**Order.** At admission each item gets a rank, a time; the lowest leads the next batch. It never changes, so nothing starves:

    rank = time of admission + the priority's handicap + twice the engine's time for the texts before it in its request

The handicap is 0 s for high priority, 5 s for normal and 10 s for low: an item lets those of the next higher priority pass that
come up to 5 s after it. The last term lines the texts of a large request up as if they came one after the other and half of the
engine's time were theirs, so those of small requests pass between them.

**Admission.** The queue takes a burst of so many tokens, but no lasting overload: while the item that leads is too far behind
its turn, jobs that would come after it are refused (as CoDel does; Nichols and Jacobson 2012, "Controlling Queue Delay"). Low
priority may fill half of the queue, high priority a quarter more than there is for normal.

**Deadline.** An item that would be late if another batch went before it leads, whatever its rank and the earliest deadline
first, but not two batches in a row.

**Batch.** Items wait in buckets by padded length. A batch is filled from its leader's bucket, then from shorter ones as long as
padding at most doubles an item, each by rank. An item that does not fit is passed over, and the batch leaves at once: an idle
engine never waits for company. An item whose engine was lost goes alone the second time, and no third time.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, takewhile
from typing import Any, Literal, NamedTuple

Stage = Literal["queue", "encoder", "head"]
Priority = Literal["high", "normal", "low"]

_NEAR_BATCHES = 2  # a deadline is near when it is this many batches away: the one that goes now, and the item's own


class _Level(NamedTuple):
    handicap_s: float
    queue_share: float  # of max_queue_tokens that may wait when a job of this priority comes


_LEVELS: dict[Priority, _Level] = {"high": _Level(0, 1.25), "normal": _Level(5, 1.0), "low": _Level(10, 0.5)}


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

    __slots__ = ("bucket", "crowded", "job", "length", "lost", "order", "payload", "rank", "result", "waits")

    def __init__(self, job: Job, payload: Any, length: int) -> None:
        self.job, self.payload, self.length = job, payload, length
        self.bucket = self.order = 0
        self.rank = 0.0
        self.waits = self.lost = self.crowded = False
        self.result: Any = None


class Job:
    """A request on its way. The scheduler writes its fields; the owner reads them once the job is handed back.

    inputs    (payload, length in tokens) of each item, at least one
    k         results wanted per item, passed on to the engine
    allowed   which results may be given, passed on to the engine; None for all
    priority  "high", "normal" or "low"
    deadline  on the scheduler's clock, seconds
    owner     whatever the caller needs to find its waiter
    """

    __slots__ = (
        "admitted_at", "allowed", "deadline", "encoder_s", "error", "finished_at", "head_s", "items", "k", "over", "owner",
        "priority", "remaining", "stage",
    )  # fmt: skip

    def __init__(
        self,
        inputs: Iterable[tuple[Any, int]],
        *,
        k: int,
        allowed: Any = None,
        priority: Priority = "normal",
        deadline: float = float("inf"),
        owner: Any = None,
    ) -> None:
        self.items = [Item(self, payload, length) for payload, length in inputs]
        self.k, self.allowed, self.priority, self.deadline, self.owner = k, allowed, priority, deadline, owner
        self.remaining = len(self.items)
        self.over = False  # finished, failed or cancelled: no item of it is worth any more work
        self.error: Exception | None = None
        self.stage: Stage = "queue"
        self.admitted_at = self.finished_at = 0.0
        self.encoder_s = self.head_s = 0.0  # time its batches took

    @property
    def tokens(self) -> int:
        return sum(item.length for item in self.items)


class _Line:
    """Waiting items in the order of a number each; equal numbers in the order of arrival."""

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, Item]] = []

    def __bool__(self) -> bool:
        return bool(self._entries)

    def __iter__(self) -> Iterator[Item]:
        return (item for _, _, item in self._entries)

    @property
    def first(self) -> Item:
        return self._entries[0][2]

    def add(self, number: float, item: Item) -> None:
        insort(self._entries, (number, item.order, item))

    def remove(self, number: float, item: Item) -> None:
        del self._entries[bisect_left(self._entries, (number, item.order))]


class Scheduler:
    """The queue between requests and the engines' threads. Every method may be called from any thread.

    max_queue_tokens  tokens that may wait, times the priority's share; an empty queue takes a job of any size
    max_batch_inputs  items per batch
    max_late_s        how far the leading item may be behind its turn, and how long a job should have to wait, before jobs are
                      refused
    padded            length → length it is padded to, which names its bucket
    deliver           called with jobs that finished or failed, from the thread that ended them
    engines           how many take batches
    """

    def __init__(
        self,
        *,
        max_queue_tokens: int,
        max_batch_inputs: int,
        max_late_s: float = float("inf"),
        padded: Callable[[int], int],
        deliver: Callable[[list[Job]], None],
        engines: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_queue_tokens, self._max_batch_inputs, self._max_late_s = max_queue_tokens, max_batch_inputs, max_late_s
        self._padded, self._deliver, self._engines, self._clock = padded, deliver, engines, clock
        self._buckets: dict[int, _Line] = {}  # by padded length, each by rank, none empty
        self._by_deadline = _Line()  # the same items
        self._unfinished: dict[Job, None] = {}  # waiting or in an engine
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._closed = self._hurried = False
        self._arrivals = 0
        self._token_s = self._batch_s = 0.0  # that an engine took per token and per batch, lately
        self._crowded_token_s = 0.0  # of batches that left others waiting: small ones cost more per token
        self.queue_inputs = 0
        self.queue_tokens = 0

    @property
    def queue_oldest_age_s(self) -> float:
        with self._lock:
            return self._clock() - min((item.job.admitted_at for item in self._by_deadline), default=self._clock())

    def check_room(self, priority: Priority = "normal") -> None:
        """Raises what `submit` would raise for a job of one token: a cheap look before the tokens are counted."""
        with self._lock:
            self._check(1, priority)

    def submit(self, job: Job) -> None:
        """Admits the job with all of its items, or raises QueueFull, DeadlineExceeded or Closed and keeps none."""
        with self._lock:
            self._check(job.tokens, job.priority)
            job.admitted_at = rank = self._clock()
            if job.deadline <= job.admitted_at:
                raise DeadlineExceeded
            self._unfinished[job] = None
            rank += _LEVELS[job.priority].handicap_s
            for item in job.items:
                item.bucket, item.order, item.rank = self._padded(item.length), self._arrivals, rank
                rank += 2 * item.length * self._token_s / self._engines
                self._arrivals += 1
                self._enter(item)
            self._changed.notify_all()

    def take(self, max_batch_tokens: int) -> list[Item] | None:
        """The next batch; waits while there is nothing to do. None once closed and empty.

        max_batch_tokens   items × padded length, at most; a single longer item goes alone
        """
        while True:
            with self._lock:
                while not self._by_deadline and not self._closed:
                    self._changed.wait()
                late, batch = self._drop_late(), self._form(max_batch_tokens)
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
            batch_s = encoder_s + head_s
            self._batch_s += 0.1 * (batch_s - self._batch_s)
            token_s = batch_s / sum(item.length for item in items)
            self._token_s += 0.1 * (token_s - self._token_s)
            if items[0].crowded:
                self._crowded_token_s += (0.1 if self._crowded_token_s else 1) * (token_s - self._crowded_token_s)

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

    def give_back(self, items: Sequence[Item], *, lost: bool) -> None:
        """Puts the items of a batch back into the queue, at their old places.

        lost   the engine was lost at them: the next time they go alone, since one may be the cause; the second time they fail
        """
        failed = []
        with self._lock:
            for item in items:
                if item.job.over:
                    continue
                if lost and item.lost:
                    self._end(item.job, Closed("the engine was lost twice at the same text"))
                    failed.append(item.job)
                else:
                    item.lost, item.job.stage = item.lost or lost, "queue"
                    self._enter(item)
            self._changed.notify_all()
        self._hand_back(failed)

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
        """Closes, and ends every job with Closed, also those that are in an engine."""
        self.close()
        with self._lock:
            jobs = list(self._unfinished)
            for job in jobs:
                self._end(job, Closed("the engine stopped"))
        self._hand_back(jobs)

    def _check(self, tokens: int, priority: Priority) -> None:
        if self._closed:
            raise Closed("no more jobs are taken")
        if not self.queue_tokens:
            return
        full = self.queue_tokens + tokens > self._max_queue_tokens * _LEVELS[priority].queue_share
        first, now = self._first(), self._clock()
        rank = now + _LEVELS[priority].handicap_s
        late_s = now + _LEVELS[first.job.priority].handicap_s - first.rank if first.rank <= rank else 0
        if full or max(late_s, self._wait_s(rank)) > self._max_late_s:
            raise QueueFull(self.queue_tokens * self._token_s / self._engines)

    def _wait_s(self, rank: float) -> float:
        """How long an item of this rank should have to wait."""
        token_s = self._crowded_token_s / self._engines
        if self.queue_tokens * token_s <= self._max_late_s:
            return 0.0
        ahead = (takewhile(lambda item: item.rank <= rank, line) for line in self._buckets.values())
        return token_s * sum(item.length for items in ahead for item in items)

    def _drop_late(self) -> list[Job]:
        late = []
        while self._by_deadline and self._by_deadline.first.job.deadline <= self._clock():
            late.append(self._by_deadline.first.job)
            self._end(late[-1], DeadlineExceeded())
        return late

    def _form(self, max_batch_tokens: int) -> list[Item]:
        if not self._by_deadline:
            return []
        leader = self._leader()
        length = leader.bucket
        batch = [leader]
        self._leave(leader)
        if not leader.lost:
            room = min(self._max_batch_inputs, max_batch_tokens // length)
            for bucket in sorted((b for b in self._buckets if length / 2 < b <= length), reverse=True):
                others = (item for item in self._buckets[bucket] if not item.lost)
                batch += islice(others, max(0, room - len(batch)))
        for item in batch[1:]:
            self._leave(item)
        for item in batch:
            item.job.stage, item.crowded = "encoder", bool(self._by_deadline)
        return batch

    def _first(self) -> Item:
        return min((line.first for line in self._buckets.values()), key=lambda item: (item.rank, item.order))

    def _leader(self) -> Item:
        first = self._first()
        urgent = self._by_deadline.first
        near = urgent.job.deadline <= self._clock() + _NEAR_BATCHES * self._batch_s
        # Every other batch at most, or short deadlines would starve the rest.
        self._hurried = near and urgent is not first and not self._hurried
        return urgent if self._hurried else first

    def _enter(self, item: Item) -> None:
        item.waits = True
        self._buckets.setdefault(item.bucket, _Line()).add(item.rank, item)
        self._by_deadline.add(item.job.deadline, item)
        self.queue_inputs += 1
        self.queue_tokens += item.length

    def _leave(self, item: Item) -> None:
        item.waits = False
        bucket = self._buckets[item.bucket]
        bucket.remove(item.rank, item)
        if not bucket:
            del self._buckets[item.bucket]
        self._by_deadline.remove(item.job.deadline, item)
        self.queue_inputs -= 1
        self.queue_tokens -= item.length

    def _end(self, job: Job, error: Exception | None) -> None:
        job.over, job.error, job.finished_at = True, error, self._clock()
        del self._unfinished[job]
        for item in job.items:
            if item.waits:
                self._leave(item)

    def _hand_back(self, jobs: list[Job]) -> None:
        if jobs:
            self._deliver(jobs)
