"""The Open Inference Protocol v2 over HTTP, as clients of KServe and Triton speak it, with the binary tensor extension.

The model takes `text` BYTES [N] or [N, 1] and gives, best first, `label_ids` INT64 [N, k] and `scores` FP32 [N, k]. As
label ids are strings here and in files, `label_ids` are the labels' places in the bundle, counted from 0; `label_keys` BYTES
[N, k] are the ids and `label_names` BYTES [N, k] the names. These two are given when they are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response

from serve.answers import probabilities
from serve.backend import Answer
from serve.engine import Engine
from serve.http import schema
from serve.http.answering import REFUSALS, answer, reply
from serve.http.body import check_type, parse_json, validated
from serve.http.infer_schema import (
    InferRequest,
    InferResponse,
    InputTensor,
    ModelMetadata,
    ModelReady,
    RequestedOutput,
    ServerLive,
    ServerMetadata,
    ServerReady,
)
from serve.http.problems import SCHEMAS, UNREADY, Problem, invalid, responses
from serve.http.tensors import Datatype, Tensor, strings
from serve.metrics import versions
from serve.service import NotReady, Service

_HEADER_LENGTH = "Inference-Header-Content-Length"
_OUTPUTS: dict[str, Datatype] = {"label_ids": "INT64", "scores": "FP32", "label_keys": "BYTES", "label_names": "BYTES"}
_GIVEN_UNASKED: list[Literal["label_ids", "scores"]] = ["label_ids", "scores"]
_UNKNOWN_MODEL = "There is no model, or no version of it, with this name."


router = APIRouter(prefix="/v2", tags=["Open Inference Protocol v2"])
_MODEL = "/models/{model}"
_VERSION = "/models/{model}/versions/{version}"


@router.get("", summary="The server", response_model=ServerMetadata)
async def server_metadata() -> Any:
    return {"name": "fanin", "version": versions()["fanin"], "extensions": ["binary_tensor_data"]}


@router.get(
    "/health/live",
    summary="As /livez",
    response_model=ServerLive,
    responses=responses(s503="The engine is dead or stuck; the process should be restarted."),
)
async def live(request: Request) -> Any:
    if request.app.state.service.alive:
        return {"live": True}
    raise Problem(503, "engine-stopped", "the engine is dead or stuck")


@router.get("/health/ready", summary="As /readyz", response_model=ServerReady, responses=responses(s503=UNREADY))
async def ready(request: Request) -> Any:
    _ready(request)
    return {"ready": True}


@router.get(
    _VERSION + "/ready",
    summary="Whether this version is predicted with",
    response_model=ModelReady,
    responses=responses(s404=_UNKNOWN_MODEL, s503=UNREADY),
)
@router.get(
    _MODEL + "/ready",
    summary="Whether the model is predicted with",
    response_model=ModelReady,
    responses=responses(s404=_UNKNOWN_MODEL, s503=UNREADY),
)
async def model_ready(request: Request, model: str, version: str | None = None) -> Any:
    _ready(request)
    _engine(request, model, version)
    return {"name": model, "ready": True}


@router.get(
    _VERSION,
    summary="Inputs and outputs of this version",
    response_model=ModelMetadata,
    responses=responses(s404=_UNKNOWN_MODEL, s503=UNREADY),
)
@router.get(
    _MODEL,
    summary="Inputs and outputs",
    response_model=ModelMetadata,
    responses=responses(s404=_UNKNOWN_MODEL, s503=UNREADY),
)
async def model_metadata(request: Request, model: str, version: str | None = None) -> Any:
    engine = _engine(request, model, version)
    return {
        "name": model,
        "versions": [engine.version],
        "platform": "fanin",
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}],
        "outputs": [{"name": name, "datatype": datatype, "shape": [-1, -1]} for name, datatype in _OUTPUTS.items()],
    }


_INFER_RESPONSES = responses(
    s400="The body is not JSON, or not as long as its header says.",
    s404=_UNKNOWN_MODEL,
    s415="The body is neither application/json nor application/octet-stream.",
    s422="A field is missing, unknown or out of bounds; a text is empty; a tensor is not of its shape.",
    **REFUSALS,
)
_INFER_RESPONSES[200] = {
    "description": "In JSON, or with tensors in binary behind it.",
    "content": {"application/octet-stream": {}},
}
_INFER_BODY = {
    "requestBody": {
        "required": True,
        "description": f"With tensors in binary behind the JSON, the header {_HEADER_LENGTH} says how long the JSON is.",
        "content": {"application/json": {"schema": {"$ref": SCHEMAS + InferRequest.__name__}}},
    }
}


@router.post(
    _VERSION + "/infer",
    summary="The best labels for texts, by this version",
    response_model=InferResponse,
    responses=_INFER_RESPONSES,
    openapi_extra=_INFER_BODY,
)
@router.post(
    _MODEL + "/infer",
    summary="The best labels for texts",
    response_model=InferResponse,
    responses=_INFER_RESPONSES,
    openapi_extra=_INFER_BODY,
)
async def infer(request: Request, model: str, version: str | None = None) -> Response:
    check_type(request.headers, "application/json", "application/octet-stream", "")  # Triton's clients give none
    _engine(request, model, version)
    asked, binary = _parse(await request.body(), request.headers.get(_HEADER_LENGTH))
    parameters = asked.parameters
    found = await answer(
        request,
        _texts(asked.inputs[0], binary),
        k=parameters.top_k,
        truncate=parameters.truncate,
        timeout_ms=parameters.timeout_ms or (-(-parameters.timeout // 1000) if parameters.timeout else None),
        priority=parameters.level,
        inputs="/inputs/0/data",
        top_k="/parameters/top_k",
    )
    return reply(request, found, lambda: _render(found, asked))


def _ready(request: Request) -> None:
    service: Service = request.app.state.service
    if service.status != "ready":
        raise NotReady(service.status)


def _engine(request: Request, model: str, version: str | None) -> Engine:
    """The engine of this model, and version if one is asked for; NotReady until it is loaded."""
    engine: Engine = request.app.state.service.engine
    name = engine.bundle.manifest.name
    if model != name:
        raise Problem(404, "unknown-model", f"there is no model {model!r}; the one served is {name!r}")
    if version is not None and version != engine.version:
        raise Problem(404, "unknown-model", f"there is no version {version!r}; the one served is {engine.version!r}")
    return engine


def _parse(body: bytes, header_length: str | None) -> tuple[InferRequest, bytes]:
    """The request, and the binary data behind it."""
    length = len(body)
    if header_length is not None:
        if not header_length.isascii() or not header_length.isdigit() or len(header_length) > 9 or int(header_length) > length:
            raise Problem(400, "bad-request", f"{_HEADER_LENGTH} is {header_length!r}, the body has {length} bytes")
        length = int(header_length)
    return validated(InferRequest, parse_json(body[:length])), body[length:]


def _texts(tensor: InputTensor, binary: bytes) -> list[str]:
    """The N texts of the input."""
    if len(tensor.shape) == 2 and tensor.shape[1] != 1:
        raise invalid(("/inputs/0/shape", f"is {tensor.shape}, expected [N] or [N, 1]"))
    size = tensor.parameters.binary_data_size
    if (size or 0) != len(binary):
        raise invalid(("/inputs/0/parameters/binary_data_size", f"is {size or 0}, {len(binary)} bytes are behind the JSON"))
    if (size is None) == (tensor.data is None):
        raise invalid(("/inputs/0", "give either data or binary_data_size"))
    if tensor.data is not None:
        found = [text for row in tensor.data for text in ([row] if isinstance(row, str) else row)]
    else:
        try:
            found = strings(binary)
        except ValueError as error:
            raise invalid(("/inputs/0", str(error))) from None
    if len(found) != tensor.shape[0]:
        raise invalid(("/inputs/0/shape", f"is {tensor.shape}, the data have {len(found)} elements"))
    faults = ((i, schema.fault(text)) for i, text in enumerate(found))
    if errors := [(f"/inputs/0/data/{i}", fault) for i, fault in faults if fault]:
        raise invalid(*errors)
    return found


def _render(found: Answer, asked: InferRequest) -> Response:
    """An InferResponse in JSON, with the binary data behind it if there are any."""
    table = found.engine.bundle.labels
    labels = np.stack([labels for labels, _ in found.best])
    logits = np.stack([logits for _, logits in found.best])
    make: dict[str, Callable[[], np.ndarray | Sequence[Sequence[str]]]] = {
        "label_ids": lambda: labels,
        "scores": lambda: logits if asked.parameters.scores == "logit" else probabilities(logits).astype(np.float32),
        "label_keys": lambda: [[table.id(label) for label in row] for row in labels.tolist()],
        "label_names": lambda: [[table.name(label) for label in row] for row in labels.tolist()],
    }
    outputs: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for requested in asked.outputs or [RequestedOutput(name=name) for name in _GIVEN_UNASKED]:
        tensor = Tensor(requested.name, _OUTPUTS[requested.name], make[requested.name]())
        described = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        binary = requested.parameters.binary_data
        if asked.parameters.binary_data_output if binary is None else binary:
            parts.append(tensor.as_binary())
            outputs.append(described | {"parameters": {"binary_data_size": len(parts[-1])}})
        else:
            outputs.append(described | {"data": tensor.as_json()})
    response = {
        "model_name": found.engine.bundle.manifest.name,
        "model_version": found.engine.version,
        **({} if asked.id is None else {"id": asked.id}),
        "outputs": outputs,
    }
    content = json.dumps(response, ensure_ascii=False, separators=(",", ":")).encode()
    if not parts:
        return Response(content, media_type="application/json")
    headers = {_HEADER_LENGTH: str(len(content))}
    return Response(b"".join((content, *parts)), media_type="application/octet-stream", headers=headers)
