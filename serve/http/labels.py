"""GET /labels."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import Field

from serve.http import schema
from serve.http.problems import UNREADY, Problem, invalid, responses
from serve.labels import find, search

router = APIRouter()


@router.get(
    "/labels",
    summary="Labels by id, or by part of their name",
    response_model=schema.Labels,
    responses=responses(s404="No label has one of the ids.", s422="Neither or both of ids and query are given.", s503=UNREADY),
)
async def labels(
    request: Request,
    ids: Annotated[
        list[Annotated[str, Field(min_length=1)]] | None,
        Query(description="Label ids, separated by commas or given one by one."),
    ] = None,
    query: Annotated[
        str | None,
        Query(min_length=1, description="Part of the name, ASCII case ignored. Names that begin with it come first."),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="Labels to give for a query.")] = 20,
) -> Any:
    table = request.app.state.service.engine.bundle.labels
    if query is not None and ids is None:
        found = await asyncio.to_thread(search, table.names, query, limit)
    elif ids is not None and query is None:
        wanted = ",".join(ids).split(",")
        places = await asyncio.to_thread(find, table.ids, wanted)
        if unknown := [repr(text) for text in wanted if text not in places]:
            raise Problem(404, "unknown-label", f"there is no label with id {', '.join(unknown)}")
        found = [places[text] for text in wanted]
    else:
        raise invalid(("ids", "give either ids or query"))
    return {"labels": [{"id": table.id(label), "name": table.name(label)} for label in found]}
