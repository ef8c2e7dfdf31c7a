"""Values of a trained head in another number format."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from models import dtypes
from models.head import Block, Head

DTYPES = ("fp32", "fp16", "bf16")
ENCODER_DTYPES = ("fp32", "int8")
_CHUNK = 1 << 12  # groups


def convert_values(head: Head, dtype: str) -> Head:
    """The head with its values rounded to nearest in `dtype`, one of DTYPES; blocks that have it already stay as they are.

    Numbers beyond fp16 become infinite, which Head.validate refuses.
    """
    return replace(head, blocks=tuple(block if block.dtype == dtype else _convert(block, dtype) for block in head.blocks))


def _convert(block: Block, dtype: str) -> Block:
    values = np.empty(block.values.shape, dtype=dtypes.STORAGE[dtype])
    for start in range(0, block.groups, _CHUNK):
        part = slice(start, start + _CHUNK)
        with np.errstate(over="ignore"):
            values[part] = dtypes.encode(dtypes.decode(block.values[part], block.dtype), dtype)
    return replace(block, dtype=dtype, values=values)
