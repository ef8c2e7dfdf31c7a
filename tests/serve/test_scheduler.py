"""The scheduler alone: no engine, no threads but where waiting is the subject, and a clock that stands still."""

from __future__ import annotations

import math
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve.scheduler import Closed, DeadlineExceeded, Item, Job, QueueFull, Scheduler


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def padded(length: int) -> int:
    return max(8, 1 << (length - 1).bit_length())


class Queue:
    """A scheduler with its clock and what it has handed back."""

    def __init__(self, *, queue: int = 1000, inputs: int = 4, tokens: int = 128) -> None:
        self.clock, self.returned = Clock(), []
        self.scheduler = Scheduler(
            max_queue_tokens=queue,
            max_batch_inputs=inputs,
            max_batch_tokens=tokens,
            padded=padded,
            deliver=self.returned.extend,
            clock=self.clock,
        )

    def submit(self, *lengths: int, deadline: float = math.inf) -> Job:
        job = Job(((f"text of {length}", length) for length in lengths), k=1, deadline=deadline)
        self.scheduler.submit(job)
        return job

    def take(self) -> list[Item]:
        batch = self.scheduler.take()
        assert batch is not None
        return batch

    def finish(self, batch: list[Item]) -> None:
        self.scheduler.complete(batch, [f"answer to {item.payload}" for item in batch])


def test_a_lone_text_leaves_at_once() -> None:
    queue = Queue()
    job = queue.submit(5)
    assert queue.take() == job.items
    assert (queue.scheduler.queue_inputs, queue.scheduler.queue_tokens) == (0, 0)


def test_texts_of_different_requests_share_a_batch_and_each_gets_its_answer() -> None:
    queue = Queue()
    jobs = [queue.submit(5), queue.submit(6, 7)]
    queue.finish(queue.take())
    assert queue.returned == jobs
    assert [item.result for item in jobs[1].items] == ["answer to text of 6", "answer to text of 7"]


def test_a_request_is_handed_back_once_when_its_last_text_is_done() -> None:
    queue = Queue(inputs=2)
    job = queue.submit(5, 5, 5)
    queue.finish(queue.take())
    assert queue.returned == []
    queue.finish(queue.take())
    assert queue.returned == [job]


def test_a_batch_keeps_its_token_budget_padding_included() -> None:
    queue = Queue(inputs=100, tokens=64)
    for _ in range(10):
        queue.submit(9)  # padded to 16
    assert len(queue.take()) == 4


def test_a_text_over_the_budget_goes_alone() -> None:
    queue = Queue(tokens=64)
    long = queue.submit(100)
    queue.submit(100)
    assert queue.take() == long.items


def test_a_misfit_is_passed_over_and_leads_the_next_batch() -> None:
    queue = Queue()
    first, misfit, second = queue.submit(8), queue.submit(100), queue.submit(8)
    assert queue.take() == first.items + second.items
    assert queue.take() == misfit.items


def test_shorter_texts_fill_a_batch_when_padding_at_most_doubles_them() -> None:
    queue = Queue()
    leader, much_shorter, shorter = queue.submit(32), queue.submit(8), queue.submit(17)
    assert queue.take() == leader.items + shorter.items
    assert queue.take() == much_shorter.items


def test_a_steady_stream_of_short_texts_never_starves_a_long_one() -> None:
    queue = Queue(inputs=2)
    queue.submit(8)
    long = queue.submit(128)
    for _ in range(3):
        queue.submit(8)
    taken = [queue.take(), queue.take()]
    assert taken[1] == long.items


def test_a_full_queue_refuses_the_whole_request() -> None:
    queue = Queue(queue=20)
    queue.submit(15)
    with pytest.raises(QueueFull):
        queue.submit(3, 3)
    assert (queue.scheduler.queue_inputs, queue.scheduler.queue_tokens) == (1, 15)
    queue.submit(5)


def test_an_empty_queue_takes_a_request_of_any_size() -> None:
    queue = Queue(queue=20)
    queue.submit(15, 15)
    with pytest.raises(QueueFull):
        queue.scheduler.check_room()


def test_a_refusal_says_how_long_the_queue_will_take() -> None:
    queue = Queue(queue=100, inputs=1)
    for _ in range(200):  # the estimate follows slowly
        queue.submit(10)
        batch = queue.take()
        queue.scheduler.spent(batch, 0.75, 0.25)
        queue.finish(batch)
    queue.submit(100)
    with pytest.raises(QueueFull) as refusal:
        queue.submit(1)
    assert refusal.value.retry_after_s == pytest.approx(100 / 10 * 1.0, rel=0.01)


def test_a_deadline_that_passed_in_the_queue_ends_the_request() -> None:
    queue = Queue(inputs=1)
    late, other = queue.submit(5, 5, deadline=101), queue.submit(5)
    queue.clock.now = 101
    assert queue.take() == other.items
    assert queue.returned == [late]
    assert isinstance(late.error, DeadlineExceeded)
    assert queue.scheduler.queue_inputs == 0


def test_a_deadline_that_passed_before_admission_refuses_the_request() -> None:
    queue = Queue()
    with pytest.raises(DeadlineExceeded):
        queue.submit(5, deadline=100)
    assert queue.scheduler.queue_inputs == 0


def test_between_the_stages_late_and_cancelled_texts_are_dropped() -> None:
    queue = Queue()
    late, left, wanted = queue.submit(5, deadline=101), queue.submit(5), queue.submit(5)
    batch = queue.take()
    queue.clock.now = 102
    assert queue.scheduler.cancel(left)
    assert queue.scheduler.still_wanted(batch, "head") == wanted.items
    assert wanted.stage == "head"
    assert queue.returned == [late]


def test_a_cancelled_request_leaves_the_queue_and_is_never_handed_back() -> None:
    queue = Queue()
    left, other = queue.submit(5, 5), queue.submit(5)
    assert queue.scheduler.cancel(left)
    assert not queue.scheduler.cancel(left)
    queue.finish(queue.take())
    assert queue.returned == [other]


def test_a_request_cancelled_in_the_engine_is_not_handed_back() -> None:
    queue = Queue()
    job = queue.submit(5)
    batch = queue.take()
    assert queue.scheduler.cancel(job)
    queue.finish(batch)
    assert queue.returned == []


def test_one_failed_text_ends_its_request_and_no_other() -> None:
    queue = Queue(inputs=1)
    bad, good = queue.submit(5, 5), queue.submit(5)
    error = RuntimeError("no")
    queue.scheduler.fail(queue.take()[0].job, error)
    queue.finish(queue.take())
    assert queue.returned == [bad, good]
    assert (bad.error, good.error) == (error, None)
    assert queue.scheduler.queue_inputs == 0


def test_closing_serves_who_waits_and_refuses_who_comes() -> None:
    queue = Queue()
    job = queue.submit(5)
    queue.scheduler.close()
    with pytest.raises(Closed):
        queue.submit(5)
    assert queue.take() == job.items
    assert queue.scheduler.take() is None


def test_aborting_fails_who_waits() -> None:
    queue = Queue()
    job = queue.submit(5)
    queue.scheduler.abort()
    assert queue.returned == [job]
    assert isinstance(job.error, Closed)
    assert queue.scheduler.take() is None


def test_an_idle_engine_wakes_for_the_first_text_and_for_the_end() -> None:
    queue = Queue()
    taken: list[list[Item] | None] = []
    thread = threading.Thread(target=lambda: taken.extend([queue.scheduler.take(), queue.scheduler.take()]))
    thread.start()
    job = queue.submit(5)
    queue.scheduler.close()
    thread.join(10)
    assert taken == [job.items, None]


def test_age_of_the_oldest() -> None:
    queue = Queue()
    assert queue.scheduler.queue_oldest_age_s == 0
    queue.submit(100)
    queue.clock.now = 103
    queue.submit(5)
    assert queue.scheduler.queue_oldest_age_s == 3


class AnyHistory(RuleBasedStateMachine):
    """Whatever happens, in whatever order: the books balance, limits hold, and every request ends exactly once."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = Queue(queue=200, inputs=3, tokens=96)
        self.waiting: dict[Item, None] = {}  # oldest first
        self.in_engine: list[list[Item]] = []
        self.jobs: list[Job] = []
        self.cancelled: list[Job] = []

    @rule(lengths=st.lists(st.integers(1, 128), min_size=1, max_size=4), patience=st.none() | st.integers(1, 5))
    def submit(self, lengths: list[int], patience: int | None) -> None:
        before = sum(item.length for item in self.waiting)
        deadline = math.inf if patience is None else self.queue.clock.now + patience
        try:
            job = self.queue.submit(*lengths, deadline=deadline)
        except QueueFull:
            assert before
            assert before + sum(lengths) > 200
            return
        assert not before or before + sum(lengths) <= 200
        self.jobs.append(job)
        self.waiting.update(dict.fromkeys(job.items))

    @rule(seconds=st.integers(1, 3))
    def time_passes(self, seconds: int) -> None:
        self.queue.clock.now += seconds

    def _late(self, item: Item) -> bool:
        return item.job.deadline <= self.queue.clock.now

    @precondition(lambda self: any(not self._late(item) for item in self.waiting))
    @rule()
    def take(self) -> None:
        batch = self.queue.take()
        self._forget_over()
        length = max(padded(item.length) for item in batch)
        assert batch[0] is next(iter(self.waiting))
        assert len(batch) <= 3
        assert len(batch) == 1 or len(batch) * length <= 96
        assert all(padded(item.length) * 2 > length for item in batch)
        for item in batch:
            del self.waiting[item]
        self.in_engine.append(batch)

    @precondition(lambda self: self.in_engine)
    @rule(poison=st.booleans())
    def engine_answers(self, poison: bool) -> None:
        batch = self.queue.scheduler.still_wanted(self.in_engine.pop(0), "head")
        assert not any(self._late(item) or item.job.over for item in batch)
        if batch and poison:
            self.queue.scheduler.fail(batch[0].job, RuntimeError("poison"))
            batch = self.queue.scheduler.still_wanted(batch, "head")
        self.queue.finish(batch)
        self._forget_over()

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def client_leaves(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.jobs))
        if self.queue.scheduler.cancel(job):
            self.cancelled.append(job)
        self._forget_over()

    def _forget_over(self) -> None:
        for item in [item for item in self.waiting if item.job.over]:
            del self.waiting[item]

    @invariant()
    def books_balance(self) -> None:
        assert self.queue.scheduler.queue_inputs == len(self.waiting)
        assert self.queue.scheduler.queue_tokens == sum(item.length for item in self.waiting)

    @invariant()
    def every_request_ends_once(self) -> None:
        ended = self.queue.returned + self.cancelled
        assert len(ended) == len(set(ended))
        assert set(ended) == {job for job in self.jobs if job.over}
        for job in self.queue.returned:
            assert job.error is not None or all(item.result for item in job.items)


AnyHistory.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestAnyHistory = AnyHistory.TestCase
