"""Accuracy of sparse and dense heads on the same data, encoder and epochs; and what each part of the training adds.

    python -m benchmarks.accuracy compare --data ../tib-titles --runs runs/tib --seeds 0 1 2
    python -m benchmarks.accuracy ablate --data ../tib-titles --runs runs/tib

Every run is a `python -m train` of its own in RUNS/NAME-SEED. One that is there is continued or, when it is finished, only
read; so the command may be stopped and called again. The table goes to standard output; --record appends the rows to
benchmarks/results/accuracy.jsonl.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import exported, measure
from export.convert import DTYPES
from train.flags import parse
from train.runs import Run
from train.settings import SettingsError, resumed

SPARSE = "--tiers dense:15%,64:85%"
DENSE = "--connectivity dense --head-dtype fp32"
ABLATIONS = {
    "sparse": SPARSE,
    "fp32": f"{SPARSE} --head-dtype fp32",
    "imprinted": f"{SPARSE} --head-init imprinted",
    "rewire off": f"{SPARSE} --rewire off",
    "rewire gradient": f"{SPARSE} --rewire gradient",
    "grouping random": f"{SPARSE} --grouping random",
    "grouping frequency": f"{SPARSE} --grouping frequency",
    "auxiliary": f"{SPARSE} --auxiliary 0.5",
    "intermediate 1024": f"{SPARSE} --intermediate 1024",
    "intermediate 4096": f"{SPARSE} --intermediate 4096",
    "private": f"{SPARSE} --connectivity private",
    "dense 2%": "--tiers dense:2%,64:98%",
    "dense 2%, fan-in 128": "--tiers dense:2%,128:98%",
    "no dense block": "--tiers 64:100%",
    "three tiers": "--tiers dense:2%,128:18%,64:80%",
    "fan-in 32": "--tiers dense:15%,32:85%",
    "positives weighted": f"{SPARSE} --weight-positives",
    "squared hinge": f"{SPARSE} --loss squared_hinge",
}
METRICS = ("P@1", "P@3", "P@5", "PSP@1", "PSP@5")


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.accuracy", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["compare", "ablate"], help="dense beside sparse, or sparse with one thing changed")
    parser.add_argument("--data", type=Path, required=True, help="data folder")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs and their cache")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument("--only", nargs="+", help="names of the heads to train, of those of the table")
    parser.add_argument("--flags", default="", help="flags of python -m train for all runs, in one string")
    parser.add_argument("--sparse", default=SPARSE, metavar="FLAGS", help=f"the sparse head to compare; default: {SPARSE}")
    parser.add_argument(
        "--export-dtype",
        choices=DTYPES,
        help="sparse heads as `python -m export --head-dtype` packs them: their metrics and bytes (default: as trained)",
    )
    parser.add_argument("--record", action="store_true", help="append the rows to benchmarks/results/accuracy.jsonl")
    args = parser.parse_args()
    heads = compared(args.sparse, args.flags) if args.what == "compare" else ABLATIONS
    rows = []
    for name, flags in heads.items():
        if args.only and name not in args.only:
            continue
        for seed in args.seeds:
            run = args.runs / f"{name.replace(' ', '-')}-{seed}"
            given = f"{args.flags} {flags}".strip()
            dtype = None if flags.startswith(DENSE) else args.export_dtype
            try:
                train(run, ["--data", str(args.data), "--cache", str(args.runs / "cache"), "--seed", str(seed)], given)
            except SettingsError as error:
                parser.error(f"{run}: {error}")
            rows.append({"data": args.data.name, "head": name, "seed": seed, "flags": given, **result(run, dtype)})
            measure.show(rows[-1:])
    print(table(rows))
    if args.record:
        measure.record("accuracy", rows)


def compared(sparse: str, flags: str) -> dict[str, str]:
    """A sparse head, a dense one that reads the encoder's embedding and, if the sparse one has a layer, one that reads that."""
    heads = {"sparse": sparse, "dense": f"{DENSE} --intermediate 0"}
    if units := parse(["--out", "", *shlex.split(f"{flags} {sparse}")])[0].get("intermediate"):
        heads["dense, same layer"] = f"{DENSE} --intermediate {units}"
    return heads


def train(run: Path, common: list[str], flags: str) -> None:
    """Trains into `run`, goes on with what is there, or does nothing when it is finished. SettingsError for another run's."""
    arguments = ["--out", str(run), "--resume", *common, *shlex.split(flags)]
    if config := Run(run).config():
        epochs = resumed(config["settings"], parse(arguments)[0]).epochs
        if any(row["kind"] == "eval" and row["epoch"] == epochs and row["split"] == "test" for row in Run(run).log.rows()):
            return
    subprocess.run([sys.executable, "-m", "train", *arguments], check=True, stdout=subprocess.DEVNULL)


def result(run: Path, dtype: str | None) -> dict[str, Any]:
    """Metrics on test of the head in `dtype` (None: as trained), bytes of all behind the encoder, minutes of the run."""
    config, rows = Run(run).config(), Run(run).log.rows()
    assert config is not None
    model, settings = config["model"], config["settings"]
    if dtype is None:
        last = next(row for row in reversed(rows) if row["kind"] == "eval" and row["split"] == "test")
        head_bytes = model["head_bytes"]
    else:
        last, head_bytes = exported.metrics_on_test(run, dtype)
    width = model["embedding_width"]
    intermediate = 4 * (width + 1) * settings["intermediate"]
    dense = 4 * (width + 1) * model["labels"]
    return {
        **{name: round(last[name], 4) for name in METRICS},
        **({"exported": dtype} if dtype else {}),
        "bytes": head_bytes + intermediate,
        "share_of_dense_fp32": round((head_bytes + intermediate) / dense, 4),
        "epochs": settings["epochs"],
        "minutes": round(sum(row["seconds"] for row in rows if row["kind"] == "stage") / 60, 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per head, means over the seeds, ± standard deviation where there are several."""
    columns = [*METRICS, "bytes", "share_of_dense_fp32", "minutes"]
    lines = [f"| head | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for head in dict.fromkeys(row["head"] for row in rows):
        ours = [row for row in rows if row["head"] == head]
        lines.append(f"| {head} | {' | '.join(cell(column, [row[column] for row in ours]) for column in columns)} |")
    return "\n".join(lines)


def cell(column: str, numbers: list[float]) -> str:
    mean = statistics.mean(numbers)
    if column in METRICS:
        spread = f" ± {statistics.stdev(numbers):.4f}" if len(numbers) > 1 else ""
        return f"{mean:.4f}{spread}"
    return f"{mean / 1e6:.1f} MB" if column == "bytes" else f"{mean:.1%}" if "share" in column else f"{mean:.0f}"


if __name__ == "__main__":
    main()
