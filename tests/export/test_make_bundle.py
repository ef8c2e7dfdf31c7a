"""Bundles for load tests are bundles like any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.make_bundle import label_names, main
from export.bundle import open_bundle
from models import kernels
from tests.export.conftest import WIDTH, small_encoder

pytestmark = pytest.mark.slow


def test_a_bundle_of_the_asked_size(tmp_path: Path) -> None:
    small_encoder().save(tmp_path / "encoder")
    sizes = ["--labels", "5003", "--fan-in", "7", "--group-size", "48", "--connectivity", "private", "--dtype", "fp16"]
    assert main([*sizes, "--encoder", str(tmp_path / "encoder"), "--out", str(tmp_path / "b")]) == 0
    bundle = open_bundle(tmp_path / "b")
    (block,) = bundle.head.blocks
    assert (block.connectivity, block.dtype, block.width) == ("private", "fp16", WIDTH)
    assert (block.groups, block.fan_in, block.group_size) == (105, 7, 48)
    assert (bundle.labels.id(5002), len(bundle.labels)) == ("L000005002", 5003)
    bundle.head.validate()
    scores, _ = kernels.topk(np.random.default_rng(0).standard_normal((2, WIDTH), dtype=np.float32), bundle.head, 3)
    assert np.ptp(scores) > 0


def test_names_are_repeatable_and_of_a_real_length() -> None:
    names = list(label_names(20_000, seed=1))
    assert names == list(label_names(20_000, seed=1))
    assert names != list(label_names(20_000, seed=2))
    assert 25 < np.mean([len(name) for name in names]) < 45
    assert len(set(names)) > 19_990


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (["--labels", "0"], "b: the head has no labels"),
        (["--fan-in", "49"], "fan-in is 49, must be 1 to the width 48"),
        (["--group-size", "20"], "group size is 20, must be a multiple of 16"),
        (["--encoder", "absent/folder"], "error: absent/folder: "),
        (["--out", "."], "exists"),
    ],
)
def test_what_cannot_be_made_is_one_clear_error(
    tmp_path: Path, change: list[str], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small_encoder().save(tmp_path / "encoder")
    arguments = ["--labels", "100", "--encoder", str(tmp_path / "encoder"), "--out", str(tmp_path / "b"), *change]
    assert main(arguments) == 2
    assert fault in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
