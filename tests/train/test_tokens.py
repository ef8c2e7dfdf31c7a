import os

import numpy as np
import pytest
import torch

from models.encoder import Encoder, EncoderConfig
from tests.train.tasks import N_LABELS
from train.data import DataError, Dataset
from train.inputs import PooledInputs, TextInputs
from train.tokens import label_counts, load_split


@pytest.fixture(scope="module")
def data(task):
    return Dataset(task)


@pytest.fixture(scope="module")
def labels(data):
    return data.labels()


@pytest.fixture(scope="module")
def texts(data, labels):
    return list(data.texts("train", labels))


@pytest.fixture(scope="module")
def encoder(texts):
    config = EncoderConfig(pooling="mean", max_length=6, intermediate=8)
    return Encoder.small([text for text, _ in texts], config, vocabulary=300, width=16, layers=1, heads=2, seed=0)


@pytest.fixture
def split(data, labels, encoder, tmp_path):
    return load_split(data, "train", labels, ["key"], encoder.tokenize, tmp_path)


def test_a_split_holds_the_tokens_and_labels_of_each_text(split, texts, encoder, labels):
    assert len(split) == len(texts)
    rows = np.array([5, 0, 299])
    input_ids, mask = split.padded(rows, pad_id=7)
    for i, row in enumerate(rows):
        tokens = encoder.tokenize([texts[row][0]])[0]
        assert len(tokens) <= 6, "cut at max_length"
        assert split.lengths[row] == len(tokens)
        assert input_ids[i].tolist() == tokens + [7] * (input_ids.shape[1] - len(tokens))
        assert mask[i].tolist() == [1] * len(tokens) + [0] * (input_ids.shape[1] - len(tokens))
        assert split.labels_of(rows)[i].tolist() == texts[row][1].tolist()
    counts = label_counts(split, labels)
    assert counts.sum() == sum(len(positions) for _, positions in texts)
    assert counts.shape == (N_LABELS,)
    assert counts[3] == sum(3 in positions for _, positions in texts)


def test_tokens_are_made_once_and_mapped(data, labels, encoder, tmp_path, split):
    def never(texts):
        raise AssertionError("tokenized again")

    again = load_split(data, "train", labels, ["key"], never, tmp_path)
    assert isinstance(again.tokens, np.memmap)
    assert (again.tokens == split.tokens).all()
    assert again.key == split.key
    with pytest.raises(AssertionError, match="tokenized again"):
        load_split(data, "train", labels, ["another key"], never, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"tokens-{split.key}"], "a failure leaves nothing behind"


@pytest.mark.parametrize("name", ["tokens", "labels", "label_starts", "filtered_starts"])
def test_a_damaged_cache_is_named(data, labels, encoder, tmp_path, split, name):
    file = tmp_path / f"tokens-{split.key}" / f"{name}.bin"
    whole = file.read_bytes()
    for left in (len(whole) // 2, 0):
        file.write_bytes(whole[:left])
        with pytest.raises(DataError, match=f"{file.parent}: damaged; delete this folder"):
            load_split(data, "train", labels, ["key"], encoder.tokenize, tmp_path)
    file.unlink()
    with pytest.raises(DataError, match="damaged"):
        load_split(data, "train", labels, ["key"], encoder.tokenize, tmp_path)


def test_a_cache_that_another_process_made_first_is_taken(data, labels, encoder, tmp_path, split):
    cache = tmp_path / "shared"

    def slow(texts):
        if not list(cache.glob("tokens-*")):  # the other one is quicker
            os.symlink(next(tmp_path.glob("tokens-*")), cache / f"tokens-{split.key}")
        return encoder.tokenize(texts)

    late = load_split(data, "train", labels, ["key"], slow, cache)
    assert (late.tokens == split.tokens).all()
    assert [path.name for path in cache.iterdir()] == [f"tokens-{split.key}"]


def test_cached_embeddings_give_the_head_what_the_encoder_would(split, encoder, tmp_path):
    rows = np.array([1, 200, 17, 3])
    expected = TextInputs(encoder, split).embed(rows)
    frozen = PooledInputs(encoder, split, tmp_path, "train")
    torch.testing.assert_close(frozen.embed(rows), expected)
    with torch.no_grad():
        encoder.intermediate.weight.mul_(2)
    assert len(list(tmp_path.glob("pooled-*"))) == 1
    PooledInputs(encoder, split, tmp_path, "train")
    assert len(list(tmp_path.glob("pooled-*"))) == 1, "the intermediate layer comes after what is cached"
    with torch.no_grad():
        encoder.transformer.embeddings.word_embeddings.weight.mul_(2)
    PooledInputs(encoder, split, tmp_path, "train")
    assert len(list(tmp_path.glob("pooled-*"))) == 2, "other weights before it give other embeddings"
