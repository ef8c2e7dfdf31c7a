"""`python -m serve` under load, as a process of its own, and a dense FastAPI + torch server beside it in the same run.

    python -m benchmarks.serve bundle --encoder sentence-transformers/all-MiniLM-L6-v2 --record

phases, in this order; --only picks some:
  alone      one client (closed loop: its next request follows the last answer)
  clients    --clients clients; their requests/s are called the capacity
  open       requests due at 70 % of the capacity at a constant rate; latency counts from when a request was due
  overload   requests due at --overload times the capacity: who is accepted, who gets 429, how soon, and how much memory
  reload     --reloads reloads by SIGHUP under the clients' load
  drain      SIGTERM under the clients' load
  dense      the first two phases for the dense server, right after each of ours, and the ratios; with more clients than one
             also for that server with requests predicted in batches, which a plain one does not do

Text lengths: --tokens N makes every text N tokens long, --tokens mixed draws from a log-normal distribution (median 24, a tenth
above 87). --record appends a row per phase to benchmarks/results/serve.jsonl.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure
from benchmarks.make_bundle import RANDOM_MINILM
from benchmarks.server_process import STAGES, ServerError, ServerProcess, plan_for, run_load
from export.bundle import Bundle, BundleError, open_bundle
from serve.tokens import TextTokenizer

PHASES = ("alone", "clients", "open", "overload", "reload", "drain", "dense")
_TEXTS = 512
_OPEN_SHARE = 0.7  # of the capacity
_MIXED_MEDIAN, _MIXED_SIGMA = 24, 1.0
_HOUR_S = 3600.0


def main(argv: list[str] | None = None) -> int:
    given = _parser().parse_args(argv)
    try:
        rows = _Run(given).rows()
    except (BundleError, ServerError) as error:
        print(f"python -m benchmarks.serve: error: {error}", file=sys.stderr)
        return 2
    if given.record:
        measure.record("serve", rows)
    return 0


class _Run:
    """The phases asked for, on servers of this run."""

    def __init__(self, given: argparse.Namespace) -> None:
        self._given = given
        bundle = open_bundle(given.bundle, verify=False)
        self._facts = {"labels": bundle.manifest.labels, "width": bundle.manifest.width, "tokens": given.tokens}
        texts = make_texts(bundle, given.tokens, np.random.default_rng(given.seed))
        self._bodies = [json.dumps({"inputs": text, "top_k": given.top_k}) for text in texts]
        self._rows: list[measure.Row] = []
        self._capacity: float | None = given.capacity

    def rows(self) -> list[measure.Row]:
        """Runs the phases, prints a line for each and returns their rows."""
        given, phases = self._given, self._given.only
        with ExitStack() as stack:
            flags = shlex.split(given.serve_flags)
            fanin = _start(stack, "fanin", "serve", str(given.bundle), "--port", "0", *flags)
            dense = None
            if "dense" in phases:
                dense = _start(stack, "dense", "benchmarks.dense_server", str(given.bundle), "--encoder", given.encoder)
            ratios: measure.Row = {}
            for phase, clients in (("alone", 1), ("clients", given.clients)):
                if phase in phases or dense is not None or (phase == "clients" and self._needs_capacity()):
                    rate = self._closed(phase, fanin, clients, given.seconds)
                    if phase == "clients":
                        self._capacity = rate
                    if dense is not None:
                        for path in ("/predict", "/predict-batched")[: 1 if clients == 1 else 2]:
                            dense_rate = self._closed(phase, dense, clients, given.dense_s, path)
                            ratios[f"{phase}{path.removeprefix('/predict')}_ratio"] = rate / dense_rate
            if ratios:
                self._report({"phase": "dense", "server": "fanin", **ratios})
            if "open" in phases:
                self._open("open", fanin, _OPEN_SHARE, given.seconds)
            if "overload" in phases:
                self._open("overload", fanin, given.overload, given.overload_s)
            if "reload" in phases:
                self._reload(fanin)
            if "drain" in phases:
                self._drain(fanin)
        return self._rows

    def _needs_capacity(self) -> bool:
        return self._capacity is None and bool({"open", "overload"} & set(self._given.only))

    def _closed(self, phase: str, server: ServerProcess, clients: int, seconds: float, path: str = "/predict") -> float:
        plan = plan_for(server, self._bodies, seconds, path, clients=clients)
        row = run_load(server, plan, every_s=1 if clients > 1 else _HOUR_S)  # a look at /metrics would hold up the one client
        name = server.name + path.removeprefix("/predict")
        if not row["requests_per_s"]:
            raise ServerError(f"{name} answered nothing within {seconds:.0f} s")
        self._report({"phase": phase, "server": name, "clients": clients, **row})
        return float(row["requests_per_s"])

    def _open(self, phase: str, server: ServerProcess, share: float, seconds: float) -> None:
        assert self._capacity is not None
        rate = share * self._capacity
        row = run_load(server, plan_for(server, self._bodies, seconds, rate=rate))
        self._report({"phase": phase, "server": server.name, "rate": rate, "share_of_capacity": share, **row})

    def _reload(self, server: ServerProcess) -> None:
        taken: list[float] = []

        def reload() -> None:
            taken.extend(server.reload() for _ in range(self._given.reloads))

        row = self._during(server, reload)
        self._report({"phase": "reload", "server": server.name, "reloads": len(taken), "reload_max_s": max(taken), **row})

    def _drain(self, server: ServerProcess) -> None:
        ended: dict[str, float] = {}

        def drain() -> None:
            began = time.perf_counter()
            ended["exit_status"] = server.end()
            ended["drain_s"] = time.perf_counter() - began

        row = self._during(server, drain)
        self._report({"phase": "drain", "server": server.name, **ended, **row})

    def _during(self, server: ServerProcess, action: Callable[[], object]) -> measure.Row:
        plan = plan_for(server, self._bodies, _HOUR_S, clients=self._given.clients)
        return {"clients": self._given.clients, **run_load(server, plan, action=action)}

    def _report(self, row: measure.Row) -> None:
        self._rows.append(row | self._facts)
        print(describe(row), flush=True)


def _start(stack: ExitStack, name: str, module: str, *arguments: str) -> ServerProcess:
    server = ServerProcess(name, module, *arguments)
    stack.callback(server.end)
    print(f"{name:9}{server.greeting} after {server.ready_s:.1f} s, {server.rss_mb:,.0f} MB resident", flush=True)
    return server


def make_texts(bundle: Bundle, tokens: str, rng: np.random.Generator) -> list[str]:
    """Texts made of words from label names; each of the number of tokens asked for, special ones included, as far as words
    allow, or of mixed lengths."""
    tokenizer = TextTokenizer(bundle.tokenizer_file, bundle.manifest.max_length)
    names = rng.integers(0, len(bundle.labels), 4 * _TEXTS)
    words = sorted({word for name in names for word in bundle.labels.name(int(name)).split()})
    if tokens == "mixed":
        lengths = np.exp(rng.normal(np.log(_MIXED_MEDIAN), _MIXED_SIGMA, _TEXTS)).round()
        wanted = np.clip(lengths, 4, bundle.manifest.max_length).astype(int).tolist()
    else:
        wanted = [int(tokens)] * _TEXTS
    return [_text(tokenizer, words, length, rng) for length in wanted]


def _text(tokenizer: TextTokenizer, words: list[str], length: int, rng: np.random.Generator) -> str:
    """Words drawn until there are `length` tokens; one that is too long is passed over, and at last letters fill up."""
    chosen: list[str] = []
    drawn = (words[i] for i in rng.integers(0, len(words), 4 * length))
    for word in [*drawn, *("a" * length)]:
        (text,) = tokenizer([" ".join([*chosen, word])])
        if len(text.ids) <= length and not text.truncated:
            chosen.append(word)
        if len(text.ids) == length and not text.truncated:
            break
    return " ".join(chosen)


def describe(row: dict[str, Any]) -> str:
    """A phase's row for people, on a few lines."""
    if row["phase"] == "dense":
        ratios = [f"{name.removesuffix('_ratio')} {value:.1f}×" for name, value in row.items() if name.endswith("_ratio")]
        return f"dense    requests/s of fanin over those of dense: {', '.join(ratios)}"
    offered = f"{row['clients']} clients" if "clients" in row else f"{row['rate']:.0f} requests/s due"
    lines = [f"{row['phase']:9}{row['server']}, {offered}: {row['requests_per_s']:.1f} requests/s answered 200"]
    for code, facts in row["codes"].items():
        times = ", ".join(f"{name[:-3]} {value:.1f}" for name, value in facts.items() if name.endswith("_ms"))
        lines.append(f"{code}: {facts['count']:,} in ms {times}")
    lines += [f"{error}: {count:,}" for error, count in row["errors"].items()]
    if row["phase"] == "reload":
        lines.append(f"{row['reloads']} reloads, the slowest took {row['reload_max_s']:.1f} s")
    if row["phase"] == "drain":
        lines.append(f"ended {row['drain_s']:.1f} s after SIGTERM with status {row['exit_status']}")
    lines.append(
        f"rss {row['rss_first_mb']:,.0f} MB at first, {row['rss_last_mb']:,.0f} at last, {row['rss_max_mb']:,.0f} at most; "
        f"queue at most {row['queue_max_inputs']:.0f} texts"
    )
    cpu = f"{row['server_cpu_ms_per_request']:.2f} ms" if "server_cpu_ms_per_request" in row else "?"
    late = row["sent_late_ms"].get("p99_ms", 0.0)
    lines.append(
        f"CPU per request: server {cpu}, client {row['client_cpu_ms_per_request']:.2f} ms; sent late by {late:.1f} ms (p99)"
    )
    if "encoder_ms" in row:
        stages = ", ".join(f"{stage} {row[f'{stage}_ms']:.2f}" for stage in STAGES)
        lines.append(f"means in ms: {stages}; {row['batch_mean_inputs']:.1f} texts a batch")
    return ("\n" + " " * 9).join(lines)


def _tokens(text: str) -> str:
    if text != "mixed":
        measure.count(text)
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "bundle", type=Path, metavar="BUNDLE", help="what to serve; benchmarks.make_bundle makes them of any size"
    )
    parser.add_argument("--only", nargs="+", choices=PHASES, default=PHASES, metavar="PHASE", help="default: all")
    parser.add_argument(
        "--tokens", type=_tokens, default="16", metavar="N|mixed", help="length of the texts (default: %(default)s)"
    )
    parser.add_argument("--top-k", type=measure.count, default=10, help="labels wanted per text (default: %(default)s)")
    parser.add_argument("--clients", type=measure.count, default=64, help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=10, metavar="S", help="of each phase without another limit (default: 10)"
    )
    parser.add_argument("--capacity", type=float, metavar="R", help="requests/s (default: measured by the phase clients)")
    parser.add_argument("--overload", type=float, default=2, metavar="X", help="times the capacity (default: 2)")
    parser.add_argument("--overload-s", type=float, default=30, metavar="S", help="seconds of the overload (default: 30)")
    parser.add_argument("--dense-s", type=float, default=30, metavar="S", help="seconds of each of its phases (default: 30)")
    parser.add_argument("--reloads", type=measure.count, default=5, help="default: %(default)s")
    parser.add_argument(
        "--serve-flags",
        default="",
        metavar="FLAGS",
        help="for python -m serve, as one argument (default: none)",
    )
    parser.add_argument(
        "--encoder",
        default=RANDOM_MINILM,
        help="the encoder that the bundle was made with, for the dense server (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the texts (default: %(default)s)")
    parser.add_argument("--record", action="store_true", help="append the rows to benchmarks/results/serve.jsonl")
    return parser


if __name__ == "__main__":
    sys.exit(main())
