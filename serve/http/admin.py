"""The routes of the admin listener: reload and drain. For operators, not for the network that clients come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field

from export.bundle import BundleError
from serve.http import problems
from serve.http.gateway import Gateway
from serve.http.keys import ApiKeys, KeyCheck
from serve.http.problems import Problem, try_again
from serve.service import NotReady, ReloadUnderWay, Service


class ReloadRequest(BaseModel):
    """Which bundle to load."""

    model_config = ConfigDict(extra="forbid")

    bundle: Annotated[Path | None, Field(description="A folder on the server; without it the present one's path.")] = None


def create_admin_app(service: Service, keys: ApiKeys, drain: Callable[[], None]) -> Gateway:
    """The ASGI application of the admin listener; `drain` begins to drain the server and returns."""
    app = FastAPI(openapi_url=None)
    app.state.service, app.state.drain = service, drain
    app.include_router(_router)
    problems.install(app)
    return Gateway(KeyCheck(app, keys, lambda path: False), service)


async def _no_page(request: Request) -> None:
    """A page of another site can make a browser on this machine send a POST, but not without Origin."""
    if "origin" in request.headers:
        raise Problem(403, "from-a-page", "requests from web pages are not taken")


_router = APIRouter(dependencies=[Depends(_no_page)])


@_router.post("/reload")
async def reload(request: Request, body: ReloadRequest | None = None) -> Any:
    """Answers when the new bundle has taken over and the old one's memory is given back."""
    service: Service = request.app.state.service
    try:
        done = await service.reload(body.bundle if body else None)
    except BundleError as error:
        raise Problem(422, "bundle-refused", str(error)) from None
    except ReloadUnderWay as error:
        raise Problem(409, "reload-under-way", str(error)) from None
    except NotReady as error:
        raise try_again(503, error.status, str(error)) from None
    return {"old_version": done.old_version, "new_version": done.new_version, "seconds": round(done.seconds, 3)}


@_router.post("/drain", status_code=202)
async def drain(request: Request) -> Any:
    """The same as SIGTERM: the process ends when what is under way is answered."""
    request.app.state.drain()
    return {"status": "draining"}
