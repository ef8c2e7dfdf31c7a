"""A client of the server, for one thread or many (`Client`) and for asyncio (`AsyncClient`).

    with Client("http://127.0.0.1:8000") as client:
        for label in client.predict("sort an array", top_k=3).predictions[0].labels:
            print(label.score, label.id, label.name)

It needs httpx (`pip install 'fanin[client]'`) and nothing else of this project, so this file may be copied.

A request that meets a lost connection, 429 or 503 is sent again, later each time and no sooner than Retry-After says: every
call only reads, so a second one does no harm. Any other error is raised at once. Nothing is tried beyond the call's deadline.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import count
from typing import Any, Literal, Self, TypedDict, TypeVar, Unpack

import httpx

_CONNECT_TIMEOUT_S = 5.0
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.1, 10.0
# The server closes connections that were idle for 75 s; a client that does so earlier never meets one just closed.
_POOL = httpx.Limits(max_connections=100, max_keepalive_connections=100, keepalive_expiry=60)
_PASSING_STATUSES = (429, 503)
_PASSING_ERRORS = (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError)

_T = TypeVar("_T")
# A call without I/O: it gives (seconds to wait, what to send then) and is given what came of it, until it returns.
_Steps = Generator[tuple[float, httpx.Request], httpx.Response | httpx.RequestError, _T]


class FaninError(Exception):
    """No usable answer: the server cannot be reached, is not one of Fanin's, or one of the subclasses below."""


class ProblemError(FaninError):
    """The server answered with an error, `problem`."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(f"{problem.status} {problem.title}: {problem.detail}")
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of a request: where (a JSON Pointer into the body, or a query parameter's name), and what."""

    pointer: str
    detail: str


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as the server describes it (RFC 9457). `type` is about:blank if something before the server answered."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str | None = None
    errors: tuple[Fault, ...] = ()


@dataclass(frozen=True, slots=True)
class Label:
    """A label by its id, with its name."""

    id: str
    name: str


@dataclass(frozen=True, slots=True)
class LabelScore:
    """A label of a text. `name` is None with return_names=False."""

    id: str
    score: float
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """The labels of one text, best first; the tokens read, and whether the text was longer than the model reads."""

    labels: list[LabelScore]
    tokens: int
    truncated: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one request: a prediction per text, in order.

    id             the request's id, for the server's log
    model_version  SHA-256 of the bundle
    timing_ms      where the server spent its time: tokenize, queue, encode, head, total
    """

    id: str
    model: str
    model_version: str
    predictions: list[Prediction]
    timing_ms: dict[str, float]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask for. `max_length` is in tokens per text, `max_filter_labels` of `allow` and `deny` together."""

    max_length: int
    max_inputs: int
    max_top_k: int
    max_filter_labels: int
    max_body_bytes: int
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class Info:
    """The model that is served, and the server's limits. `blocks`, `metrics` and `versions` as GET /info gives them."""

    model: str
    model_version: str
    created: str
    labels: int
    width: int
    limits: Limits
    blocks: list[dict[str, Any]]
    metrics: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class Health:
    """Whether texts are predicted now; `status` is "ready", or why not: "loading", "draining", "engine-stopped"."""

    ready: bool
    status: str


class Options(TypedDict, total=False):
    """What `predict` may say about its texts. What is left out is as the server has it.

    top_k         labels per text (10)
    min_score     leave out labels with less, in the unit of `scores`
    scores        the head's own score, or its sigmoid ("probability")
    return_names  give names beside ids (True)
    truncate      cut texts to the model's length (True); if False, a longer one is an error
    priority      who goes first when requests wait ("normal")
    timeout_ms    milliseconds after which the server gives up
    allow, deny   ids of the only labels to choose from, and of labels to leave out
    """

    top_k: int
    min_score: float
    scores: Literal["probability", "logit"]
    return_names: bool
    truncate: bool
    priority: Literal["high", "normal", "low"]
    timeout_ms: int
    allow: Sequence[str]
    deny: Sequence[str]


class _Calls:
    """Every call as steps without I/O, for both clients."""

    def __init__(self, http: httpx.Client | httpx.AsyncClient, timeout_s: float, max_retries: int) -> None:
        self._http, self._timeout_s, self._max_retries = http, timeout_s, max_retries

    def predict(self, inputs: str | Sequence[str], options: Options) -> _Steps[Answer]:
        body = {"inputs": inputs if isinstance(inputs, str) else list(inputs), **_fields_of(options)}
        return self._call(_read_answer, "POST", "predict", json=body)

    def predict_all(self, texts: Sequence[str], options: Options) -> _Steps[list[Prediction]]:
        limits = (yield from self.info()).limits
        room = limits.max_body_bytes - len(json.dumps(_fields_of(options))) - len('{"inputs": []}')
        predictions: list[Prediction] = []
        for some in _chunks(texts, limits.max_inputs, room):
            predictions += (yield from self.predict(some, options)).predictions
        return predictions

    def labels(self, ids: Sequence[str] | None, query: str | None, limit: int) -> _Steps[list[Label]]:
        if (ids is None) == (query is None):
            raise ValueError("labels() takes either ids or query")
        params = {"query": query, "limit": limit} if ids is None else {"ids": list(ids)}
        return self._call(_read_labels, "GET", "labels", params=params)

    def info(self) -> _Steps[Info]:
        return self._call(_read_info, "GET", "info")

    def health(self) -> _Steps[Health]:
        outcome = yield 0, self._http.build_request("GET", "readyz", timeout=min(_CONNECT_TIMEOUT_S, self._timeout_s))
        if isinstance(outcome, httpx.Response) and outcome.is_success:
            return Health(True, "ready")
        error = _error(outcome)
        if isinstance(error, ProblemError) and error.problem.status == 503:
            return Health(False, error.problem.type.rpartition(":")[2])
        raise error

    def _call(self, read: Callable[[httpx.Response], _T], method: str, path: str, **content: Any) -> _Steps[_T]:
        deadline = time.monotonic() + self._timeout_s
        wait_s = 0.0
        for attempt in count():
            left_s = deadline - time.monotonic() - wait_s
            timeout = httpx.Timeout(left_s, connect=min(_CONNECT_TIMEOUT_S, left_s))
            outcome = yield wait_s, self._http.build_request(method, path, timeout=timeout, **content)
            if isinstance(outcome, httpx.Response) and outcome.is_success:
                return _read(read, outcome)
            backoff_s = min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2**attempt)
            wait_s = _retry_after_s(outcome) + random.uniform(0, backoff_s)  # "full jitter": clients turned away part ways
            if attempt >= self._max_retries or not _may_pass(outcome) or time.monotonic() + wait_s >= deadline:
                raise _error(outcome)
        raise AssertionError("unreachable")


class Client:
    """A client for programs without asyncio. It keeps connections open: make one and use it from any thread.

    url          where the server is, such as http://127.0.0.1:8000
    api_key      sent as a bearer token
    timeout_s    seconds that one request may take, with all that is tried again
    max_retries  how often a request may be sent again; 0 is never
    transport    another httpx transport, for a proxy of one's own, or for tests

    Its methods raise FaninError or its subclasses.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 60,
        max_retries: int = 8,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(base_url=url, headers=_headers(api_key), limits=_POOL, transport=transport)
        self._calls = _Calls(self._http, timeout_s, max_retries)

    def predict(self, inputs: str | Sequence[str], **options: Unpack[Options]) -> Answer:
        """The best labels of one text or of several, in one request."""
        return self._run(self._calls.predict(inputs, options))

    def predict_all(self, texts: Sequence[str], **options: Unpack[Options]) -> list[Prediction]:
        """The best labels of any number of texts, in order: in several requests, one by one, where the limits ask for it."""
        return self._run(self._calls.predict_all(texts, options))

    def labels(self, *, ids: Sequence[str] | None = None, query: str | None = None, limit: int = 20) -> list[Label]:
        """The labels with these ids, or up to `limit` whose names contain `query`."""
        return self._run(self._calls.labels(ids, query, limit))

    def info(self) -> Info:
        """The model and the server's limits."""
        return self._run(self._calls.info())

    def health(self) -> Health:
        """Whether the server predicts now. Asks once."""
        return self._run(self._calls.health())

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, steps: _Steps[_T]) -> _T:
        outcome: Any = None
        try:
            while True:
                wait_s, request = steps.send(outcome)
                time.sleep(wait_s)
                try:
                    outcome = self._http.send(request)
                except httpx.RequestError as error:
                    outcome = error
        except StopIteration as end:
            return end.value


class AsyncClient:
    """`Client` for asyncio: the same arguments and methods, to be awaited. One per event loop."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 60,
        max_retries: int = 8,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(base_url=url, headers=_headers(api_key), limits=_POOL, transport=transport)
        self._calls = _Calls(self._http, timeout_s, max_retries)

    async def predict(self, inputs: str | Sequence[str], **options: Unpack[Options]) -> Answer:
        return await self._run(self._calls.predict(inputs, options))

    async def predict_all(self, texts: Sequence[str], **options: Unpack[Options]) -> list[Prediction]:
        return await self._run(self._calls.predict_all(texts, options))

    async def labels(self, *, ids: Sequence[str] | None = None, query: str | None = None, limit: int = 20) -> list[Label]:
        return await self._run(self._calls.labels(ids, query, limit))

    async def info(self) -> Info:
        return await self._run(self._calls.info())

    async def health(self) -> Health:
        return await self._run(self._calls.health())

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, steps: _Steps[_T]) -> _T:
        outcome: Any = None
        try:
            while True:
                wait_s, request = steps.send(outcome)
                await asyncio.sleep(wait_s)
                try:
                    outcome = await self._http.send(request)
                except httpx.RequestError as error:
                    outcome = error
        except StopIteration as end:
            return end.value


def _headers(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def _fields_of(options: Options) -> dict[str, Any]:
    """The options as fields of a request's body."""
    body: dict[str, Any] = dict(options)
    filters = {name: list(body.pop(name)) for name in ("allow", "deny") if name in body}
    return body | {"labels": filters} if filters else body


def _chunks(texts: Sequence[str], max_inputs: int, max_bytes: int) -> Iterator[list[str]]:
    """The texts in order, together as far as count and size in JSON allow. One too large alone is the server's to refuse."""
    chunk: list[str] = []
    room = max_bytes
    for text in texts:
        nbytes = len(json.dumps(text)) + 2  # with its comma and space
        if chunk and (len(chunk) == max_inputs or nbytes > room):
            yield chunk
            chunk, room = [], max_bytes
        chunk.append(text)
        room -= nbytes
    if chunk:
        yield chunk


def _may_pass(outcome: httpx.Response | httpx.RequestError) -> bool:
    if isinstance(outcome, httpx.Response):
        return outcome.status_code in _PASSING_STATUSES
    return isinstance(outcome, _PASSING_ERRORS)


def _retry_after_s(outcome: httpx.Response | httpx.RequestError) -> float:
    """Seconds to wait as the header says, which may also be a date (RFC 9110); 0 without one that can be read."""
    text = outcome.headers.get("Retry-After", "") if isinstance(outcome, httpx.Response) else ""
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # no date, or one without a time zone
        return 0.0


def _error(outcome: httpx.Response | httpx.RequestError) -> FaninError:
    if isinstance(outcome, httpx.RequestError):
        error = FaninError(f"{outcome.request.url}: no answer: {outcome or type(outcome).__name__}")
        error.__cause__ = outcome
        return error
    try:
        data = outcome.json()
        problem = _pick(Problem, data | {"errors": tuple(_pick(Fault, fault) for fault in data.get("errors") or ())})
    except (ValueError, TypeError, AttributeError):
        problem = Problem("about:blank", outcome.reason_phrase, outcome.status_code, outcome.text[:200])
    return ProblemError(problem)


def _read(read: Callable[[httpx.Response], _T], response: httpx.Response) -> _T:
    try:
        return read(response)
    except (ValueError, TypeError, KeyError) as error:
        raise FaninError(f"{response.url}: the answer is not one of a Fanin server: {error!r}") from error


def _read_answer(response: httpx.Response) -> Answer:
    data = response.json()
    predictions = [
        _pick(Prediction, prediction | {"labels": [_pick(LabelScore, label) for label in prediction["labels"]]})
        for prediction in data["predictions"]
    ]
    parts = (part.strip().partition(";dur=") for part in response.headers.get("Server-Timing", "").split(",") if part)
    return _pick(Answer, data | {"predictions": predictions, "timing_ms": {name: float(ms) for name, _, ms in parts}})


def _read_labels(response: httpx.Response) -> list[Label]:
    return [_pick(Label, label) for label in response.json()["labels"]]


def _read_info(response: httpx.Response) -> Info:
    data = response.json()
    return _pick(Info, data | {"limits": _pick(Limits, data["limits"])})


def _pick(kind: type[_T], data: Mapping[str, Any]) -> _T:
    """A dataclass from JSON; fields that a newer server adds are passed over. TypeError when one is missing."""
    return kind(**{field.name: data[field.name] for field in fields(kind) if field.name in data})  # type: ignore[arg-type]
