"""The routes."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import Field
from starlette.types import Receive

from serve.answers import prediction
from serve.backend import Answer, ClientLeft, TooLong
from serve.http import docs, problems, schema
from serve.http.gateway import Gateway
from serve.http.problems import Problem, invalid, responses
from serve.labels import find, search
from serve.metrics import versions
from serve.scheduler import Closed, DeadlineExceeded, QueueFull
from serve.service import NotReady, Service

_PAGE = Path(__file__).with_name("page.html").read_bytes()
_PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
_CLIENT_CLOSED_REQUEST = 499  # nginx's code; nobody is left to read it, it is for the metrics


def create_app(service: Service) -> Gateway:
    """The ASGI application around a service, which may still be loading."""
    app = FastAPI(
        title="Fanin",
        description="The best labels for a text, out of millions: a text classifier with a sparse output layer.",
        version=versions()["fanin"],
        openapi_url=None,  # serve.http.docs has it
    )
    app.state.service = service
    app.include_router(_router)
    app.include_router(docs.router)
    problems.install(app)
    app.add_exception_handler(NotReady, _on_not_ready)
    return Gateway(app, service.metrics, service.settings.max_body_bytes)


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


_router = APIRouter(route_class=_JsonRoute)
_UNREADY = "No predictions are taken now: the model is loading, the server is draining, or its engine stopped."


@_router.post(
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
        s503=_UNREADY,
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
        raise _try_again(429, "queue-full", "the queue is full", error.retry_after_s) from None
    except DeadlineExceeded:
        raise Problem(504, "deadline-exceeded", "the time given ran out before the answer was ready") from None
    except Closed as error:
        raise _try_again(503, "engine-stopped", str(error)) from None
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


@_router.get("/health", summary="The same as /readyz", response_model=schema.Status, responses=responses(s503=_UNREADY))
@_router.get("/readyz", summary="Whether texts are predicted", response_model=schema.Status, responses=responses(s503=_UNREADY))
async def ready(request: Request) -> Any:
    service: Service = request.app.state.service
    if service.status != "ready":
        raise NotReady(service.status)
    return {"status": "ready"}


@_router.get(
    "/livez",
    summary="Whether the process and its engine are alive",
    response_model=schema.Status,
    responses=responses(s503="The engine is dead or stuck; the process should be restarted."),
)
async def live(request: Request) -> Any:
    if request.app.state.service.alive:
        return {"status": "alive"}
    raise Problem(503, "engine-stopped", "the engine is dead or stuck")


@_router.get("/info", summary="Model and limits", response_model=schema.Info, responses=responses(s503=_UNREADY))
async def info(request: Request) -> Any:
    service: Service = request.app.state.service
    engine, settings = service.engine, service.settings
    manifest = engine.bundle.manifest
    return {
        "model": manifest.name,
        "model_version": engine.version,
        "created": manifest.created,
        "labels": manifest.labels,
        "width": manifest.width,
        "blocks": [
            {
                "connectivity": block.connectivity,
                "dtype": block.dtype,
                "fan_in": block.fan_in,
                "groups": block.groups,
                "group_size": block.group_size,
            }
            for block in manifest.blocks
        ],
        "bytes": manifest.component_nbytes,
        "threads": engine.threads,
        "limits": {
            "max_length": engine.max_length,
            "max_inputs": settings.max_inputs,
            "max_top_k": settings.max_top_k,
            "max_body_bytes": settings.max_body_bytes,
            "timeout_ms": settings.timeout_ms,
        },
        "metrics": manifest.metrics,
        "versions": versions(),
    }


@_router.get(
    "/labels",
    summary="Labels by id, or by part of their name",
    response_model=schema.Labels,
    responses=responses(s404="No label has one of the ids.", s422="Neither or both of ids and query are given.", s503=_UNREADY),
)
async def labels(
    request: Request,
    ids: Annotated[
        list[Annotated[str, Field(min_length=1)]] | None,
        Query(description="Label ids, separated by commas or given one by one."),
    ] = None,
    query: Annotated[
        str | None,
        Query(min_length=1, description="Part of the name, ASCII case ignored. Names that begin with it come first."),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="Labels to give for a query.")] = 20,
) -> Any:
    table = request.app.state.service.engine.bundle.labels
    if query is not None and ids is None:
        found = await asyncio.to_thread(search, table.names, query, limit)
    elif ids is not None and query is None:
        wanted = ",".join(ids).split(",")
        places = await asyncio.to_thread(find, table.ids, wanted)
        if unknown := [repr(text) for text in wanted if text not in places]:
            raise Problem(404, "unknown-label", f"there is no label with id {', '.join(unknown)}")
        found = [places[text] for text in wanted]
    else:
        raise invalid(("ids", "give either ids or query"))
    return {"labels": [{"id": table.id(label), "name": table.name(label)} for label in found]}


@_router.get("/metrics", summary="For Prometheus", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    return Response(generate_latest(request.app.state.service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@_router.get("/", include_in_schema=False)
async def page() -> Response:
    return Response(_PAGE, media_type="text/html", headers={"Content-Security-Policy": _PAGE_POLICY})


async def _on_not_ready(request: Request, error: Exception) -> Response:
    assert isinstance(error, NotReady)
    return _try_again(503, error.status, str(error)).response(request.state.id)


def _try_again(status: int, kind: str, detail: str, after_s: float = 1) -> Problem:
    return Problem(status, kind, detail, headers={"Retry-After": str(min(60, max(1, math.ceil(after_s))))})


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
