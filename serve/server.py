"""A server process from its socket to its end: it listens, loads, answers, drains."""

from __future__ import annotations

import asyncio
import gc
import socket
from types import FrameType

import uvicorn

from export.bundle import BundleError
from serve import logs, telemetry
from serve.http.app import create_app
from serve.http.keys import ApiKeys, KeysError
from serve.http.protocol import configuration
from serve.metrics import Metrics
from serve.service import Service
from serve.settings import Settings

__all__ = ["BundleError", "KeysError", "ListenError", "run"]


class ListenError(Exception):
    """The address cannot be had; the message names it."""


class _Server(uvicorn.Server):
    """Loads the model once it listens, says when it is ready, and drains before it ends."""

    def __init__(self, config: uvicorn.Config, service: Service, address: str) -> None:
        super().__init__(config)
        self.failure: Exception | None = None
        self._service, self._address = service, address
        self._tasks: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._tasks.append(asyncio.create_task(self._load()))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends at once. Without a call of uvicorn's own, the exit status stays 0."""
        if self._service.status == "draining":
            self.should_exit = self.force_exit = True
        else:
            asyncio.get_running_loop().call_soon_threadsafe(lambda: self._tasks.append(asyncio.create_task(self._drain())))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self._service.close()

    async def _load(self) -> None:
        try:
            await self._service.load()
        except Exception as error:
            self.failure = error
            self.should_exit = True
            return
        gc.freeze()  # what is loaded stays: a full collection need not walk through it
        manifest = self._service.engine.bundle.manifest
        if self._service.status == "ready":
            print(f"{manifest.name}: {manifest.labels:,} labels at {self._address}", flush=True)

    async def _drain(self) -> None:
        await self._service.drain()
        self.should_exit = True


def run(settings: Settings) -> None:
    """Serves until a signal ends it. ListenError; KeysError; BundleError when the bundle cannot be served."""
    logs.set_up(settings.log_format, settings.log_level)
    keys = ApiKeys(settings.api_keys_file)
    try:
        listener = _listen(settings)
    except OSError as error:
        reason = error.strerror or error
        raise ListenError(f"cannot listen on {settings.host} port {settings.port}: {reason}") from error
    with listener:
        asyncio.run(_serve(settings, keys, listener))


async def _serve(settings: Settings, keys: ApiKeys, listener: socket.socket) -> None:
    service, tracing = Service(settings, Metrics()), telemetry.tracing()
    config = configuration(create_app(service, keys, tracing), settings, service.metrics)
    server = _Server(config, service, _address(listener))
    await server.serve([listener])
    if tracing:
        tracing.close()
    if server.failure is not None:
        raise server.failure


def _listen(settings: Settings) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
