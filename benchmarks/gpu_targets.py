"""The figures that the GPU kernels are to reach on an H100, beside what a run measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.measure import Row

_SHARED = {"labels": 2_800_000, "fan_in": 128, "group_size": 64}


@dataclass(frozen=True)
class Target:
    """A column of the one row of a benchmark that has these values: at least `least` or at most `most`."""

    benchmark: str
    where: dict[str, object]
    column: str
    least: float | None = None
    most: float | None = None


TARGETS = (
    *(
        Target("gpu_topk", {"kernel": "shared", **_SHARED, "batch": batch}, "share_of_copy", least=0.6)
        for batch in (1, 4, 16, 64)
    ),
    Target("gpu_topk", {"kernel": "shared", **_SHARED, "batch": 256}, "median_ms", most=0.8),
    Target("gpu_topk", {"kernel": "shared", **_SHARED, "batch": 64}, "dense_is_slower", least=10),
    Target("gpu_topk", {"kernel": "private", "labels": 2_800_000, "fan_in": 32, "batch": 64}, "dense_is_slower", least=4),
    Target("gpu_train_step", {"step": "shared", **_SHARED, "batch": 128, "optimizer": "sgd"}, "median_ms", most=2.5),
    Target("gpu_train_step", {"step": "shared", **_SHARED, "batch": 128, "optimizer": "sgd"}, "dense_is_slower", least=4),
    Target("gpu_whole_step", {"labels": 2_800_000, "batch": 128, "length": 128}, "peak_gib", most=3.5),
    Target("gpu_whole_step", {"labels": 8_600_000, "batch": 128, "length": 128}, "peak_gib", most=5.0),
)


def verdicts(rows: Sequence[tuple[str, Row]]) -> str:
    """A line per target: reached, missed or not measured."""
    lines = []
    for target in TARGETS:
        found = [row for name, row in rows if name == target.benchmark and target.where.items() <= row.items()]
        value = found[0].get(target.column) if found else None
        bound = f"≥ {target.least:g}" if target.least is not None else f"≤ {target.most:g}"
        if value is None:
            verdict = "not measured"
        else:
            reached = value >= target.least if target.least is not None else value <= target.most
            verdict = f"{value:.3g}, {'reached' if reached else 'missed'}"
        where = " ".join(f"{key}={value}" for key, value in target.where.items())
        lines.append(f"# {target.benchmark} {where}: {target.column} {bound}: {verdict}")
    return "\n".join(lines)
