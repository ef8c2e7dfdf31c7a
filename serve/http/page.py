"""The page at / to try the model, and the files it is made of."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.staticfiles import StaticFiles

_FILES = StaticFiles(directory=Path(__file__).with_name("page"))
# Nothing comes from elsewhere or stands inline, and no script can make markup out of text.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page(request: Request) -> Response:
    response = await file(request, "index.html")
    response.headers["Content-Security-Policy"] = _POLICY
    response.headers["Referrer-Policy"] = "no-referrer"
    return response


@router.get("/page/{name}")
async def file(request: Request, name: str) -> Response:
    response = await _FILES.get_response(name, request.scope)
    response.headers["Cache-Control"] = "no-cache"  # asked for again each time, by its ETag: the files belong together
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response
