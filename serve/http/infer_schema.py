"""What goes over HTTP in the Open Inference Protocol, as pydantic models."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve.answers import Scores
from serve.http.schema import Count, Size
from serve.http.tensors import Datatype
from serve.scheduler import Priority

_LEVELS: tuple[Priority, ...] = ("normal", "high", "normal", "low")  # Triton's: 0 is its default, 1 the highest


class Parameters(BaseModel):
    """Of a request; the same as in PredictRequest. Unknown ones are refused."""

    model_config = ConfigDict(extra="forbid")

    top_k: Count = 10
    scores: Scores = "probability"
    truncate: bool = Field(default=True, strict=True)
    timeout_ms: Count | None = None
    timeout: Size | None = Field(default=None, description="Microseconds, as Triton's clients have it; 0 for none.")
    priority: Priority | Size = Field(
        default="normal", description="Or as Triton's clients have it: 1 is high, 0 and 2 are normal, all from 3 on low."
    )
    binary_data_output: bool = Field(default=False, strict=True, description="Give all outputs in binary.")

    @property
    def level(self) -> Priority:
        return self.priority if isinstance(self.priority, str) else _LEVELS[min(self.priority, len(_LEVELS) - 1)]


class InputParameters(BaseModel):
    binary_data_size: Size | None = Field(default=None, description="Bytes of the tensor behind the JSON.")


class InputTensor(BaseModel):
    name: Literal["text"]
    shape: list[Count] = Field(min_length=1, max_length=2, description="[N] or [N, 1]")
    datatype: Literal["BYTES"]
    parameters: InputParameters = InputParameters()
    data: list[str | list[str]] | None = Field(default=None, description="Flat or nested. Absent when it is binary.")


class OutputParameters(BaseModel):
    binary_data: bool | None = Field(default=None, strict=True)


class RequestedOutput(BaseModel):
    name: Literal["label_ids", "scores", "label_keys", "label_names"]
    parameters: OutputParameters = OutputParameters()


class InferRequest(BaseModel):
    """Texts as a tensor."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["sort an array along an axis"]}]}
            ]
        }
    )

    id: str | None = Field(default=None, description="Comes back in the response.")
    parameters: Parameters = Parameters()
    inputs: list[InputTensor] = Field(min_length=1, max_length=1)
    outputs: list[RequestedOutput] | None = Field(default=None, description="Which are given; else label_ids and scores.")


class OutputTensor(BaseModel):
    name: str
    shape: list[int]
    datatype: Datatype
    parameters: dict[str, int] | None = Field(default=None, description="binary_data_size of a tensor behind the JSON.")
    data: list[Any] | None = Field(default=None, description="Flat, row by row.")


class InferResponse(BaseModel):
    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]


class TensorMetadata(BaseModel):
    name: str
    datatype: Datatype
    shape: list[int] = Field(description="-1 where the size varies.")


class ModelMetadata(BaseModel):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServerMetadata(BaseModel):
    name: str
    version: str
    extensions: list[str]


class ServerLive(BaseModel):
    live: bool


class ServerReady(BaseModel):
    ready: bool


class ModelReady(BaseModel):
    name: str
    ready: bool
