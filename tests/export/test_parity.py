"""The comparison of bundle and checkpoint passes when they are the same and names what differs when not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.bundle import Bundle, open_bundle, write_bundle
from export.convert import convert_values
from export.encoder import export_encoder
from export.parity import Parity, ParityError, _checkpoint_embeddings, _compare_rankings, prove
from export.run import HeldOut, Run, load_model
from models import kernels
from models.head import Block, Head
from tests.export.conftest import LABELS, WIDTH

pytestmark = pytest.mark.slow


def repack(exported: Path, out: Path, **changes: Any) -> Bundle:
    """The exported bundle with some of its contents replaced."""
    bundle = open_bundle(exported)
    contents: dict[str, Any] = {
        "head": bundle.head,
        "labels": [(bundle.labels.id(i), bundle.labels.name(i)) for i in range(LABELS)],
        "tokenizer": bundle.tokenizer_file.read_text(),
        "write_encoder": lambda file: shutil.copy(bundle.encoder_file, file),
    }
    write_bundle(out, name="changed", max_length=24, metrics={}, **contents | changes)
    return open_bundle(out)


@pytest.fixture(scope="module")
def checkpoint(run_folder: Path) -> dict[str, Any]:
    run = Run(run_folder)
    encoder, head = load_model(run.checkpoint())
    return {"encoder": encoder, "trained": head, "packed": head, "labels": list(run.labels()), "heldout": run.heldout()}


def test_a_bundle_equals_its_checkpoint(exported: Path, checkpoint: dict[str, Any]) -> None:
    parity = prove(open_bundle(exported), **checkpoint)
    assert (parity.texts, parity.top_k, parity.same_top_k) == (26, 10, 26)
    assert 0 < parity.embedding_difference < 1e-5 * parity.embedding_scale
    assert 0 < parity.score_difference < 1e-5 * parity.score_scale
    assert parity.precision.keys() == {"P@1", "P@3", "P@5"}


def test_places_that_are_not_those_of_the_labels_are_found(exported: Path, checkpoint: dict[str, Any]) -> None:
    bundle = open_bundle(exported)
    with pytest.raises(ParityError, match=r"^the labels' places are not those in the checkpoint's head$"):
        prove(replace(bundle, places=bundle.places[::-1]), **checkpoint)


def test_what_an_int8_encoder_may_be_off_is_too_much_for_fp32(
    checkpoint: dict[str, Any], exported: Path, tmp_path: Path
) -> None:
    bundle = repack(exported, tmp_path / "b", write_encoder=lambda file: export_encoder(checkpoint["encoder"], file, "int8"))
    parity = prove(bundle, **checkpoint, encoder_dtype="int8")
    assert parity.embedding_difference > 1e-4 * parity.embedding_scale
    with pytest.raises(ParityError, match=r"^embeddings of a batch"):
        prove(bundle, **checkpoint)


def test_precision_counts_true_labels_of_texts_that_have_some(exported: Path, checkpoint: dict[str, Any]) -> None:
    """Every text is given its own best labels as true ones, then P@k is known."""
    bundle = open_bundle(exported)
    encoder, rows = checkpoint["encoder"], checkpoint["heldout"][:5]
    tokens = encoder.tokenize([row.text for row in rows])
    _, ranked = kernels.topk(_checkpoint_embeddings(encoder, tokens), checkpoint["trained"], 3)
    rows = [
        replace(row, labels=frozenset({f"id-{first}", f"id-{third}"}))
        for row, (first, _, third) in zip(rows, ranked, strict=True)
    ]
    rows.append(HeldOut("nothing is true of this", frozenset()))
    parity = prove(bundle, **checkpoint | {"heldout": rows})
    assert parity.precision == {"P@1": (1.0, 1.0), "P@3": (2 / 3, 2 / 3), "P@5": (0.4, 0.4)}
    assert prove(bundle, **checkpoint | {"heldout": rows[-1:]}).precision == {}


def test_a_converted_head_is_held_against_the_converted_one(exported: Path, checkpoint: dict[str, Any], tmp_path: Path) -> None:
    packed = convert_values(checkpoint["trained"], "bf16")
    bundle = repack(exported, tmp_path / "b", head=packed)
    assert prove(bundle, **checkpoint | {"packed": packed}).same_top_k == 26
    with pytest.raises(ParityError, match="head block 0: values is not what the checkpoint holds"):
        prove(bundle, **checkpoint | {"packed": convert_values(checkpoint["trained"], "fp32")})


def altered(head: Head, block: int, buffer: str, change: Callable[[np.ndarray], object]) -> Head:
    arrays = {name: array.copy() for name, array in head.blocks[block].buffers.items()}
    change(arrays[buffer])
    blocks = list(head.blocks)
    blocks[block] = replace(blocks[block], **arrays)
    return replace(head, blocks=tuple(blocks))


def swap_first_two(array: np.ndarray) -> None:
    array[0, [0, 1]] = array[0, [1, 0]]


def flip_last_bit(array: np.ndarray) -> None:
    array.reshape(-1).view(np.uint8)[-array.itemsize] ^= 1


@pytest.mark.parametrize(
    ("block", "buffer", "change"),
    [(0, "values", flip_last_bit), (1, "values", flip_last_bit), (2, "bias", flip_last_bit), (1, "label_ids", swap_first_two)],
)
def test_one_altered_number_of_the_head_is_found(
    exported: Path, checkpoint: dict[str, Any], tmp_path: Path, block: int, buffer: str, change: Callable[[np.ndarray], object]
) -> None:
    bundle = repack(exported, tmp_path / "b", head=altered(checkpoint["trained"], block, buffer, change))
    with pytest.raises(ParityError, match=f"head block {block}: {buffer} is not what the checkpoint holds"):
        prove(bundle, **checkpoint)


def test_altered_labels_are_found(exported: Path, checkpoint: dict[str, Any], tmp_path: Path) -> None:
    labels = list(checkpoint["labels"])
    labels[299] = ("id-299", "another name")
    bundle = repack(exported, tmp_path / "b", labels=labels)
    with pytest.raises(ParityError, match=r"label 299 is \('id-299', 'Näme 299 名前 🎈'\) in the run and .*another name"):
        prove(bundle, **checkpoint)
    with pytest.raises(ParityError, match=r"label 299 is None in the run"):
        prove(open_bundle(exported), **checkpoint | {"labels": checkpoint["labels"][:-1]})


def test_an_altered_tokenizer_is_found(exported: Path, checkpoint: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = json.loads((exported / "tokenizer.json").read_text())
    tokenizer["truncation"]["max_length"] = 23
    bundle = repack(exported, tmp_path / "b", tokenizer=json.dumps(tokenizer))
    with pytest.raises(ParityError, match=r"held-out text 25: tokenizer\.json gives other tokens"):
        prove(bundle, **checkpoint)


def test_an_altered_encoder_is_found(exported: Path, checkpoint: dict[str, Any]) -> None:
    encoder = checkpoint["encoder"]
    weight = encoder.intermediate.weight.data
    weight[0] *= 1.02
    try:
        with pytest.raises(ParityError, match=r"embeddings of a batch \[1, 1\] differ by"):
            prove(open_bundle(exported), **checkpoint)
    finally:
        weight[0] /= 1.02


def test_an_encoder_that_onnx_runtime_cannot_load_is_found(exported: Path, checkpoint: dict[str, Any], tmp_path: Path) -> None:
    bundle = repack(exported, tmp_path / "b", write_encoder=lambda file: file.write_bytes(b"not ONNX"))
    with pytest.raises(ParityError, match=r"encoder\.onnx cannot be loaded"):
        prove(bundle, **checkpoint)


@pytest.mark.parametrize(("value", "fault"), [(3e38, "scores .* differ by nan"), (-3e38, "cannot be scored: .* overflow")])
def test_scores_that_overflow_are_found(
    exported: Path, checkpoint: dict[str, Any], tmp_path: Path, value: float, fault: str
) -> None:
    labels = np.arange(LABELS, dtype=np.int32)
    block = Block.random(labels, width=WIDTH, connectivity="dense", fan_in=WIDTH, rng=np.random.default_rng(0))
    block.values[...] = value
    head = Head(WIDTH, LABELS, (block,))
    bundle = repack(exported, tmp_path / "b", head=head)
    with pytest.raises(ParityError, match=fault):
        prove(bundle, **checkpoint | {"trained": head, "packed": head})


def test_only_ties_may_change_places() -> None:
    scores = np.array([[3.0, 2.0, 1.001]])
    ranked = np.array([[7, 8, 9]])
    assert _compare_rankings(scores, ranked, np.array([[8, 7, 9]]), slack=0) == 1
    assert _compare_rankings(scores, ranked, np.array([[7, 8, 5]]), slack=0) == 0
    with pytest.raises(ParityError, match="held-out text 0: label 8 is among the best"):
        _compare_rankings(scores, ranked, np.array([[7, 5, 9]]), slack=0.1)


def test_the_table_shows_both_sides(exported: Path) -> None:
    stored = open_bundle(exported).manifest.parity
    assert stored is not None
    parity = Parity(**stored | {"precision": {"P@1": (0.25, 0.5)}})
    lines = parity.table().splitlines()
    assert lines[0].split() == ["largest", "difference"]
    assert [line.split()[0] for line in lines[1:3]] == ["embedding", "score"]
    assert lines[4].split() == ["P@1", "0.2500", "0.5000"]
    assert lines[-1] == "same top-10 on 26 of 26 held-out texts"
