"""One training step of the head: our fused step against torch's dense layer, loss, backward and optimizer.

    python -m benchmarks.train_step --labels 250000 --width 384 --fan-in 64 --batch 64 --record

Both sides compute binary cross-entropy summed over the labels, the gradient of the inputs, and the weight update. A row per
connectivity and for torch dense in fp32 and bf16: time per step, ratio, weight bytes and the memory a step needs beyond them.
--record also appends the rows to benchmarks/results/train_step.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import get_args

import numpy as np
import torch

from benchmarks import measure
from models import kernels
from models.head import Block, Connectivity, Head, HeadError
from models.kernels import Optimizer, Positives, cpu, rounding_key

Step = Callable[[], object]


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    if args.positives > args.labels:
        parser.error(f"--positives {args.positives} is more than --labels {args.labels}")
    try:
        _run(args)
    except HeadError as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--labels", type=measure.count, default=250_000, help="number of labels (default %(default)s)")
    parser.add_argument("--width", type=measure.count, default=384, help="input width D (default %(default)s)")
    parser.add_argument("--fan-in", type=measure.count, default=64, help="inputs per label (default %(default)s)")
    parser.add_argument("--group-size", type=measure.count, default=32, help="labels per group (default %(default)s)")
    parser.add_argument("--batch", type=measure.count, nargs="+", default=[64], help="batch sizes (default 64)")
    parser.add_argument("--positives", type=measure.count, default=5, help="positive labels per row (default %(default)s)")
    parser.add_argument(
        "--connectivity", nargs="+", choices=get_args(Connectivity), default=["shared", "private", "dense"], help="default: all"
    )
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"], help="format of the values (default %(default)s)")
    parser.add_argument("--optimizer", default="sgd", choices=["sgd", "momentum", "adam"], help="default %(default)s")
    parser.add_argument("--baseline", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"], help="default: both")
    parser.add_argument("--repeats", type=measure.count, default=7, help="timed steps of each side (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="append the rows to benchmarks/results/train_step.jsonl")
    return parser


def _run(args: argparse.Namespace) -> None:
    torch.set_num_threads(cpu.threads())
    rng = np.random.default_rng(args.seed)
    for batch in args.batch:
        x = rng.standard_normal((batch, args.width), dtype=np.float32)
        positives = [rng.choice(args.labels, args.positives, replace=False) for _ in range(batch)]
        steps: dict[str, Step] = {}
        weight_bytes: dict[str, int] = {}
        extra_bytes: dict[str, int] = {}
        for connectivity in args.connectivity:
            block = Block.random(
                np.arange(args.labels, dtype=np.int32), width=args.width, connectivity=connectivity, fan_in=args.fan_in,
                group_size=args.group_size, dtype=args.dtype, rng=rng,
            )  # fmt: skip
            steps[connectivity] = fused_step(block, x, positives, args)
            extra_bytes[connectivity] = measure.extra_memory(steps[connectivity])
            weight_bytes[connectivity] = block.nbytes
        for dtype in args.baseline:
            name = f"torch-dense-{dtype}"
            layer = torch.nn.Linear(args.width, args.labels, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
            steps[name] = dense_step(layer, x, positives, args)
            extra_bytes[name] = measure.extra_memory(steps[name])
            weight_bytes[name] = sum(p.nbytes for p in layer.parameters())
        times = measure.interleaved(steps, args.repeats)
        rows = []
        for name, taken in times.items():
            row = {
                "step": name, "labels": args.labels, "width": args.width,
                "fan_in": args.fan_in if name in ("shared", "private") else args.width, "group_size": args.group_size,
                "dtype": name.split("-")[-1] if "torch" in name else args.dtype, "optimizer": args.optimizer, "batch": batch,
                **measure.summary(taken),
                **{f"{base}_is_slower": measure.paired_ratio(times[base], taken) for base in times if base.startswith("torch")},
                "weight_bytes": weight_bytes[name], "extra_bytes": extra_bytes[name],
            }  # fmt: skip
            rows.append(row)
        measure.show(rows)
        if args.record:
            measure.record("train_step", rows)


def fused_step(block: Block, x: np.ndarray, positives: list[np.ndarray], args: argparse.Namespace) -> Step:
    head = Head(args.width, args.labels, (block,))
    located = head.slots()
    optimizer = Optimizer(args.optimizer, lr=1e-3)
    moments = optimizer.moments(block)

    def step() -> None:
        (pairs,) = Positives.of_batch(positives, located, head)
        kernels.train_step(x, pairs, block, moments, loss="bce", optimizer=optimizer, step=1, key=rounding_key(args.seed, 1, 0))

    return step


def dense_step(
    layer: torch.nn.Linear, x: np.ndarray, positives: list[np.ndarray], args: argparse.Namespace
) -> Callable[[], object]:
    kind = {
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-3),
        "momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    }
    optimizer = kind[args.optimizer](layer.parameters())
    inputs = torch.from_numpy(x).to(layer.weight.dtype).requires_grad_()
    rows = torch.arange(len(x)).repeat_interleave(args.positives)
    columns = torch.from_numpy(np.concatenate(positives))

    def step() -> None:
        target = torch.zeros(len(x), args.labels, dtype=layer.weight.dtype)
        target[rows, columns] = 1
        loss = torch.nn.functional.binary_cross_entropy_with_logits(layer(inputs), target, reduction="sum") / len(x)
        optimizer.zero_grad(set_to_none=True)
        inputs.grad = None
        loss.backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
