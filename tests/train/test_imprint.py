"""First weights from the labels' training texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models import dtypes
from models.head import Block, Head
from tests.train.tasks import QUICK, metrics, run, write_task
from train.imprint import imprint
from train.tokens import Split

WIDTH, LABELS, TEXTS = 24, 80, 300


@dataclass
class Vectors:
    """Texts whose embeddings are given."""

    x: np.ndarray
    split: Split
    lengths: np.ndarray

    def embed(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(self.x[rows])


def task(rng: np.random.Generator) -> tuple[Vectors, np.ndarray]:
    """Texts with 0 to 4 labels, of which the last five never occur and the one before has a single text; its counts."""
    labels = [np.sort(rng.choice(LABELS - 6, rng.integers(0, 5), replace=False)) for _ in range(TEXTS)]
    labels[7] = np.append(labels[7], LABELS - 6)
    starts = np.cumsum([0, *map(len, labels)])
    flat = np.concatenate(labels).astype(np.int32)
    none = np.zeros(TEXTS + 1, np.int64)
    split = Split("", np.empty(0, np.int32), none, flat, starts, np.empty(0, np.int32), none)
    x = (rng.standard_normal((TEXTS, WIDTH)) + 3).astype(np.float32)
    return Vectors(x, split, rng.integers(1, 9, TEXTS)), np.bincount(flat, minlength=LABELS)


def head_of(connectivity: str, dtype: str, rng: np.random.Generator) -> Head:
    """Two blocks of shuffled labels, the second of the connectivity asked for, each with padding."""
    first, second = np.split(rng.permutation(LABELS).astype(np.int32), [20])
    facts: Any = {"width": WIDTH, "group_size": 16, "dtype": dtype, "rng": rng}
    blocks = (
        Block.random(first, connectivity="dense", fan_in=WIDTH, **facts),
        Block.random(second, connectivity=connectivity, fan_in=9, **facts),
    )
    return Head(WIDTH, LABELS, blocks)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("connectivity", ["dense", "shared", "private"])
def test_a_label_starts_at_the_mean_of_its_texts(connectivity, dtype):
    rng = np.random.default_rng(0)
    texts, counts = task(rng)
    head = head_of(connectivity, dtype, rng)
    before = [{name: buffer.copy() for name, buffer in block.buffers.items()} for block in head.blocks]
    imprint(head, texts, counts)
    head.validate()

    of_label = [[row for row in range(TEXTS) if label in texts.split.labels_of([row])[0]] for label in range(LABELS)]
    means = np.array([texts.x[rows].mean(axis=0, dtype=np.float64) if rows else np.full(WIDTH, np.nan) for rows in of_label])
    means -= np.nanmean(means, axis=0)
    for block, old in zip(head.blocks, before, strict=True):
        assert (block.bias == old["bias"]).all()
        assert block.connectivity != "shared" or (block.indices == old["indices"]).all()
        values = dtypes.decode(block.values, dtype)
        for (group, place), label in np.ndenumerate(block.label_ids):
            if label < 0 or not counts[label]:
                assert (block.values[group, :, place] == old["values"][group, :, place]).all()
                continue
            inputs = {"dense": slice(None), "shared": (group,), "private": (group, slice(None), place)}[block.connectivity]
            expected = means[label] if block.indices is None else means[label][block.indices[inputs]]
            expected = expected / np.sqrt((expected**2).mean()) * block.fan_in**-0.5
            np.testing.assert_allclose(values[group, :, place], expected, rtol=2**-8 if dtype == "bf16" else 1e-3, atol=1e-5)


def test_a_private_label_reads_where_it_differs_most():
    """A label's texts have much of three inputs; half of all inputs vary a hundred times as much, in every label alike."""
    rng = np.random.default_rng(2)
    texts, counts = task(rng)
    told = np.array([rng.permutation(WIDTH)[:3] for _ in range(LABELS)])
    texts.x[:] = rng.standard_normal(texts.x.shape) * 0.01
    for label in range(LABELS):
        rows = [row for row in range(TEXTS) if label in texts.split.labels_of([row])[0]]
        texts.x[rows, told[label][:, None]] += 1
    texts.x[:, ::2] *= 100
    head = head_of("private", "fp32", rng)
    block, before = head.blocks[1], head.blocks[1].indices.copy()
    imprint(head, texts, counts)
    head.validate()
    for (group, place), label in np.ndenumerate(block.label_ids):
        read = block.indices[group, :, place]
        if label >= 0 and counts[label] > 4:  # of fewer texts, other labels' inputs may say as much
            assert set(told[label]) <= set(read)
        elif label < 0 or not counts[label]:
            assert (read == before[group, :, place]).all()


@pytest.mark.parametrize("connectivity", ["shared", "private"])
def test_texts_that_say_nothing_leave_the_weights(connectivity):
    rng = np.random.default_rng(1)
    texts, counts = task(rng)
    texts.x[:] = 0
    head = head_of(connectivity, "fp32", rng)
    before = [{name: buffer.copy() for name, buffer in block.buffers.items()} for block in head.blocks]
    imprint(head, texts, counts)
    for block, old in zip(head.blocks, before, strict=True):
        assert all((buffer == old[name]).all() for name, buffer in block.buffers.items())


def test_a_head_so_begun_ranks_before_the_first_step(task, tmp_path):
    """A bag of words of random vectors and learning rates of zero: random weights are at chance, 3 of 40 labels."""
    bag = ("--small-layers", "0", "--small-width", "128", "--intermediate", "0", "--fan-in", "64")
    still = (*bag, "--encoder-lr", "0", "--head-lr", "0", "--epochs", "1", "--rewire", "off")
    found = {}
    for name in ("random", "imprinted"):
        assert run(task, tmp_path / name, *QUICK, *still, "--head-init", name) == 0
        rows = metrics(tmp_path / name)
        found[name] = next(row["P@1"] for row in rows if row["kind"] == "eval")
        assert any(row.get("stage") == "imprinting" for row in rows) == (name == "imprinted")
    assert found["imprinted"] > 0.3 > 2 * found["random"]


def test_a_pretrained_encoder_embeds_the_texts_once(task, tmp_path, minilm_path):
    """The grouping's embeddings in the cache serve the first weights too."""
    few = write_task(tmp_path / "few", texts=40, test_texts=5)
    flags = (*QUICK, "--epochs", "1", "--encoder", str(minilm_path), "--head-init", "imprinted")
    assert run(few, tmp_path / "run", *flags) == 0
    assert len(list((tmp_path / "run" / "cache").glob("pooled-*"))) == 1
