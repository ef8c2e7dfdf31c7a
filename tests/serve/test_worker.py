"""The engine's threads with an engine that only pretends: failures, cancellation between the stages, memory, loss, death."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from serve.metrics import Metrics
from serve.scheduler import Closed, Job, Scheduler
from serve.worker import EngineLost, Worker, out_of_memory


class Pretender:
    """The embedding of a text is its number; its best labels are the number and what follows. Some numbers are poison."""

    def __init__(self, overlaps: bool) -> None:
        self.overlaps = overlaps
        self.up = threading.Event()
        self.up.set()
        self.head_poison: dict[int, BaseException] = {}
        self.allowed: list[Sequence[object] | None] = []
        self.batches: list[list[int]] = []
        self.rows_in_head: list[int] = []
        self.poison: dict[int, BaseException] = {}
        self.before_head: Callable[[], object] = lambda: None

    def wait_until_up(self) -> bool:
        return self.up.wait(10)

    def encode(self, payloads: Sequence[int]) -> np.ndarray:
        self.batches.append(list(payloads))
        for payload in payloads:
            if payload in self.poison:
                raise self.poison[payload]
        self.before_head()
        return np.array(payloads, dtype=np.float32)[:, None]

    def topk(self, x: np.ndarray, k: int, allowed: Sequence[object] | None = None) -> tuple[np.ndarray, np.ndarray]:
        self.rows_in_head.append(len(x))
        self.allowed.append(allowed)
        for number in x[:, 0]:
            if int(number) in self.head_poison:
                raise self.head_poison[int(number)]
        return np.repeat(-x, k, axis=1), x.astype(np.int32) + np.arange(k, dtype=np.int32)


class Bench:
    def __init__(self, overlaps: bool) -> None:
        self.engine, self.metrics = Pretender(overlaps), Metrics()
        self.returned: queue.Queue[Job] = queue.Queue()
        self.scheduler = Scheduler(
            max_queue_tokens=10_000,
            max_batch_inputs=8,
            padded=lambda length: length,
            deliver=self.deliver,
        )
        self.worker = Worker(self.engine, self.scheduler, self.metrics, max_batch_tokens=256)

    def deliver(self, jobs: list[Job]) -> None:
        for job in jobs:
            self.returned.put(job)

    def submit(self, *numbers: int, k: int = 1, allowed: object = None, length: int = 1) -> Job:
        job = Job(((number, length) for number in numbers), k=k, allowed=allowed)
        self.scheduler.submit(job)
        return job

    def wait_for(self, *jobs: Job) -> None:
        got = {self.returned.get(timeout=10) for _ in jobs}
        assert got == set(jobs)

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"fanin_{name}", labels) or 0.0


def _raise(error: Exception) -> None:
    raise error


@pytest.fixture(params=[False, True], ids=["one thread", "a thread per stage"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(overlaps=request.param)
    yield bench
    bench.scheduler.close()
    bench.worker.join(10)
    assert not bench.worker.alive


def test_what_waits_goes_through_together_and_each_gets_its_own(bench: Bench) -> None:
    jobs = [bench.submit(1, 2, k=2), bench.submit(3)]
    bench.worker.start()
    bench.wait_for(*jobs)
    assert bench.engine.batches == [[1, 2, 3]]
    found = [[(labels.tolist(), scores.tolist()) for labels, scores in (item.result for item in job.items)] for job in jobs]
    assert found == [[([1, 2], [-1, -1]), ([2, 3], [-2, -2])], [([3], [-3])]]
    assert bench.count("batch_inputs_sum") == 3


def test_a_poisoned_text_fails_alone(bench: Bench) -> None:
    bench.engine.poison = {5: ValueError("poison")}
    jobs = [bench.submit(number) for number in range(8)]
    bench.worker.start()
    bench.wait_for(*jobs)
    assert [type(job.error) for job in jobs] == [type(None)] * 5 + [ValueError] + [type(None)] * 2
    assert bench.count("batch_splits_total", reason="error") == 3  # 8 → 4 → 2 → 1


def test_a_batch_that_is_too_large_for_memory_is_halved(bench: Bench) -> None:
    encode = bench.engine.encode

    def encode_few(payloads: Sequence[int]) -> np.ndarray:
        if len(payloads) > 2:
            raise MemoryError
        return encode(payloads)

    bench.engine.encode = encode_few  # type: ignore[method-assign]
    jobs = [bench.submit(number) for number in range(8)]
    bench.worker.start()
    bench.wait_for(*jobs)
    assert all(job.error is None for job in jobs)
    assert bench.count("batch_splits_total", reason="memory") == 3


def test_after_memory_was_short_batches_are_smaller_and_grow_again(bench: Bench) -> None:
    encode, short = bench.engine.encode, [True]

    def encode_later(payloads: Sequence[int]) -> np.ndarray:
        if short and len(payloads) > 1:
            short.clear()
            raise MemoryError
        return encode(payloads)

    bench.engine.encode = encode_later  # type: ignore[method-assign]
    jobs = [bench.submit(number, length=64) for number in range(8)]
    bench.worker.start()
    bench.wait_for(*jobs)
    assert [len(batch) for batch in bench.engine.batches] == [2, 2, 2, 2]  # 4 of them were too much for 256 tokens
    assert bench.worker.batch_token_budget == pytest.approx(128 + 4)
    for number in range(130):
        bench.wait_for(bench.submit(number))
    assert bench.worker.batch_token_budget == 256


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("... Failed to allocate memory for requested buffer of size 4294967296"), True),
        (RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("no"), False),
    ],
)
def test_lack_of_memory_is_told_from_other_failures(error: Exception, memory: bool) -> None:
    assert out_of_memory(error) is memory


def test_what_fails_in_the_head_is_not_encoded_again(bench: Bench) -> None:
    bench.engine.head_poison = {5: ValueError("poison")}
    jobs = [bench.submit(number) for number in range(8)]
    bench.worker.start()
    bench.wait_for(*jobs)
    assert [type(job.error) for job in jobs] == [type(None)] * 5 + [ValueError] + [type(None)] * 2
    assert [job.items[0].result[0].tolist() for job in jobs if job.error is None] == [[0], [1], [2], [3], [4], [6], [7]]
    assert bench.engine.batches == [list(range(8))]


def test_what_each_request_allows_reaches_the_head_beside_its_row(bench: Bench) -> None:
    jobs = [bench.submit(1), bench.submit(2, 3, allowed="some"), bench.submit(4)]
    bench.worker.start()
    bench.wait_for(*jobs)
    bench.wait_for(bench.submit(5))
    assert bench.engine.allowed == [[None, "some", "some", None], None]


def test_what_a_lost_engine_had_is_tried_once_more(bench: Bench) -> None:
    errors: list[Exception] = [EngineLost(begun=True)]
    bench.engine.before_head = lambda: errors and _raise(errors.pop())
    jobs = [bench.submit(number) for number in range(3)]
    bench.worker.start()
    bench.wait_for(*jobs)
    assert [job.error for job in jobs] == [None] * 3
    assert bench.engine.batches == [[0, 1, 2], [0], [1], [2]]


def test_a_text_that_kills_two_engines_ends_and_takes_no_other_with_it(bench: Bench) -> None:
    bench.engine.head_poison = {1: EngineLost(begun=True)}
    jobs = [bench.submit(number) for number in range(3)]
    bench.worker.start()
    bench.wait_for(*jobs)
    assert [type(job.error) for job in jobs] == [type(None), Closed, type(None)]


def test_while_the_engine_is_down_texts_stay_in_the_queue(bench: Bench) -> None:
    bench.engine.up.clear()
    bench.worker.start()
    job = bench.submit(1)
    assert bench.scheduler.queue_inputs == 1
    assert bench.worker.alive
    bench.engine.up.set()
    bench.wait_for(job)


def test_one_batch_may_wait_between_the_stages_and_no_more() -> None:
    bench, gate = Bench(overlaps=True), threading.Event()
    topk = bench.engine.topk
    bench.engine.topk = lambda *given: (gate.wait(10), topk(*given))[1]  # type: ignore[method-assign]
    jobs = [bench.submit(number, length=256) for number in range(6)]  # each a batch of its own
    bench.worker.start()
    end = time.monotonic() + 10
    while len(bench.engine.batches) < 3:  # one in the head, one waiting, and one that cannot be handed on
        assert time.monotonic() < end
        time.sleep(0.001)
    time.sleep(0.05)
    assert bench.engine.batches == [[0], [1], [2]]
    assert bench.scheduler.queue_inputs == 3
    gate.set()
    bench.wait_for(*jobs)
    bench.scheduler.close()
    bench.worker.join(10)


def test_a_client_that_left_while_its_text_was_encoded_costs_no_head(bench: Bench) -> None:
    stays, leaves = bench.submit(1), bench.submit(2)
    bench.engine.before_head = lambda: bench.scheduler.cancel(leaves)
    bench.worker.start()
    bench.wait_for(stays)
    assert bench.engine.rows_in_head == [1]
    assert stays.items[0].result[0].tolist() == [1]
    assert leaves.stage == "encoder"


def test_when_all_clients_left_the_head_does_not_run(bench: Bench) -> None:
    leaves = bench.submit(1)
    bench.engine.before_head = lambda: bench.scheduler.cancel(leaves)
    bench.worker.start()
    bench.scheduler.close()
    bench.worker.join(10)
    assert bench.engine.batches == [[1]]
    assert bench.engine.rows_in_head == []


def test_a_request_learns_how_long_the_engine_was_at_it(bench: Bench) -> None:
    job = bench.submit(1)
    bench.engine.before_head = lambda: threading.Event().wait(0.05)
    bench.worker.start()
    bench.wait_for(job)
    assert 0.05 <= job.encoder_s <= job.finished_at - job.admitted_at
    assert 0 < job.head_s < 0.05


@pytest.mark.parametrize("stage", ["encoder", "head"])
def test_a_dead_thread_leaves_nobody_waiting(bench: Bench, stage: str) -> None:
    (bench.engine.poison if stage == "encoder" else bench.engine.head_poison)[1] = SystemExit()
    jobs = [bench.submit(1), bench.submit(*range(2, 20))]
    bench.worker.start()
    bench.wait_for(*jobs)
    assert all(isinstance(job.error, Closed) for job in jobs)
    bench.worker.join(10)
    assert not bench.worker.alive
    with pytest.raises(Closed):
        bench.submit(1)


def test_the_heartbeat_ages_while_a_batch_is_stuck(bench: Bench) -> None:
    entered, go_on = threading.Event(), threading.Event()
    bench.engine.before_head = lambda: (entered.set(), go_on.wait(10))
    bench.worker.start()
    assert bench.worker.heartbeat_age_s == 0
    job = bench.submit(1)
    assert entered.wait(10)
    first = bench.worker.heartbeat_age_s
    assert bench.worker.heartbeat_age_s > first
    go_on.set()
    bench.wait_for(job)
