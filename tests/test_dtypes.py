"""Number formats against torch, which has them natively: every bit pattern, every rounding tie, saturation and NaN."""

import numpy as np
import pytest
import torch

from models import dtypes

TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
SMALL = ["fp16", "bf16", "fp8"]  # formats whose patterns can all be tried


def patterns(dtype: str) -> np.ndarray:
    """Every stored value of a format, in bit order."""
    storage = dtypes.STORAGE[dtype]
    unsigned = np.dtype(f"u{storage.itemsize}")
    return np.arange(1 << 8 * storage.itemsize, dtype=unsigned).view(storage)


def torch_decode(stored: np.ndarray, dtype: str) -> np.ndarray:
    return torch.from_numpy(stored.copy()).view(TORCH[dtype]).to(torch.float32).numpy()


def torch_encode(numbers: np.ndarray, dtype: str) -> np.ndarray:
    unsigned = {1: torch.uint8, 2: torch.uint16}[dtypes.STORAGE[dtype].itemsize]
    return torch.from_numpy(numbers).to(TORCH[dtype]).view(unsigned).numpy().view(dtypes.STORAGE[dtype])


def assert_same_numbers(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal as numbers, signs of zero included; any NaN equals any NaN."""
    np.testing.assert_array_equal(ours, theirs)
    number = ~np.isnan(theirs)
    np.testing.assert_array_equal(np.signbit(ours[number]), np.signbit(theirs[number]))


@pytest.mark.parametrize("dtype", SMALL)
def test_every_pattern_decodes_exactly(dtype: str) -> None:
    stored = patterns(dtype)
    assert_same_numbers(dtypes.decode(stored, dtype), torch_decode(stored, dtype))


@pytest.mark.parametrize("dtype", SMALL)
def test_every_number_survives_a_round_trip(dtype: str) -> None:
    stored = patterns(dtype)
    numbers = dtypes.decode(stored, dtype)
    keep = ~np.isnan(numbers)
    np.testing.assert_array_equal(dtypes.encode(numbers, dtype)[keep].view(np.uint8), stored[keep].view(np.uint8))


@pytest.mark.parametrize("dtype", SMALL)
def test_rounding_between_all_neighbours(dtype: str) -> None:
    """Midpoints are the ties; the fp32 numbers just beside them go to the nearer neighbour."""
    numbers = dtypes.decode(patterns(dtype), dtype)
    numbers = np.unique(numbers[np.isfinite(numbers)]).astype(np.float64)
    ties = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)  # exact: one bit more than the format has
    tried = np.concatenate([ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))])
    np.testing.assert_array_equal(dtypes.encode(tried, dtype).view(np.uint8), torch_encode(tried, dtype).view(np.uint8))


@pytest.mark.parametrize("dtype", SMALL)
def test_random_numbers_of_every_size_round_as_in_torch(dtype: str) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    numbers = bits.view(np.float32)
    numbers = numbers[np.isfinite(numbers)]
    if dtype == "fp8":  # torch turns what is too large into NaN, this format's rule is to saturate
        numbers = numbers[np.abs(numbers) <= 448]
    with np.errstate(over="ignore"):
        ours = dtypes.encode(numbers, dtype)
    assert_same_numbers(dtypes.decode(ours, dtype), torch_decode(torch_encode(numbers, dtype), dtype))


def test_large_bf16_rounds_to_infinity() -> None:
    largest = np.finfo(np.float32).max
    np.testing.assert_array_equal(dtypes.decode(dtypes.encode([largest, -largest], "bf16"), "bf16"), [np.inf, -np.inf])


@pytest.mark.parametrize(("dtype", "limit"), [("int8", 127), ("fp8", 448)])
def test_quantized_formats_saturate(dtype: str, limit: float) -> None:
    tried = np.float32([limit, limit + 0.4, 1e30, np.inf, -limit, -1e30, -np.inf])
    expected = [limit, limit, limit, limit, -limit, -limit, -limit]
    np.testing.assert_array_equal(dtypes.decode(dtypes.encode(tried, dtype), dtype), expected)


@pytest.mark.parametrize(("dtype", "limit", "step"), [("int8", 127, 0.5), ("fp8", 448, 16)])
def test_each_label_is_quantized_in_a_unit_of_its_own(dtype: str, limit: float, step: float) -> None:
    weights = np.random.default_rng(0).standard_normal((3, 40, 16), dtype=np.float32)
    weights *= 10.0 ** np.arange(-24, 24).reshape(3, 1, 16)
    weights[1, :, 5] = 0
    weights[2, :, 7] = 1e-45
    stored, scales = dtypes.quantize(weights, dtype)
    assert (stored.dtype, scales.dtype) == (dtypes.STORAGE[dtype], np.float32)
    numbers = dtypes.decode(stored, dtype)
    assert (np.abs(numbers * scales[:, None] - weights) <= step * scales[:, None] * (1 + 1e-6)).all()
    kept = np.ones((3, 16), dtype=bool)
    kept[1, 5] = kept[2, 7] = False
    assert (np.abs(numbers).max(axis=1)[kept] == limit).all()
    assert np.isfinite(scales).all()


def test_int8_rounds_ties_to_even() -> None:
    np.testing.assert_array_equal(dtypes.encode([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 2.4999], "int8"), [0, 2, 2, 0, -2, 126, 2])


@pytest.mark.parametrize("dtype", ["fp32", *SMALL])
def test_nan_stays_nan(dtype: str) -> None:
    """Every kind of NaN: quiet and signalling, both signs, payloads that a shift would turn into infinity."""
    nans = np.uint32([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF]).view(np.float32)
    with np.errstate(invalid="ignore"):  # numpy reports that it made a signalling one quiet
        assert np.isnan(dtypes.decode(dtypes.encode(nans, dtype), dtype)).all()


@pytest.mark.parametrize("dtype", list(dtypes.STORAGE))
def test_finite_tells_infinity_and_nan_from_numbers(dtype: str) -> None:
    stored = patterns(dtype) if dtype != "fp32" else np.float32([0, -1, np.inf, -np.inf, np.nan, 1e-45])
    np.testing.assert_array_equal(dtypes.finite(stored, dtype), np.isfinite(dtypes.decode(stored, dtype)))


@pytest.mark.parametrize("dtype", list(dtypes.STORAGE))
def test_storage_and_shape_are_kept(dtype: str) -> None:
    numbers = np.arange(6, dtype=np.float64).reshape(2, 3)
    stored = dtypes.encode(numbers, dtype)
    assert stored.dtype == dtypes.STORAGE[dtype]
    for precision in (np.float32, np.float64):
        decoded = dtypes.decode(stored, dtype, precision)
        assert decoded.dtype == precision
        np.testing.assert_array_equal(decoded, numbers)
    assert dtypes.encode(numbers[:0], dtype).shape == (0, 3)
