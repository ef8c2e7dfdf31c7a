"""Server processes under load: started, watched from outside (/proc, /metrics) and loaded by `benchmarks.load`. Linux."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.load import Plan

ROOT = Path(__file__).parents[1]
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
STAGES = ("tokenize", "queue", "encoder", "head", "serialize")
_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_KEPT_SAMPLES = 60
_SETTLE_S = 1  # after a reload, until the old model has answered its last request and is gone


class ServerError(Exception):
    """A server did not start, or did not do what was asked; the message says which and what."""


class ServerProcess:
    """A module run as a server. It is ready when it prints a line that ends with its address."""

    def __init__(self, name: str, module: str, *arguments: str) -> None:
        self.name = name
        began = time.perf_counter()
        command = [sys.executable, "-m", module, *arguments]
        self._popen = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self._popen.stdout is not None
        self._output = self._popen.stdout
        self.greeting = self._output.readline().strip()
        if not self.greeting:
            raise ServerError(f"python -m {module} ended with status {self.end()}")
        self.ready_s = time.perf_counter() - began
        self.url = self.greeting.split()[-1].rstrip("/")

    @property
    def cpu_s(self) -> float:
        """CPU time of all of its threads."""
        fields = Path(f"/proc/{self._popen.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S

    @property
    def rss_mb(self) -> float:
        """Resident memory."""
        pages = int(Path(f"/proc/{self._popen.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def metrics(self) -> dict[tuple[str, str], float]:
        """/metrics as {(name without prefix, labels as written): value}; empty for a server without."""
        try:
            with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
                text = answer.read().decode()
        except OSError:
            return {}
        return {(name.removeprefix("fanin_"), labels): float(value) for name, labels, value in _SAMPLE.findall(text)}

    def post(self, body: str) -> dict[str, Any]:
        """The answer to one prediction; OSError when it is an error."""
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(f"{self.url}/predict", body.encode(), headers), timeout=60
        ) as answer:
            return json.load(answer)

    def reload(self, timeout_s: float = 120) -> float:
        """Seconds until a reload by SIGHUP has succeeded; ServerError when it has not."""
        before, began = self.metrics(), time.perf_counter()
        self._popen.send_signal(signal.SIGHUP)
        while time.perf_counter() < began + timeout_s:
            time.sleep(0.1)
            after = self.metrics()
            for key in after:
                if key[0] == "reloads_total" and after[key] > before.get(key, 0):
                    if key[1] != 'result="ok"':
                        raise ServerError(f"a reload ended with {key[1]}")
                    taken = time.perf_counter() - began
                    time.sleep(_SETTLE_S)
                    return taken
        raise ServerError(f"no end of a reload within {timeout_s} s")

    def end(self) -> int:
        """Exit status after SIGTERM, or of a server that has ended already."""
        self._popen.terminate()
        self._output.close()
        try:
            return self._popen.wait(timeout=120)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            raise ServerError(f"{self.name} does not end on SIGTERM") from None


class Watch(threading.Thread):
    """Looks at a server at regular times: (seconds, rss in MB, texts waiting)."""

    def __init__(self, server: ServerProcess, every_s: float) -> None:
        super().__init__(daemon=True)
        self._server, self._every_s = server, every_s
        self._done = threading.Event()
        self.samples: list[tuple[float, float, float]] = []

    def run(self) -> None:
        began = time.perf_counter()
        while not self._done.wait(self._every_s):
            try:
                queued = self._server.metrics().get(("queue_inputs", ""), 0.0)
                self.samples.append((time.perf_counter() - began, self._server.rss_mb, queued))
            except OSError:
                return  # the server has ended

    def stop(self) -> None:
        self._done.set()
        self.join()


def run_load(
    server: ServerProcess, plan: Plan, every_s: float = 1, action: Callable[[], object] | None = None
) -> dict[str, Any]:
    """The summary of a load, with what the server spent on it. With `action`, it runs after the warm-up and the load ends
    when it returns."""
    before, cpu_s, rss_mb = server.metrics(), server.cpu_s, server.rss_mb
    watch = Watch(server, every_s)
    watch.start()
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.load"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    child.stdin.write(json.dumps(dataclasses.asdict(plan)))
    child.stdin.close()
    child.stdin = None
    try:
        if action is not None:
            time.sleep(plan.warm_up_s + 1)
            action()
    finally:
        if action is not None:
            child.terminate()  # it sends no more and sums up
        output, _ = child.communicate()
        watch.stop()
    if child.returncode:
        raise ServerError(f"python -m benchmarks.load ended with status {child.returncode}")
    summary: dict[str, Any] = json.loads(output)
    answered = summary.pop("answered")
    with suppress(OSError):  # it has ended, as a drained server should
        summary["server_cpu_ms_per_request"] = (server.cpu_s - cpu_s) / max(1, answered) * 1e3
    summary["client_cpu_ms_per_request"] = summary.pop("client_cpu_s") / max(1, answered) * 1e3
    rss = [rss_mb, *(sample[1] for sample in watch.samples)]
    summary |= {
        "rss_first_mb": rss[0],
        "rss_last_mb": rss[-1],
        "rss_max_mb": max(rss),
        "queue_max_inputs": max((sample[2] for sample in watch.samples), default=0),
        "over_time": watch.samples[:: len(watch.samples) // _KEPT_SAMPLES + 1],
    }
    return summary | _means(before, server.metrics())


def plan_for(server: ServerProcess, bodies: list[str], seconds: float, path: str = "/predict", **load: Any) -> Plan:
    """A load on one of the server's paths; `load` is what else a Plan has."""
    address = urlsplit(server.url)
    assert address.hostname is not None
    assert address.port is not None
    return Plan(host=address.hostname, port=address.port, path=path, bodies=bodies, seconds=seconds, **load)


def _means(before: dict[tuple[str, str], float], after: dict[tuple[str, str], float]) -> dict[str, float]:
    """Mean time of each stage and mean batch between two looks at /metrics."""

    def mean(name: str, labels: str = "") -> float:
        total, count = (
            after[f"{name}_{part}", labels] - before.get((f"{name}_{part}", labels), 0) for part in ("sum", "count")
        )
        return total / max(1, count)

    if not before or not after:
        return {}
    means = {f"{stage}_ms": 1e3 * mean("stage_duration_seconds", f'stage="{stage}"') for stage in STAGES}
    return means | {"batch_mean_inputs": mean("batch_inputs")}
