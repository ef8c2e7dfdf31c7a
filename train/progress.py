"""How far a run is, where no bar can be drawn: in a log file or to another program."""

from __future__ import annotations

import sys
import time
from typing import Any

_EVERY_S = 10.0


class Lines:
    """Follows a Log: prints its training rows to standard error, the first at once and then one in ten seconds at most."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs
        self._next = time.monotonic()

    def __call__(self, row: dict[str, Any]) -> None:
        now = time.monotonic()
        if row["kind"] == "train" and now >= self._next:
            self._next = now + _EVERY_S
            where = f"epoch {row['epoch']}/{self._epochs}, step {row['step']}"
            print(f"{where}: loss {row['loss']:.4g}, {row['texts_per_s']:.0f} texts/s", file=sys.stderr)
