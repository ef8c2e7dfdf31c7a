"""POST /predict."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from starlette.types import Receive

from serve.answers import prediction
from serve.backend import Answer, ClientLeft, TooLong
from serve.http import schema
from serve.http.problems import UNREADY, Problem, invalid, responses, try_again
from serve.scheduler import Closed, DeadlineExceeded, QueueFull
from serve.service import Service

_CLIENT_CLOSED_REQUEST = 499  # nginx's code; nobody is left to read it, it is for the metrics


class _JsonRoute(APIRoute):
    """Refuses bodies that do not say they are JSON before anything reads them."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def checked(request: Request) -> Response:
            given = request.headers.get("content-type", "")
            if self.body_field is not None and given.partition(";")[0].strip().lower() != "application/json":
                raise Problem(415, "unsupported-media-type", f"the body is {given or 'of no type'}, expected application/json")
            return await handle(request)

        return checked


router = APIRouter(route_class=_JsonRoute)


@router.post(
    "/predict",
    summary="The best labels for texts",
    response_model=schema.PredictResponse,
    responses=responses(
        s400="The body is not JSON.",
        s413="The body is too large.",
        s415="The body is not of type application/json.",
        s422="A field is missing, unknown, empty or out of bounds.",
        s429="The queue is full; Retry-After says when to come back.",
        s500="The prediction failed.",
        s503=UNREADY,
        s504="The time given ran out.",
    ),
)
async def predict(body: schema.PredictRequest, request: Request) -> Response:
    service: Service = request.app.state.service
    settings, metrics = service.settings, service.metrics
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    if len(texts) > settings.max_inputs:
        raise invalid(("/inputs", f"has {len(texts)} texts, at most {settings.max_inputs} are taken"))
    if body.top_k > settings.max_top_k:
        raise invalid(("/top_k", f"is {body.top_k}, at most {settings.max_top_k} labels are given"))
    try:
        answer = await service.predict(
            texts,
            k=body.top_k,
            truncate=body.truncate,
            timeout_s=min(body.timeout_ms or settings.timeout_ms, settings.timeout_ms) / 1000,
            client_left=lambda: _disconnected(request.receive),
        )
    except TooLong as error:
        raise invalid(*((f"/inputs/{i}", f"is longer than {error.max_length} tokens") for i in error.positions)) from None
    except QueueFull as error:
        metrics.rejected.labels("queue-full").inc()
        raise try_again(429, "queue-full", "the queue is full", error.retry_after_s) from None
    except DeadlineExceeded:
        raise Problem(504, "deadline-exceeded", "the time given ran out before the answer was ready") from None
    except Closed as error:
        raise try_again(503, "engine-stopped", str(error)) from None
    except ClientLeft:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    began = time.perf_counter()
    content = _render(answer, body, request.state.id)
    ended = time.perf_counter()
    metrics.stage["serialize"].observe(ended - began)
    parts = {
        "tokenize": answer.tokenize_s,
        "queue": answer.queue_s,
        "encode": answer.encode_s,
        "head": answer.head_s,
        "total": ended - request.state.began,
    }
    timing = ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in parts.items())
    return Response(content, media_type="application/json", headers={"Server-Timing": timing})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _render(answer: Answer, body: schema.PredictRequest, request_id: str) -> bytes:
    """The JSON of a schema.PredictResponse, written without building one: this runs for every request."""
    bundle = answer.engine.bundle
    response = {
        "id": request_id,
        "model": bundle.manifest.name,
        "model_version": answer.engine.version,
        "predictions": [
            prediction(
                tokens,
                labels,
                logits,
                bundle.labels,
                scores=body.scores,
                min_score=body.min_score,
                names=body.return_names,
            )
            for tokens, (labels, logits) in zip(answer.tokens, answer.best, strict=True)
        ],
        "usage": {"inputs": len(answer.tokens), "tokens": sum(len(tokens.ids) for tokens in answer.tokens)},
    }
    return json.dumps(response, ensure_ascii=False, separators=(",", ":")).encode()
