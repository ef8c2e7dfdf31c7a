"""Ctrl-C and SIGTERM, turned from an end at any moment into a request to stop at a good one."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class StoppedError(Exception):
    """Ctrl-C or SIGTERM was obeyed and the state is saved. `signum` is the signal's number."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Interrupt:
    """While entered, the first signal only sets `signum`; a second one acts at once, as it did before."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def __enter__(self) -> Interrupt:
        for signum in self._before:
            signal.signal(signum, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def check(self) -> None:
        """StoppedError when a signal has come."""
        if self.signum is not None:
            raise StoppedError(self.signum)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
