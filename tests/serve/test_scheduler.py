"""The scheduler alone: no engine, no threads but where waiting is the subject, and a clock that stands still."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve.scheduler import Closed, DeadlineExceeded, Item, Job, Priority, QueueFull, Scheduler


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def padded(length: int) -> int:
    return max(8, 1 << (length - 1).bit_length())


class Queue:
    """A scheduler with its clock and what it has handed back."""

    def __init__(
        self, *, queue: int = 1000, inputs: int = 4, tokens: int = 128, engines: int = 1, late_s: float = math.inf
    ) -> None:
        self.clock, self.returned, self.tokens = Clock(), [], tokens
        self.scheduler = Scheduler(
            max_queue_tokens=queue,
            max_batch_inputs=inputs,
            max_late_s=late_s,
            padded=padded,
            deliver=self.returned.extend,
            engines=engines,
            clock=self.clock,
        )

    def submit(self, *lengths: int, deadline: float = math.inf, priority: Priority = "normal") -> Job:
        inputs = ((f"text of {length}", length) for length in lengths)
        job = Job(inputs, k=1, deadline=deadline, priority=priority)
        self.scheduler.submit(job)
        return job

    def take(self) -> list[Item]:
        batch = self.scheduler.take(self.tokens)
        assert batch is not None
        return batch

    def learn_speed(self, seconds: float) -> None:
        """Makes the engine one that has taken so long for each batch, which was of one token."""
        for _ in range(200):  # the estimate follows slowly
            self.submit(1)
            batch = self.take()
            self.scheduler.spent(batch, seconds * 0.75, seconds * 0.25)
            self.finish(batch)
        self.returned.clear()

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
    for engines in (1, 2):
        queue = Queue(queue=100, engines=engines)
        queue.learn_speed(0.1)
        queue.submit(100)
        with pytest.raises(QueueFull) as refusal:
            queue.submit(1)
        assert refusal.value.retry_after_s == pytest.approx(100 * 0.1 / engines, rel=0.01)


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
    assert queue.scheduler.take(128) is None


def test_aborting_fails_who_waits() -> None:
    queue = Queue()
    job = queue.submit(5)
    queue.scheduler.abort()
    assert queue.returned == [job]
    assert isinstance(job.error, Closed)
    assert queue.scheduler.take(128) is None


def test_aborting_also_fails_who_is_in_an_engine_that_may_never_return() -> None:
    queue = Queue()
    job = queue.submit(5)
    batch = queue.take()
    queue.scheduler.abort()
    assert queue.returned == [job]
    assert isinstance(job.error, Closed)
    assert queue.scheduler.still_wanted(batch, "head") == []
    queue.finish(batch)
    assert queue.returned == [job]


def test_high_priority_goes_first_and_low_last() -> None:
    queue = Queue(inputs=1)
    low, normal, high = (queue.submit(5, priority=priority) for priority in ("low", "normal", "high"))
    assert [queue.take() for _ in range(3)] == [high.items, normal.items, low.items]


def test_of_one_length_a_batch_is_filled_by_priority() -> None:
    queue = Queue(inputs=2)
    low, normal, high = (queue.submit(5, priority=priority) for priority in ("low", "normal", "high"))
    assert [queue.take(), queue.take()] == [high.items + normal.items, low.items]


@pytest.mark.parametrize(("priority", "higher"), [("low", "normal"), ("low", "high"), ("normal", "high")])
def test_a_steady_stream_of_higher_priority_never_starves_a_lower_one(priority: Priority, higher: Priority) -> None:
    queue = Queue(inputs=1)
    old = queue.submit(5, priority=priority)
    for _ in range(40):
        queue.submit(5, priority=higher)
        queue.submit(5, priority=higher)  # more than one second's work
        queue.clock.now += 1
        if queue.take() == old.items:
            return
    pytest.fail("it starves")


def test_low_priority_may_fill_half_of_the_queue_and_high_a_little_more_than_all() -> None:
    queue = Queue(queue=100)
    queue.submit(50, priority="low")
    with pytest.raises(QueueFull):
        queue.submit(1, priority="low")
    queue.submit(50)
    with pytest.raises(QueueFull):
        queue.scheduler.check_room()
    queue.scheduler.check_room("high")
    queue.submit(25, priority="high")
    with pytest.raises(QueueFull):
        queue.submit(1, priority="high")


def test_a_burst_is_taken_and_a_lasting_overload_is_not() -> None:
    queue = Queue(late_s=0.4)
    first = [queue.submit(5) for _ in range(20)]
    queue.clock.now += 0.5
    with pytest.raises(QueueFull):
        queue.submit(5)
    queue.submit(5, priority="high")  # it passes those that are late
    while any(item.waits for job in first for item in job.items):
        queue.finish(queue.take())
    queue.submit(5)


def test_a_job_that_would_have_to_wait_too_long_is_refused_at_once() -> None:
    queue = Queue(inputs=2, late_s=0.4)
    for _ in range(6):
        queue.submit(5)
    while queue.scheduler.queue_inputs:
        batch = queue.take()
        queue.scheduler.spent(batch, 0.05, 0.05)  # 10 ms a token
        queue.finish(batch)
    for _ in range(9):  # the ninth waits for 40 tokens
        queue.submit(5)
    with pytest.raises(QueueFull):
        queue.submit(5)
    queue.submit(5, priority="high")
    queue.finish(queue.take())
    queue.submit(5)


def test_small_batches_say_nothing_of_how_fast_a_queue_is_worked_off() -> None:
    queue = Queue(late_s=0.4)
    queue.learn_speed(0.3)
    for _ in range(20):
        queue.submit(5)


def test_the_texts_of_a_large_request_are_not_late_before_their_turn() -> None:
    queue = Queue(inputs=1, late_s=0.4)
    queue.learn_speed(0.1)
    queue.submit(*[10] * 10)  # a second's work each
    queue.finish(queue.take())
    queue.clock.now += 1
    queue.submit(10)


def test_a_small_request_passes_between_the_texts_of_a_large_one() -> None:
    queue = Queue(inputs=1)
    queue.learn_speed(0.1)
    large = queue.submit(*[10] * 10)  # a second's work each
    queue.clock.now += 3.5
    small = queue.submit(10)
    order = [item for _ in range(11) for item in queue.take()]
    assert order.index(small.items[0]) == 2  # half of the engine's time is the large request's
    assert [item for item in order if item.job is large] == large.items


def test_an_item_that_would_be_late_leads() -> None:
    queue = Queue(inputs=1)
    queue.learn_speed(0.5)
    before, hurried, after = queue.submit(5), queue.submit(5, deadline=queue.clock.now + 4), queue.submit(5)
    assert queue.take() == before.items
    queue.clock.now += 3.2  # less than two batches are left
    urgent = queue.submit(5, priority="high")
    assert [queue.take() for _ in range(3)] == [hurried.items, urgent.items, after.items]


def test_a_steady_stream_of_near_deadlines_never_starves_the_rest() -> None:
    queue = Queue(inputs=1)
    queue.learn_speed(0.5)
    patient = queue.submit(5)
    queue.submit(5, deadline=queue.clock.now + 0.8)
    queue.submit(5, deadline=queue.clock.now + 0.8)
    queue.take()
    assert queue.take() == patient.items


def test_an_engine_asks_for_smaller_batches_when_its_memory_is_short() -> None:
    queue = Queue(inputs=10)
    for _ in range(6):
        queue.submit(8)
    assert [len(batch) for tokens in (32, 8, 4) if (batch := queue.scheduler.take(tokens))] == [4, 1, 1]


def test_what_a_lost_engine_had_keeps_its_place_and_goes_alone() -> None:
    queue = Queue(inputs=2)
    first, second, third = queue.submit(5), queue.submit(5), queue.submit(5)
    batch = queue.take()
    queue.scheduler.give_back(batch, lost=True)
    assert queue.scheduler.queue_inputs == 3
    assert first.stage == "queue"
    assert [queue.take() for _ in range(3)] == [first.items, second.items, third.items]


def test_the_second_engine_that_is_lost_at_a_text_was_the_last() -> None:
    queue = Queue()
    guilty, other = queue.submit(5), queue.submit(5)
    queue.scheduler.give_back(queue.take(), lost=True)
    queue.scheduler.give_back(queue.take(), lost=True)
    assert queue.returned == [guilty]
    assert isinstance(guilty.error, Closed)
    queue.finish(queue.take())
    assert queue.returned == [guilty, other]
    assert other.error is None


def test_what_an_engine_never_had_may_come_back_any_number_of_times() -> None:
    queue = Queue()
    jobs = [queue.submit(5), queue.submit(5)]
    for _ in range(3):
        queue.scheduler.give_back(queue.take(), lost=False)
    queue.finish(queue.take())
    assert queue.returned == jobs


def test_a_request_that_ended_meanwhile_does_not_come_back() -> None:
    queue = Queue()
    job = queue.submit(5)
    batch = queue.take()
    queue.scheduler.cancel(job)
    queue.scheduler.give_back(batch, lost=True)
    assert queue.scheduler.queue_inputs == 0


def test_an_idle_engine_wakes_for_the_first_text_and_for_the_end() -> None:
    queue = Queue()
    taken: list[list[Item] | None] = []
    thread = threading.Thread(target=lambda: taken.extend([queue.scheduler.take(128), queue.scheduler.take(128)]))
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

    SHARE: ClassVar = {"high": 250, "normal": 200, "low": 100}
    LONGEST_DELAY_S = 10 + 2 * 4 * 128 * 0.1  # the handicap of low priority, and twice the longest request

    def __init__(self) -> None:
        super().__init__()
        self.queue = Queue(queue=200, inputs=3, tokens=96)
        self.queue.learn_speed(0.1)
        self.waiting: set[Item] = set()
        self.with_encoder: list[list[Item]] = []
        self.with_head: list[list[Item]] = []
        self.jobs: list[Job] = []
        self.cancelled: list[Job] = []
        self.first_led = True

    @rule(
        lengths=st.lists(st.integers(1, 128), min_size=1, max_size=4),
        patience=st.none() | st.integers(1, 5),
        priority=st.sampled_from(["high", "normal", "normal", "low"]),
    )
    def submit(self, lengths: list[int], patience: int | None, priority: Priority) -> None:
        before = sum(item.length for item in self.waiting)
        deadline = math.inf if patience is None else self.queue.clock.now + patience
        try:
            job = self.queue.submit(*lengths, deadline=deadline, priority=priority)
        except QueueFull:
            assert before
            assert before + sum(lengths) > self.SHARE[priority]
            return
        assert not before or before + sum(lengths) <= self.SHARE[priority]
        self.jobs.append(job)
        self.waiting.update(job.items)

    @rule(seconds=st.integers(1, 3))
    def time_passes(self, seconds: int) -> None:
        self.queue.clock.now += seconds

    def _late(self, item: Item) -> bool:
        return item.job.deadline <= self.queue.clock.now

    @precondition(lambda self: any(not self._late(item) for item in self.waiting))
    @rule(budget=st.sampled_from([96, 96, 40]))
    def take(self, budget: int) -> None:
        batch = self.queue.scheduler.take(budget)
        assert batch
        self._forget_over()
        length = padded(batch[0].length)
        assert set(batch) <= self.waiting
        assert len(batch) == len(set(batch)) <= 3
        assert len(batch) == 1 or len(batch) * length <= budget
        assert all(length / 2 < padded(item.length) <= length for item in batch)
        assert len(batch) == 1 or not any(item.lost for item in batch)
        # The lowest rank leads at least every other batch, and nobody who comes long after an item has a lower one.
        first = min(self.waiting, key=lambda item: (item.rank, item.order))
        assert batch[0] is first or self.first_led
        assert batch[0] is first or batch[0].job.deadline == min(item.job.deadline for item in self.waiting)
        self.first_led = batch[0] is first
        for item in self.waiting:
            assert first.rank <= item.rank <= item.job.admitted_at + self.LONGEST_DELAY_S
        # Of one priority and length, who came first goes first, but for the leader and for what goes alone.
        for item in batch[1:]:
            for other in self.waiting - set(batch):
                same = (item.job.priority, padded(item.length)) == (other.job.priority, padded(other.length))
                assert not same or other.lost or other.rank > item.rank or other.order > item.order
        self.waiting -= set(batch)
        self.with_encoder.append(batch)

    @precondition(lambda self: self.with_encoder)
    @rule(data=st.data(), fate=st.sampled_from(["encoded", "poison", "lost", "not begun"]))
    def encoder_ends(self, data: st.DataObject, fate: str) -> None:
        batch = self.with_encoder.pop(data.draw(st.integers(0, len(self.with_encoder) - 1)))
        self._end_stage(batch, fate, self.with_head.append)

    @precondition(lambda self: self.with_head)
    @rule(data=st.data(), fate=st.sampled_from(["answered", "poison", "lost"]))
    def head_ends(self, data: st.DataObject, fate: str) -> None:
        batch = self.queue.scheduler.still_wanted(self.with_head.pop(0), "head")
        assert not any(self._late(item) or item.job.over for item in batch)
        self._end_stage(batch, fate, self.queue.finish)

    def _end_stage(self, batch: list[Item], fate: str, go_on: Callable[[list[Item]], object]) -> None:
        if fate in ("lost", "not begun"):
            twice = {item.job for item in batch if item.lost and fate == "lost"}
            self.queue.scheduler.give_back(batch, lost=fate == "lost")
            assert all(job.over for job in twice)
            self.waiting.update(item for item in batch if not item.job.over)
        else:
            if batch and fate == "poison":
                self.queue.scheduler.fail(batch[0].job, RuntimeError("poison"))
                batch = batch[1:]
            go_on(batch)
        self._forget_over()

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def client_leaves(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.jobs))
        if self.queue.scheduler.cancel(job):
            self.cancelled.append(job)
        self._forget_over()

    def _forget_over(self) -> None:
        self.waiting = {item for item in self.waiting if not item.job.over}

    @invariant()
    def books_balance(self) -> None:
        assert self.queue.scheduler.queue_inputs == len(self.waiting)
        assert self.queue.scheduler.queue_tokens == sum(item.length for item in self.waiting)

    @invariant()
    def no_item_is_in_two_places(self) -> None:
        inside = [item for batch in self.with_encoder + self.with_head for item in batch]
        assert len(inside) == len(set(inside))
        assert not self.waiting & set(inside)

    @invariant()
    def every_request_ends_once(self) -> None:
        ended = self.queue.returned + self.cancelled
        assert len(ended) == len(set(ended))
        assert set(ended) == {job for job in self.jobs if job.over}
        for job in self.queue.returned:
            assert job.error is not None or all(item.result for item in job.items)

    def teardown(self) -> None:
        """However it went, the end leaves nobody waiting and nothing in the books."""
        self.queue.scheduler.abort()
        self.waiting.clear()
        assert all(job.over for job in self.jobs)
        self.books_balance()
        self.every_request_ends_once()
        assert self.queue.scheduler.take(96) is None


AnyHistory.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestAnyHistory = AnyHistory.TestCase
