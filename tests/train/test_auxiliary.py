"""The auxiliary objective and the other ways to change the loss: what they do to the head's input gradient, and when."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from models.head import Block, Head
from tests.train.tasks import QUICK, metrics, run
from train.auxiliary import Auxiliary
from train.compute import OnCpu


def small_head() -> Head:
    rng = np.random.default_rng(0)
    return Head(
        12,
        64,
        (Block.random(np.arange(64, dtype=np.int32), width=12, connectivity="shared", fan_in=4, group_size=16, rng=rng),),
    )


def test_the_weight_falls_to_zero_as_half_a_cosine() -> None:
    auxiliary = Auxiliary(OnCpu(), small_head(), classes=4, weight=0.5, until=100, seed=0)
    weights = [auxiliary.weight(step) for step in range(120)]
    assert weights[0] == 0.5
    assert weights[50] == pytest.approx(0.25)
    assert (np.diff(weights[:101]) < 0).all()
    assert weights[100:] == [0.0] * 20


def test_it_learns_which_group_of_labels_is_meant_and_tells_the_encoder() -> None:
    """Inputs point to the group of the label. Following the gradient of the inputs lowers the loss of the classifier."""
    rng = np.random.default_rng(1)
    auxiliary = Auxiliary(OnCpu(), small_head(), classes=4, weight=0.5, until=1000, seed=0)
    directions = rng.standard_normal((4, 12)).astype(np.float32)
    losses = []
    for step in range(150):
        labels = rng.integers(0, 64, 32)
        x = torch.from_numpy(directions[labels // 16])
        loss, grad_x = auxiliary.step(x, [np.array([label]) for label in labels], step, 0.05, "bce")
        losses.append(loss / auxiliary.weight(step))
    assert losses[-1] < losses[0] / 10
    x = torch.from_numpy(rng.standard_normal((8, 12)).astype(np.float32))
    labels = [np.array([i, 63]) for i in range(8)]
    before, grad_x = auxiliary.step(x, labels, 500, 0.0, "bce")
    assert grad_x.dtype == torch.float32
    after, _ = auxiliary.step(x - 0.1 * grad_x, labels, 500, 0.0, "bce")
    assert after < before
    assert auxiliary.step(x, labels, 0, 0.0, "bce")[0] == pytest.approx(before * auxiliary.weight(0) / auxiliary.weight(500))


def test_a_run_with_it_starts_with_a_higher_loss_and_leaves_it_behind(task, tmp_path) -> None:
    for name, flags in (("with", ("--auxiliary", "1", "--auxiliary-until", "50%", "--meta-classes", "3")), ("without", ())):
        assert run(task, tmp_path / name, *QUICK, "--epochs", "2", *flags) == 0
    ours, plain = ([row["loss"] for row in metrics(tmp_path / name) if row["kind"] == "train"] for name in ("with", "without"))
    assert ours[0] > plain[0] * 1.01
    checkpoint = max((tmp_path / "with" / "checkpoints").iterdir())
    config = json.loads((tmp_path / "with" / "config.json").read_text())
    assert config["model"]["labels"] == 40
    assert (checkpoint / "head.safetensors").stat().st_size == (
        max((tmp_path / "without" / "checkpoints").iterdir()) / "head.safetensors"
    ).stat().st_size, "the classifier is no part of the head"


def test_weights_and_smoothing_change_what_is_learnt(task, tmp_path) -> None:
    """Positives that count more add to the loss; what smoothing does exactly is said by the kernels' tests."""
    losses = {}
    for name, flags in (("plain", ()), ("weighted", ("--weight-positives",)), ("smoothed", ("--label-smoothing", "0.2"))):
        assert run(task, tmp_path / name, *QUICK, "--epochs", "4", *flags) == 0
        losses[name] = [row["loss"] for row in metrics(tmp_path / name) if row["kind"] == "train"][-1]
    assert losses["weighted"] > 1.2 * losses["plain"]
    assert losses["smoothed"] != losses["plain"]
