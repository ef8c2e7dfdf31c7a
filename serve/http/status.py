"""What is served and how it is: health, /info, /metrics."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from serve.http import schema
from serve.http.problems import UNREADY, Problem, responses
from serve.metrics import versions
from serve.service import NotReady, Service

router = APIRouter()


@router.get("/health", summary="The same as /readyz", response_model=schema.Status, responses=responses(s503=UNREADY))
@router.get("/readyz", summary="Whether texts are predicted", response_model=schema.Status, responses=responses(s503=UNREADY))
async def ready(request: Request) -> Any:
    service: Service = request.app.state.service
    if service.status != "ready":
        raise NotReady(service.status)
    return {"status": "ready"}


@router.get(
    "/livez",
    summary="Whether the process and its engine are alive",
    response_model=schema.Status,
    responses=responses(s503="The engine is dead or stuck; the process should be restarted."),
)
async def live(request: Request) -> Any:
    if request.app.state.service.alive:
        return {"status": "alive"}
    raise Problem(503, "engine-stopped", "the engine is dead or stuck")


@router.get("/info", summary="Model and limits", response_model=schema.Info, responses=responses(s503=UNREADY))
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
            "max_filter_labels": settings.max_filter_labels,
            "max_body_bytes": settings.max_body_bytes,
            "timeout_ms": settings.timeout_ms,
        },
        "metrics": manifest.metrics,
        "versions": versions(),
    }


@router.get("/metrics", summary="For Prometheus", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    registry = request.app.state.service.metrics.registry
    # In a thread: the kernel may take milliseconds to add up the memory of a large process.
    return Response(await asyncio.to_thread(generate_latest, registry), media_type=CONTENT_TYPE_LATEST)
