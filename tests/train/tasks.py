"""A made-up task that is quick to learn, and helpers that run the command on it."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from train.__main__ import main

N_LABELS = 40
# Small enough for a second or two, large enough to have several batches, groups and log lines.
SMALL = (
    *("--threads", "1", "--batch-size", "16", "--max-length", "16", "--log-every", "5", "--group-size", "16"),
    *("--small-width", "32", "--small-layers", "1", "--small-heads", "2", "--small-vocabulary", "300", "--intermediate", "64"),
)
QUICK = (*SMALL, "--fan-in", "16")


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """Writes rows as JSON lines, gzipped where the name ends in .gz; strings are written as they are."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_task(folder: Path, *, texts: int = 300, test_texts: int = 60, dev_texts: int = 0, seed: int = 0) -> Path:
    """Label i belongs to texts with the word `word<i>`; three such words a text, among words that mean nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("abcdefghij"), 5)) for _ in range(N_LABELS + 10)]

    def row() -> dict[str, Any]:
        labels = rng.choice(N_LABELS, 3, replace=False)
        noise = rng.choice(np.arange(N_LABELS, N_LABELS + 10), rng.integers(0, 4))
        text = " ".join(words[i] for i in rng.permutation(np.concatenate([labels, noise])))
        return {"text": text, "labels": [f"id{i}" for i in labels]}

    write_jsonl(folder / "labels.jsonl.gz", [{"id": f"id{i}", "name": words[i]} for i in range(N_LABELS)])
    write_jsonl(folder / "train.jsonl", [row() for _ in range(texts)])
    write_jsonl(folder / "test.jsonl.gz", [row() for _ in range(test_texts)])
    if dev_texts:
        write_jsonl(folder / "dev.jsonl", [row() for _ in range(dev_texts)])
    return folder


def run(data: Path | None, out: Path, *flags: str) -> int:
    """Runs the command in this process and returns its exit code."""
    return main([*(("--data", str(data)) if data else ()), "--out", str(out), *flags])


def command(*flags: str) -> list[str]:
    """The command line of a process of its own."""
    return [sys.executable, "-m", "train", *flags]


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without what a clock or a memory meter says, of which the rows of stages are made."""
    measured = {"seconds", "texts_per_s", "peak_memory_mb", "device_peak_memory_mb"}
    return [{key: value for key, value in row.items() if key not in measured} for row in rows if row.get("kind") != "stage"]


def assert_same_training(one: Path, other: Path) -> None:
    """Both runs' last checkpoints are the same bit for bit (encoder, head, moments, random state), and so are their metrics."""
    last_one, last_other = (max((out / "checkpoints").glob("step-*")) for out in (one, other))
    assert last_one.name == last_other.name
    files = [f"encoder/{path.name}" for path in (last_one / "encoder").iterdir()]
    for name in [*files, "head.safetensors", "trainer.safetensors"]:
        assert (last_one / name).read_bytes() == (last_other / name).read_bytes(), name
    progress = [untimed([json.loads((folder / "trainer.json").read_text())]) for folder in (last_one, last_other)]
    assert progress[0] == progress[1]
    assert untimed(metrics(one)) == untimed(metrics(other))
