"""Where labels stand: tiers by frequency, the similarity tree, label vectors, meta-classes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.checkpoint import load_head
from models.head import Block, Head
from tests.train.tasks import QUICK, run, write_jsonl
from train.auxiliary import meta_classes
from train.labels import LatentSemantics, label_vectors
from train.tiers import Tier, parse_tiers, split_by_frequency
from train.tokens import Split
from train.tree import level, similarity_order


def test_tiers_are_read() -> None:
    assert parse_tiers("dense:2%, 128:18%,32:80%") == (Tier(None, 0.02), Tier(128, 0.18), Tier(32, 0.8))
    assert parse_tiers("16:1") == (Tier(16, 1.0),)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "'' is not FAN-IN:SHARE"),
        ("dense", "'' is not a share|'dense' is not FAN-IN:SHARE"),
        ("many:100%", "'many:100%' is not FAN-IN:SHARE"),
        ("0:100%", "fan-in 0 is not at least 1"),
        ("32:120%", "'120%' is not a share"),
        ("dense:0%,32:100%", "'0%' is not a share"),
        ("dense:2%,32:97%", "the shares add up to 99%, not 100%"),
    ],
)
def test_bad_tiers_are_named(text: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        parse_tiers(text)


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=200),
    shares=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    group_size=st.sampled_from([16, 32]),
)
@settings(deadline=None)
def test_tiers_split_labels_by_frequency(counts: list[int], shares: list[int], group_size: int) -> None:
    tiers = tuple(Tier(8, share / sum(shares)) for share in shares)
    parts = split_by_frequency(np.array(counts), tiers, group_size)
    assert len(parts) == len(tiers)
    order = np.concatenate(parts)
    assert sorted(order) == list(range(len(counts)))
    assert (np.diff(np.array(counts)[order]) <= 0).all()
    ends = np.cumsum([len(part) for part in parts])
    for end, share in zip(ends, np.cumsum([tier.share for tier in tiers]), strict=True):
        assert end == len(counts) or end % group_size == 0, "whole groups"
        assert 0 <= end - share * len(counts) + 1e-6 <= group_size


@given(n=st.integers(1, 400), group_size=st.sampled_from([16, 32]), width=st.integers(1, 5), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_similarity_order_is_a_permutation_that_carries_the_vectors(n: int, group_size: int, width: int, seed: int) -> None:
    vectors = np.random.default_rng(seed).integers(-1, 2, (n, width)).astype(np.float32)  # many are equal, some are zero
    before = vectors.copy()
    order = similarity_order(vectors, group_size, np.random.default_rng(seed))
    assert sorted(order) == list(range(n))
    np.testing.assert_array_equal(vectors, before[order])
    again = similarity_order(before.copy(), group_size, np.random.default_rng(seed))
    np.testing.assert_array_equal(again, order)


def test_clusters_become_groups() -> None:
    """Sixteen labels around each of 64 centres: nearly all groups hold labels of one centre, at random none would."""
    rng = np.random.default_rng(0)
    centre = rng.permutation(np.repeat(np.arange(64), 16))
    vectors = rng.standard_normal((64, 32), dtype=np.float32)[centre]
    vectors += 0.05 * rng.standard_normal(vectors.shape, dtype=np.float32)
    groups = centre[similarity_order(vectors, 16, rng)].reshape(-1, 16)
    # A split through the middle may cut a cluster in two, seldom more.
    assert np.mean([len(set(group)) for group in groups]) < 2


def test_a_level_of_the_tree_is_that_of_its_splits() -> None:
    assert level(10, 4).tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert level(3, 100).tolist() == [0, 1, 2]
    assert level(1, 8).tolist() == [0]
    assert level(7, 1).tolist() == [0] * 7


def test_meta_classes_are_runs_of_groups() -> None:
    rng = np.random.default_rng(0)
    labels = {"dense": np.arange(32, dtype=np.int32), "shared": rng.permutation(np.arange(32, 250, dtype=np.int32))}
    blocks = [
        Block.random(members, width=8, connectivity=kind, fan_in=4, group_size=16, rng=rng) for kind, members in labels.items()
    ]
    class_of, count = meta_classes(Head(8, 250, tuple(blocks)), 8)
    assert set(class_of) == set(range(count))
    assert count == 1 + 8, "one of 2 groups, seven or more of 14"
    first, rest = (block.label_ids for block in blocks)
    assert (class_of[first] == 0).all()
    by_slot = [class_of[group[group >= 0]] for group in rest]
    assert all(len(set(group)) == 1 for group in by_slot)
    assert (np.diff([group[0] for group in by_slot]) >= 0).all()


def split_of(texts: list[list[int]], labels: list[list[int]]) -> Split:
    split = Split.of_tokens(texts)
    starts = np.cumsum([0, *map(len, labels)], dtype=np.int64)
    return replace(split, labels=np.concatenate(labels).astype(np.int32), label_starts=starts)


def test_label_vectors_are_mean_directions_of_their_texts_or_names() -> None:
    texts = np.array([[2, 0, 0], [0, 3, 0], [0, 0, 0], [0, 0, 5]], dtype=np.float32)
    split = split_of([[1]] * 4, [[0], [0, 1], [2], []])
    names = {2: [0, 0, 9], 3: [4, 0, 3]}
    vectors = label_vectors(split, lambda part: texts[part], 4, lambda which: np.array([names[i] for i in which], np.float32))
    np.testing.assert_allclose(vectors, [[0.5**0.5, 0.5**0.5, 0], [0, 1, 0], [0, 0, 1], [0.8, 0, 0.6]], atol=1e-6)


def test_latent_semantics_puts_words_of_one_subject_together() -> None:
    """Token 0 is in every text; 1 … 5 and 6 … 10 are two vocabularies that never meet."""
    rng = np.random.default_rng(0)
    subjects = rng.integers(0, 2, 200)
    split = Split.of_tokens([[0, *(1 + 5 * subject + rng.choice(5, 3))] for subject in subjects])
    semantics = LatentSemantics(split.tokens, split.token_starts, vocabulary=12, seed=0)
    vectors = semantics.embed(split.tokens, split.token_starts)
    assert vectors.dtype == np.float32
    alike = vectors @ vectors.T
    same = subjects[:, None] == subjects
    assert np.abs(alike[~same]).max() < 1e-5
    assert alike[same].mean() > 0.3
    odd = Split.of_tokens([[0], [11], []])
    np.testing.assert_allclose(semantics.embed(odd.tokens, odd.token_starts), 0, atol=1e-6)


@pytest.mark.parametrize("texts", [[[0, 1, 2]], [[0, 1], [0, 1], [0, 1]], [[], []]], ids=["one", "the same", "empty"])
def test_latent_semantics_of_texts_that_nothing_tells_apart(texts) -> None:
    split = Split.of_tokens(texts)
    vectors = LatentSemantics(split.tokens, split.token_starts, vocabulary=5, seed=0).embed(split.tokens, split.token_starts)
    assert len(vectors) == len(texts)
    assert not vectors.any()


@pytest.mark.parametrize("encoder", ["small", "pretrained"])
def test_groups_of_a_run_hold_similar_labels(tmp_path, minilm_path, encoder: str) -> None:
    """Labels of two worlds whose texts share no words: similarity keeps the worlds apart, frequency mixes them."""
    rng = np.random.default_rng(1)
    words = [["harbour", "ship", "sail", "mast", "anchor"], ["violin", "cello", "sonata", "opera", "chorus"]]
    data = tmp_path / "data"
    data.mkdir()
    world = rng.permutation(np.repeat([0, 1], 32))
    rows = []
    for label in np.repeat(np.arange(64), 4):
        text = " ".join(rng.choice(words[world[label]], 3))
        rows.append({"text": text, "labels": [str(label)]})
    write_jsonl(data / "train.jsonl", rows)
    write_jsonl(data / "test.jsonl", rows[:20])
    write_jsonl(data / "labels.jsonl", [{"id": str(i), "name": f"label {i}"} for i in range(64)])
    mixed = {}
    for grouping in ("similarity", "frequency"):
        out = tmp_path / grouping
        flags = ["--encoder", str(minilm_path), "--freeze-encoder"] if encoder == "pretrained" else []
        assert run(data, out, *QUICK, *flags, "--epochs", "1", "--dense-labels", "0", "--grouping", grouping) == 0
        (block,) = load_head(max((out / "checkpoints").iterdir()) / "head.safetensors").blocks
        mixed[grouping] = sum(len(set(world[group])) - 1 for group in block.label_ids)
    assert mixed["similarity"] == 0
    assert mixed["frequency"] > 0
