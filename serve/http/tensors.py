"""Tensors of the Open Inference Protocol, in JSON and in the binary tensor extension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Datatype = Literal["BYTES", "INT64", "FP32"]
_DTYPES = {"INT64": "<i8", "FP32": "<f4"}


@dataclass(frozen=True, slots=True)
class Tensor:
    """An output. `values`: int64 or fp32 [N, k], or for BYTES N rows of k strings."""

    name: str
    datatype: Datatype
    values: np.ndarray | Sequence[Sequence[str]]

    @property
    def shape(self) -> list[int]:
        return [len(self.values), len(self.values[0])]

    def as_json(self) -> list[Any]:
        """Flattened, row by row."""
        if isinstance(self.values, np.ndarray):
            flat: list[Any] = self.values.ravel().tolist()
            return flat
        return [text for row in self.values for text in row]

    def as_binary(self) -> bytes:
        """Little-endian, row by row; each string with its length in bytes before it, uint32."""
        if isinstance(self.values, np.ndarray):
            return self.values.astype(_DTYPES[self.datatype]).tobytes()
        encoded = [text.encode() for row in self.values for text in row]
        return b"".join(part for text in encoded for part in (len(text).to_bytes(4, "little"), text))


def strings(data: bytes) -> list[str]:
    """The strings of a binary BYTES tensor. ValueError, with the element, when it ends in the middle or is not UTF-8."""
    found: list[str] = []
    at = 0
    while at < len(data):
        start = at + 4
        at = start + int.from_bytes(data[at:start], "little")
        if at > len(data):
            raise ValueError(f"element {len(found)} ends after the tensor does")
        try:
            found.append(data[start:at].decode())
        except UnicodeDecodeError:
            raise ValueError(f"element {len(found)} is not UTF-8") from None
    return found
