"""Values of a trained head in another number format."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from models import dtypes
from models.head import Block, Head

DTYPES = ("fp32", "fp16", "bf16", "int8")
ENCODER_DTYPES = ("fp32", "int8")
_CHUNK = 1 << 12  # groups


def convert_values(head: Head, dtype: str) -> Head:
    """The head with its values rounded to nearest in `dtype`, one of DTYPES; blocks that have it already stay as they are.

    int8 has a scale per label, so that the label's heaviest weight becomes ±127. Numbers beyond fp16 become infinite, and
    int8's scales where weights are not finite, which Head.validate refuses.
    """
    return replace(head, blocks=tuple(block if block.dtype == dtype else _convert(block, dtype) for block in head.blocks))


def _convert(block: Block, dtype: str) -> Block:
    values = np.empty(block.values.shape, dtype=dtypes.STORAGE[dtype])
    scales = np.empty(block.bias.shape, dtype=np.float32) if dtype in dtypes.QUANTIZED else None
    for start in range(0, block.groups, _CHUNK):
        part = slice(start, start + _CHUNK)
        weights = block.weights(part)
        with np.errstate(over="ignore", invalid="ignore"):
            if scales is not None:
                values[part], scales[part] = dtypes.quantize(weights, dtype)
            else:
                values[part] = dtypes.encode(weights, dtype)
    return replace(block, dtype=dtype, values=values, scales=scales)
