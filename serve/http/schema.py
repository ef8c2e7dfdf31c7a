"""What goes over HTTP: requests and responses as pydantic models, for validation and for the API's description."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, FiniteFloat, Tag
from pydantic_core import PydanticCustomError

from serve.scheduler import Priority


def fault(text: str) -> str | None:
    """Why a text cannot be predicted, or None."""
    if not text or text.isspace():
        return "the text is empty"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "the text is not Unicode: it has half a surrogate pair"
    return None


def _check_text(text: str) -> str:
    if reason := fault(text):
        raise PydanticCustomError("text", "{reason}", {"reason": reason})
    return text


_Text = Annotated[str, AfterValidator(_check_text), Field(json_schema_extra={"minLength": 1, "pattern": r"\S"})]
# In JSON 5.0 is a whole number too; "5" and true are none.
_whole = BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)
Count = Annotated[int, Field(strict=True, ge=1), _whole]
Size = Annotated[int, Field(strict=True, ge=0), _whole]
# Only the form that was meant is checked, so that an error speaks of that one.
_Inputs = Annotated[
    Annotated[_Text, Tag("text")] | Annotated[list[_Text], Field(min_length=1), Tag("texts")],
    Discriminator(lambda value: "text" if isinstance(value, str) else "texts"),
]


class LabelLists(BaseModel):
    """Which labels may be given, by id. Without `allow`, all that are not denied; a label in both is denied."""

    model_config = ConfigDict(extra="forbid")

    allow: list[str] | None = Field(None, description="The only labels to choose from.")
    deny: list[str] = Field([], description="Labels to leave out.")


class PredictRequest(BaseModel):
    """Texts and what to say about them. Unknown fields are refused."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"inputs": "sort an array along an axis", "top_k": 5}]}
    )

    inputs: _Inputs = Field(description="One text or a list of texts, none empty.")
    top_k: Count = Field(10, description="Labels per text, best first.")
    min_score: FiniteFloat | None = Field(None, strict=True, description="Leave out labels with less, in the unit of `scores`.")
    scores: Literal["probability", "logit"] = Field(
        "probability", description="The head's own score (logit) or its sigmoid; the order is the same."
    )
    labels: LabelLists | None = Field(
        None, description="The best labels of these, exactly; fewer than top_k if there are fewer."
    )
    return_names: bool = Field(True, strict=True, description="Give each label's name beside its id.")
    truncate: bool = Field(
        True, strict=True, description="Cut texts to the model's length. If false, a longer one is an error."
    )
    priority: Priority = Field(
        "normal", description="Who goes first when requests wait. Low is refused sooner when the queue fills; nothing starves."
    )
    timeout_ms: Count | None = Field(None, description="Give up after this time; the server's own limit holds.")


class LabelScore(BaseModel):
    id: str
    name: str | None = Field(None, description="Absent with return_names false.")
    score: float


class Prediction(BaseModel):
    """The labels of one text, best first."""

    labels: list[LabelScore]
    tokens: int = Field(description="Tokens read, special ones included.")
    truncated: bool = Field(description="Whether the text was longer than the model reads.")


class Usage(BaseModel):
    inputs: int
    tokens: int


class PredictResponse(BaseModel):
    id: str = Field(description="The request's id, as in the header X-Request-Id.")
    model: str
    model_version: str = Field(description="SHA-256 of the bundle.")
    predictions: list[Prediction] = Field(description="One per text, in order.")
    usage: Usage


class Label(BaseModel):
    id: str
    name: str


class Labels(BaseModel):
    labels: list[Label]


class Status(BaseModel):
    status: Literal["alive", "ready"]


class BlockInfo(BaseModel):
    """Labels of one connectivity, in groups. Each is scored from fan_in of the width values of an embedding."""

    connectivity: str
    dtype: str
    fan_in: int
    groups: int
    group_size: int


class Limits(BaseModel):
    max_length: int = Field(description="Tokens per text.")
    max_inputs: int
    max_top_k: int
    max_filter_labels: int = Field(description="Labels that a request may allow and deny, together.")
    max_body_bytes: int
    timeout_ms: int


class Info(BaseModel):
    model: str
    model_version: str
    created: str
    labels: int
    width: int
    blocks: list[BlockInfo]
    bytes: dict[str, int]
    threads: int
    limits: Limits
    metrics: dict[str, Any] = Field(description="The training run's last evaluation.")
    versions: dict[str, str]


class FieldProblem(BaseModel):
    pointer: str = Field(description="Where in the request: a JSON Pointer into the body, or the name of a query parameter.")
    detail: str


class ProblemDetails(BaseModel):
    """An error, as RFC 9457 describes them."""

    type: str = Field(description="Stable name of this kind of problem.")
    title: str
    status: int
    detail: str = Field(description="What was wrong this time.")
    request_id: str
    errors: list[FieldProblem] | None = Field(None, description="Each fault of a request that is not valid.")
