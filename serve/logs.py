"""The log on standard error: every message of this process, of libraries too, as text or as JSON, one line each.

Texts, labels and keys are never logged. A request is logged at level info, once it is over.
"""

from __future__ import annotations

import logging
from typing import Literal

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

_requests = logging.getLogger("fanin.requests")


def set_up(format: Literal["text", "json"], level: Literal["debug", "info", "warning", "error"]) -> None:
    """Sends the log of the whole process to standard error."""
    formatter: logging.Formatter
    if format == "json":
        renamed = {"levelname": "level", "name": "logger", "exc_info": "exception"}
        unwanted = [*RESERVED_ATTRS, "color_message"]  # the latter is uvicorn's
        formatter = JsonFormatter(
            ["levelname", "name", "message"], rename_fields=renamed, timestamp="time", reserved_attrs=unwanted
        )
    else:
        formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)


def request(
    *, id: str, method: str, route: str, code: int, seconds: float, inputs: int = 0, tokens: int = 0, client: str | None
) -> None:
    """Logs a request that is over. `route` is a template, never a path that a client made up."""
    if _requests.isEnabledFor(logging.INFO):
        fields = {
            "method": method,
            "route": route,
            "code": code,
            "duration_ms": round(seconds * 1000, 3),
            "inputs": inputs,
            "tokens": tokens,
            "request_id": id,
            "client": client,
        }
        _requests.info(_REQUEST, fields, extra=fields)


_REQUEST = (
    "%(method)s %(route)s %(code)d in %(duration_ms).3f ms, inputs %(inputs)d, tokens %(tokens)d, "
    "id %(request_id)s, client %(client)s"
)
