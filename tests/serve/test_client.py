"""The Python client: what it sends, what it makes of answers, when it tries again; alone and with a real server."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve import client as module
from serve.client import Answer, AsyncClient, Client, FaninError, Fault, Health, Label, LabelScore, Prediction, ProblemError
from tests.serve.harness import LABELS, ROOT, TEXTS, Process, Serving

Call = Callable[[Any], Any]  # what to do with a Client, or to await from an AsyncClient
Handler = Callable[[httpx.Request], httpx.Response]

ANSWER = {
    "id": "r-1",
    "model": "topics",
    "model_version": "ab",
    "predictions": [
        {
            "labels": [{"id": "t-1", "name": "topic 1", "score": 0.5}, {"id": "t-2", "score": 0.25}],
            "tokens": 3,
            "truncated": False,
        }
    ],
    "usage": {"inputs": 1, "tokens": 3},
    "of_a_newer_server": True,
}
PREDICTION = Prediction([LabelScore("t-1", 0.5, "topic 1"), LabelScore("t-2", 0.25)], 3, False)
INFO = {
    "model": "topics",
    "model_version": "ab",
    "created": "2026-01-01T00:00:00Z",
    "labels": 500,
    "width": 96,
    "limits": {
        "max_length": 32,
        "max_inputs": 3,
        "max_top_k": 5,
        "max_filter_labels": 9,
        "max_body_bytes": 200,
        "timeout_ms": 1000,
    },
    "blocks": [],
    "metrics": {},
    "versions": {},
}


def with_client(call: Call, handler: Handler, **settings: Any) -> Any:
    with Client("http://server", transport=httpx.MockTransport(handler), **settings) as client:
        return call(client)


def with_async_client(call: Call, handler: Handler, **settings: Any) -> Any:
    async def main() -> Any:
        async with AsyncClient("http://server", transport=httpx.MockTransport(handler), **settings) as client:
            return await call(client)

    return asyncio.run(main())


@pytest.fixture(params=[with_client, with_async_client], ids=["Client", "AsyncClient"])
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return request.param


class Clock:
    """Time that only passes when somebody sleeps, or a test says so. Jitter is always the most it may be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.slept = 1000.0, []
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))
        monkeypatch.setattr(module, "asyncio", SimpleNamespace(sleep=self.sleep_async))
        monkeypatch.setattr(module, "random", SimpleNamespace(uniform=lambda low, high: high))

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if seconds:
            self.slept.append(round(seconds, 6))

    async def sleep_async(self, seconds: float) -> None:
        self.sleep(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Script:
    """A server that gives these answers one after the other, an exception being a connection that fails."""

    def __init__(self, *outcomes: httpx.Response | Exception) -> None:
        self._outcomes, self.requests = iter(outcomes), []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        outcome = next(self._outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return httpx.Response(outcome.status_code, content=outcome.content, headers=outcome.headers)  # for one use only


def ok(data: Any = ANSWER, **headers: str) -> httpx.Response:
    return httpx.Response(200, json=data, headers=headers)


def problem(status: int, kind: str = "queue-full", **headers: str) -> httpx.Response:
    data = {"type": f"urn:fanin:problem:{kind}", "title": "T", "status": status, "detail": "d", "request_id": "r-9"}
    return httpx.Response(status, json=data, headers=headers)


def test_it_imports_nothing_of_the_server() -> None:
    code = "import sys, serve.client; print({'numpy', 'onnxruntime', 'fastapi', 'models', 'export'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == ("set()\n", "")


def test_a_prediction_is_typed(run: Callable[..., Any]) -> None:
    answer = run(lambda c: c.predict("a"), Script(ok(**{"Server-Timing": "queue;dur=0.250, total;dur=2"})))
    assert answer == Answer("r-1", "topics", "ab", [PREDICTION], {"queue": 0.25, "total": 2.0})


def test_every_option_reaches_the_server_and_no_other(run: Callable[..., Any]) -> None:
    script = Script(ok(), ok())
    run(lambda c: c.predict(("a", "b")), script)
    options = {"top_k": 3, "min_score": 0.5, "scores": "logit", "return_names": False, "truncate": False, "timeout_ms": 9}
    run(lambda c: c.predict("a", **options, allow=("x",), deny=["y"]), script)
    assert [json.loads(request.content) for request in script.requests] == [
        {"inputs": ["a", "b"]},
        {"inputs": "a", **options, "labels": {"allow": ["x"], "deny": ["y"]}},
    ]


def test_the_key_is_sent_with_every_request_and_the_path_of_the_url_is_kept() -> None:
    script = Script(ok(INFO))
    with Client("http://server/models/a/", api_key="k", transport=httpx.MockTransport(script)) as client:
        client.info()
    assert script.requests[0].headers["authorization"] == "Bearer k"
    assert script.requests[0].url == "http://server/models/a/info"


@pytest.mark.parametrize(
    "passing",
    [
        problem(429),
        problem(503, "loading"),
        httpx.ConnectError("refused"),
        httpx.ReadError(""),
        httpx.RemoteProtocolError("gone"),
    ],
    ids=lambda outcome: getattr(outcome, "status_code", type(outcome).__name__),
)
def test_what_may_pass_is_tried_again(run: Callable[..., Any], clock: Clock, passing: Any) -> None:
    script = Script(passing, passing, ok())
    assert run(lambda c: c.predict("a"), script).predictions == [PREDICTION]
    assert len(script.requests) == 3
    assert clock.slept == [0.1, 0.2]


@pytest.mark.parametrize("status", [400, 401, 404, 413, 415, 422, 500, 502, 504])
def test_other_errors_are_raised_at_once(run: Callable[..., Any], clock: Clock, status: int) -> None:
    script = Script(problem(status, "some", **{"Retry-After": "1"}))
    with pytest.raises(ProblemError) as caught:
        run(lambda c: c.predict("a"), script)
    assert (caught.value.problem.status, caught.value.problem.request_id) == (status, "r-9")
    assert (len(script.requests), clock.slept) == (1, [])


def test_an_address_that_can_never_answer_is_not_tried_again(clock: Clock) -> None:
    with Client("nowhere") as client, pytest.raises(FaninError, match="http"):
        client.predict("a")
    assert clock.slept == []


def test_retry_after_is_waited_for_and_jitter_added(run: Callable[..., Any], clock: Clock) -> None:
    script = Script(problem(429, **{"Retry-After": "7"}), problem(503, **{"Retry-After": "soon"}), ok())
    run(lambda c: c.predict("a"), script)
    assert clock.slept == [7.1, 0.2]


def test_retry_after_may_be_a_date() -> None:
    assert module._retry_after_s(problem(503, **{"Retry-After": "Mon, 01 Jan 2001 00:00:00 GMT"})) == 0
    assert module._retry_after_s(problem(503, **{"Retry-After": "Fri, 01 Jan 2100 00:00:00 GMT"})) > 1e9


def test_back_off_doubles_up_to_its_longest_and_ends_after_max_retries(run: Callable[..., Any], clock: Clock) -> None:
    with pytest.raises(ProblemError):
        run(lambda c: c.predict("a"), Script(*[problem(429)] * 10), timeout_s=1000, max_retries=9)
    assert clock.slept == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10]


def test_jitter_is_from_nothing_to_all_of_the_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(module, "random", SimpleNamespace(uniform=lambda *bounds: asked.append(bounds) or 0.0))
    with_client(lambda c: c.predict("a"), Script(problem(429), problem(429), ok()))
    assert asked == [(0, 0.1), (0, 0.2)]


def test_nothing_is_waited_for_beyond_the_deadline(run: Callable[..., Any], clock: Clock) -> None:
    with pytest.raises(ProblemError):
        run(lambda c: c.predict("a"), Script(problem(429, **{"Retry-After": "60"})), timeout_s=10)
    assert clock.slept == []


def test_each_attempt_may_take_what_is_left_of_the_deadline(run: Callable[..., Any], clock: Clock) -> None:
    def slow(request: httpx.Request) -> httpx.Response:
        clock.now += 4
        return script(request)

    script = Script(problem(503), httpx.ReadTimeout(""), ok())
    with pytest.raises(FaninError, match="http://server/predict: no answer"):
        run(lambda c: c.predict("a"), slow, timeout_s=8)
    timeouts = [request.extensions["timeout"] for request in script.requests]
    assert [round(timeout["read"], 3) for timeout in timeouts] == [8, 3.9]
    assert [round(timeout["connect"], 3) for timeout in timeouts] == [5, 3.9]


def test_a_problem_carries_every_fault() -> None:
    data = problem(422, "invalid-request").json() | {"errors": [{"pointer": "/inputs/1", "detail": "is empty"}]}
    with pytest.raises(ProblemError, match="422 T: d") as caught:
        with_client(lambda c: c.predict("a"), Script(httpx.Response(422, json=data)))
    assert caught.value.problem.type == "urn:fanin:problem:invalid-request"
    assert caught.value.problem.errors == (Fault("/inputs/1", "is empty"),)


@pytest.mark.parametrize("body", ["<h1>Bad Gateway</h1>", "[]", "{}", '{"detail": "x"}', '{"errors": 3}'])
def test_an_error_of_a_proxy_is_a_problem_without_a_type(body: str) -> None:
    with pytest.raises(ProblemError) as caught:
        with_client(lambda c: c.info(), Script(httpx.Response(502, text=body)))
    assert caught.value.problem == module.Problem("about:blank", "Bad Gateway", 502, body)


@pytest.mark.parametrize("body", ["<h1>It works!</h1>", "[]", "{}", '{"predictions": [{}]}', "null"])
def test_an_answer_of_another_kind_of_server_is_named(body: str) -> None:
    with pytest.raises(FaninError, match="http://server/predict: the answer is not one of a Fanin server"):
        with_client(lambda c: c.predict("a"), Script(httpx.Response(200, text=body)))


@pytest.mark.parametrize(
    ("outcome", "health"),
    [
        (ok({"status": "ready"}), Health(True, "ready")),
        (problem(503, "draining", **{"Retry-After": "1"}), Health(False, "draining")),
        (problem(503, "engine-stopped"), Health(False, "engine-stopped")),
    ],
)
def test_health_asks_once(run: Callable[..., Any], clock: Clock, outcome: httpx.Response, health: Health) -> None:
    assert run(lambda c: c.health(), Script(outcome)) == health
    assert clock.slept == []


def test_health_of_no_server_is_an_error(run: Callable[..., Any], clock: Clock) -> None:
    with pytest.raises(FaninError, match="refused"):
        run(lambda c: c.health(), Script(httpx.ConnectError("refused")))
    assert clock.slept == []


def test_labels_takes_ids_or_a_query(run: Callable[..., Any]) -> None:
    script = Script(*[ok({"labels": [{"id": "t-1", "name": "topic 1"}]}) for _ in range(2)])
    assert run(lambda c: c.labels(ids=["t-1", "t-2"]), script) == [Label("t-1", "topic 1")]
    run(lambda c: c.labels(query="topic", limit=3), script)
    assert [list(request.url.params.multi_items()) for request in script.requests] == [
        [("ids", "t-1"), ("ids", "t-2")],
        [("query", "topic"), ("limit", "3")],
    ]
    for both in ({}, {"ids": ["t-1"], "query": "x"}):
        with pytest.raises(ValueError, match="either"):
            run(lambda c, both=both: c.labels(**both), script)


def echo(request: httpx.Request) -> httpx.Response:
    """Answers a prediction whose only label is the text, within INFO's limits."""
    if request.url.path == "/info":
        return ok(INFO)
    limits = INFO["limits"]
    texts = json.loads(request.content)["inputs"]
    if len(texts) > limits["max_inputs"] or len(request.content) > limits["max_body_bytes"]:
        return problem(422)
    return ok(ANSWER | {"predictions": [{"labels": [{"id": t, "score": 1}], "tokens": 1, "truncated": False} for t in texts]})


def test_any_number_of_texts_is_split_to_fit_the_limits() -> None:
    @settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(st.text(st.characters(codec="utf-8"), max_size=24), max_size=20))
    def check(texts: list[str]) -> None:
        predictions = client.predict_all(texts, top_k=1, deny=["t-1"])
        assert [prediction.labels[0].id for prediction in predictions] == texts

    with Client("http://server", transport=httpx.MockTransport(echo)) as client:
        check()


def test_a_text_too_large_for_any_request_is_refused_by_the_server(run: Callable[..., Any]) -> None:
    with pytest.raises(ProblemError):
        run(lambda c: c.predict_all(["a", "b" * 300]), echo)


@pytest.fixture
def real(server: Process) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


def test_a_real_server_answers_every_call(real: Client) -> None:
    info = real.info()
    assert (info.model, info.labels, info.width, info.limits.max_length) == ("topics", LABELS, 96, 32)
    answer = real.predict(TEXTS, top_k=3, scores="logit")
    assert (answer.model, answer.model_version) == (info.model, info.model_version)
    assert [len(prediction.labels) for prediction in answer.predictions] == [3] * len(TEXTS)
    assert set(answer.timing_ms) >= {"tokenize", "queue", "encode", "head", "total"}
    best = answer.predictions[0].labels[0]
    assert real.labels(ids=[best.id]) == [Label(best.id, best.name or "")]
    assert [label.id for label in real.labels(query="TOPIC 49", limit=3)] == ["t-49", "t-490", "t-491"]
    assert real.health() == Health(True, "ready")
    assert real.predict(TEXTS[0], return_names=False).predictions[0].labels[0].name is None


def test_a_real_server_answers_texts_beyond_its_limits(real: Client) -> None:
    texts = TEXTS * 50
    assert len(texts) > real.info().limits.max_inputs
    predictions = real.predict_all(texts, top_k=1)
    alone = [real.predict(text, top_k=1).predictions[0].labels[0].id for text in TEXTS]
    assert [prediction.labels[0].id for prediction in predictions] == alone * 50


def test_faults_of_a_real_server_are_problems(real: Client) -> None:
    with pytest.raises(ProblemError) as caught:
        real.predict(["a", " "])
    assert caught.value.problem.status == 422
    assert [fault.pointer for fault in caught.value.problem.errors] == ["/inputs/1"]
    with pytest.raises(ProblemError, match="404"):
        real.labels(ids=["absent"])


def test_one_client_serves_many_threads(real: Client) -> None:
    with ThreadPoolExecutor(8) as pool:
        best = list(pool.map(lambda i: real.predict(TEXTS[i % 6], top_k=1).predictions[0].labels[0].id, range(48)))
    assert best == best[:6] * 8


def test_many_calls_of_one_async_client(server: Process) -> None:
    async def main() -> list[Answer]:
        async with AsyncClient(server.url) as client:
            await client.info()
            calls: list[Awaitable[Answer]] = [client.predict(text, top_k=2) for text in TEXTS]
            return await asyncio.gather(*calls)

    assert [len(answer.predictions[0].labels) for answer in asyncio.run(main())] == [2] * len(TEXTS)


def test_a_full_queue_is_waited_out(serving: Serving) -> None:
    with serving(max_queue_tokens=1, max_batch_inputs=1) as local, Client(local.url) as client, ThreadPoolExecutor(4) as pool:
        local.engine.gate.clear()
        answers = [pool.submit(client.predict, TEXTS[0]) for _ in range(4)]
        refused = threading.Event()
        while not local.metric("rejected_total", reason="queue-full"):
            assert not refused.wait(0.01)
        local.engine.gate.set()
        assert len({answer.result(30).id for answer in answers}) == 4
