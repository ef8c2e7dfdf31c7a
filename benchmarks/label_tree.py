"""The label similarity tree: time and memory for millions of labels.

    python -m benchmarks.label_tree --labels 3000000 --width 384

Vectors are drawn around random centres, one for each group, so that there is something to find.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from benchmarks import measure
from train.stages import peak_memory_mb
from train.tree import similarity_order


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.label_tree", description=__doc__.split("\n")[0])
    parser.add_argument("--labels", type=measure.count, default=3_000_000, help="number of labels (default %(default)s)")
    parser.add_argument("--width", type=measure.count, default=384, help="width of the label vectors (default %(default)s)")
    parser.add_argument("--group-size", type=measure.count, default=32, help="labels per group (default %(default)s)")
    parser.add_argument(
        "--noise", type=float, default=0.5, help="distance from the centre, 1 is a centre's length (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="append the row to benchmarks/results/label_tree.jsonl")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    centres = rng.standard_normal((max(1, args.labels // args.group_size), args.width), dtype=np.float32)
    centre = rng.permutation(np.arange(args.labels) % len(centres))
    vectors = np.empty((args.labels, args.width), dtype=np.float32)
    for start in range(0, args.labels, 65_536):
        part = vectors[start : start + 65_536]
        part[...] = rng.standard_normal(part.shape, dtype=np.float32) * args.noise + centres[centre[start : start + 65_536]]
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    before = peak_memory_mb()
    started = time.perf_counter()
    order = similarity_order(vectors, args.group_size, rng)
    seconds = time.perf_counter() - started
    whole = len(order) // args.group_size * args.group_size
    groups = np.sort(centre[order[:whole]].reshape(-1, args.group_size), axis=1)
    distinct = 1 + (np.diff(groups, axis=1) != 0).sum(axis=1)
    row = {
        "labels": args.labels, "width": args.width, "group_size": args.group_size, "seconds": round(seconds, 1),
        "vectors_mb": vectors.nbytes / 1e6, "peak_memory_before_mb": before, "peak_memory_mb": peak_memory_mb(),
        "centres_per_group": float(distinct.mean()),
    }  # fmt: skip
    measure.show([row])
    if args.record:
        measure.record("label_tree", [row])


if __name__ == "__main__":
    main()
