"""Metrics of a finished run's model with its head in another number format, as `python -m export --head-dtype` packs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from export.convert import convert_values
from models import kernels
from models.kernels import cpu
from train import checkpoint
from train.evaluation import evaluate
from train.inputs import TextInputs
from train.interrupt import Interrupt
from train.metrics import Meter
from train.prepare import counts_and_weights, dataset, read_splits
from train.runs import Run
from train.settings import resumed
from train.tokens import label_counts


def metrics_on_test(run: Path, dtype: str) -> tuple[dict[str, float], int]:
    """The metrics on the whole split "test", on a CPU, and the head's bytes."""
    config = Run(run).config()
    folder = checkpoint.latest(Run(run).checkpoints)
    assert config is not None
    assert folder is not None
    settings = resumed(config["settings"], {})
    threads = settings.threads or cpu.default_threads()
    torch.set_num_threads(threads)
    cpu.set_threads(threads)
    encoder, trained, _ = checkpoint.load_model(folder)
    head = convert_values(trained, dtype)
    data = dataset(settings)
    labels = data.labels()
    cache = Path(settings.cache) if settings.cache else run / "cache"
    splits = read_splits(settings, data, labels, data.hashes(), encoder, cache)
    counts, weights = counts_and_weights(settings, splits["train"], label_counts(splits["train"], labels))
    meter, screens = Meter(weights, counts), kernels.screen(head)

    def topk(x: torch.Tensor, k: int) -> Any:
        return kernels.topk(x.numpy(), head, k, screens=screens)[1]

    inputs = TextInputs(encoder, splits["test"])
    with Interrupt() as interrupt:
        evaluate(encoder, topk, inputs, meter, limit=settings.limit_eval, name="test", interrupt=interrupt)
    return meter.result(), head.nbytes
