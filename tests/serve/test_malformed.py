"""Malformed requests, hundreds or thousands, to a real server: each gets a documented error, and the server stays as it was."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.harness import TEXTS, Process
from tests.serve.malformed import Malformed, generate
from tests.serve.test_behaviour import eventually

COUNT = int(os.environ.get("FANIN_MALFORMED_REQUESTS", "400"))  # 10,000 take a minute and a half
AT_A_TIME = 32
GROWTH_BYTES = 30e6
POOL_THREADS = 8  # started when a label is first looked up, and kept
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST


async def exchange(host: str, port: int, request: Malformed) -> bytes:
    """What is received until the server closes the connection."""
    reader, writer = await asyncio.open_connection(host, port)
    received = b""
    try:
        writer.write(request.data)
        await writer.drain()
        if request.then == "half-close":
            writer.write_eof()
        elif request.then == "reset":
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            return b""
        while part := await asyncio.wait_for(reader.read(1 << 16), 60):
            received += part
    except OSError:  # the server closed while we were still sending; what it said is there unless RST overtook it
        received += await reader.read() if not reader.exception() else b""
    finally:
        writer.close()
    return received


def check(seed: int, request: Malformed, received: bytes) -> None:
    context = f"seed {seed}, {request.kind}: {request.data[:300]!r} -> {received[:600]!r}"
    if not received:
        # of what it refuses unread, a server that closes cannot be sure that its answer arrives
        assert None in request.statuses or request.kind in ("large head", "too large in chunks"), context
        return
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.decode("ascii").lower().split("\r\n")
    status = int(lines[0].split()[1])
    assert status in request.statuses, context
    headers = dict(line.split(": ", 1) for line in lines[1:])
    assert int(headers["content-length"]) == len(body), context  # one answer and no more
    if status >= 400:
        assert headers["content-type"] == "application/problem+json", context
        problem = json.loads(body)
        assert problem["status"] == status, context
        assert problem["request_id"] == headers["x-request-id"], context


async def send(url: httpx.URL, seeds: range) -> None:
    free = asyncio.Semaphore(AT_A_TIME)

    async def one(seed: int) -> None:
        async with free:
            request = generate(seed)
            check(seed, request, await exchange(url.host, url.port or 80, request))

    async with asyncio.TaskGroup() as tasks:
        for seed in seeds:
            tasks.create_task(one(seed))


def state(process: Process) -> dict[str, float]:
    folder = Path(f"/proc/{process.popen.pid}")
    with httpx.Client(base_url=process.url, timeout=30) as client:
        families = text_string_to_metric_families(client.get("/metrics").text)
        values = {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}
    return {
        "files": len(os.listdir(folder / "fd")),
        "threads": len(os.listdir(folder / "task")),
        "in progress": values["fanin_requests_in_progress"],
        "waiting tokens": values["fanin_queue_tokens"],
        "resident": int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
    }


def test_each_gets_an_error_and_leaves_nothing_behind(bundle_path: Path) -> None:
    process = Process(bundle_path, "--client-timeout", "3")
    url = httpx.URL(process.url)

    def ask() -> Any:
        answer = httpx.post(f"{process.url}/predict", json={"inputs": TEXTS}, timeout=30).json()
        return [[row["id"] for row in prediction["labels"]] for prediction in answer["predictions"]]

    labels, idle = ask(), state(process)
    asyncio.run(send(url, range(COUNT // 4)))  # until every buffer has its size
    before = state(process)
    asyncio.run(send(url, range(COUNT // 4, COUNT)))
    assert ask() == labels
    eventually(lambda: state(process)["files"] <= idle["files"])
    after = state(process)
    assert after["resident"] < before["resident"] + GROWTH_BYTES
    assert after["threads"] <= idle["threads"] + POOL_THREADS
    assert (after["in progress"], after["waiting tokens"]) == (1, 0)
    assert process.end() == (0, "")  # and nothing was worth a warning
