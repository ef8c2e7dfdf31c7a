"""The kernels on a GPU: right first, then how fast, beside torch's dense layer and the ceilings of the same card.

    python -m benchmarks.gpu                    # everything, in about eight minutes; rows go to benchmarks/results/gpu_*.jsonl
    python -m benchmarks.gpu --quick            # the shapes of the targets only
    python -m benchmarks.gpu --only topk        # one section: correctness ceilings topk train_step whole_step

It needs torch, Triton and numpy, and nothing built. Every row is written when it is measured, so a run that is cut short keeps
what it has. Times are medians of CUDA events with the L2 cache flushed before each repeat; calls are replayed from CUDA graphs
(--device cpu, under TRITON_INTERPRET=1, goes through everything with tiny shapes and measures nothing worth reading).
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import triton

from benchmarks import measure
from benchmarks.gpu_clock import Clock
from benchmarks.gpu_correctness import check, check_large
from benchmarks.gpu_problems import DenseLayer, Problem, random_block, random_input, random_positives
from benchmarks.gpu_targets import verdicts
from benchmarks.gpu_whole_step import EncoderShape, WholeStep
from models.device import DeviceError, cuda_device
from models.kernels import Optimizer, gpu, rounding_key
from models.kernels.gpu import DeviceHead, DeviceMoments
from models.kernels.gpu.launch import INTERPRETED

K_BEST = 10
SECTIONS = ("correctness", "ceilings", "whole_step", "topk", "train_step")  # in this order: the longest ones may be cut short
MILLION = 1_000_000
SHARED, PRIVATE = Problem("shared", 2_800_000, 128, 64), Problem("private", 2_800_000, 32, 64)


@dataclass(frozen=True)
class Plan:
    """What is measured, the most wanted first."""

    checks: tuple[tuple[Problem, str], ...]  # and the type of values and inputs
    large: int  # labels of the check against torch
    topk: tuple[Problem, ...]
    steps: tuple[tuple[Problem, str], ...]  # and the optimizer
    whole: tuple[Problem, ...]
    large_batches: tuple[int, ...] = (3, 70)
    length: int = 128
    encoder: EncoderShape = field(default_factory=EncoderShape)
    copy_bytes: int = 4 << 30
    matrix: int = 8192


def _batches(problem: Problem, *sizes: int) -> tuple[Problem, ...]:
    return tuple(replace(problem, batch=size) for size in sizes)


def _checks(dtypes: Iterable[str], *batches: int) -> tuple[tuple[Problem, str], ...]:
    return tuple(
        (Problem(connectivity, 700, 40, batch, width=64 if connectivity == "dense" else 96), dtype)
        for connectivity in ("shared", "private", "dense")
        for dtype in dtypes
        for batch in batches
    )


QUICK = Plan(
    checks=_checks(("fp32", "fp16", "bf16"), 5, 100),
    large=100_000,
    topk=(*_batches(SHARED, 64, 1, 256), PRIVATE),
    steps=((replace(SHARED, batch=128), "sgd"),),
    whole=(replace(SHARED, batch=128), replace(SHARED, batch=128, labels=8_600_000)),
)
FULL = replace(
    QUICK,
    topk=(
        *QUICK.topk,
        *_batches(SHARED, 4, 16, 128, 512, 1024),
        *_batches(PRIVATE, 1, 16, 256, 1024),
        *(replace(SHARED, labels=labels) for labels in (100_000, MILLION, 10 * MILLION)),
        *(replace(SHARED, fan_in=fan_in) for fan_in in (32, 64)),
        *(replace(PRIVATE, fan_in=fan_in) for fan_in in (64, 128)),
        *(replace(PRIVATE, labels=labels) for labels in (100_000, MILLION, 10 * MILLION)),
        replace(SHARED, labels=100 * MILLION, fan_in=32),
        replace(SHARED, labels=100 * MILLION),
    ),
    steps=(
        *QUICK.steps,
        *((problem, "sgd") for problem in _batches(SHARED, 1, 16, 64, 256, 512, 1024)),
        *((replace(SHARED, batch=128), kind) for kind in ("momentum", "adam")),
        *((replace(PRIVATE, batch=batch), "sgd") for batch in (128, 16, 512)),
        *((replace(SHARED, batch=128, labels=labels), "sgd") for labels in (100_000, MILLION, 10 * MILLION)),
        *((replace(SHARED, batch=128, fan_in=fan_in), "sgd") for fan_in in (32, 64)),
        *((replace(PRIVATE, batch=128, fan_in=fan_in), "sgd") for fan_in in (64, 128)),
    ),
    whole=(*QUICK.whole, replace(SHARED, batch=128, labels=670_000)),
)
_TINY, _TINY_PRIVATE = Problem("shared", 40, 8, 3, 32, 16), Problem("private", 40, 8, 3, 32, 16)
DRY = Plan(
    checks=((_TINY, "fp32"), (_TINY_PRIVATE, "fp32"), (replace(_TINY, connectivity="dense"), "fp16")),
    large=60,
    large_batches=(3,),
    topk=(_TINY, _TINY_PRIVATE),
    steps=((_TINY, "sgd"), (_TINY_PRIVATE, "adam")),
    whole=(_TINY,),
    length=4,
    encoder=EncoderShape(vocabulary=50, width=32, layers=2, heads=2, positions=8),
    copy_bytes=1 << 10,
    matrix=16,
)


class Bench:
    """One run: where rows go and how much time is left.

    rows       what was measured, (benchmark, row)
    failures   how many rows could not be
    """

    def __init__(self, plan: Plan, device: torch.device, seconds: float, commit: str | None, repeats: int) -> None:
        self.rows: list[tuple[str, measure.Row]] = []
        self.failures = 0
        self._plan, self._device = plan, device
        self._clock = Clock(device, repeats)
        self._ends = time.monotonic() + seconds
        self._facts = measure.environment(_hardware(device)) | ({"commit": commit} if commit else {})
        self._dense: dict[tuple[str, int, int], float | None] = {}  # medians by benchmark, labels and batch
        self._copy_gb_per_s = self._tflops = float("nan")

    def run(self, section: str) -> None:
        began = time.monotonic()
        getattr(self, section)()
        print(f"# {section}: {time.monotonic() - began:.0f} s; compiling and choosing so far {gpu.tuning_seconds():.0f} s")

    def correctness(self) -> None:
        plan, device = self._plan, self._device
        worst = max(check(problem, dtype, device) for problem, dtype in plan.checks)
        large = max(
            check_large(kind, plan.large, batch, device) for kind in ("shared", "private") for batch in plan.large_batches
        )
        print(f"# correct: errors up to {worst:.1e} of the largest number, {large:.1e} among {plan.large:,} labels in fp32")

    def ceilings(self) -> None:
        """How fast the card copies, bytes read and written, and multiplies bf16 matrices."""
        source = torch.randint(256, (self._plan.copy_bytes // 2,), dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        copy_ms = min(self._clock.times_ms(lambda: target.copy_(source), graph=False))
        side = self._plan.matrix
        a, b = (torch.randn((side, side), dtype=torch.bfloat16, device=self._device) for _ in range(2))
        product_ms = min(self._clock.times_ms(lambda: a @ b, graph=False))
        self._copy_gb_per_s, self._tflops = 2 * source.nbytes / copy_ms / 1e6, 2 * side**3 / product_ms / 1e9
        self._write("gpu_ceilings", {"copy_gb_per_s": self._copy_gb_per_s, "bf16_tflops": self._tflops})

    def topk(self) -> None:
        for problem in self._in_time(self._plan.topk):
            with self._going_on(problem):
                row = self._topk(problem)
                row["dense_is_slower"] = self._times(self._dense_ms("topk", problem), row)
                self._write("gpu_topk", row)

    def train_step(self) -> None:
        for problem, kind in self._in_time(self._plan.steps):
            with self._going_on(problem):
                row = self._train_step(problem, kind)
                row["dense_is_slower"] = self._times(self._dense_ms("train_step", problem), row)
                self._write("gpu_train_step", row)

    def whole_step(self) -> None:
        plan = self._plan
        for problem in self._in_time(plan.whole):
            with self._going_on(problem):
                step = WholeStep(replace(problem, width=plan.encoder.width), plan.length, plan.encoder, self._device)
                times, peak = self._clock.times_ms(step, graph=False), self._clock.peak_bytes(step)
                row = {
                    "step": problem.connectivity, **problem.facts, "dtype": "bf16", "optimizer": "sgd", "length": plan.length,
                    "encoder_layers": plan.encoder.layers, **measure.summary(times), "peak_bytes": peak,
                    "peak_gib": peak / 2**30, **step.parts_bytes,
                }  # fmt: skip
                del step
                self._write("gpu_whole_step", row)

    def _topk(self, problem: Problem) -> measure.Row:
        x, head = self._input(problem), DeviceHead(problem.width, problem.labels, (random_block(problem, self._device),))

        def call() -> object:
            return gpu.topk(x, head, K_BEST)

        summary, extra = measure.summary(self._clock.times_ms(call, graph=True)), self._clock.extra_bytes(call)
        eager = measure.summary(self._clock.times_ms(call, graph=False))
        wide = x.float()  # as an encoder gives it: products are fp32's then, without tensor cores
        served = measure.summary(self._clock.times_ms(lambda: gpu.topk(wide, head, K_BEST), graph=True))
        return {
            "kernel": problem.connectivity, **problem.facts, "dtype": "bf16", "k": K_BEST, **summary,
            "eager_median_ms": eager["median_ms"], "fp32_input_median_ms": served["median_ms"],
            "bytes": problem.nbytes, "extra_bytes": extra,
            "share_of_copy": problem.nbytes / summary["median_ms"] / 1e6 / self._copy_gb_per_s,
        }  # fmt: skip

    def _train_step(self, problem: Problem, kind: str) -> measure.Row:
        x, block = self._input(problem), random_block(problem, self._device)
        positives, optimizer = random_positives(problem, self._device), Optimizer(kind, lr=1e-3)
        moments = DeviceMoments.zeros(optimizer, block)

        def call() -> object:
            key = rounding_key(0, 1, 0)
            return gpu.train_step(x, positives, block, moments, loss="bce", optimizer=optimizer, step=1, key=key)

        summary, extra = measure.summary(self._clock.times_ms(call, graph=True)), self._clock.extra_bytes(call)
        written = block.values.nbytes + block.bias.nbytes + moments.nbytes
        traffic = problem.nbytes + moments.nbytes + written  # all is read once, and what changes written once
        operations = 3 * 2 * problem.batch * problem.labels * problem.fan_in  # scores and both gradients
        return {
            "step": problem.connectivity, **problem.facts, "dtype": "bf16", "optimizer": kind, **summary,
            "bytes": problem.nbytes, "moment_bytes": moments.nbytes, "extra_bytes": extra,
            "share_of_copy": traffic / summary["median_ms"] / 1e6 / self._copy_gb_per_s,
            "share_of_bf16_peak": operations / summary["median_ms"] / 1e9 / self._tflops,
        }  # fmt: skip

    def _dense_ms(self, what: str, problem: Problem) -> float | None:
        """The median of torch's dense layer, measured once for each size; None where it does not fit."""
        size = what, problem.labels, problem.batch
        if size not in self._dense:
            self._dense[size] = None
            with self._going_on(replace(problem, connectivity="dense")):
                layer, x = DenseLayer(problem.labels, problem.width, self._device), random_input(problem, self._device)
                places = layer.places(random_positives(problem, self._device))

                def call() -> object:
                    return layer.topk(x, K_BEST) if what == "topk" else layer.train_step(x, places, 1e-3)

                summary, extra = measure.summary(self._clock.times_ms(call, graph=True)), self._clock.extra_bytes(call)
                name = {"kernel": "torch-dense-bf16", "k": K_BEST} if what == "topk" else {"step": "torch-dense-bf16-chunked"}
                facts = {**problem.facts, "fan_in": problem.width, "dtype": "bf16"}
                self._write(f"gpu_{what}", {**name, **facts, **summary, "bytes": layer.weight.nbytes, "extra_bytes": extra})
                self._dense[size] = summary["median_ms"]
        return self._dense[size]

    def _times(self, dense_ms: float | None, row: measure.Row) -> float | None:
        return None if dense_ms is None else dense_ms / row["median_ms"]

    def _input(self, problem: Problem) -> torch.Tensor:
        """bf16; fp32 in the interpreter, which multiplies bf16 matrices wrongly."""
        return random_input(problem, self._device, torch.bfloat16 if self._device.type == "cuda" else torch.float32)

    def _in_time(self, problems: tuple) -> Iterator:
        for i, problem in enumerate(problems):
            if time.monotonic() > self._ends:
                print(f"# out of time: {len(problems) - i} of {len(problems)} rows are not measured")
                return
            yield problem

    @contextmanager
    def _going_on(self, problem: Problem) -> Iterator[None]:
        """A row that does not fit into memory is left out, and so is one that fails: what was measured stays."""
        try:
            yield
        except torch.OutOfMemoryError:
            print(f"# too large for this card: {problem}")
        except Exception:
            self.failures += 1
            print(f"# failed: {problem}\n{traceback.format_exc()}")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _write(self, benchmark: str, row: measure.Row) -> None:
        row = {key: None if value != value else value for key, value in row.items()}  # NaN: there is no ceiling to compare with
        self.rows.append((benchmark, row))
        measure.show([row])
        measure.record(benchmark, [row], self._facts)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections to run (default: all)")
    parser.add_argument("--quick", action="store_true", help="only the shapes of the targets, fewer repeats")
    parser.add_argument("--minutes", type=float, default=7.5, help="begin no row after so long (default %(default)g)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu for a dry run (default %(default)s)")
    parser.add_argument("--results", type=Path, default=measure.RESULTS, metavar="DIR", help="where rows are appended")
    parser.add_argument("--commit", help="what the rows say was measured (default: what git says)")
    args = parser.parse_args()
    if args.device.startswith("cuda"):
        try:
            device = cuda_device(args.device)
        except DeviceError as error:
            parser.error(f"--device {error}")
        torch.cuda.set_device(device)
    elif INTERPRETED:
        device = torch.device(args.device)
    else:
        parser.error(f"--device {args.device} is a dry run in Triton's interpreter: set TRITON_INTERPRET=1")
    torch.manual_seed(0)
    measure.RESULTS = args.results
    plan = DRY if device.type == "cpu" else QUICK if args.quick else FULL
    bench = Bench(plan, device, 60 * args.minutes, args.commit, repeats=10 if args.quick else 30)
    for section in (section for section in SECTIONS if section in args.only):
        bench.run(section)
    print(verdicts(bench.rows))
    return 1 if bench.failures else 0


def _hardware(device: torch.device) -> dict[str, object]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, interpreted"
    return {"device": name, "triton": triton.__version__, "cuda": torch.version.cuda}


if __name__ == "__main__":
    sys.exit(main())
