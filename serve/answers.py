"""What is said of one text, for HTTP and for files alike."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from export.labels import LabelTable
from serve.tokens import Tokens

Scores = Literal["probability", "logit"]


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Their sigmoid fp64, without overflow."""
    return np.exp(-np.logaddexp(0.0, -logits.astype(np.float64)))


def prediction(
    tokens: Tokens,
    labels: np.ndarray,
    logits: np.ndarray,
    table: LabelTable,
    *,
    scores: Scores = "probability",
    min_score: float | None = None,
    names: bool = True,
) -> dict[str, Any]:
    """A schema.Prediction as a dict, from labels int32 [k] and their logits fp32 [k], best first; −1 ends them."""
    if scores == "probability":
        logits = probabilities(logits)
    rows: list[dict[str, Any]] = []
    for label, score in zip(labels.tolist(), logits.tolist(), strict=True):
        if label < 0 or (min_score is not None and score < min_score):
            break  # no label is left
        row = {"id": table.id(label)}
        if names:
            row["name"] = table.name(label)
        rows.append(row | {"score": score})
    return {"labels": rows, "tokens": len(tokens.ids), "truncated": tokens.truncated}
