"""Request bodies: what they may say of themselves, and JSON read strictly."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from serve.http.problems import Problem


def check_type(headers: Headers, *accepted: str) -> None:
    """415 unless the body is of an accepted media type and not compressed."""
    given = headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() not in accepted:
        expected = " or ".join(name or "no type" for name in accepted)
        raise Problem(415, "unsupported-media-type", f"the body is {given or 'of no type'}, expected {expected}")
    if (coding := headers.get("content-encoding", "identity")) != "identity":
        raise Problem(
            415,
            "unsupported-media-type",
            f"the body is encoded as {coding}, expected none",
            headers={"Accept-Encoding": "identity"},
        )


def parse_json(body: bytes) -> Any:
    """The value of a JSON text in UTF-8. Refused with 400, beside what is not JSON: a name that an object has twice, NaN."""
    try:
        return json.loads(body.decode(), object_pairs_hook=_object, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        fault = f"is not JSON in UTF-8: {error.reason}: byte {error.start + 1}"
    except json.JSONDecodeError as error:
        fault = f"is not JSON: {error.msg}: character {error.pos + 1}"
    except RecursionError:
        fault = "is nested too deeply"
    except _Refused as error:
        fault = str(error)
    except ValueError:
        fault = "has a number with too many digits"
    raise HTTPException(400, f"the body {fault}")  # the one kind of exception that FastAPI lets through


class JsonRoute(APIRoute):
    """Routes whose bodies are JSON and say so; the type is looked at before anything is read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def checked(request: Request) -> Response:
            check_type(request.headers, "application/json")
            return await handle(_JsonRequest(request.scope, request.receive))

        return checked


class _JsonRequest(Request):
    async def json(self) -> Any:
        return parse_json(await self.body())


class _Refused(ValueError):
    """JSON as Python reads it, but not as we do."""


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _Refused(f"has {json.dumps(name)} twice in one object")
        found[name] = value
    return found


def _no_constant(text: str) -> Any:
    raise _Refused(f"is not JSON: {text} is no number")
