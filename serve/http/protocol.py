"""HTTP on a connection: uvicorn's protocol, with limits on what a client can hold and errors as problems.

What a client may do to a connection, and what it gets:

- what is no HTTP, or ends in the middle: 400; a head of more than 32 KiB: 431; both close the connection
- a head that does not come within the client timeout: 408 and closed; a connection on which nothing comes: closed
- an answer that is not read for as long: closed
- more connections than there may be: 503 with Retry-After, and closed
- more than 16 requests sent ahead: those are answered, then it is closed
- closing its half of the connection means that the client has left: what it waits for is dropped
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import httptools
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serve import logs
from serve.http.gateway import new_id
from serve.http.problems import Problem, try_again
from serve.metrics import Metrics
from serve.settings import Settings

_log = logging.getLogger("fanin.serve")
_MAX_HEAD_BYTES = 32 << 10
_MAX_AHEAD = 16  # requests waiting on one connection
_SURPLUS_TIMEOUT_S = 1  # for a connection that only gets a 503
_KEEP_ALIVE_S = 75  # longer than load balancers keep idle connections, so that they are the ones to close them
_FLUSH_TIMEOUT_S = 5  # at the end, for answers that are ready, to clients that read slowly


def configuration(app: ASGIApp, settings: Settings, metrics: Metrics) -> uvicorn.Config:
    """How a listener of ours serves an app."""
    protocol: Callable[..., asyncio.Protocol] = partial(_Protocol, settings=settings, metrics=metrics)
    return uvicorn.Config(
        app,
        http=protocol,  # type: ignore[arg-type]  # it only calls it
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_FLUSH_TIMEOUT_S,
    )


class _TooMuch(Exception):
    """Raised in the parser's callbacks to stop it."""


class _Protocol(HttpToolsProtocol):
    def __init__(self, *arguments: Any, settings: Settings, metrics: Metrics, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._metrics = metrics
        self._timeout_s: float = settings.client_timeout_s
        self._max_connections = settings.max_connections
        # The gateway counts what is in the body. This counts what arrives: framing and trailers too, and what nobody reads.
        self._max_body_bytes = _MAX_HEAD_BYTES + 8 * settings.max_body_bytes
        self._in_message = self._in_head = False
        self._head_bytes = self._body_bytes = 0
        self._deaf = False  # nothing that still comes is read
        self._arrival: asyncio.TimerHandle | None = None  # by when the request under way must be here
        self._stall: asyncio.TimerHandle | None = None  # by when the client must have read on

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # so that pause_writing tells of any byte that the client does not take
        if len(self.connections) > self._max_connections:
            self.app, self._timeout_s = _busy, _SURPLUS_TIMEOUT_S
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._arrival, self._stall):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:  # answered as if it had not asked; what follows may be another protocol
            self._deaf = True
            self.cycle.keep_alive = False
        except httptools.HttpParserError:
            if self._head_bytes > _MAX_HEAD_BYTES:
                self._refuse_head()
            else:
                self._refuse(Problem(400, "bad-request", "this is not a request in HTTP/1.1 or HTTP/1.0"))
        else:
            if self._in_head:
                self._head_bytes += len(data)
                if self._head_bytes > _MAX_HEAD_BYTES:
                    self._refuse_head()
            elif self._in_message:
                self._body_bytes += len(data)
                if self._body_bytes > self._max_body_bytes:
                    self._refuse(Problem(413, "body-too-large", "the body is far too large, or in too many pieces"))

    def eof_received(self) -> None:
        if self._in_message:
            self._refuse(Problem(400, "bad-request", "the request ended before it was complete"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_message = self._in_head = True
        self._head_bytes = self._body_bytes = 0
        self._await_request()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # trailers are dropped: nothing reads them, and headers are settled before the body
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if self._head_bytes > _MAX_HEAD_BYTES or len(self.pipeline) == _MAX_AHEAD:
            raise _TooMuch
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_message = False
        if self._arrival is not None:
            self._arrival.cancel()
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()

    def _await_request(self) -> None:
        if self._arrival is not None:
            self._arrival.cancel()
        self._arrival = self.loop.call_later(self._timeout_s, self._on_late)

    def _on_late(self) -> None:
        if self._answering:  # the next request can wait, and a body has its own clock (serve.http.gateway)
            self._await_request()
        elif self._in_head:
            self._refuse(Problem(408, "request-timeout", f"the request's head did not come within {self._timeout_s:g} seconds"))
        else:
            self.transport.close()

    def _await_reading(self) -> None:
        self._stall = self.loop.call_later(self._timeout_s, self._on_stall, self.transport.get_write_buffer_size())

    def _on_stall(self, unread: int) -> None:
        if self.transport.get_write_buffer_size() < unread:
            self._await_reading()
        else:
            self.transport.abort()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse_head(self) -> None:
        self._refuse(Problem(431, "head-too-large", f"the request's line and headers may have {_MAX_HEAD_BYTES} bytes"))

    def _refuse(self, problem: Problem) -> None:
        """Ends the connection: with the problem as its last answer if it is this request's turn to be answered."""
        self._deaf = True
        if self._answering and (self.pipeline or not self.cycle.more_body):
            self.cycle.keep_alive = False  # earlier requests get their answers first
            return
        if self._answering:  # it is about the body of the request that the app sees; to the app, its client has left
            if not self.cycle.response_started:
                self._write(problem, new_id())
        elif self.cycle is None or not self.cycle.more_body:  # otherwise it is about what follows an early answer
            id = new_id()
            self._write(problem, id)
            self._metrics.requests.labels("unmatched", problem.status).inc()
            client = self.client[0] if self.client else None
            logs.request(id=id, method="-", route="unmatched", code=problem.status, seconds=0, client=client)
        self.transport.close()

    def _write(self, problem: Problem, id: str) -> None:
        response = problem.response({"state": {"id": id}, "path": ""})
        headers = [*response.raw_headers, (b"x-request-id", id.encode()), (b"connection", b"close")]
        head = b"".join(b"%s: %s\r\n" % header for header in headers)
        self.transport.write(STATUS_LINE[problem.status] + head + b"\r\n" + bytes(response.body))


async def _busy(scope: Scope, receive: Receive, send: Send) -> None:
    """The app of a connection too many."""
    problem = try_again(503, "too-many-connections", "there are too many connections")
    scope["state"]["id"] = new_id()
    response = problem.response(scope)
    response.headers["X-Request-Id"], response.headers["Connection"] = scope["state"]["id"], "close"
    await response(scope, receive, send)
