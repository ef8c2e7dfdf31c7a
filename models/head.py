"""The sparse output layer: blocks of labels and their buffers. docs/design.md describes the layout.

Training updates these buffers in place, a checkpoint stores them, a bundle packs them and the server maps them. They are
numpy arrays (or memory maps); this module knows nothing of files, HTTP or training, and needs no torch.

Dimensions: D head input width, L labels, K fan-in, G group size, N groups in a block.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import numpy as np

from models import dtypes

Connectivity = Literal["dense", "shared", "private"]
MAX_WIDTH = 65_536  # indices are uint16
_CHUNK = 1 << 22  # elements looked at together, so that checks need little memory


class HeadError(ValueError):
    """A head or block breaks the layout; the message names block, buffer and position."""


@dataclass(frozen=True, eq=False)
class Block:
    """Labels of one connectivity and fan-in, in N groups of G slots.

    values     [N, K, G]  in the storage of `dtype` (see models.dtypes)
    bias       [N, G]     fp32
    label_ids  [N, G]     int32; −1 marks padding
    indices    uint16     shared [N, K] ascending, private [N, K, G] distinct within a label, dense None
    scales     [N, G]     fp32, for int8 and fp8 only

    The score of slot (n, g) for input x is
    `bias[n, g] + scales[n, g] · Σ_k values[n, k, g] · x[indices[n, k(, g)]]`.

    Shapes and types are checked on construction (HeadError); `validate` also reads the contents.
    """

    connectivity: Connectivity
    width: int
    dtype: str
    values: np.ndarray
    bias: np.ndarray
    label_ids: np.ndarray
    indices: np.ndarray | None = None
    scales: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.connectivity not in get_args(Connectivity):
            raise HeadError(f"connectivity is {self.connectivity!r}, not one of {', '.join(get_args(Connectivity))}")
        if self.dtype not in dtypes.STORAGE:
            raise HeadError(f"dtype is {self.dtype!r}, not one of {', '.join(dtypes.STORAGE)}")
        if not 1 <= self.width <= MAX_WIDTH:
            raise HeadError(f"width is {self.width}, must be 1 to {MAX_WIDTH}")
        if self.values.ndim != 3:
            raise HeadError(f"values has shape {list(self.values.shape)}, expected [N, K, G]")
        n, k, g = self.values.shape
        if g == 0 or g % 16:
            raise HeadError(f"group size is {g}, must be a multiple of 16")
        if not 1 <= k <= self.width:
            raise HeadError(f"fan-in is {k}, must be 1 to the width {self.width}")
        if self.connectivity == "dense" and k != self.width:
            raise HeadError(f"a dense block has fan-in {k}, must equal the width {self.width}")
        index_shape = {"dense": None, "shared": (n, k), "private": (n, k, g)}[self.connectivity]
        quantized = self.dtype in dtypes.QUANTIZED
        _check_buffer("values", self.values, (n, k, g), dtypes.STORAGE[self.dtype])
        _check_buffer("bias", self.bias, (n, g), np.dtype(np.float32))
        _check_buffer("label_ids", self.label_ids, (n, g), np.dtype(np.int32))
        _check_buffer("indices", self.indices, index_shape, np.dtype(np.uint16))
        _check_buffer("scales", self.scales, (n, g) if quantized else None, np.dtype(np.float32))

    @property
    def groups(self) -> int:
        return self.values.shape[0]

    @property
    def fan_in(self) -> int:
        return self.values.shape[1]

    @property
    def group_size(self) -> int:
        return self.values.shape[2]

    @property
    def buffers(self) -> dict[str, np.ndarray]:
        """The arrays that make up the block, by field name, absent ones left out."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.buffers.values())

    def weights(self, groups: slice) -> np.ndarray:
        """What the values of these groups stand for, fp32 [n, K, G]."""
        numbers = dtypes.decode(self.values[groups], self.dtype)
        return numbers if self.scales is None else numbers * self.scales[groups, None]

    def part(self, groups: slice) -> Block:
        """The block of these groups alone, a view: it has no memory of its own."""
        buffers: dict[str, Any] = {name: array[groups] for name, array in self.buffers.items()}
        return replace(self, **buffers)

    def validate(self) -> None:
        """Reads every buffer; raises HeadError at the first bad index, duplicate, non-finite number or label id."""
        for name in ("bias", "scales"):
            array = getattr(self, name)
            if array is not None and not np.isfinite(array).all():
                raise HeadError(f"{name}{_first(~np.isfinite(array))} is not finite")
        for start, part in _chunks(self.values):
            bad = ~dtypes.finite(part, self.dtype)
            if bad.any():
                raise HeadError(f"values{_first(bad, start)} is not finite")
        if (self.label_ids < -1).any():
            at = _first(self.label_ids < -1)
            raise HeadError(f"label_ids{at} is negative; only −1, padding, may be")
        if self.indices is None:
            return
        for start, part in _chunks(self.indices):
            bad = part >= self.width
            if bad.any():
                raise HeadError(f"indices{_first(bad, start)} is {part[bad][0]}, the width is {self.width}")
            # Sorted neighbours show duplicates of a label; a shared list must be ascending as it stands.
            ordered = part if self.connectivity == "shared" else np.sort(part, axis=1)
            bad = ordered[:, 1:] <= ordered[:, :-1]
            if bad.any():
                group = start + int(np.argwhere(bad)[0][0])
                fault = "not ascending and distinct" if self.connectivity == "shared" else "not distinct within a label"
                raise HeadError(f"indices of group {group} are {fault}")

    @classmethod
    def random(
        cls,
        labels: np.ndarray,
        *,
        width: int,
        connectivity: Connectivity,
        fan_in: int,
        group_size: int = 32,
        dtype: str = "fp32",
        rng: np.random.Generator,
    ) -> Block:
        """A block over `labels` (int32 [n], in slot order): random distinct indices, values N(0, 1/K), bias zero.

        The last group is padded. With variance 1/K scores keep the variance of the inputs, whatever the fan-in.
        `dense` ignores `fan_in`.
        """
        if group_size < 16 or group_size % 16:
            raise HeadError(f"group size is {group_size}, must be a multiple of 16")
        if connectivity == "dense":
            fan_in = width
        if not 1 <= fan_in <= width:
            raise HeadError(f"fan-in is {fan_in}, must be 1 to the width {width}")
        n = -(-len(labels) // group_size)
        label_ids = np.full((n, group_size), -1, dtype=np.int32)
        label_ids.reshape(-1)[: len(labels)] = labels
        values = np.empty((n, fan_in, group_size), dtype=dtypes.STORAGE[dtype])
        scales = np.empty((n, group_size), dtype=np.float32) if dtype in dtypes.QUANTIZED else None
        step = max(1, _CHUNK // (fan_in * group_size))
        for start in range(0, n, step):
            part = rng.standard_normal((min(step, n - start), fan_in, group_size), dtype=np.float32)
            part *= fan_in**-0.5
            part *= (label_ids[start : start + step] >= 0)[:, None, :]
            if scales is not None:
                values[start : start + step], scales[start : start + step] = dtypes.quantize(part, dtype)
            else:
                values[start : start + step] = dtypes.encode(part, dtype)
        indices = None
        if connectivity == "shared":
            indices = random_indices(n, fan_in, width, rng)
        elif connectivity == "private":
            indices = np.empty((n, fan_in, group_size), dtype=np.uint16)
            step = max(1, _CHUNK // (fan_in * group_size))
            for start in range(0, n, step):
                part = random_indices(min(step, n - start) * group_size, fan_in, width, rng)
                indices[start : start + step] = part.reshape(-1, group_size, fan_in).transpose(0, 2, 1)
        bias = np.zeros((n, group_size), dtype=np.float32)
        return cls(connectivity, width, dtype, values, bias, label_ids, indices, scales)


@dataclass(frozen=True, eq=False)
class Head:
    """Blocks that partition the labels 0 … n_labels − 1, all of one input width. Checked on construction (HeadError)."""

    width: int
    n_labels: int
    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        if not self.blocks:
            raise HeadError("a head needs at least one block")
        for i, block in enumerate(self.blocks):
            if block.width != self.width:
                raise HeadError(f"block {i}: width is {block.width}, the head's is {self.width}")

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)

    def validate(self) -> None:
        """Checks every block's contents and that each label has exactly one slot; HeadError names block and position."""
        for i, block in enumerate(self.blocks):
            try:
                block.validate()
            except HeadError as error:
                raise HeadError(f"block {i}: {error}") from None
        self.slots()

    def slots(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each label lives: block int32 [L] and slot int64 [L], a slot being n · G + g within its block.

        Raises HeadError when a label is out of range, has two slots or has none.
        """
        block_of = np.full(self.n_labels, -1, dtype=np.int32)
        slot_of = np.full(self.n_labels, -1, dtype=np.int64)
        for i, block in enumerate(self.blocks):
            ids = block.label_ids.reshape(-1)
            slots = np.flatnonzero(ids >= 0)
            ids = ids[slots]
            if ids.size and ids.max() >= self.n_labels:
                at = slots[np.argmax(ids >= self.n_labels)]
                raise HeadError(f"block {i}: slot {at} holds label {ids.max()}, the head has {self.n_labels} labels")
            taken = block_of[ids] >= 0
            if taken.any():
                label = ids[taken][0]
                raise HeadError(f"block {i}: slot {slots[taken][0]} holds label {label}, already in block {block_of[label]}")
            block_of[ids], slot_of[ids] = i, slots
            twice = slot_of[ids] != slots
            if twice.any():
                raise HeadError(f"block {i}: slot {slots[twice][0]} holds label {ids[twice][0]}, already in that block")
        missing = block_of < 0
        if missing.any():
            raise HeadError(f"label {np.argmax(missing)} is in no block")
        return block_of, slot_of

    def places(self) -> np.ndarray:
        """Where each label lives, uint32 [L]: its slot, counted on from those of the blocks before. HeadError as in `slots`."""
        block_of, slot_of = self.slots()
        first = np.cumsum([0, *(block.bias.size for block in self.blocks)])
        return (slot_of + first[block_of]).astype(np.uint32)


def random_indices(rows: int, fan_in: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """uint16 [rows, fan_in]: per row a uniformly random subset of range(width), ascending."""
    if 4 * fan_in > width:  # few redraws would succeed: rank random keys instead
        out = np.empty((rows, fan_in), dtype=np.uint16)
        step = max(1, _CHUNK // width)
        for start in range(0, rows, step):
            keys = rng.random((min(step, rows - start), width), dtype=np.float32)
            out[start : start + step] = np.argsort(keys, axis=1)[:, :fan_in]
        out.sort(axis=1)
        return out
    out = rng.integers(0, width, (rows, fan_in), dtype=np.uint16 if width < MAX_WIDTH else np.uint32).astype(np.uint16)
    open_rows = np.arange(rows)
    while open_rows.size:
        part = np.sort(out[open_rows], axis=1)
        again = np.zeros(part.shape, dtype=bool)
        again[:, 1:] = part[:, 1:] == part[:, :-1]
        part[again] = rng.integers(0, width, int(again.sum())).astype(np.uint16)
        out[open_rows] = part
        open_rows = open_rows[again.any(axis=1)]
    return out


def _check_buffer(name: str, array: np.ndarray | None, shape: tuple[int, ...] | None, dtype: np.dtype) -> None:
    if shape is None:
        if array is not None:
            raise HeadError(f"{name} is given, but this kind of block has none")
    elif array is None:
        raise HeadError(f"{name} is missing, expected {dtype} {list(shape)}")
    elif array.shape != shape or array.dtype != dtype:
        raise HeadError(f"{name} is {array.dtype} {list(array.shape)}, expected {dtype} {list(shape)}")
    elif not array.flags.c_contiguous:
        raise HeadError(f"{name} is not contiguous")


def _chunks(array: np.ndarray) -> Iterable[tuple[int, np.ndarray]]:
    step = max(1, _CHUNK // max(1, int(np.prod(array.shape[1:]))))
    for start in range(0, len(array), step):
        yield start, array[start : start + step]


def _first(mask: np.ndarray, start: int = 0) -> str:
    at = np.argwhere(mask)[0]
    at[0] += start
    return "[" + ", ".join(map(str, at)) + "]"
