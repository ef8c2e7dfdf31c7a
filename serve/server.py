"""A server process from its socket to its end: it listens, loads, answers, drains."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import uvicorn

from export.bundle import BundleError
from models.device import DeviceError
from serve import logs, telemetry
from serve.host import fix_heap_thresholds, give_way
from serve.http.admin import create_admin_app
from serve.http.app import create_app
from serve.http.gateway import Gateway
from serve.http.keys import ApiKeys, KeysError
from serve.http.protocol import configuration
from serve.metrics import Metrics
from serve.service import NotReady, ReloadUnderWay, Service
from serve.settings import Settings
from serve.watchdog import Watchdog

__all__ = ["BundleError", "DeviceError", "KeysError", "ListenError", "run"]

_log = logging.getLogger("fanin.serve")
_EXIT_FAILED = 3
_LAST_LOOKS, _LAST_LOOK_S = 5, 0.2  # for requests, before the listener is closed


class ListenError(Exception):
    """The address cannot be had; the message names it."""


class _Server(uvicorn.Server):
    """Loads the model once it listens, says when it is ready, reloads on request, and drains before it ends."""

    def __init__(
        self, config: uvicorn.Config, service: Service, keys: ApiKeys, address: str, admin_address: str | None
    ) -> None:
        super().__init__(config)
        self.failure: Exception | None = None
        self._service, self._keys, self._address, self._admin_address = service, keys, address, admin_address
        self._draining = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: self._begin(self._reload()))
        self._begin(self._load())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends at once. Without a call of uvicorn's own, the exit status stays 0."""
        if self._draining:
            self.should_exit = self.force_exit = True
        else:
            asyncio.get_running_loop().call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Begins to drain; the server ends when that is over."""
        if not self._draining:
            self._draining = True
            self._begin(self._drain())

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the event loop itself holds it weakly
        task.add_done_callback(self._tasks.discard)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for _ in range(_LAST_LOOKS if self._draining else 0):  # what comes before clients know is answered, with 503
            count = self.server_state.total_requests
            await asyncio.sleep(_LAST_LOOK_S)
            if self.force_exit or self.server_state.total_requests == count:
                break
        await super().shutdown(sockets)

    async def _load(self) -> None:
        try:
            await self._service.load()
        except Exception as error:
            self.failure = error
            self.should_exit = True
            return
        gc.freeze()  # what is loaded stays: a full collection need not walk through it
        if self._service.status == "ready":
            self._greet()
            if self._admin_address is not None:
                print(f"admin at {self._admin_address}", flush=True)

    async def _reload(self) -> None:
        try:
            self._keys.reload()
            await self._service.reload()
        except (BundleError, KeysError, NotReady, ReloadUnderWay) as error:
            _log.error("reload: %s; nothing has changed", error)
        except Exception:
            _log.exception("reload failed; nothing has changed")
        else:
            self._greet()

    async def _drain(self) -> None:
        await self._service.drain()
        self.should_exit = True

    def _greet(self) -> None:
        manifest = self._service.engine.bundle.manifest
        print(f"{manifest.name}: {manifest.labels:,} labels at {self._address}", flush=True)


class _AdminServer(uvicorn.Server):
    """A second listener in the same event loop. Signals are the first one's."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()


def run(settings: Settings) -> None:
    """Serves until a signal ends it. ListenError; KeysError; BundleError when the bundle cannot be served.

    Ends the process with status 3 when the engine or the event loop fails.
    """
    faulthandler.enable()
    fix_heap_thresholds()
    logs.set_up(settings.log_format, settings.log_level)
    keys = ApiKeys(settings.api_keys_file)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listen(settings.host, settings.port))
        admin = None if settings.admin_port is None else stack.enter_context(_listen(settings.admin_host, settings.admin_port))
        asyncio.run(_serve(settings, keys, listener, admin))


async def _serve(settings: Settings, keys: ApiKeys, listener: socket.socket, admin_listener: socket.socket | None) -> None:
    service, tracing = Service(settings, Metrics()), telemetry.tracing()
    admin_address = None if admin_listener is None else _address(admin_listener)
    server = _Server(
        configuration(create_app(service, keys, tracing), settings, service.metrics),
        service,
        keys,
        _address(listener),
        admin_address,
    )
    # Engines are opened there. While they compute, the event loop gets a core at once, so that a refusal takes no time.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(initializer=give_way, thread_name_prefix="background"))
    watchdog = Watchdog(service, asyncio.get_running_loop(), end=_give_up)
    watchdog.start()
    async with contextlib.AsyncExitStack() as stack:
        if admin_listener is not None:
            await stack.enter_async_context(
                _administered(create_admin_app(service, keys, server.drain), service, admin_listener)
            )
        await server.serve([listener])
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends already; uvicorn has put the deadly default back
    if service.failure is not None:
        _give_up()
    watchdog.stop()
    service.close()
    if tracing:
        tracing.close()
    if server.failure is not None:
        raise server.failure


@contextlib.asynccontextmanager
async def _administered(app: Gateway, service: Service, listener: socket.socket) -> AsyncIterator[None]:
    server = _AdminServer(configuration(app, service.settings, service.metrics))
    serving = asyncio.create_task(server.serve([listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving


def _give_up() -> None:
    os._exit(_EXIT_FAILED)  # a stuck thread would keep the interpreter from ending


def _listen(host: str, port: int) -> socket.socket:
    """ListenError when it cannot be had."""
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise ListenError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
