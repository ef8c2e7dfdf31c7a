"""The outermost ASGI layer: request ids, body limit, request metrics, and the answer to whatever nobody else caught."""

from __future__ import annotations

import logging
import re
import time
from itertools import count
from secrets import token_hex

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.metrics import Metrics

_log = logging.getLogger("fanin.serve")
_FIT_FOR_ID = re.compile(rb"[\w.:/+=@-]{1,128}", re.ASCII)  # what may go into headers and logs as it is
_process, _numbers = token_hex(8), count(1)


def _new_id() -> str:
    """Unique without a system call: this process's random part and a number."""
    return f"{_process}-{next(_numbers):08x}"


class Gateway:
    """Wraps the app. In the scope's state it leaves the request's `id` and when it `began` (time.perf_counter)."""

    def __init__(self, app: ASGIApp, metrics: Metrics, max_body_bytes: int) -> None:
        self._app, self._metrics, self._max_body_bytes = app, metrics, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if scope["method"] == "HEAD":  # as GET for the app; the server leaves the body out
            scope = {**scope, "method": "GET"}
        exchange = _Exchange(scope, receive, send, self._max_body_bytes)
        self._metrics.requests_in_progress.inc()
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except Exception:
            _log.exception("request %s failed", exchange.id)
            if exchange.code is None:
                raise
        finally:
            self._metrics.requests_in_progress.dec()
            route = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.requests.labels(route, exchange.code or 499).inc()
            self._metrics.request_duration.labels(route).observe(time.perf_counter() - exchange.began)


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_body_bytes: int) -> None:
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        self.id = given.decode() if _FIT_FOR_ID.fullmatch(given) else _new_id()
        self.began = time.perf_counter()
        self.code: int | None = None
        self._receive, self._send = receive, send
        self._max_body_bytes = self._room = max_body_bytes
        self._announced = int(headers.get(b"content-length", 0))
        scope.setdefault("state", {}).update(id=self.id, began=self.began)

    async def receive(self) -> Message:
        # Too large a body is refused by its announced length before a byte of it is read, or while it comes in chunks.
        if self._announced > self._max_body_bytes:
            raise self._too_large()
        message = await self._receive()
        if message["type"] == "http.request":
            self._room -= len(message.get("body", b""))
            if self._room < 0:
                raise self._too_large()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.code = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.id.encode())]
        await self._send(message)

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the body may have {self._max_body_bytes} bytes")
