"""Errors as application/problem+json (RFC 9457), FastAPI's and Starlette's own included."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Scope

from serve.http.schema import ProblemDetails

MEDIA_TYPE = "application/problem+json"
SCHEMAS = "#/components/schemas/"
CLIENT_CLOSED_REQUEST = 499  # nginx's code; nobody is left to read it, it is for the metrics
UNREADY = "No predictions are taken now: the model is loading, the server is draining, or its engine stopped."


class Problem(Exception):
    """An answer that is an error. `kind` is its stable name; `errors` are (JSON Pointer, detail) pairs."""

    def __init__(
        self,
        status: int,
        kind: str,
        detail: str,
        *,
        errors: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.kind, self.detail, self.errors, self.headers = status, kind, detail, errors, headers

    def response(self, scope: Scope) -> Response:
        """For the request of this scope, which has the request's `id` in its state."""
        body: dict[str, Any] = {
            "type": f"urn:fanin:problem:{self.kind}",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            "request_id": scope["state"]["id"],
        }
        if scope["path"].startswith("/v2"):
            body["error"] = self.detail  # where clients of the Open Inference Protocol look for it
        if self.errors:
            body["errors"] = [{"pointer": pointer, "detail": detail} for pointer, detail in self.errors]
        content = json.dumps(body, ensure_ascii=False).encode(errors="replace")  # a detail may quote half a surrogate pair
        return Response(content, self.status, self.headers, MEDIA_TYPE)


def invalid(*errors: tuple[str, str]) -> Problem:
    """422 with each fault and where it is."""
    detail = "; ".join(f"{pointer}: {text}" if pointer else text for pointer, text in errors[:3])
    return Problem(422, "invalid-request", detail + ("; …" if len(errors) > 3 else ""), errors=errors)


def try_again(status: int, kind: str, detail: str, after_s: float = 1) -> Problem:
    """A 429 or 503, with Retry-After in whole seconds."""
    return Problem(status, kind, detail, headers={"Retry-After": str(min(60, max(1, math.ceil(after_s))))})


def responses(**details: str) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entries of a route's errors, from s422="when" and so on."""
    content = {MEDIA_TYPE: {"schema": {"$ref": SCHEMAS + ProblemDetails.__name__}}}
    return {int(code[1:]): {"description": detail, "content": content} for code, detail in details.items()}


def install(app: FastAPI) -> None:
    """Makes every error of the app a problem."""
    app.add_exception_handler(Problem, _on_problem)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_exception)


async def _on_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return error.response(request.scope)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = error.errors()
    if faults[0]["loc"] == ("body",):  # absent, or not an object
        problem = invalid(("", 'the body must be an object such as {"inputs": "a text"}'))
    else:
        problem = invalid(*((_pointer(fault["loc"]), fault["msg"]) for fault in faults))
    return problem.response(request.scope)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == CLIENT_CLOSED_REQUEST:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    path = request.url.path
    kind, detail = {
        400: ("bad-json", error.detail),
        404: ("not-found", f"there is nothing at {path}"),
        405: ("method-not-allowed", f"{request.method} is not possible at {path}"),
        408: ("request-timeout", error.detail),
        413: ("body-too-large", error.detail),
    }.get(error.status_code, (HTTPStatus(error.status_code).phrase.lower().replace(" ", "-"), error.detail))
    return Problem(error.status_code, kind, detail, headers=error.headers).response(request.scope)


async def _on_exception(request: Request, error: Exception) -> Response:
    return Problem(500, "internal", "the server failed; its log says why").response(request.scope)


def _pointer(loc: Sequence[Any]) -> str:
    """("body", "inputs", "texts", 3) → /inputs/3 and ("query", "limit") → limit"""
    where, *path = loc
    if where != "body":
        return ".".join(map(str, path))
    if path[:2] in (["inputs", "text"], ["inputs", "texts"]):
        del path[1]  # the name of the form that was checked
    return "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in path)
