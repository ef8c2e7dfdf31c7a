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
    x = (rng.standard_normal((TEXTS, WIDTH)) + 3).astype(np.float32)
    return vectors(x, labels, rng.integers(1, 9, TEXTS))


def vectors(x: np.ndarray, labels: list[np.ndarray], lengths: np.ndarray) -> tuple[Vectors, np.ndarray]:
    """Texts of these embeddings, labels and lengths, and how many each label has."""
    starts = np.cumsum([0, *map(len, labels)])
    flat = np.concatenate(labels).astype(np.int32)
    none = np.zeros(len(x) + 1, np.int64)
    split = Split("", np.empty(0, np.int32), none, flat, starts, np.empty(0, np.int32), none)
    return Vectors(x, split, lengths), np.bincount(flat, minlength=LABELS)


def head_of(connectivity: str, dtype: str, rng: np.random.Generator) -> Head:
    """Two blocks of shuffled labels, the second of the connectivity asked for, each with padding."""
    first, second = np.split(rng.permutation(LABELS).astype(np.int32), [20])
    facts: Any = {"width": WIDTH, "group_size": 16, "dtype": dtype, "rng": rng}
    blocks = (
        Block.random(first, connectivity="dense", fan_in=WIDTH, **facts),
        Block.random(second, connectivity=connectivity, fan_in=9, **facts),
    )
    return Head(WIDTH, LABELS, blocks)


def means_of(texts: Vectors) -> np.ndarray:
    """fp64 [L, D]: the mean of each label's texts; NaN for labels without any."""
    of_label = [[row for row in range(TEXTS) if label in texts.split.labels_of([row])[0]] for label in range(LABELS)]
    return np.array([texts.x[rows].mean(axis=0, dtype=np.float64) if rows else np.full(WIDTH, np.nan) for rows in of_label])


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("connectivity", ["dense", "shared", "shared as it is", "private"])
def test_a_label_starts_as_the_discriminant_of_its_texts(connectivity, dtype, wide, monkeypatch):
    """At the inputs that it or, where they choose, its group would miss most; a wide head takes inputs for uncorrelated."""
    monkeypatch.setattr("train.imprint._WIDEST_COVARIANCE", WIDTH - wide)
    rng = np.random.default_rng(0)
    texts, counts = task(rng)
    texts.x[:] = texts.x @ rng.standard_normal((WIDTH, WIDTH)).astype(np.float32)
    connectivity, _, stays = connectivity.partition(" ")
    head = head_of(connectivity, dtype, rng)
    before = [{name: buffer.copy() for name, buffer in block.buffers.items()} for block in head.blocks]
    imprint(head, texts, counts, choose_shared=not stays)
    head.validate()

    covariance = np.cov(texts.x.T.astype(np.float64), bias=True)
    shrunken = (np.diag(np.diag(covariance)) if wide else covariance) + np.trace(covariance) / WIDTH * np.eye(WIDTH)
    means = means_of(texts)
    weights = np.linalg.solve(shrunken, (means - np.nanmean(means, axis=0)).T).T
    losses = weights**2 / np.diag(np.linalg.inv(shrunken))
    losses /= losses.sum(axis=1, keepdims=True)
    for block, old in zip(head.blocks, before, strict=True):
        assert (block.bias == old["bias"]).all()
        values = dtypes.decode(block.values, dtype)
        for (group, place), label in np.ndenumerate(block.label_ids):
            known = [other for other in block.label_ids[group] if other >= 0 and counts[other]]
            read = {
                "dense": np.arange(WIDTH),
                "shared": np.sort(np.argsort(-losses[known].sum(axis=0))[: block.fan_in]),
                "private": np.sort(np.argsort(-losses[label])[: block.fan_in]),
            }[block.connectivity]
            if label not in known:
                assert (block.values[group, :, place] == old["values"][group, :, place]).all()
                continue
            if stays and block.indices is not None:
                read = old["indices"][group]
            if block.indices is not None:
                assert (block.indices[(group, slice(None), place)[: block.indices.ndim]] == read).all()
            expected = weights[label][read]
            expected = expected / np.sqrt((expected**2).mean()) * block.fan_in**-0.5
            np.testing.assert_allclose(values[group, :, place], expected, rtol=2**-8 if dtype == "bf16" else 1e-3, atol=1e-5)


@pytest.mark.parametrize("numbers", [1, 20 * WIDTH, 1 << 22])
def test_labels_in_several_passes_come_to_the_same(numbers, monkeypatch):
    texts, counts = task(np.random.default_rng(3))
    heads = [head_of("shared", "fp32", np.random.default_rng(4)) for _ in range(2)]
    imprint(heads[0], texts, counts, choose_shared=True)
    monkeypatch.setattr("train.imprint._NUMBERS_AT_ONCE", numbers)
    monkeypatch.setattr("train.imprint._SUMS_AT_ONCE", numbers)
    imprint(heads[1], texts, counts, choose_shared=True)
    for one, other in zip(heads[0].blocks, heads[1].blocks, strict=True):
        for name, buffer in one.buffers.items():
            np.testing.assert_allclose(other.buffers[name], buffer, rtol=1e-5, atol=1e-7)


def test_of_many_texts_some_say_how_inputs_vary(monkeypatch):
    """Every fourth, where each text occurs four times: the weights are those of each text once."""
    texts, counts = task(np.random.default_rng(7))
    labels = [of_text for of_text in texts.split.labels_of(np.arange(TEXTS)) for _ in range(4)]
    many = vectors(np.repeat(texts.x, 4, axis=0), labels, np.repeat(texts.lengths, 4))
    heads = [head_of("private", "fp32", np.random.default_rng(8)) for _ in range(2)]
    imprint(heads[0], texts, counts, choose_shared=True)
    monkeypatch.setattr("train.imprint._TEXTS_OF_MOMENTS", TEXTS + 1)
    embedded: list[int] = []
    monkeypatch.setattr(Vectors, "embed", lambda self, rows: embedded.append(len(rows)) or torch.from_numpy(self.x[rows]))
    imprint(heads[1], *many, choose_shared=True)
    assert sum(embedded) == TEXTS + 4 * TEXTS
    for one, other in zip(heads[0].blocks, heads[1].blocks, strict=True):
        for name, buffer in one.buffers.items():
            np.testing.assert_allclose(other.buffers[name], buffer, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("connectivity", ["shared", "private"])
def test_labels_read_what_tells_them_apart(connectivity):
    """A label's texts have more of two of sixteen inputs; the others say nothing, though the last varies much."""
    rng = np.random.default_rng(2)
    texts, counts = task(rng)
    telling = 16
    told = np.array([rng.permutation(telling)[:2] for _ in range(LABELS)])
    texts.x[:] = rng.standard_normal(texts.x.shape) * 0.2
    for label in range(LABELS):
        rows = [row for row in range(TEXTS) if label in texts.split.labels_of([row])[0]]
        texts.x[rows, told[label][:, None]] += 1
    texts.x[:, -1] *= 100
    head = head_of(connectivity, "fp32", rng)
    block, before = head.blocks[1], head.blocks[1].indices.copy()
    imprint(head, texts, counts, choose_shared=True)
    head.validate()
    if connectivity == "shared":
        assert not np.isin(block.indices, np.arange(telling, WIDTH - 1)).any()
        return
    for (group, place), label in np.ndenumerate(block.label_ids):
        read = block.indices[group, :, place]
        if label >= 0 and counts[label] > 4:  # of fewer texts, other labels' inputs may say as much
            assert set(told[label]) <= set(read)
        elif label < 0 or not counts[label]:
            assert (read == before[group, :, place]).all()


def test_a_group_whose_inputs_say_nothing_keeps_its_weights():
    rng = np.random.default_rng(6)
    texts, counts = task(rng)
    head = head_of("shared", "fp32", rng)
    block = head.blocks[1]
    texts.x[:, block.indices[0]] = 0
    before = block.values.copy()
    imprint(head, texts, counts, choose_shared=False)
    assert (block.values[0] == before[0]).all()
    head.validate()


def test_what_several_inputs_say_is_said_once():
    """Twelve inputs are nearly copies of one that tells a label; two others, each by itself, tell it a little less."""
    rng = np.random.default_rng(5)
    texts, counts = task(rng)
    texts.x[:] = rng.standard_normal(texts.x.shape)
    label = int(counts.argmax())
    rows = [row for row in range(TEXTS) if label in texts.split.labels_of([row])[0]]
    texts.x[:, 1:12] = texts.x[:, :1] + 0.3 * texts.x[:, 1:12]
    texts.x[rows, :12] += 1
    texts.x[rows, 12:14] += 0.8
    head = head_of("private", "fp32", rng)
    imprint(head, texts, counts, choose_shared=True)
    block_of, slot_of = head.slots()
    group, place = divmod(int(slot_of[label]), 16)
    assert block_of[label] == 1
    block = head.blocks[1]
    weight = dict(zip(block.indices[group, :, place], block.values[group, :, place], strict=True))
    assert min(weight[12], weight[13]) > 1.5 * max(weight.get(i, 0) for i in range(12))


@pytest.mark.parametrize("connectivity", ["shared", "private"])
def test_texts_that_say_nothing_leave_the_weights(connectivity):
    rng = np.random.default_rng(1)
    texts, counts = task(rng)
    texts.x[:] = 0
    head = head_of(connectivity, "fp32", rng)
    before = [{name: buffer.copy() for name, buffer in block.buffers.items()} for block in head.blocks]
    imprint(head, texts, counts, choose_shared=True)
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
