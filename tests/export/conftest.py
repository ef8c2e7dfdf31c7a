"""A tiny trained run, made by hand, and the bundle exported from it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from export.__main__ import main
from models.checkpoint import save_head
from models.encoder import Encoder, EncoderConfig
from models.head import Block, Head

WIDTH, LABELS = 48, 300
TEXTS = [
    "sort an array along an axis",
    "parse a date from a string",
    "open a file for reading and writing",
    "the eigenvalues of a symmetric matrix",
    "send a request and wait for the answer",
]


def small_encoder() -> Encoder:
    config = EncoderConfig("mean", max_length=24, intermediate=WIDTH)
    return Encoder.small(TEXTS * 3, config, vocabulary=300, width=32, layers=2, heads=2, seed=1)


def mixed_head() -> Head:
    """A block of each connectivity, with padding in the last group of two of them."""
    rng = np.random.default_rng(2)
    labels = rng.permutation(LABELS).astype(np.int32)
    kinds = [("dense", "fp32", labels[:32]), ("shared", "bf16", labels[32:200]), ("private", "fp16", labels[200:])]
    blocks = [
        Block.random(part, width=WIDTH, connectivity=kind, fan_in=12, group_size=16, dtype=dtype, rng=rng)
        for kind, dtype, part in kinds
    ]
    for block in blocks:
        block.bias[...] = rng.standard_normal(block.bias.shape, dtype=np.float32)
    return Head(WIDTH, LABELS, tuple(blocks))


def write_lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one checkpoint. Not to be changed by tests."""
    run = tmp_path_factory.mktemp("run")
    checkpoint = run / "checkpoints" / "step-00000020"
    small_encoder().save(checkpoint / "encoder")
    save_head(mixed_head(), checkpoint / "head.safetensors")
    write_lines(run / "labels.jsonl", [{"id": f"id-{i}", "name": f"Näme {i} 名前 🎈"} for i in range(LABELS)])
    heldout = [{"text": f"{text} number {i}", "labels": [f"id-{i}"]} for i, text in enumerate(TEXTS * 5)]
    write_lines(run / "heldout.jsonl", [*heldout, {"text": "no labels " * 40, "labels": []}])
    evaluations = [{"kind": "eval", "split": "dev", "step": step, "P@1": step / 100} for step in (10, 20, 30)]
    write_lines(run / "metrics.jsonl", [{"kind": "train", "step": 5, "loss": 3.5}, *evaluations])
    return run


@pytest.fixture(scope="session")
def exported(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `run_folder`. Not to be changed by tests."""
    bundle = tmp_path_factory.mktemp("bundles") / "tiny"
    assert main([str(run_folder), "--out", str(bundle)]) == 0
    return bundle
