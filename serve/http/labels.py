"""GET /labels."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import Field

from serve.http import schema
from serve.http.problems import UNREADY, Problem, invalid, responses
from serve.labels import search

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
        Query(
            min_length=1,
            description="Part of the name, in any case. Names that begin with it come first, then those with a word that does.",
        ),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="Labels to give for a query.")] = 20,
) -> Any:
    table = request.app.state.service.engine.bundle.labels
    if query is not None and ids is None:
        found = await asyncio.to_thread(search, table, query, limit)
    elif ids is not None and query is None:
        wanted = ",".join(ids).split(",")
        found = (await asyncio.to_thread(table.find, wanted)).tolist()
        if unknown := [repr(text) for text, label in zip(wanted, found, strict=True) if label < 0]:
            raise Problem(404, "unknown-label", f"there is no label with id {', '.join(unknown)}")
    else:
        raise invalid(("ids", "give either ids or query"))
    return {"labels": [{"id": table.id(label), "name": table.name(label)} for label in found]}
