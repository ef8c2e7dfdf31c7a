"""What the routes that predict have in common: asking the service, what it may refuse, and the reply around its answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from fastapi import FastAPI, Request, Response
from starlette.types import Receive

from serve.backend import Answer, ClientLeft, TooLong
from serve.http.problems import CLIENT_CLOSED_REQUEST, UNREADY, Problem, invalid, try_again
from serve.labels import LabelFilter, NoLabelLeft, UnknownLabels
from serve.scheduler import Closed, DeadlineExceeded, Priority, QueueFull
from serve.service import NotReady, Service

_NAMED = 8  # unknown labels in an error, at most
REFUSALS = {
    "s408": "The body did not come in time.",
    "s413": "The body is too large.",
    "s429": "The queue is full; Retry-After says when to come back.",
    "s500": "The prediction failed.",
    "s503": UNREADY,
    "s504": "The time given ran out.",
}


async def answer(
    request: Request,
    texts: Sequence[str],
    *,
    k: int,
    truncate: bool,
    timeout_ms: int | None,
    labels: LabelFilter | None = None,
    priority: Priority = "normal",
    inputs: str = "/inputs",
    top_k: str = "/top_k",
) -> Answer:
    """The service's answer. 422 for what is beyond its limits; `inputs` and `top_k` point to where the request says them."""
    service: Service = request.app.state.service
    settings = service.settings
    if len(texts) > settings.max_inputs:
        raise invalid((inputs, f"has {len(texts)} texts, at most {settings.max_inputs} are taken"))
    if k > settings.max_top_k:
        raise invalid((top_k, f"is {k}, at most {settings.max_top_k} labels are given"))
    if labels is not None and len(labels) > settings.max_filter_labels:
        raise invalid(("/labels", f"has {len(labels)} ids, at most {settings.max_filter_labels} are taken"))
    try:
        found = await service.predict(
            texts,
            k=k,
            truncate=truncate,
            timeout_s=min(timeout_ms or settings.timeout_ms, settings.timeout_ms) / 1000,
            client_left=lambda: _disconnected(request.receive),
            labels=labels,
            priority=priority,
        )
    except TooLong as error:
        raise invalid(*((f"{inputs}/{i}", f"is longer than {error.max_length} tokens") for i in error.positions)) from None
    except UnknownLabels as error:
        faults = [(f"/labels/{name}/{i}", f"no label has id {text[:80]!r}") for name, i, text in error.unknown[:_NAMED]]
        if more := len(error.unknown) - len(faults):
            faults.append(("/labels", f"{more} more ids are of no label"))
        raise invalid(*faults) from None
    except NoLabelLeft as error:
        raise invalid(("/labels", str(error))) from None
    request.state.answer = found
    return found


def reply(request: Request, found: Answer, render: Callable[[], Response]) -> Response:
    """The response that `render` makes of the answer, with Server-Timing."""
    began = time.perf_counter()
    response = render()
    ended = time.perf_counter()
    request.app.state.service.metrics.stage["serialize"].observe(ended - began)
    parts = {
        "tokenize": found.tokenize_s,
        "queue": found.queue_s,
        "encode": found.encode_s,
        "head": found.head_s,
        "total": ended - request.state.began,
    }
    response.headers["Server-Timing"] = ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in parts.items())
    return response


def install(app: FastAPI) -> None:
    """Makes a problem of each way in which the service refuses or gives up."""
    for kind in (NotReady, QueueFull, DeadlineExceeded, Closed, ClientLeft):
        app.add_exception_handler(kind, _on_refusal)


async def _on_refusal(request: Request, error: Exception) -> Response:
    match error:
        case NotReady():
            problem = try_again(503, error.status, str(error))
        case Closed():
            problem = try_again(503, "engine-stopped", str(error))
        case QueueFull():
            request.app.state.service.metrics.rejected.labels("queue-full").inc()
            problem = try_again(429, "queue-full", "the queue is full", error.retry_after_s)
        case DeadlineExceeded():
            problem = Problem(504, "deadline-exceeded", "the time given ran out before the answer was ready")
        case _:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
    return problem.response(request.scope)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
