"""A small bundle, made as `export` makes them, servers that serve it, and a browser for their page."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn

from export.bundle import open_bundle
from models.kernels import cpu
from serve.engine import CpuEngine, Engine
from serve.http.app import create_app
from serve.http.keys import ApiKeys
from serve.http.protocol import configuration
from serve.metrics import Metrics
from serve.service import Service
from serve.settings import Settings
from tests.serve.browser import Browser
from tests.serve.harness import LABELS, Local, Process, Serving, TouchyEngine, make_bundle
from tests.serve.page import open_page


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks (dense and shared) over 500 labels; label i has the id "t-i" and is called "topic i"."""
    return make_bundle(tmp_path_factory.mktemp("serve") / "bundle", name="topics", labels=LABELS, width=96)


@pytest.fixture(scope="session")
def engine(bundle_path: Path) -> Engine:
    before = cpu.threads()
    engine = CpuEngine(open_bundle(bundle_path), threads=1)
    cpu.set_threads(before)
    return engine


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """An engine sets the head's threads for the whole process."""
    before = cpu.threads()
    yield
    cpu.set_threads(before)


@pytest.fixture(scope="session")
def server(bundle_path: Path) -> Iterator[Process]:
    process = Process(bundle_path)
    yield process
    assert process.end() == (0, "")


@pytest.fixture
def client(server: Process) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def tab(chromium: Browser) -> Iterator[Browser]:
    """The browser as at first, with nothing open yet."""
    chromium.open("about:blank")
    chromium.requests.clear()
    chromium.errors.clear()
    chromium.resize(1280, 900)
    chromium.prefer()
    yield chromium
    chromium.run("0")  # so that the last events are noted
    assert chromium.errors == []


@pytest.fixture
def page(tab: Browser, server: Process) -> Browser:
    open_page(tab, server.url)
    return tab


@pytest.fixture
def serving(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serving:
    """`with serving(max_queue_tokens=…) as local`. With `load=False` the server stays as it is before it has loaded."""

    @contextmanager
    def start(load: bool = True, **settings: float) -> Iterator[Local]:
        engine = TouchyEngine(bundle_path)
        monkeypatch.setattr(Engine, "open", lambda path, threads, *_: engine)
        service = Service(Settings(bundle_path, **settings), Metrics())
        with socket.create_server(("127.0.0.1", 0)) as listener:
            server = uvicorn.Server(configuration(create_app(service, ApiKeys()), service.settings, service.metrics))
            started = threading.Event()
            loops: list[asyncio.AbstractEventLoop] = []

            async def main() -> None:
                loops.append(asyncio.get_running_loop())
                if load:
                    await service.load()
                started.set()
                await server.serve([listener])
                service.close()

            thread = threading.Thread(target=lambda: asyncio.run(main()))
            thread.start()
            assert started.wait(30)
            engine.entered.clear()
            engine.batches.clear()
            try:
                yield Local(service, engine, "http://{}:{}".format(*listener.getsockname()), loops[0])
            finally:
                engine.gate.set()
                server.should_exit = True
                thread.join(30)
                assert not thread.is_alive()

    return start
