"""Request bodies: what they may say of themselves, and JSON read strictly."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar, get_type_hints

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from serve.http.problems import Problem

_M = TypeVar("_M", bound=BaseModel)


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
    raise HTTPException(400, f"the body {fault}")


def validated(model: type[_M], value: Any) -> _M:
    """The JSON value as the model has it; RequestValidationError."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise RequestValidationError([{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]) from None


class JsonRoute(APIRoute):
    """Routes whose bodies are JSON and say so; the type is looked at before anything is read.

    The endpoint is called with the body and the request. FastAPI's own way there is made for dependencies and takes time.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint, model = self.endpoint, get_type_hints(self.endpoint)["body"]

        async def handle(request: Request) -> Response:
            check_type(request.headers, "application/json")
            body = await request.body()
            return await endpoint(validated(model, parse_json(body) if body else None), request)

        return handle


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
