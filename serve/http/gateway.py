"""The outermost ASGI layer: request ids, limits of the body, metrics and log, and the answer to whatever nobody else caught."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from itertools import count
from secrets import token_hex

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve import logs
from serve.http.problems import CLIENT_CLOSED_REQUEST
from serve.service import Service
from serve.telemetry import Tracing

_log = logging.getLogger("fanin.serve")
_FIT_FOR_ID = re.compile(rb"[\w.:/+=@-]{1,128}", re.ASCII)  # what may go into headers and logs as it is
_process, _numbers = token_hex(8), count(1)


def new_id() -> str:
    """Unique without a system call: this process's random part and a number."""
    return f"{_process}-{next(_numbers):08x}"


class Gateway:
    """Wraps the app. In the scope's state it leaves the request's `id` and when it `began` (time.perf_counter); the app may
    leave an `answer` there (serve.backend.Answer)."""

    def __init__(self, app: ASGIApp, service: Service, tracing: Tracing | None = None) -> None:
        self._app, self._service, self._metrics, self._tracing = app, service, service.metrics, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        method = scope["method"]
        if method == "HEAD":  # as GET for the app; the server leaves the body out
            scope = {**scope, "method": "GET"}
        exchange = _Exchange(scope, receive, send, self._service)
        self._metrics.requests_in_progress.inc()
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except Exception:
            _log.exception("request %s failed", exchange.id)
            if exchange.code is None:
                raise
        finally:
            ended = time.perf_counter()
            route = getattr(scope.get("route"), "path", "unmatched")
            code = exchange.code or CLIENT_CLOSED_REQUEST
            answer = scope["state"].pop("answer", None)  # uvicorn keeps the scope until the connection's next request
            self._metrics.requests_in_progress.dec()
            self._metrics.requests.labels(route, code).inc()
            self._metrics.request_duration.labels(route).observe(ended - exchange.began)
            logs.request(
                id=exchange.id,
                method=method,
                route=route,
                code=code,
                seconds=ended - exchange.began,
                inputs=len(answer.tokens) if answer else 0,
                tokens=sum(len(text.ids) for text in answer.tokens) if answer else 0,
                client=scope["client"][0] if scope.get("client") else None,
            )
            if self._tracing:
                self._tracing.record(scope, method, route, code, exchange.began, ended, answer)


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, service: Service) -> None:
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        self.id = given.decode() if _FIT_FOR_ID.fullmatch(given) else new_id()
        self.began = time.perf_counter()
        self.code: int | None = None
        self._receive, self._send, self._service = receive, send, service
        self._max_body_bytes = self._room = service.settings.max_body_bytes
        self._timeout_s = service.settings.client_timeout_s
        self._late_at = asyncio.get_running_loop().time() + self._timeout_s
        self._announced = int(headers.get(b"content-length", 0))
        self._complete = False  # the body
        scope.setdefault("state", {}).update(id=self.id, began=self.began)

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        # Too large a body is refused by its announced length before a byte of it is read, or while it comes in chunks.
        if self._announced > self._max_body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout_at(self._late_at):
                message = await self._receive()
        except TimeoutError:
            detail = f"the body did not come within {self._timeout_s} seconds"
            raise HTTPException(408, detail, headers={"Connection": "close"}) from None
        if message["type"] != "http.request":
            raise HTTPException(CLIENT_CLOSED_REQUEST)
        self._room -= len(message.get("body", b""))
        if self._room < 0:
            raise self._too_large()
        self._complete = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.code = message["status"]
            own = [(b"x-request-id", self.id.encode()), (b"x-content-type-options", b"nosniff")]
            if self._service.draining:
                own.append((b"connection", b"close"))
            message["headers"] = [*message.get("headers", ()), *own]
        await self._send(message)

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the body may have {self._max_body_bytes} bytes")
