"""What a server does under load, late, and in trouble. The engine waits at a gate, so that nothing depends on speed."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.serve.harness import TEXTS, Local, Serving, problem_of


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as pool:
        yield pool


def post(local: Local, **body: Any) -> httpx.Response:
    return httpx.post(f"{local.url}/predict", json=body, timeout=30)


def eventually(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


def occupy(local: Local, pool: ThreadPoolExecutor) -> Future[httpx.Response]:
    """A request that stays in the engine until the gate opens."""
    local.engine.gate.clear()
    local.engine.entered.clear()
    first = pool.submit(post, local, inputs="first")
    assert local.engine.entered.wait(20)
    return first


def test_requests_that_wait_share_a_batch_and_each_gets_its_own_answer(serving: Serving, pool: ThreadPoolExecutor) -> None:
    texts = [text[:cut] for text in TEXTS for cut in (9, 14)]
    with serving() as local:
        alone = [post(local, inputs=text, scores="logit").json()["predictions"][0]["labels"] for text in texts]
        local.engine.batches.clear()
        first = occupy(local, pool)
        waiting = [pool.submit(post, local, inputs=text, scores="logit") for text in texts]
        eventually(lambda: local.metric("queue_inputs") == len(texts))
        local.engine.gate.set()
        together = [answer.result().json()["predictions"][0]["labels"] for answer in waiting]
        assert first.result().status_code == 200
        assert len(local.engine.batches) < len(texts) / 2
    assert [[row["id"] for row in rows] for rows in together] == [[row["id"] for row in rows] for rows in alone]
    for one, other in zip(together, alone, strict=True):
        assert [row["score"] for row in one] == pytest.approx([row["score"] for row in other], rel=1e-4, abs=1e-5)


def test_each_request_gets_as_many_labels_as_it_asked_for(serving: Serving, pool: ThreadPoolExecutor) -> None:
    with serving() as local:
        occupy(local, pool)
        waiting = [pool.submit(post, local, inputs=TEXTS[0], top_k=k) for k in (1, 300, 3)]
        eventually(lambda: local.metric("queue_inputs") == 3)
        local.engine.gate.set()
        assert [len(answer.result().json()["predictions"][0]["labels"]) for answer in waiting] == [1, 300, 3]
        assert local.engine.batches == [1, 3]


def test_a_full_queue_answers_429_at_once_and_recovers(serving: Serving, pool: ThreadPoolExecutor) -> None:
    with serving(max_queue_tokens=40) as local:
        first = occupy(local, pool)
        waiting = pool.submit(post, local, inputs=TEXTS[:3])
        eventually(lambda: local.metric("queue_inputs") == 3)
        response = post(local, inputs=TEXTS)
        problem_of(response, 429, "queue-full")
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert local.metric("rejected_total", reason="queue-full") == 1
        local.engine.gate.set()
        assert (first.result().status_code, waiting.result().status_code) == (200, 200)
        assert post(local, inputs=TEXTS).status_code == 200


def infer(local: Local, inputs: str, priority: str | int) -> httpx.Response:
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [inputs]}
    body = {"inputs": [tensor], "parameters": {"priority": priority}}
    return httpx.post(f"{local.url}/v2/models/topics/infer", json=body, timeout=30)


@pytest.mark.parametrize(
    ("ask", "low", "normal", "high"), [(post, "low", "normal", "high"), (infer, "low", "normal", "high"), (infer, 7, 0, 1)]
)
def test_high_priority_passes_those_who_wait_and_low_lets_them_pass(
    serving: Serving, pool: ThreadPoolExecutor, ask: Callable[..., httpx.Response], low: object, normal: object, high: object
) -> None:
    with serving(max_batch_inputs=1) as local:
        first = occupy(local, pool)
        lengths: list[int] = []
        encode = local.engine.encode
        local.engine.encode = lambda sequences: (lengths.append(len(sequences[0])), encode(sequences))[1]
        waiting = []
        texts = ["a", TEXTS[0], TEXTS[3]]
        for i, (priority, text) in enumerate(zip((low, normal, high), texts, strict=True), 1):
            waiting.append(pool.submit(ask, local, inputs=text, priority=priority))
            eventually(lambda i=i: local.metric("queue_inputs") == i)
        local.engine.gate.set()
        assert [answer.result().status_code for answer in (first, *waiting)] == [200] * 4
        assert lengths == [len(tokens.ids) for tokens in local.engine.new_tokenizer()([TEXTS[3], TEXTS[0], "a"])]
        assert len(set(lengths)) == 3
        problem_of(ask(local, inputs="a", priority="urgent"), 422, "invalid-request")


@pytest.mark.parametrize("where", ["engine", "queue"])
def test_a_deadline_is_kept_while_the_engine_is_busy(serving: Serving, pool: ThreadPoolExecutor, where: str) -> None:
    with serving() as local:
        if where == "queue":
            occupy(local, pool)
        local.engine.gate.clear()
        began = time.monotonic()
        problem_of(post(local, inputs="a", timeout_ms=300), 504, "deadline-exceeded")
        assert 0.3 <= time.monotonic() - began < 10
        assert local.metric("cancelled_total", stage="queue" if where == "queue" else "encoder") == 1
        assert local.metric("queue_inputs") == 0
        local.engine.gate.set()
        assert post(local, inputs="a").status_code == 200
        assert sum(local.engine.batches) == 2  # the one that was late in the queue was never encoded


def test_the_server_has_a_time_limit_of_its_own(serving: Serving) -> None:
    with serving(timeout_ms=200) as local:
        local.engine.gate.clear()
        problem_of(post(local, inputs="a", timeout_ms=1_000_000), 504, "deadline-exceeded")


def test_a_client_that_leaves_gives_its_place_up(serving: Serving, pool: ThreadPoolExecutor) -> None:
    with serving() as local:
        first = occupy(local, pool)
        body = json.dumps({"inputs": TEXTS}).encode()
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", int(local.url.rsplit(":", 1)[1]))) as leaver:
            leaver.sendall(head.encode() + body)
            eventually(lambda: local.metric("queue_inputs") == len(TEXTS))
        eventually(lambda: local.metric("queue_inputs") == 0)
        eventually(lambda: local.metric("requests_total", route="/predict", code="499") == 1)
        assert local.metric("cancelled_total", stage="queue") == 1
        local.engine.gate.set()
        assert first.result().status_code == 200
        assert local.engine.batches == [1]


def test_a_failing_text_fails_its_own_request_only(serving: Serving, pool: ThreadPoolExecutor) -> None:
    with serving() as local:
        poisonous = " ".join(TEXTS)  # the only one of 32 tokens
        local.engine.poison = {32: RuntimeError("no")}
        occupy(local, pool)
        bad = pool.submit(post, local, inputs=["fine", poisonous])
        good = [pool.submit(post, local, inputs=" ".join(TEXTS[:2] * 2)[: 80 + i]) for i in range(3)]
        eventually(lambda: local.metric("queue_inputs") == 5)
        local.engine.gate.set()
        problem = problem_of(bad.result(), 500, "internal")
        assert "no" not in problem["detail"].split()  # what went wrong inside is for the log
        assert [answer.result().status_code for answer in good] == [200] * 3
        assert local.service.alive


def test_before_the_model_is_loaded_only_liveness_is_good(serving: Serving) -> None:
    with serving(load=False) as local:
        for response in (post(local, inputs="a"), *(httpx.get(f"{local.url}/{path}") for path in ("readyz", "health", "info"))):
            problem_of(response, 503, "loading")
            assert response.headers["retry-after"]
        problem_of(httpx.get(f"{local.url}/labels?ids=t-1"), 503, "loading")
        assert httpx.get(f"{local.url}/livez").status_code == 200
        assert httpx.get(f"{local.url}/").status_code == 200
        assert local.metric("ready") == 0
        assert local.metric("rejected_total", reason="loading") == 1


def test_a_dead_engine_shows_and_leaves_nobody_waiting(serving: Serving, pool: ThreadPoolExecutor) -> None:
    with serving() as local:
        first = occupy(local, pool)
        waiting = pool.submit(post, local, inputs="a")
        eventually(lambda: local.metric("queue_inputs") == 1)
        local.engine.poison = {length: SystemExit() for length in range(33)}
        local.engine.gate.set()
        for response in (first.result(), waiting.result(), post(local, inputs="a")):
            problem_of(response, 503, "engine-stopped")
        problem_of(httpx.get(f"{local.url}/livez"), 503, "engine-stopped")
        problem_of(httpx.get(f"{local.url}/readyz"), 503, "engine-stopped")
        assert local.metric("ready") == 0


_tasks: list[asyncio.Future[None]] = []  # the event loop itself holds them weakly


def start_drain(local: Local) -> threading.Event:
    """Drains the server; the event is set when that is over."""
    drained = threading.Event()

    async def drain() -> None:
        await local.service.drain()
        drained.set()

    local.call(lambda: _tasks.append(asyncio.ensure_future(drain())))
    return drained


def test_draining_finishes_what_is_under_way_and_takes_nothing_new(serving: Serving, pool: ThreadPoolExecutor) -> None:
    with serving() as local:
        first = occupy(local, pool)
        drained = start_drain(local)
        eventually(lambda: local.metric("draining") == 1)
        problem_of(post(local, inputs="a"), 503, "draining")
        problem_of(httpx.get(f"{local.url}/readyz"), 503, "draining")
        alive = httpx.get(f"{local.url}/livez")
        assert (alive.status_code, alive.headers["connection"]) == (200, "close")
        assert not drained.is_set()
        local.engine.gate.set()
        answer = first.result()
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert drained.wait(20)


def test_load_balancers_have_time_to_notice_a_drain(serving: Serving) -> None:
    with serving(drain_delay_s=1) as local:
        assert "connection" not in post(local, inputs="a").headers
        drained = start_drain(local)
        eventually(lambda: local.metric("draining") == 1)
        problem_of(httpx.get(f"{local.url}/readyz"), 503, "draining")
        answer = post(local, inputs="a")
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert drained.wait(20)
        problem_of(post(local, inputs="a"), 503, "draining")


def test_what_a_drain_has_no_time_for_is_answered_503(serving: Serving, pool: ThreadPoolExecutor) -> None:
    with serving(drain_timeout_s=0) as local:
        first = occupy(local, pool)
        waiting = pool.submit(post, local, inputs=TEXTS)
        eventually(lambda: local.metric("queue_inputs") == len(TEXTS))
        assert start_drain(local).wait(20)
        for response in (first.result(), waiting.result()):
            problem_of(response, 503, "draining")
            assert response.headers["retry-after"]


def test_a_long_text_does_not_hold_up_the_event_loop(serving: Serving, pool: ThreadPoolExecutor) -> None:
    with serving() as local:
        local.engine.long_texts.clear()
        long = pool.submit(post, local, inputs=["x" * 5000])
        eventually(lambda: local.metric("requests_in_progress") == 1)
        assert httpx.get(f"{local.url}/livez", timeout=20).status_code == 200
        assert post(local, inputs="a").status_code == 200
        assert not long.done()
        local.engine.long_texts.set()
        assert long.result().status_code == 200
