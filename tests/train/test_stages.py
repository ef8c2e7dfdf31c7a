import os
import time

import numpy as np
import pytest
import torch

from train.checkpoint import Progress
from train.runs import Log
from train.stages import Stages


def test_the_seconds_of_an_inner_stage_are_its_own(tmp_path):
    stages = Stages(torch.device("cpu"))
    log = Log(tmp_path / "metrics.jsonl")
    with stages("reading"):
        time.sleep(0.01)
    progress = Progress(step=3)
    stages.log_to(log, progress)
    with stages("training"):
        time.sleep(0.05)
        progress.step = 7
        with stages("checkpoint"):
            time.sleep(0.2)
        time.sleep(0.05)
    rows = log.rows()
    assert [(row["kind"], row["stage"], row["step"]) for row in rows] == [
        ("stage", "reading", 3),
        ("stage", "checkpoint", 7),
        ("stage", "training", 7),
    ]
    reading, checkpoint, training = (row["seconds"] for row in rows)
    assert reading >= 0.01
    assert checkpoint >= 0.2
    assert 0.1 <= training < checkpoint + 0.1, "without the checkpoint's"


def test_a_stage_that_fails_is_written(tmp_path):
    stages, log = Stages(torch.device("cpu")), Log(tmp_path / "metrics.jsonl")
    stages.log_to(log, Progress())
    with pytest.raises(OSError, match="disk is full"), stages("training"), stages("checkpoint"):
        raise OSError("disk is full")
    assert [row["stage"] for row in log.rows()] == ["checkpoint", "training"]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="here a process has one peak")
def test_each_stage_has_a_peak_of_its_own(tmp_path):
    stages, log = Stages(torch.device("cpu")), Log(tmp_path / "metrics.jsonl")
    stages.log_to(log, Progress())
    with stages("outer"), stages("large"):
        np.ones(25_000_000)  # 200 MB
    with stages("small"):
        pass
    large, outer, small = (row["peak_memory_mb"] for row in log.rows())
    assert large > outer + 150
    assert large > small + 150
    assert small > 10
