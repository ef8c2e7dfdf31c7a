"""/openapi.json, and /docs: the API's description as a page of Swagger UI that needs nothing from another server."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.staticfiles import StaticFiles

_ASSETS = StaticFiles(packages=[("fastapi_offline", "static")])
_POLICY = (
    "default-src 'none'; style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline'; "
    "connect-src 'self'; img-src 'self' data:"
)

router = APIRouter(include_in_schema=False)


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
