"""POST /predict."""

from __future__ import annotations

import json

from fastapi import APIRouter, Request, Response

from serve.answers import prediction
from serve.backend import Answer
from serve.http import schema
from serve.http.answering import REFUSALS, answer, reply
from serve.http.body import JsonRoute
from serve.http.problems import responses
from serve.labels import LabelFilter

router = APIRouter(route_class=JsonRoute)


@router.post(
    "/predict",
    summary="The best labels for texts",
    response_model=schema.PredictResponse,
    responses=responses(
        s400="The body is not JSON.",
        s415="The body is not of type application/json.",
        s422="A field is missing, unknown, empty or out of bounds.",
        **REFUSALS,
    ),
)
async def predict(body: schema.PredictRequest, request: Request) -> Response:
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    found = await answer(
        request,
        texts,
        k=body.top_k,
        truncate=body.truncate,
        timeout_ms=body.timeout_ms,
        labels=LabelFilter(body.labels.allow, body.labels.deny) if body.labels else None,
        priority=body.priority,
    )
    return reply(request, found, lambda: _render(found, body, request.state.id))


def _render(answer: Answer, body: schema.PredictRequest, request_id: str) -> Response:
    """The JSON of a schema.PredictResponse, written without building one: this runs for every request."""
    bundle = answer.engine.bundle
    response = {
        "id": request_id,
        "model": bundle.manifest.name,
        "model_version": answer.engine.version,
        "predictions": [
            prediction(
                tokens,
                labels,
                logits,
                bundle.labels,
                scores=body.scores,
                min_score=body.min_score,
                names=body.return_names,
            )
            for tokens, (labels, logits) in zip(answer.tokens, answer.best, strict=True)
        ],
        "usage": {"inputs": len(answer.tokens), "tokens": sum(len(tokens.ids) for tokens in answer.tokens)},
    }
    content = json.dumps(response, ensure_ascii=False, separators=(",", ":")).encode()
    return Response(content, media_type="application/json")
