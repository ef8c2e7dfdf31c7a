"""Exact top-k over millions of labels: the sparse head against torch's dense matrix product + topk, on the same numbers.

    python -m benchmarks.head_topk --labels 2800000 --width 768 --batch 1 16 --record

Each sparse head is also laid out as a dense matrix for torch, so both sides answer the same question, and the answers are
compared. A row per connectivity and batch: times per call, milliseconds per query, ratio to dense, bytes, read bandwidth.
--record also appends the rows to benchmarks/results/head_topk.jsonl.
"""

from __future__ import annotations

import argparse
from typing import get_args

import numpy as np
import torch

from benchmarks import measure
from export.convert import DTYPES
from models import kernels
from models.head import Block, Connectivity, Head, HeadError
from models.kernels import cpu


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    try:
        _run(args)
    except HeadError as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head_topk", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--labels", type=measure.count, default=2_800_000, help="number of labels (default %(default)s)")
    parser.add_argument("--width", type=measure.count, default=768, help="input width D (default %(default)s)")
    parser.add_argument("--fan-in", type=measure.count, nargs="+", default=[32], help="inputs per label (default %(default)s)")
    parser.add_argument("--group-size", type=measure.count, default=32, help="labels per group (default %(default)s)")
    parser.add_argument("--batch", type=measure.count, nargs="+", default=[1, 16], help="batch sizes (default 1 16)")
    parser.add_argument(
        "--connectivity", nargs="+", choices=get_args(Connectivity), default=["shared", "private", "dense"], help="default: all"
    )
    parser.add_argument("--dtype", default="bf16", choices=DTYPES, help="format of the sparse values (default %(default)s)")
    parser.add_argument("--k", type=measure.count, default=10, help="labels wanted per query (default %(default)s)")
    parser.add_argument("--repeats", type=measure.count, default=7, help="timed calls of each side (default %(default)s)")
    parser.add_argument("--dense-fp32", action="store_true", help="also time torch dense fp32 (twice the memory of bf16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="append the rows to benchmarks/results/head_topk.jsonl")
    return parser


def _run(args: argparse.Namespace) -> None:
    torch.set_num_threads(cpu.threads())
    rng = np.random.default_rng(args.seed)
    bandwidth = measure.read_bandwidth()
    for connectivity in args.connectivity:
        for fan_in in [args.width] if connectivity == "dense" else args.fan_in:
            labels = np.arange(args.labels, dtype=np.int32)
            block = Block.random(
                labels,
                width=args.width,
                connectivity=connectivity,
                fan_in=fan_in,
                group_size=args.group_size,
                dtype=args.dtype,
                rng=rng,
            )
            head = Head(args.width, args.labels, (block,))
            weight = dense_weight(block, args.labels)
            for batch in args.batch:
                x = rng.standard_normal((batch, args.width), dtype=np.float32)
                rows = compare(head, weight, x, args, bandwidth)
                measure.show(rows)
                if args.record:
                    measure.record("head_topk", rows)
            del block, head, weight


def compare(
    head: Head, weight: torch.Tensor, x: np.ndarray, args: argparse.Namespace, bandwidth: float
) -> list[dict[str, object]]:
    """Rows for one head and batch: ours, torch dense bf16 and, if asked for, torch dense fp32."""
    block, screens = head.blocks[0], kernels.screen(head)
    x_bf16 = torch.from_numpy(x).bfloat16()
    calls = {
        block.connectivity: lambda: kernels.topk(x, head, args.k, screens=screens),
        "torch-dense-bf16": lambda: (x_bf16 @ weight.T).topk(args.k),
    }
    if args.dense_fp32:
        wide, x_fp32 = weight.float(), torch.from_numpy(x)
        calls["torch-dense-fp32"] = lambda: (x_fp32 @ wide.T).topk(args.k)
    # bf16 inputs and logits make torch's order of near-equal labels rough: the best of ours must be among its first few.
    first, few = calls[block.connectivity]()[1][:, :1], calls["torch-dense-bf16"]().indices.numpy()
    if not (first == few).any(axis=1).all():
        raise SystemExit(f"{block.connectivity}: the best label is not among those of torch dense")
    times = measure.interleaved(calls, args.repeats)
    ours = times[block.connectivity]
    rows = []
    for name, taken in times.items():
        nbytes = head.nbytes if name == block.connectivity else weight.nbytes * (2 if name.endswith("fp32") else 1)
        screen = sum(screen.nbytes for screen in screens if screen) if name == block.connectivity else 0
        row = {
            "kernel": name, "labels": args.labels, "width": args.width, "fan_in": block.fan_in, "group_size": block.group_size,
            "dtype": block.dtype if name == block.connectivity else name.split("-")[-1], "batch": len(x), "k": args.k,
            **measure.summary(taken), "ms_per_query": measure.summary(taken)["median_ms"] / len(x),
            "times_slower_than_ours": measure.paired_ratio(taken, ours), "bytes": nbytes, "screen_bytes": screen,
            "machine_read_gb_per_s": bandwidth,
        }  # fmt: skip
        if not screen:  # or most weights are never read
            row["read_gb_per_s"] = nbytes / min(taken) / 1e6
        rows.append(row)
    return rows


def dense_weight(block: Block, labels: int) -> torch.Tensor:
    """The block as a dense bf16 matrix [L, D] in label order."""
    weight = torch.zeros(labels, block.width, dtype=torch.bfloat16)
    step = max(1, (1 << 26) // (block.group_size * block.width))
    for start in range(0, block.groups, step):
        part = slice(start, min(start + step, block.groups))
        values = block.weights(part).transpose(0, 2, 1)  # [n, G, K]
        rows = np.zeros((*values.shape[:2], block.width), dtype=np.float32)
        if block.connectivity == "dense":
            rows[...] = values
        else:
            index = block.indices[part]
            index = index[:, None, :] if block.connectivity == "shared" else index.transpose(0, 2, 1)
            np.put_along_axis(rows, np.broadcast_to(index, values.shape).astype(np.int64), values, axis=2)
        ids = block.label_ids[part].reshape(-1)
        weight[torch.from_numpy(ids[ids >= 0]).long()] = torch.from_numpy(rows.reshape(-1, block.width)[ids >= 0]).bfloat16()
    return weight


if __name__ == "__main__":
    main()
