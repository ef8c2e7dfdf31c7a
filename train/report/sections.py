"""What stands in the report: headline figures, charts and tables of one run, or of several side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from train.metrics import DECILES
from train.report.charts import Chart, Point, Table, bar_chart, line_chart, number
from train.report.record import Record, dense_bytes
from train.settings import Settings

_FAMILIES = {
    "P@k": ("P@1", "P@3", "P@5"),
    "PSP@k, weighted by inverse propensity": ("PSP@1", "PSP@3", "PSP@5"),
    "nDCG@k": ("nDCG@1", "nDCG@3", "nDCG@5"),
    "The long tail": ("macro-F1@5", "coverage@5", "recall@10"),
}
_COMPARED = ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5", "nDCG@5", "recall@10", "macro-F1@5", "coverage@5")


def of(records: Sequence[Record]) -> dict[str, Any]:
    """The template's variables."""
    return {
        "title": records[0].name if len(records) == 1 else " · ".join(record.name for record in records),
        "runs": [{"name": record.name, "facts": _facts(record), "state": record.state} for record in records],
        "tiles": _tiles(records[0]) if len(records) == 1 else [],
        "results": _results(records),
        "curves": _some([*_training(records), *_metrics(records)]),
        "deciles": _some(_deciles(records)),
        "rewiring": _some(_rewiring(records)),
        "stages": _stages(records),
        "heads": [(record.name, _head(record)) for record in records],
        "changed": _settings(records, changed=True),
        "unchanged": _settings(records, changed=False),
        "versions": _by_run(records, lambda record: record.config["versions"]),
        "data": _by_run(records, _data),
    }


def size(n_bytes: float) -> str:
    """A number of bytes to three digits, in the largest unit (powers of ten) of which it is at least one."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= unit:
            count = n_bytes / unit
            return f"{count:,.{0 if count >= 100 else 1 if count >= 10 else 2}f} {name}"
    return f"{n_bytes:.0f} B"


def duration(seconds: float) -> str:
    """12.3 s, 4 min 5 s, or 3 h 7 min."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _some(charts: Sequence[Chart | None]) -> list[Chart]:
    return [chart for chart in charts if chart]


def _facts(record: Record) -> str:
    model, data, settings = record.config["model"], record.config["data"], record.config["settings"]
    encoder = "/".join(Path(settings["encoder"]).parts[-2:]) + (", frozen" if settings["freeze_encoder"] else "")
    kinds = " + ".join(f"{block['connectivity']} {block['fan_in']:,}" for block in model["blocks"])
    return f"{model['labels']:,} labels · {data['train']['texts']:,} texts · encoder {encoder} · fan-in {kinds}"


def _tiles(record: Record) -> list[tuple[str, str, str]]:
    """(name, figure, what it is of) of the headline."""
    tiles = []
    if evaluations := record.last_evaluations:
        row = evaluations[-1]
        where = f"{row['split']}, epoch {row['epoch']}"
        tiles += [(metric, number(row[metric]), where) for metric in ("P@1", "P@5", "PSP@1", "coverage@5") if metric in row]
    times = record.dense_bytes / record.sparse_bytes
    compared = f"1/{times:.1f} of a dense fp32 head" if times >= 1 else f"{1 / times:.1f} times a dense fp32 head"
    on_gpu = (
        [("GPU memory", size(record.device_peak_memory_mb * 1e6), "peak of any stage")] if record.device_peak_memory_mb else []
    )
    return [
        *tiles,
        ("Head", size(record.sparse_bytes), compared),
        ("Time", duration(record.seconds), "training, evaluation, checkpoints"),
        ("Peak memory", size(record.peak_memory_mb * 1e6), "resident, of any stage"),
        *on_gpu,
    ]


def _results(records: Sequence[Record]) -> Table:
    """One row for each run and split that its last evaluation had."""
    rows = []
    for record in records:
        costs = [
            size(record.sparse_bytes),
            f"{record.sparse_bytes / record.dense_bytes:.1%}",
            duration(record.seconds),
            size(record.peak_memory_mb * 1e6),
        ]
        for row in record.last_evaluations or [{}]:
            accuracy = [number(row.get(metric)) for metric in _COMPARED]
            rows.append([record.name, row.get("split", ""), number(row.get("epoch")), *accuracy, *costs])
    return Table(["run", "split", "epoch", *_COMPARED, "head", "of dense", "time", "peak memory"], rows)


def _training(records: Sequence[Record]) -> list[Chart | None]:
    rates = {
        _series(records, record, kind): _points(record.of_kind("train"), "step", f"{kind}_lr")
        for record in records
        for kind in ("encoder", "intermediate", "head")
        if any(row.get(f"{kind}_lr") for row in record.of_kind("train"))
    }
    loss = {_series(records, record, "loss"): _points(record.of_kind("train"), "step", "loss") for record in records}
    return [line_chart("Training loss", "step", loss), line_chart("Learning rates", "step", rates, from_zero=True)]


def _metrics(records: Sequence[Record]) -> list[Chart | None]:
    if len(records) > 1:
        return [
            line_chart(metric, "epoch", {record.name: _points(record.evaluations, "epoch", metric) for record in records})
            for metric in _COMPARED
        ]
    rows = records[0].evaluations
    split = rows[0]["split"] if rows else ""
    return [
        line_chart(f"{title} on {split}", "epoch", {name: _points(rows, "epoch", name) for name in names})
        for title, names in _FAMILIES.items()
    ]


def _deciles(records: Sequence[Record]) -> list[Chart | None]:
    """Bars by decile of the last evaluation's last split. The table has the first run's labels, which all runs should share."""
    last = {record.name: record.last_evaluations[-1] for record in records if record.last_evaluations}
    evaluated = {name: row["deciles"] for name, row in last.items() if "deciles" in row}
    if not evaluated:
        return []
    first = next(iter(evaluated.values()))
    about = {
        "labels": [number(row["labels"]) for row in first],
        "training texts of a label": ["–".join(map(number, sorted(set(row["texts"] or [])))) for row in first],
        "share of the true labels": [f"{row['positives']:.1%}" for row in first],
    }

    def chart(title: str, bars: dict[str, tuple[str, str]]) -> Chart | None:
        heights = {name: [row[key] for row in evaluated[run]] for name, (run, key) in bars.items()}
        return bar_chart(title, "decile", [str(i + 1) for i in range(DECILES)], heights, about)

    if len(evaluated) == 1:
        (run,) = evaluated
        parts = {metric: (run, metric) for metric in ("P@1", "P@3", "P@5")}
        return [chart("Part in P@k", parts), chart("Recall@10 within the decile", {"recall@10": (run, "recall@10")})]
    return [
        chart(title, {run: (run, key) for run in evaluated})
        for title, key in (("Part in P@1", "P@1"), ("Part in P@5", "P@5"), ("Recall@10 within the decile", "recall@10"))
    ]


def _rewiring(records: Sequence[Record]) -> list[Chart | None]:
    survival: dict[str, list[Point]] = {}
    moved: dict[str, list[Point]] = {}
    read: dict[str, list[Point]] = {}
    for record in records:
        rows = record.of_kind("rewire")
        for block in sorted({row["block"] for row in rows}):
            mine = [row for row in rows if row["block"] == block]
            name = _series(records, record, f"block {block}")
            survival[name] = _points(mine, "step", "survival")
            moved[name] = [(row["step"], row["moved"] / row["connections"]) for row in mine]
            for quantile, at in (("least", 0), ("median", 2), ("most", 4)):
                read[f"{name}, {quantile}"] = [(row["step"], row["input_usage"][at]) for row in mine]
    return [
        line_chart("First connections that are still there", "step", survival, from_zero=True),
        line_chart("Share of the connections moved at a time", "step", moved, from_zero=True),
        line_chart("Readers of an input", "step", read, from_zero=True) if len(records) == 1 else None,
    ]


def _stages(records: Sequence[Record]) -> list[dict[str, Any]]:
    """For each stage a name and for each run (seconds as text, share of the longest stage from 0 to 1, peak memory)."""
    stages = [record.stages for record in records]
    longest = max((seconds for each in stages for seconds, _ in each.values()), default=0.0) or 1.0
    names = dict.fromkeys(name for each in stages for name in each)
    return [
        {
            "name": name,
            "runs": [
                (duration(each[name][0]), each[name][0] / longest, size(each[name][1] * 1e6)) if name in each else ("", 0.0, "")
                for each in stages
            ],
        }
        for name in names
    ]


def _head(record: Record) -> Table:
    """Memory of each block beside a dense fp32 layer of the same labels on the same inputs, and of everything together."""
    model = record.config["model"]

    def row(part: str, facts: Sequence[str], n_bytes: int, dense: int) -> list[str]:
        return [part, *facts, size(n_bytes), size(dense), f"{n_bytes / dense:.1%}"]

    rows = []
    for i, block in enumerate(model["blocks"]):
        facts = [number(block["labels"]), number(block["fan_in"]), number(block["group_size"]), block["dtype"]]
        dense = dense_bytes(block["labels"], model["width"])
        rows.append(row(f"block {i}: {block['connectivity']}", facts, block["bytes"], dense))
    facts = [number(model["labels"]), "", "", ""]
    rows.append(row("head", facts, model["head_bytes"], dense_bytes(model["labels"], model["width"])))
    if record.intermediate_bytes:
        rows.append(row("with intermediate layer; dense without it", facts, record.sparse_bytes, record.dense_bytes))
    rows.append(["optimizer of the head, while training", *["", "", "", ""], size(model["moment_bytes"]), "", ""])
    return Table(["part", "labels", "fan-in", "group", "format", "bytes", "dense fp32", "of dense"], rows)


def _settings(records: Sequence[Record], *, changed: bool) -> Table:
    """Settings that differ from their default in some run, or those that do in none."""
    defaults = {spec.name: spec.default for spec in fields(Settings)}
    names = dict.fromkeys(name for record in records for name in record.settings)
    rows = []
    for name in names:
        values = [record.settings.get(name) for record in records]
        if any(value != defaults.get(name) for value in values) == changed:
            rows.append([f"--{name.replace('_', '-')}", *map(_value, values), _value(defaults.get(name))])
    return Table(["setting", *_columns(records), "default"], rows)


def _data(record: Record) -> dict[str, Any]:
    data = record.config["data"]
    facts = {"folder": data["path"], "labels": number(data["labels"])}
    for split in ("train", "dev", "test"):
        facts |= {f"{split}: {name.replace('_', ' ')}": number(count) for name, count in data.get(split, {}).items()}
    return facts


def _by_run(records: Sequence[Record], facts: Callable[[Record], dict[str, Any]]) -> Table:
    columns = [facts(record) for record in records]
    names = dict.fromkeys(name for column in columns for name in column)
    return Table(["fact", *_columns(records)], [[name, *(_value(column.get(name)) for column in columns)] for name in names])


def _columns(records: Sequence[Record]) -> list[str]:
    return ["value"] if len(records) == 1 else [record.name for record in records]


def _series(records: Sequence[Record], record: Record, name: str) -> str:
    """The name of a line: of several runs it begins with the run's."""
    return name if len(records) == 1 else record.name if name == "loss" else f"{record.name}, {name}"


def _points(rows: Sequence[dict[str, Any]], x: str, y: str) -> list[Point]:
    return [(row[x], row[y]) for row in rows if y in row]


def _value(value: Any) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
