"""Number formats of a head's values, without torch.

numpy has neither bf16 nor fp8, so such values are kept as their bit patterns and every buffer travels with the name of its
format. `fp8` is e4m3 in its "fn" form (no infinities, NaN = 0x7F / 0xFF, largest 448), as in Micikevicius et al. 2022.
"""

from __future__ import annotations

import numpy as np

STORAGE: dict[str, np.dtype] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
    "int8": np.dtype(np.int8),
    "fp8": np.dtype(np.uint8),
}
QUANTIZED = {"int8": 127, "fp8": 448}  # these carry a scale per label; the largest number of each


def _fp8_table() -> np.ndarray:
    bits = np.arange(256)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    magnitude = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    magnitude[(bits & 0x7F) == 0x7F] = np.nan
    return np.where(bits < 128, magnitude, -magnitude).astype(np.float32)


_FP8 = _fp8_table()


def decode(stored: np.ndarray, dtype: str, to: type = np.float32) -> np.ndarray:
    """The numbers behind a stored array, exactly, as `to` (fp32 holds every format)."""
    if dtype == "bf16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(to, copy=False)
    if dtype == "fp8":
        return _FP8[stored].astype(to, copy=False)
    return stored.astype(to)


def encode(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """`numbers` rounded to nearest, ties to even, in the storage of `dtype`; int8 and fp8 saturate."""
    numbers = np.asarray(numbers, dtype=np.float32)
    if dtype == "bf16":
        bits = numbers.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(numbers), 0x7FC0, rounded).astype(np.uint16)
    if dtype == "int8":
        return np.clip(np.rint(numbers), -127, 127).astype(np.int8)
    if dtype == "fp8":
        return _encode_fp8(numbers)
    return numbers.astype(STORAGE[dtype])


def quantize(weights: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """fp32 [N, K, G] in a quantized `dtype`, and scales fp32 [N, G]: each label's heaviest weight is the largest number."""
    scales = np.maximum(np.abs(weights).max(axis=1) / QUANTIZED[dtype], np.finfo(np.float32).tiny)
    return encode(weights / scales[:, None], dtype), scales


def _encode_fp8(numbers: np.ndarray) -> np.ndarray:
    positive = _FP8[:0x7F].astype(np.float64)  # 0 … 448, ascending: the code of a number is its position
    midpoints = (positive[1:] + positive[:-1]) / 2
    magnitude = np.abs(numbers.astype(np.float64))
    code = np.searchsorted(midpoints, magnitude, side="left")
    tie = (code < len(midpoints)) & (magnitude == midpoints[np.minimum(code, len(midpoints) - 1)])
    code = np.where(tie & (code % 2 == 1), code + 1, code)
    code = np.where(np.isnan(magnitude), 0x7F, code)
    return (code | np.where(np.signbit(numbers), 0x80, 0)).astype(np.uint8)


def finite(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Boolean array: which stored numbers are neither infinite nor NaN."""
    if dtype == "bf16":
        return (stored & 0x7F80) != 0x7F80
    if dtype == "fp8":
        return (stored & 0x7F) != 0x7F
    if dtype == "int8":
        return np.ones(stored.shape, dtype=bool)
    return np.isfinite(stored)
