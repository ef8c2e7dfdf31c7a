import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.batches import batches_by_length, training_batches
from train.evaluation import sample
from train.optimization import schedule

lengths = st.lists(st.integers(1, 128), min_size=1, max_size=300).map(np.array)


@given(lengths, st.integers(1, 20), st.integers(0, 2**32), st.integers(0, 100))
def test_an_epoch_has_each_text_once(lengths, batch_size, seed, epoch):
    batches = training_batches(lengths, batch_size, seed=seed, epoch=epoch)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    assert sorted(map(len, batches))[1:] == [batch_size] * (len(batches) - 1)
    assert len(batches) == -(-len(lengths) // batch_size)
    again = training_batches(lengths, batch_size, seed=seed, epoch=epoch)
    assert all((one == other).all() for one, other in zip(batches, again, strict=True))


@given(lengths, st.integers(1, 20))
def test_evaluation_has_each_text_once(lengths, batch_size):
    batches = batches_by_length(lengths, batch_size)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))


def test_epochs_and_seeds_differ_and_batches_hold_texts_of_similar_length():
    lengths = np.random.default_rng(0).integers(3, 60, 10_000)
    batches = training_batches(lengths, 32, seed=1, epoch=0)
    for other in (training_batches(lengths, 32, seed=1, epoch=1), training_batches(lengths, 32, seed=2, epoch=0)):
        assert any(len(a) != len(b) or (a != b).any() for a, b in zip(batches, other, strict=True))
    padded = sum(len(rows) * lengths[rows].max() for rows in batches)
    assert padded < 1.05 * lengths.sum()
    means = np.array([lengths[rows].mean() for rows in batches])
    assert abs(means[: len(means) // 2].mean() - means[len(means) // 2 :].mean()) < 5, "short texts do not all come first"


def test_learning_rates_rise_then_fall_to_zero():
    for kind in ("linear", "cosine"):
        factors = [schedule(step, 100, 0.1, kind) for step in range(100)]
        assert factors[:10] == pytest.approx(np.arange(1, 11) / 10)
        assert factors[10] == pytest.approx(1)
        assert (np.diff(factors[10:]) < 0).all()
        assert 0 < factors[-1] < 0.02
    assert schedule(32, 100, 0.1, "linear") == pytest.approx(68 / 90)
    assert schedule(55, 100, 0.1, "cosine") == pytest.approx(0.5)
    assert schedule(0, 1, 0.0, "linear") == 1


def test_a_sample_is_evenly_spaced():
    assert sample(10, 0).tolist() == list(range(10))
    assert sample(10, 20).tolist() == list(range(10))
    assert sample(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert sample(10, 3).tolist() == [0, 3, 6]
