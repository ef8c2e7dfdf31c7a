"""Pages of other origins: which may call this server."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.http.problems import Problem


class Cors(CORSMiddleware):
    """Starlette's, for our methods and headers. What it refuses is a problem, too."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=[
                "Authorization", "Content-Type", "Inference-Header-Content-Length", "traceparent", "X-API-Key", "X-Request-Id"
            ],
            expose_headers=["Inference-Header-Content-Length", "Retry-After", "Server-Timing", "X-Request-Id"],
        )  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if scope["method"] == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers:
            preflight = self.preflight_response(headers)
            if preflight.status_code != 200:
                refusal = Problem(preflight.status_code, "cors-refused", bytes(preflight.body).decode())
                return await refusal.response(scope)(scope, receive, send)
        await super().__call__(scope, receive, send)
