"""The load generator counts every request once, from when it was due, whatever the server does."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from benchmarks.load import Load, Plan

Answer = Callable[[asyncio.StreamWriter, int], Awaitable[None]]


def run(answer: Answer, bodies: list[str] | None = None, **load: Any) -> dict[str, Any]:
    """The summary of a load on a server that leaves request number n of a connection to `answer(writer, n)`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), contextlib.closing(writer):
            number = 0
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"POST /predict HTTP/1.1\r\n")
                length = re.search(rb"Content-Length: (\d+)\r\n", head)
                assert length is not None
                seen.add((await reader.readexactly(int(length[1]))).decode())
                await answer(writer, number)
                number += 1

    async def main() -> dict[str, Any]:
        server = await asyncio.start_server(serve, "127.0.0.1")
        port = server.sockets[0].getsockname()[1]
        plan = {"warm_up_s": 0.0, "patience_s": 0.3, "bodies": bodies or ["{}"], "path": "/predict", "host": "127.0.0.1"}
        try:
            return await Load(Plan(**plan | {"port": port} | load)).run()
        finally:
            server.close()

    seen: set[str] = set()
    summary = asyncio.run(main())
    assert seen <= set(bodies or ["{}"])
    return summary


def reply(writer: asyncio.StreamWriter, code: int = 200) -> None:
    writer.write(b"HTTP/1.1 %d Whatever\r\ncontent-length: 2\r\n\r\n" % code)
    writer.write(b"{}")


async def ok(writer: asyncio.StreamWriter, number: int) -> None:
    await asyncio.sleep(0.01)
    reply(writer)


def test_closed_loop_keeps_each_client_at_one_request_at_a_time() -> None:
    summary = run(ok, ["{}", '{"inputs": "ä"}'], clients=3, seconds=0.5)
    count = summary["codes"]["200"]["count"]
    assert 3 <= count <= 3 * 51
    assert summary["requests"] == summary["answered"] == count
    assert summary["errors"] == {}
    assert summary["codes"]["200"]["p50_ms"] >= 10
    assert summary["requests_per_s"] <= 2 * count


def test_open_loop_sends_at_its_rate_and_counts_waiting_for_a_server_that_stalls() -> None:
    stalled = asyncio.Event()

    async def stall_once(writer: asyncio.StreamWriter, number: int) -> None:
        if not stalled.is_set():
            stalled.set()
            await asyncio.sleep(0.1)
            time.sleep(0.4)  # the event loop of both: nothing can be sent nor answered
        reply(writer)

    summary = run(stall_once, rate=100, seconds=1)
    assert summary["codes"]["200"]["count"] == summary["requests"] == 100
    assert summary["codes"]["200"]["p90_ms"] > 200  # a closed loop would have one slow request


def test_answers_are_told_apart_by_their_codes() -> None:
    async def answer(writer: asyncio.StreamWriter, number: int) -> None:
        await asyncio.sleep(0.005)
        reply(writer, 429 if number % 3 else 200)

    codes = run(answer, clients=2, seconds=0.3)["codes"]
    assert codes.keys() == {"200", "429"}
    assert codes["429"]["count"] >= codes["200"]["count"]


def test_a_client_that_is_told_503_leaves() -> None:
    async def answer(writer: asyncio.StreamWriter, number: int) -> None:
        reply(writer, 503 if number == 2 else 200)

    summary = run(answer, clients=4, seconds=5)  # and with the last of them the load ends
    assert {code: facts["count"] for code, facts in summary["codes"].items()} == {"200": 8, "503": 4}
    assert summary["errors"] == {}


def test_connections_cut_off_before_the_answer_are_lost() -> None:
    async def answer(writer: asyncio.StreamWriter, number: int) -> None:
        if number == 1:
            writer.close()
        else:
            reply(writer)

    summary = run(answer, clients=3, seconds=5)
    assert summary["errors"] == {"lost": 3}
    assert summary["requests"] == 6


@pytest.mark.parametrize("load", [{"clients": 2}, {"rate": 20}])
def test_requests_that_nobody_answers_are_counted(load: dict[str, int]) -> None:
    async def answer(writer: asyncio.StreamWriter, number: int) -> None:
        await asyncio.sleep(2)

    summary = run(answer, seconds=0.5, **load)
    assert summary["errors"] == {"unanswered": load.get("clients", 10)}
    assert summary["requests_per_s"] == 0


def test_a_server_that_does_not_listen_refuses() -> None:
    summary = asyncio.run(Load(Plan("127.0.0.1", 9, "/predict", ["{}"], seconds=0.2, rate=50, warm_up_s=0, patience_s=1)).run())
    assert summary["errors"] == {"refused": 10}
