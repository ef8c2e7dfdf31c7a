"""/openapi.json, and /docs: the API's description as a page of Swagger UI that needs nothing from another server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.staticfiles import StaticFiles

from serve.http.infer_schema import InferRequest
from serve.http.keys import ApiKeys
from serve.http.problems import SCHEMAS, responses
from serve.http.schema import ProblemDetails
from serve.settings import Settings

DESCRIPTION = """\
The best labels for a text, out of millions: a text classifier with a sparse output layer.

Errors are `application/problem+json` (RFC 9457). Beside those of each route there are some of the connection, which is closed
after them: 400 for what is not HTTP or ends in the middle, 408 for a request that does not come in time, 431 for a line and
headers of more than 32 KiB, 503 with `Retry-After` for a connection too many. A client that closes its half of a connection
has left: what it waits for is dropped.
"""
_ASSETS = StaticFiles(packages=[("fastapi_offline", "static")])
_POLICY = (
    "default-src 'none'; style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

router = APIRouter(include_in_schema=False)


def install(app: FastAPI, settings: Settings, keys: ApiKeys, is_open: Callable[[str], bool]) -> None:
    """Puts into the app's description what its routes do not say: schemas of bodies that they read themselves, limits, keys."""
    describe = app.openapi

    def complete() -> dict[str, Any]:
        api = describe()
        components = api["components"]
        models: list[tuple[type[BaseModel], Literal["validation", "serialization"]]] = [
            (ProblemDetails, "serialization"),
            (InferRequest, "validation"),
        ]
        _, described = models_json_schema(models, ref_template=SCHEMAS + "{model}")
        components["schemas"].update(described["$defs"])
        for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own errors, which are problems here
            components["schemas"].pop(unused, None)
        for operation in (operation for operations in api["paths"].values() for operation in operations.values()):
            if "application/json" in operation["responses"].get("422", {}).get("content", {}):
                del operation["responses"]["422"]  # FastAPI's too: of a path, any text will do
        asked = components["schemas"]["PredictRequest"]["properties"]
        asked["top_k"]["maximum"] = settings.max_top_k
        next(form for form in asked["inputs"]["oneOf"] if form["type"] == "array")["maxItems"] = settings.max_inputs
        if keys:
            components["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            }
            for path, operations in api["paths"].items():
                for operation in () if is_open(path) else operations.values():
                    operation["security"] = [{"bearer": []}, {"key": []}]
                    operation["responses"] |= {
                        str(code): response for code, response in responses(s401="The API key is missing or wrong.").items()
                    }
        return api

    app.openapi = complete  # type: ignore[method-assign]


@router.get("/openapi.json")
async def description(request: Request) -> Any:
    return request.app.openapi()


@router.get("/docs")
async def page(request: Request) -> Response:
    response = get_swagger_ui_html(
        openapi_url="openapi.json",
        title=f"{request.app.title} API",
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="docs/favicon.png",
    )
    response.headers["Content-Security-Policy"] = _POLICY
    return response


@router.get("/docs/{file}")
async def asset(request: Request, file: str) -> Response:
    return await _ASSETS.get_response(file, request.scope)
