"""Draws what benchmarks.gpu measured: python -m benchmarks.plots --out DIR writes SVG and PNG files.

Of each shape the newest row of one device counts. Needs matplotlib: pip install -c constraints.txt -e '.[bench]'.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
_SHAPE = ("kernel", "step", "labels", "width", "fan_in", "group_size", "batch", "k", "optimizer", "length")
_STYLES = {"shared": ("C0", "o"), "private": ("C1", "s")}
_DENSE_STYLE = "C3", "^"
# GiB of a training step with BERT-base, batch 128 × 128 tokens, as published: Amazon-3M (2.8 M labels), AmazonTitles-8.6M.
_PUBLISHED = {"HASTE": (5.67, 12.5), "ELMO fp8": (6.6, 10.5), "Renee": (39.7, 114.0)}


def newest(rows: Iterable[Row], device: str | None) -> list[Row]:
    """The last row of each shape, of `device` or of the one measured last."""
    rows = list(rows)
    device = device or (rows[-1]["device"] if rows else None)
    return list({tuple(row.get(key) for key in _SHAPE): row for row in rows if row["device"] == device}.values())


def lines(axes: Any, rows: list[Row], x: str, y: str = "median_ms") -> None:
    """A line per kernel and fan-in, for kernels measured at two places or more."""
    series: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for row in rows:
        series.setdefault((row.get("kernel") or row["step"], row["fan_in"]), []).append((row[x], row[y]))
    for (name, fan_in), points in sorted(series.items()):
        if len(points) > 1:
            color, marker = _STYLES.get(name, _DENSE_STYLE)
            label = name if name.startswith("torch") else f"{name}, fan-in {fan_in}"
            axes.plot(*zip(*sorted(points), strict=True), color=color, marker=marker, label=label)
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel="ms")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()


def topk_by_batch(axes: Any, rows: dict[str, list[Row]]) -> None:
    lines(axes, [row for row in rows["gpu_topk"] if row["labels"] == 2_800_000 and row["fan_in"] in (32, 128, 768)], "batch")
    axes.set_title("top 10 of 2.8 M labels")


def topk_by_labels(axes: Any, rows: dict[str, list[Row]]) -> None:
    lines(axes, [row for row in rows["gpu_topk"] if row["batch"] == 64], "labels")
    axes.set_title("top 10, batch 64")


def step_by_batch(axes: Any, rows: dict[str, list[Row]]) -> None:
    lines(axes, [row for row in rows["gpu_train_step"] if row["labels"] == 2_800_000 and row["optimizer"] == "sgd"], "batch")
    axes.set_title("training step of the head, 2.8 M labels, SGD")


def step_by_labels(axes: Any, rows: dict[str, list[Row]]) -> None:
    lines(axes, [row for row in rows["gpu_train_step"] if row["batch"] == 128 and row["optimizer"] == "sgd"], "labels")
    axes.set_title("training step of the head, batch 128, SGD")


def whole_step_memory(axes: Any, rows: dict[str, list[Row]]) -> None:
    ours = {row["labels"]: row["peak_gib"] for row in rows["gpu_whole_step"]}
    bars = {"Fanin, measured": (ours.get(2_800_000, 0.0), ours.get(8_600_000, 0.0)), **_PUBLISHED}
    for i, (name, sizes) in enumerate(bars.items()):
        places = [group + 0.2 * i for group in range(2)]
        drawn = axes.bar(places, sizes, 0.18, label=name if i == 0 else f"{name}, published")
        axes.bar_label(drawn, [f"{size:.3g}" if size else "–" for size in sizes])
    axes.set(xticks=[0.3, 1.3], xticklabels=["2.8 M labels", "8.6 M labels"], ylabel="GiB", yscale="log")
    axes.set_title("peak memory, BERT-base, 128 × 128 tokens")
    axes.legend()


PLOTS: dict[str, Callable[[Any, dict[str, list[Row]]], None]] = {
    each.__name__: each for each in (topk_by_batch, topk_by_labels, step_by_batch, step_by_labels, whole_step_memory)
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="folder of the rows (default %(default)s)")
    parser.add_argument("--device", help="as the rows name it (default: the one measured last)")
    args = parser.parse_args()
    from matplotlib.figure import Figure

    rows = {}
    for name in ("gpu_topk", "gpu_train_step", "gpu_whole_step"):
        file = args.results / f"{name}.jsonl"
        if not file.is_file():
            parser.error(f"{file}: missing; run python -m benchmarks.gpu first")
        rows[name] = newest(map(json.loads, file.read_text(encoding="utf-8").splitlines()), args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    device = next((row["device"] for each in rows.values() for row in each), "no rows")
    for name, draw in PLOTS.items():
        figure = Figure(figsize=(7, 5), layout="constrained")
        draw(figure.add_subplot(), rows)
        figure.suptitle(device, fontsize="small")
        for kind in ("svg", "png"):
            figure.savefig(args.out / f"{name}.{kind}", metadata={"Date": None} if kind == "svg" else None)
        print(args.out / f"{name}.svg")


if __name__ == "__main__":
    main()
