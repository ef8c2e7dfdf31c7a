"""The application: every route, and what stands around them."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.types import ASGIApp

from serve.http import answering, docs, labels, open_inference, page, predict, problems, status
from serve.http.cors import Cors
from serve.http.gateway import Gateway
from serve.http.keys import ApiKeys, KeyCheck
from serve.metrics import versions
from serve.service import Service
from serve.telemetry import Tracing

_OPEN = {"/", "/health", "/livez", "/readyz", "/metrics", "/docs", "/openapi.json", "/v2/health/live", "/v2/health/ready"}


def create_app(service: Service, keys: ApiKeys, tracing: Tracing | None = None) -> Gateway:
    """The ASGI application around a service, which may still be loading."""
    app = FastAPI(
        title="Fanin",
        description=docs.DESCRIPTION,
        version=versions()["fanin"],
        openapi_url=None,  # serve.http.docs has it
        redirect_slashes=False,  # it would build addresses from whatever Host says
    )
    app.state.service = service
    for routes in (predict, labels, status, open_inference, docs, page):
        app.include_router(routes.router)
    problems.install(app)
    answering.install(app)
    docs.install(app, service.settings, keys, _is_open)
    checked: ASGIApp = KeyCheck(app, keys, _is_open)
    if origins := service.settings.cors_origin:
        checked = Cors(checked, origins)
    return Gateway(checked, service, tracing)


def _is_open(path: str) -> bool:
    """Whether a path needs no key: what probes, Prometheus and a browser ask for before anybody could give one."""
    return path in _OPEN or path.startswith(("/docs/", "/page/"))
