"""The head's layout: what is refused and how the message names it, random construction, and where labels live."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import dtypes, head
from models.head import Block, Head, HeadError

WIDTH, FAN_IN, GROUP = 40, 5, 16
CONNECTIVITIES = ["dense", "shared", "private"]
SPARSE = ["shared", "private"]


def a_block(connectivity: str = "shared", labels: int = 40, first: int = 0, **changes) -> Block:
    """A random block of labels first, first + 1, … in groups of 16."""
    ids = np.arange(first, first + labels, dtype=np.int32)
    options = {"width": WIDTH, "fan_in": FAN_IN, "group_size": GROUP, "rng": np.random.default_rng(0), **changes}
    return Block.random(ids, connectivity=connectivity, **options)


def quantized_block(dtype: str = "int8") -> Block:
    block = a_block()
    values = np.zeros(block.values.shape, dtype=dtypes.STORAGE[dtype])
    return replace(block, dtype=dtype, values=values, scales=np.ones(block.bias.shape, dtype=np.float32))


def refused(message: str):
    """Expects a HeadError whose text starts with exactly this."""
    return pytest.raises(HeadError, match="^" + message)


# Each: what is changed in a good block, and how the complaint begins.
WRONG_SHAPES = {
    "connectivity": ({"connectivity": "random"}, "connectivity is 'random', not one of dense, shared, private"),
    "dtype": ({"dtype": "fp64"}, "dtype is 'fp64', not one of fp32, fp16, bf16, int8, fp8"),
    "no width": ({"width": 0}, "width is 0, must be 1 to 65536"),
    "too wide": ({"width": 65_537}, "width is 65537, must be 1 to 65536"),
    "flat values": ({"values": np.zeros((3, 80), np.float32)}, r"values has shape \[3, 80\], expected \[N, K, G\]"),
    "group of 8": ({"values": np.zeros((3, 5, 8), np.float32)}, "group size is 8, must be a multiple of 16"),
    "group of 0": ({"values": np.zeros((3, 5, 0), np.float32)}, "group size is 0, must be a multiple of 16"),
    "no inputs": ({"values": np.zeros((3, 0, 16), np.float32)}, "fan-in is 0, must be 1 to the width 40"),
    "too many inputs": ({"width": 4}, "fan-in is 5, must be 1 to the width 4"),
    "narrow dense": ({"connectivity": "dense"}, "a dense block has fan-in 5, must equal the width 40"),
    "values of another type": (
        {"values": np.zeros((3, 5, 16))},
        r"values is float64 \[3, 5, 16\], expected float32 \[3, 5, 16\]",
    ),
    "bf16 stored as fp16": ({"dtype": "bf16"}, r"values is float32 \[3, 5, 16\], expected uint16"),
    "bias of another shape": ({"bias": np.zeros((3, 8), np.float32)}, r"bias is float32 \[3, 8\], expected float32 \[3, 16\]"),
    "wide label ids": ({"label_ids": np.zeros((3, 16), np.int64)}, r"label_ids is int64 \[3, 16\], expected int32 \[3, 16\]"),
    "indices missing": ({"indices": None}, r"indices is missing, expected uint16 \[3, 5\]"),
    "signed indices": ({"indices": np.zeros((3, 5), np.int16)}, r"indices is int16 \[3, 5\], expected uint16 \[3, 5\]"),
    "shared indices in a private block": (
        {"connectivity": "private"},
        r"indices is uint16 \[3, 5\], expected uint16 \[3, 5, 16\]",
    ),
    "scales without need": ({"scales": np.ones((3, 16), np.float32)}, "scales is given, but this kind of block has none"),
    "values not contiguous": (
        {"values": np.zeros((3, 16, 5), np.float32).transpose(0, 2, 1)},
        "values is not contiguous",
    ),
}


@pytest.mark.parametrize(("change", "complaint"), WRONG_SHAPES.values(), ids=WRONG_SHAPES)
def test_wrong_layout_is_refused_on_construction(change: dict, complaint: str) -> None:
    block = a_block()
    with refused(complaint):
        replace(block, **change)


def test_dense_block_takes_no_indices_and_int8_needs_scales() -> None:
    with refused("indices is given, but this kind of block has none"):
        replace(a_block("dense"), indices=np.zeros((3, 5), np.uint16))
    with refused(r"scales is missing, expected float32 \[3, 16\]"):
        replace(quantized_block(), scales=None)


# Each: the block, the buffer, the place and the number put there, and how the complaint begins.
WRONG_CONTENTS = {
    "bias infinite": (a_block, "bias", (2, 3), np.inf, r"bias\[2, 3\] is not finite"),
    "value NaN": (a_block, "values", (1, 4, 15), np.nan, r"values\[1, 4, 15\] is not finite"),
    "fp16 value infinite": (lambda: a_block(dtype="fp16"), "values", (0, 0, 0), np.inf, r"values\[0, 0, 0\] is not finite"),
    "bf16 value NaN": (lambda: a_block(dtype="bf16"), "values", (2, 0, 1), 0xFFC1, r"values\[2, 0, 1\] is not finite"),
    "fp8 value NaN": (lambda: quantized_block("fp8"), "values", (1, 0, 1), 0x7F, r"values\[1, 0, 1\] is not finite"),
    "scale NaN": (quantized_block, "scales", (0, 9), np.nan, r"scales\[0, 9\] is not finite"),
    "label id −2": (a_block, "label_ids", (0, 7), -2, r"label_ids\[0, 7\] is negative; only −1, padding, may be"),
    "shared index beyond the width": (a_block, "indices", (1, 4), WIDTH, r"indices\[1, 4\] is 40, the width is 40"),
    "private index beyond the width": (
        lambda: a_block("private"), "indices", (2, 1, 6), 65_535, r"indices\[2, 1, 6\] is 65535, the width is 40",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "buffer", "at", "value", "complaint"), WRONG_CONTENTS.values(), ids=WRONG_CONTENTS)
@pytest.mark.parametrize("chunk", [1, 1 << 22], ids=["group by group", "at once"])
def test_wrong_contents_are_named(make, buffer, at, value, complaint, chunk, monkeypatch) -> None:
    monkeypatch.setattr(head, "_CHUNK", chunk)  # the position must not depend on how the check walks the buffer
    block = make()
    block.validate()
    getattr(block, buffer)[at] = value
    with refused(complaint):
        block.validate()
    if buffer != "label_ids":
        with refused("block 1: " + complaint):
            Head(WIDTH, 56, (a_block(labels=16, first=40), block)).validate()


@pytest.mark.parametrize("chunk", [1, 1 << 22], ids=["group by group", "at once"])
def test_repeated_inputs_are_named(chunk: int, monkeypatch) -> None:
    monkeypatch.setattr(head, "_CHUNK", chunk)
    shared, private = a_block("shared"), a_block("private")
    shared.indices[1, 2] = shared.indices[1, 1]
    with refused("indices of group 1 are not ascending and distinct"):
        shared.validate()
    swapped = a_block("shared")
    swapped.indices[2, :2] = swapped.indices[2, 1::-1]
    with refused("indices of group 2 are not ascending and distinct"):
        swapped.validate()
    private.indices[2, 4, 9] = private.indices[2, 0, 9]
    with refused("indices of group 2 are not distinct within a label"):
        private.validate()


def test_private_indices_may_stand_in_any_order() -> None:
    block = a_block("private")
    block.indices[...] = block.indices[:, ::-1]
    block.validate()


def test_a_head_refuses_blocks_that_do_not_fit() -> None:
    with refused("a head needs at least one block"):
        Head(WIDTH, 0, ())
    with refused("block 1: width is 41, the head's is 40"):
        Head(WIDTH, 80, (a_block(), a_block(first=40, width=41)))


# Each: the blocks of a head of 80 labels that do not partition them, and the complaint.
WRONG_PARTITIONS = {
    "label too large": ([(0, 40), (40, 41)], "block 1: slot 40 holds label 80, the head has 80 labels"),
    "in two blocks": ([(0, 50), (40, 40)], "block 1: slot 0 holds label 40, already in block 0"),
    "nowhere": ([(0, 40), (41, 39)], "label 40 is in no block"),
}


@pytest.mark.parametrize(("parts", "complaint"), WRONG_PARTITIONS.values(), ids=WRONG_PARTITIONS)
def test_blocks_must_partition_the_labels(parts: list[tuple[int, int]], complaint: str) -> None:
    wrong = Head(WIDTH, 80, tuple(a_block(first=first, labels=labels) for first, labels in parts))
    for check in (wrong.validate, wrong.slots):
        with refused(complaint):
            check()


def test_a_label_twice_in_one_block_is_named() -> None:
    block = a_block()
    block.label_ids[0, 5] = 39  # label 39 stands in group 2, slot 39
    with refused("block 0: slot 5 holds label 39, already in that block"):
        Head(WIDTH, 40, (block,)).validate()


def test_slots_tell_where_each_label_lives() -> None:
    ids = np.random.default_rng(1).permutation(100).astype(np.int32)
    options = {"width": WIDTH, "fan_in": FAN_IN, "rng": np.random.default_rng(0)}
    blocks = (
        Block.random(ids[:37], connectivity="dense", group_size=16, **options),
        Block.random(ids[37:38], connectivity="private", group_size=48, **options),
        Block.random(ids[38:], connectivity="shared", group_size=32, **options),
    )
    blocks[2].label_ids[:] = blocks[2].label_ids[:, ::-1]  # padding first
    whole = Head(WIDTH, 100, blocks)
    whole.validate()
    block_of, slot_of = whole.slots()
    assert block_of.dtype == np.int32
    assert slot_of.dtype == np.int64
    for label in range(100):
        assert blocks[block_of[label]].label_ids.reshape(-1)[slot_of[label]] == label
    assert whole.nbytes == sum(array.nbytes for block in blocks for array in block.buffers.values())


def test_weights_are_values_times_their_labels_scale() -> None:
    block = quantized_block()
    block.scales[...] = np.arange(block.scales.size).reshape(block.scales.shape)
    expected = block.values[1:2].astype(np.float32) * block.scales[1:2, None]
    np.testing.assert_array_equal(block.weights(slice(1, 2)), expected)
    plain = a_block("shared")
    np.testing.assert_array_equal(plain.weights(slice(0, 1)), dtypes.decode(plain.values[:1], plain.dtype))


@pytest.mark.parametrize("connectivity", CONNECTIVITIES)
def test_buffers_are_listed_by_name(connectivity: str) -> None:
    block = a_block(connectivity)
    expected = {"values", "bias", "label_ids"} | ({"indices"} if connectivity != "dense" else set())
    assert set(block.buffers) == expected
    assert set(quantized_block().buffers) == {"values", "bias", "label_ids", "indices", "scales"}
    assert (block.groups, block.fan_in, block.group_size) == block.values.shape


@settings(deadline=None)
@given(
    labels=st.integers(0, 70),
    width=st.integers(1, 50),
    group=st.sampled_from([16, 32, 48]),
    connectivity=st.sampled_from(CONNECTIVITIES),
    dtype=st.sampled_from(list(dtypes.STORAGE)),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_random_blocks_of_any_shape_are_valid(labels, width, group, connectivity, dtype, seed, data) -> None:
    fan_in = data.draw(st.integers(1, width))
    ids = np.random.default_rng(seed).permutation(labels).astype(np.int32)
    block = Block.random(
        ids, width=width, connectivity=connectivity, fan_in=fan_in, group_size=group, dtype=dtype,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    Head(width, labels, (block,)).validate()
    groups = -(-labels // group)
    assert block.values.shape == (groups, width if connectivity == "dense" else fan_in, group)
    slots = block.label_ids.reshape(-1)
    np.testing.assert_array_equal(slots[:labels], ids)
    assert (slots[labels:] == -1).all()
    padding = (block.label_ids < 0)[:, None, :]
    assert not (dtypes.decode(block.values, dtype) * padding).any()
    assert not block.bias.any()


@pytest.mark.parametrize("chunk", [1, 1 << 22], ids=["group by group", "at once"])
@pytest.mark.parametrize("connectivity", CONNECTIVITIES)
def test_random_values_keep_the_variance_of_the_inputs(connectivity: str, chunk: int, monkeypatch) -> None:
    monkeypatch.setattr(head, "_CHUNK", chunk)
    block = a_block(connectivity, labels=3000, fan_in=10)
    values = block.values.transpose(0, 2, 1)[block.label_ids >= 0]  # [labels, K]
    assert values.size >= 30_000
    assert abs(values.mean()) < 4 * (block.fan_in * values.size) ** -0.5
    assert values.var() * block.fan_in == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(("width", "fan_in"), [(60, 5), (60, 30), (60, 60), (65_536, 3), (8, 2)])
@pytest.mark.parametrize("chunk", [1, 1 << 22], ids=["row by row", "at once"])
def test_random_indices_are_uniform_subsets(width: int, fan_in: int, chunk: int, monkeypatch) -> None:
    """(60, 5) is drawn with redraws, (60, 30) by ranking; both must give every input the same chance."""
    monkeypatch.setattr(head, "_CHUNK", chunk)
    rows = 2000
    drawn = head.random_indices(rows, fan_in, width, np.random.default_rng(0))
    assert drawn.dtype == np.uint16
    assert drawn.shape == (rows, fan_in)
    assert (np.diff(drawn.astype(int), axis=1) > 0).all()
    bins = min(width, 16)
    counts = np.bincount(drawn.reshape(-1).astype(np.int64) * bins // width, minlength=bins)
    share = np.bincount(np.arange(width) * bins // width, minlength=bins) / width
    expected = rows * fan_in * share
    spread = np.sqrt(expected)  # at most; drawing without replacement spreads less
    assert (np.abs(counts - expected) <= 4.5 * spread + 1e-9).all()


def test_random_indices_reach_both_ends_of_the_widest_input() -> None:
    drawn = head.random_indices(200, 2000, head.MAX_WIDTH, np.random.default_rng(0))
    assert drawn.min() == 0
    assert drawn.max() == head.MAX_WIDTH - 1


@pytest.mark.parametrize("connectivity", SPARSE)
def test_each_list_of_inputs_is_drawn_on_its_own(connectivity: str) -> None:
    block = a_block(connectivity, labels=160)
    lists = block.indices if connectivity == "shared" else np.sort(block.indices, axis=1).transpose(0, 2, 1).reshape(-1, FAN_IN)
    assert len(np.unique(lists, axis=0)) == len(lists)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"group_size": 24}, "group size is 24, must be a multiple of 16"),
        ({"group_size": 0}, "group size is 0, must be a multiple of 16"),
        ({"fan_in": 0}, "fan-in is 0, must be 1 to the width 40"),
        ({"fan_in": 41}, "fan-in is 41, must be 1 to the width 40"),
    ],
)
def test_impossible_random_blocks_are_refused(options: dict, complaint: str) -> None:
    with refused(complaint):
        a_block(**options)


def test_random_blocks_repeat_with_the_seed() -> None:
    once, again = a_block("private"), a_block("private")
    other = a_block("private", rng=np.random.default_rng(1))
    for name, array in once.buffers.items():
        np.testing.assert_array_equal(array, again.buffers[name])
    assert (once.values != other.values).any()
    assert (once.indices != other.indices).any()
