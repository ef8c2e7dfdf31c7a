"""The application: every route, and what stands around them."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Request, Response

from serve.http import docs, labels, predict, problems, status
from serve.http.gateway import Gateway
from serve.http.problems import try_again
from serve.metrics import versions
from serve.service import NotReady, Service

_PAGE = Path(__file__).with_name("page.html").read_bytes()
_PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def create_app(service: Service) -> Gateway:
    """The ASGI application around a service, which may still be loading."""
    app = FastAPI(
        title="Fanin",
        description="The best labels for a text, out of millions: a text classifier with a sparse output layer.",
        version=versions()["fanin"],
        openapi_url=None,  # serve.http.docs has it
    )
    app.state.service = service
    for routes in (predict, labels, status, docs):
        app.include_router(routes.router)
    app.add_api_route("/", _page, include_in_schema=False)
    problems.install(app)
    app.add_exception_handler(NotReady, _on_not_ready)
    return Gateway(app, service.metrics, service.settings.max_body_bytes)


async def _page() -> Response:
    return Response(_PAGE, media_type="text/html", headers={"Content-Security-Policy": _PAGE_POLICY})


async def _on_not_ready(request: Request, error: Exception) -> Response:
    assert isinstance(error, NotReady)
    return try_again(503, error.status, str(error)).response(request.state.id)
