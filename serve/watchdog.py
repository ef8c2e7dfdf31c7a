"""A thread that sees when the engine or the event loop is dead or stuck, and ends the process for its supervisor.

It is a thread of its own since the event loop may be what is stuck, and it ends the process hard since a stuck thread would
keep it from ending otherwise.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable

from serve.backend import Backend
from serve.host import cpu_wait_s, disk_waits
from serve.service import Service

_log = logging.getLogger("fanin.serve")
_TICK_S = 0.1
_LOOP_TIMEOUT_S = 10.0  # the event loop also writes answers: with many labels for many texts that can take a second
_FLUSH_S = 0.5  # for the last answers to leave, and for probes to see that /livez fails


class Watchdog:
    """Watches a service and its event loop from `start` to `stop`.

    Time without progress counts as far as there could have been some: not while the whole process stands still, stopped or on
    a suspended machine, and little while its threads wait for a CPU or for pages from disk. When the service has failed, `end`
    is called, in the watchdog's thread.
    """

    def __init__(
        self,
        service: Service,
        loop: asyncio.AbstractEventLoop,
        end: Callable[[], object],
        loop_timeout_s: float = _LOOP_TIMEOUT_S,
    ) -> None:
        self._service, self._loop, self._end, self._loop_timeout_s = service, loop, end, loop_timeout_s
        self._stopped = threading.Event()
        self._engines: dict[Backend, tuple[float, float]] = {}  # when its batch began, seconds without progress
        self._loop_s = 0.0  # since the event loop was asked for a sign of life
        self._loop_answered = True
        self._cpu_wait_s, self._disk_waits = cpu_wait_s(), disk_waits()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Looks away from now on; call it before the service and the event loop are closed."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(_TICK_S):
            passed_s = self._passed_s()
            engine_fault, loop_stuck = self._check_engines(passed_s), self._check_loop(passed_s)
            if self._stopped.is_set():  # so an engine that ended was closed
                return
            if engine_fault is None and not loop_stuck:
                continue
            self._service.failure = engine_fault or f"the event loop has been stuck for {self._loop_timeout_s:g} s"
            # The log may be what the loop is stuck in.
            report = threading.Thread(target=_report, args=[self._service.failure], daemon=True)
            report.start()
            if not loop_stuck:
                self._loop.call_soon_threadsafe(self._service.fail)
                time.sleep(_FLUSH_S)
            report.join(_FLUSH_S)
            self._end()
            return

    def _passed_s(self) -> float:
        """How much of the last tick counts. Never nothing, as a thread may be stuck while others wait."""
        waited_s, waits = cpu_wait_s(), disk_waits()
        held_up_s = waited_s - self._cpu_wait_s if waits == self._disk_waits else _TICK_S
        self._cpu_wait_s, self._disk_waits = waited_s, waits
        return min(_TICK_S, max(_TICK_S / 10, _TICK_S - held_up_s))

    def _check_engines(self, passed_s: float) -> str | None:
        seen, self._engines = self._engines, {}
        for backend in self._service.backends:
            if not backend.alive and backend in self._service.backends:  # it was not retired just now
                return "the engine died"
            began = time.monotonic() - backend.heartbeat_age_s
            before, stuck_s = seen.get(backend, (0.0, 0.0))
            stuck_s = stuck_s + passed_s if began < before + _TICK_S / 2 else 0.0
            if stuck_s >= backend.hang_timeout_s:
                return f"the engine has made no progress for {backend.hang_timeout_s:.1f} s"
            self._engines[backend] = began, stuck_s
        return None

    def _check_loop(self, passed_s: float) -> bool:
        if self._loop_answered:
            self._loop_answered, self._loop_s = False, 0.0
            self._loop.call_soon_threadsafe(self._on_loop)
        else:
            self._loop_s += passed_s
        return self._loop_s >= self._loop_timeout_s

    def _on_loop(self) -> None:
        self._loop_answered = True


def _report(failure: str) -> None:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = [
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    ]
    _log.critical("%s; the process ends. What its threads are at:\n%s", failure, "\n".join(stacks))
