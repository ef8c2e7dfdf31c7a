"""The engine's thread with an engine that only pretends: failures, cancellation between the stages, death."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from serve.metrics import Metrics
from serve.scheduler import Closed, Job, Scheduler
from serve.worker import Worker


class Pretender:
    """The embedding of a text is its number; its best labels are the number and what follows. Some numbers are poison."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.rows_in_head: list[int] = []
        self.poison: dict[int, BaseException] = {}
        self.before_head: Callable[[], object] = lambda: None

    def encode(self, payloads: Sequence[int]) -> np.ndarray:
        self.batches.append(list(payloads))
        for payload in payloads:
            if payload in self.poison:
                raise self.poison[payload]
        self.before_head()
        return np.array(payloads, dtype=np.float32)[:, None]

    def topk(self, x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        self.rows_in_head.append(len(x))
        return np.repeat(-x, k, axis=1), x.astype(np.int32) + np.arange(k, dtype=np.int32)


class Bench:
    def __init__(self) -> None:
        self.engine, self.metrics = Pretender(), Metrics()
        self.returned: queue.Queue[Job] = queue.Queue()
        self.scheduler = Scheduler(
            max_queue_tokens=10_000,
            max_batch_inputs=8,
            max_batch_tokens=10_000,
            padded=lambda length: length,
            deliver=self.deliver,
        )
        self.worker = Worker(self.engine, self.scheduler, self.metrics)

    def deliver(self, jobs: list[Job]) -> None:
        for job in jobs:
            self.returned.put(job)

    def submit(self, *numbers: int, k: int = 1) -> Job:
        job = Job(((number, 1) for number in numbers), k=k)
        self.scheduler.submit(job)
        return job

    def wait_for(self, *jobs: Job) -> None:
        got = {self.returned.get(timeout=10) for _ in jobs}
        assert got == set(jobs)

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"fanin_{name}", labels) or 0.0


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
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


def test_a_dead_thread_leaves_nobody_waiting(bench: Bench) -> None:
    bench.engine.poison = {1: SystemExit()}
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
