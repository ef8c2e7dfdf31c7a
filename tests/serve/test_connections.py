"""What a client may do to a connection, on raw sockets."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.serve.harness import Local, Process, Serving
from tests.serve.test_behaviour import eventually

BODY = b'{"inputs": "a"}'
POST = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
WHOLE = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
LIVE = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"


@contextmanager
def connected(server: Process | Local, *data: bytes) -> Iterator[socket.socket]:
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port), timeout=20) as connection:
        for part in data:
            connection.sendall(part)
        yield connection


def answers(connection: socket.socket) -> list[tuple[int, dict[str, Any]]]:
    """Status and body of every answer until the server closes the connection."""
    received = b""
    while part := connection.recv(1 << 16):
        received += part
    found = []
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        lines = head.decode("ascii").lower().splitlines()
        headers = dict(line.split(": ", 1) for line in lines[1:])
        body, received = received[: int(headers["content-length"])], received[int(headers["content-length"]) :]
        found.append((int(lines[0].split()[1]), json.loads(body)))
        if "application/problem+json" in headers["content-type"]:
            assert found[-1][1]["request_id"] == headers["x-request-id"]
    return found


def statuses(connection: socket.socket) -> list[int]:
    return [status for status, _ in answers(connection)]


@pytest.mark.parametrize(
    "data",
    [
        b"\r\nhello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\na: b\0c\r\n\r\n",
        b"GET / HTTP/1.1\r\n folded: b\r\n\r\n",
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Content-Length: ten\r\n\r\n",
        POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n",
        POST + b"Content-Length: 15\r\nContent-Length: 16\r\n\r\n" + BODY,
        POST + b"Content-Length: 15\r\nTransfer-Encoding: chunked\r\n\r\n" + BODY,
        POST + b"Transfer-Encoding: chunked\r\n\r\nXX\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"F" * 20 + b"\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab0\r\n\r\n",
    ],
)
def test_what_is_not_http_is_400_and_the_end(server: Process, data: bytes) -> None:
    with connected(server, data) as connection:
        ((status, problem),) = answers(connection)
    assert (status, problem["type"]) == (400, "urn:fanin:problem:bad-request")


@pytest.mark.parametrize("data", [WHOLE[:10], WHOLE[:60], WHOLE[:-3], POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\na"])
def test_a_request_that_ends_in_the_middle_is_400(server: Process, data: bytes) -> None:
    with connected(server, data) as connection:
        connection.shutdown(socket.SHUT_WR)
        ((status, problem),) = answers(connection)
    assert (status, problem["detail"]) == (400, "the request ended before it was complete")


@pytest.mark.parametrize(
    "head",
    [b"GET /" + b"a" * 40_000, b"GET / HTTP/1.1\r\nx: " + b"a" * 40_000, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 8000],
    ids=["line", "one header", "many headers"],
)
@pytest.mark.parametrize("pieces", [1, 20])
def test_a_head_that_is_too_large_is_431_however_it_comes(server: Process, head: bytes, pieces: int) -> None:
    size = len(head) // pieces + 1
    with connected(server) as connection:
        for start in range(0, len(head), size):
            try:
                connection.sendall(head[start : start + size])
            except ConnectionError:  # it has heard enough
                break
            time.sleep(0.001)
        ((status, problem),) = answers(connection)
    assert (status, problem["type"]) == (431, "urn:fanin:problem:head-too-large")


def test_requests_may_be_sent_ahead_and_are_answered_in_order(server: Process) -> None:
    with connected(server, WHOLE * 3 + LIVE[:-2] + b"Connection: close\r\n\r\n") as connection:
        found = answers(connection)
    assert [status for status, _ in found] == [200] * 4
    assert ["predictions" in body for _, body in found] == [True, True, True, False]


def test_nobody_may_send_endlessly_many_ahead(server: Process) -> None:
    with connected(server, WHOLE * 500) as connection:
        found = statuses(connection)
    assert set(found) == {200}
    assert 16 <= len(found) < 500


@pytest.mark.parametrize("ahead", [1, 3])
def test_what_was_asked_before_garbage_is_answered(server: Process, ahead: int) -> None:
    with connected(server, WHOLE * ahead + b"\0garbage") as connection:
        assert statuses(connection) == [200] * ahead


def test_garbage_after_an_answer_is_400(server: Process) -> None:
    with connected(server, LIVE) as connection:
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
        connection.sendall(b"\0garbage")
        assert statuses(connection) == [400]


def test_an_offer_of_another_protocol_is_passed_over(server: Process) -> None:
    upgrade = LIVE[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    with connected(server, upgrade) as connection:
        assert statuses(connection) == [200]


def test_trailers_do_not_become_headers(server: Process) -> None:
    chunks = b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\nX-Request-Id: late\r\n\r\n"
    with connected(server, POST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + chunks) as connection:
        ((status, answer),) = answers(connection)
    assert status == 200
    assert answer["id"] != "late"


def test_a_slow_head_is_408_and_a_silent_connection_is_closed(serving: Serving) -> None:
    with serving(client_timeout_s=0.3) as local:
        with connected(local) as silent, connected(local, WHOLE[:30]) as slow:
            ((status, problem),) = answers(slow)
            assert (status, problem["type"]) == (408, "urn:fanin:problem:request-timeout")
            assert answers(silent) == []
        assert local.metric("requests_total", route="unmatched", code="408") == 1


def test_dripping_does_not_buy_time(serving: Serving) -> None:
    with serving(client_timeout_s=0.5) as local, connected(local) as connection:
        began = time.monotonic()
        with pytest.raises(ConnectionError):  # noqa: PT012
            for byte in WHOLE * 1000:
                connection.sendall(bytes([byte]))
                time.sleep(0.02)
                assert time.monotonic() < began + 20
        assert local.metric("requests_in_progress") == 0


@pytest.mark.parametrize(
    "data",
    [POST + b"Content-Length: 15\r\n\r\n" + BODY[:5], POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\na"],
    ids=["length", "chunked"],
)
def test_a_slow_body_is_408_and_holds_no_place_in_the_queue(serving: Serving, data: bytes) -> None:
    with serving(client_timeout_s=0.3) as local:
        with connected(local, data) as connection:
            eventually(lambda: local.metric("requests_in_progress") == 1)
            assert local.metric("queue_inputs") == 0
            assert statuses(connection) == [408]
        eventually(lambda: local.metric("requests_total", route="/predict", code="408") == 1)


def test_a_slow_engine_is_not_the_clients_fault(serving: Serving) -> None:
    with serving(client_timeout_s=0.3) as local:
        local.engine.gate.clear()
        with connected(local, WHOLE) as connection:
            assert local.engine.entered.wait(20)
            time.sleep(0.8)
            local.engine.gate.set()
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_a_client_that_closes_its_half_has_left(serving: Serving) -> None:
    with serving() as local:
        local.engine.gate.clear()
        with connected(local, WHOLE) as connection:
            assert local.engine.entered.wait(20)
            connection.shutdown(socket.SHUT_WR)
            assert answers(connection) == []
        eventually(lambda: local.metric("requests_total", route="/predict", code="499") == 1)


def test_an_answer_that_nobody_reads_is_dropped(serving: Serving) -> None:
    body = json.dumps({"inputs": ["a"] * 128, "top_k": 500}).encode()
    request = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with serving(client_timeout_s=0.5) as local, connected(local) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(request * 4)
        with pytest.raises(ConnectionError):  # noqa: PT012
            for _ in range(200):  # it finds out when it writes
                time.sleep(0.1)
                connection.sendall(b"x")


def test_one_connection_too_many_is_503(serving: Serving) -> None:
    with serving(max_connections=3) as local:
        with connected(local), connected(local), connected(local, LIVE) as third:
            assert third.recv(1 << 16).startswith(b"HTTP/1.1 200")
            with connected(local, LIVE) as surplus:
                ((status, problem),) = answers(surplus)
            assert (status, problem["type"]) == (503, "urn:fanin:problem:too-many-connections")
            with connected(local) as silent:
                assert answers(silent) == []  # it is not waited for as long as others
        eventually(lambda: httpx.get(f"{local.url}/livez").status_code == 200)


def test_a_body_that_nobody_wants_is_not_read_for_ever(serving: Serving) -> None:
    with serving(max_body_bytes=1000) as local, connected(local, POST + b"Content-Length: 1000000000\r\n\r\n") as connection:
        sent = 0
        with pytest.raises(ConnectionError):  # noqa: PT012
            while sent < 1_000_000_000:
                sent += connection.send(bytes(10_000))
        assert sent < 50_000_000
