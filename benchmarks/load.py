"""HTTP load from one light process: keep-alive connections, requests built beforehand. `benchmarks.serve` starts it.

    python -m benchmarks.load < plan.json        a Plan as JSON; prints a summary as JSON

Closed loop: each client sends its next request when the last one is answered. Open loop: requests are due at a constant rate,
whatever the server does, and latency counts from when a request was due; so a server that stalls cannot hide it.
"""

from __future__ import annotations

import asyncio
import gc
import json
import re
import signal
import sys
import time
from array import array
from collections import deque
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 99, 99.9)
LOST, REFUSED, UNANSWERED = "lost", "refused", "unanswered"
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection: *close\r\n", re.IGNORECASE)
_UNAVAILABLE = 503


@dataclass(frozen=True)
class Plan:
    """What to send.

    bodies   JSON bodies, sent in turn          clients  closed loop of so many, or
    seconds  how long requests are sent, unless SIGTERM ends it before
                                                rate     open loop of so many requests a second
    warm_up_s    sent before that and not counted
    patience_s   how long to wait for the last answers
    """

    host: str
    port: int
    path: str
    bodies: list[str]
    seconds: float
    clients: int = 0
    rate: float = 0
    warm_up_s: float = 1
    patience_s: float = 60


class _Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request on it."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._answer = b""
        self.transport: asyncio.Transport
        self.due = self.sent = 0.0
        self.waiting = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def send(self, due: float) -> None:
        self.due, self.sent, self.waiting = due, time.perf_counter(), True
        self.transport.write(next(self._load.requests))

    def data_received(self, data: bytes) -> None:
        self._answer += data
        end = self._answer.find(b"\r\n\r\n")
        if end < 0:
            return
        length = _CONTENT_LENGTH.search(self._answer, 0, end)
        if length is None:
            raise ValueError(f"an answer without Content-Length: {self._answer[:end]!r}")
        if len(self._answer) < end + 4 + int(length[1]):
            return
        code, stays = int(self._answer[9:12]), not _CLOSE.search(self._answer, 0, end + 2)
        self._answer, self.waiting = b"", False
        self._load.answered(self, code, stays)

    def connection_lost(self, error: Exception | None) -> None:
        self._load.disconnected(self)


class Load:
    def __init__(self, plan: Plan) -> None:
        self.requests = cycle([_request(plan, body.encode()) for body in plan.bodies])
        self._plan = plan
        self._idle: list[_Connection] = []
        self._backlog: deque[float] = deque()  # open loop: when requests were due that wait for a connection
        self._open: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._due, self._sent, self._took, self._codes = array("d"), array("d"), array("d"), array("h")
        self._lost = self._refused = 0
        self._start = self._end = 0.0

    async def run(self) -> dict[str, Any]:
        plan, began = self._plan, time.perf_counter()
        cpu = time.process_time()
        self._start = began + plan.warm_up_s
        self._end = self._start + plan.seconds
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stop)
        if plan.clients:
            await asyncio.gather(*(self._connect(began) for _ in range(plan.clients)))
        else:
            await self._pace(began)
        while time.perf_counter() < self._end:
            await asyncio.sleep(max(0.0, min(0.1, self._end - time.perf_counter())))
            if plan.clients and not self._open:
                self._stop()  # the server has gone
        stop = time.perf_counter() + plan.patience_s
        while (self._tasks or any(connection.waiting for connection in self._open)) and time.perf_counter() < stop:
            await asyncio.sleep(0.01)
        unanswered = len(self._backlog) + len(self._tasks) + sum(connection.waiting for connection in self._open)
        return self._summary(unanswered, time.process_time() - cpu)

    def answered(self, connection: _Connection, code: int, stays: bool) -> None:
        now = time.perf_counter()
        self._due.append(connection.due)
        self._sent.append(connection.sent)
        self._took.append(now - connection.due)
        self._codes.append(code)
        # A client that is told 503 leaves, too: it could only be cut off.
        if not stays or (self._plan.clients and code == _UNAVAILABLE):
            connection.transport.close()
        elif self._plan.clients:
            if now < self._end:
                connection.send(now)
        elif self._backlog:
            connection.send(self._backlog.popleft())
        else:
            self._idle.append(connection)

    def disconnected(self, connection: _Connection) -> None:
        self._open.discard(connection)
        self._lost += connection.waiting
        if connection in self._idle:
            self._idle.remove(connection)

    def _stop(self) -> None:
        self._end = min(self._end, time.perf_counter())

    async def _pace(self, began: float) -> None:
        number, due = 0, began
        while due < self._end:
            now = time.perf_counter()
            while due <= now and due < self._end:
                if self._idle:
                    self._idle.pop().send(due)
                else:
                    self._backlog.append(due)
                    task = asyncio.create_task(self._connect())
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                number += 1
                due = began + number / self._plan.rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))

    async def _connect(self, due: float | None = None) -> None:
        """Opens a connection and sends a request: one due at `due`, or the oldest that waits for a connection."""
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(lambda: _Connection(self), self._plan.host, self._plan.port)
        except OSError:
            self._refused += 1
            if self._backlog:
                self._backlog.popleft()
            return
        self._open.add(connection)
        if due is not None:
            connection.send(due)
        elif self._backlog:
            connection.send(self._backlog.popleft())
        else:
            self._idle.append(connection)

    def _summary(self, unanswered: int, cpu_s: float) -> dict[str, Any]:
        due, sent, took, codes = (np.array(column) for column in (self._due, self._sent, self._took, self._codes))
        counted = due >= self._start
        done = due + took
        in_time = (codes == 200) & (done >= self._start) & (done <= self._end)
        summary: dict[str, Any] = {
            "requests": int(counted.sum()) + unanswered + self._lost + self._refused,
            "requests_per_s": float(in_time.sum() / max(1e-9, self._end - self._start)),
            "errors": {
                name: count for name, count in ((LOST, self._lost), (REFUSED, self._refused), (UNANSWERED, unanswered)) if count
            },
            "codes": {},
            "sent_late_ms": latencies((sent - due)[counted]),
            "answered": len(codes),
            "client_cpu_s": cpu_s,
        }
        for code in np.unique(codes[counted]):
            taken = took[counted & (codes == code)]
            summary["codes"][str(code)] = {"count": len(taken)} | latencies(taken)
        return summary


def latencies(seconds: np.ndarray) -> dict[str, float]:
    """Percentiles and the maximum, in milliseconds; nothing for no requests."""
    if not len(seconds):
        return {}
    values = np.percentile(seconds, PERCENTILES, method="higher") * 1e3
    return {f"p{p}_ms": float(value) for p, value in zip(PERCENTILES, values, strict=True)} | {
        "max_ms": float(seconds.max() * 1e3)
    }


def _request(plan: Plan, body: bytes) -> bytes:
    head = f"POST {plan.path} HTTP/1.1\r\nHost: {plan.host}:{plan.port}\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


def main() -> None:
    plan = Plan(**json.load(sys.stdin))
    gc.disable()  # it keeps little, and a collection would count as the server's latency
    json.dump(asyncio.run(Load(plan).run()), sys.stdout)


if __name__ == "__main__":
    main()
