"""Prometheus metrics of a server. No label value comes from a client."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from serve.host import heap_bytes, memory_bytes

disable_created_metrics()  # they double the series and nobody reads them
_REQUEST_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_STAGE_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_SIZES = tuple(2**i for i in range(15))
_RATIOS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)


class Metrics:
    """Every metric of one server, in a registry of its own. The attributes' names are the metrics' without prefix and unit."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"fanin_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
            return Gauge(f"fanin_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
            return Histogram(f"fanin_{name}", text, labels, registry=self.registry, buckets=buckets)

        self.requests = counter("requests_total", "Requests answered; code 499 when the client left first.", ["route", "code"])
        self.request_duration = histogram("request_duration_seconds", "Time to answer a request.", _REQUEST_S, ["route"])
        self.requests_in_progress = gauge("requests_in_progress", "Requests being answered.")
        self.inputs = counter("inputs_total", "Texts predicted.")
        self.input_tokens = histogram("input_tokens", "Tokens per text, after truncation.", _SIZES)
        self.truncated_inputs = counter("truncated_inputs_total", "Texts cut to the model's length.")
        self.rejected = counter("rejected_total", "Predictions refused before they were queued.", ["reason"])
        self.cancelled = counter(
            "cancelled_total",
            "Predictions given up by the stage they were in: the client left, the deadline passed.",
            ["stage"],
        )
        stage_duration = histogram("stage_duration_seconds", "Time in a stage, per request or per batch.", _STAGE_S, ["stage"])
        self.queue_inputs = gauge("queue_inputs", "Texts waiting for a batch.")
        self.queue_tokens = gauge("queue_tokens", "Tokens waiting for a batch.")
        self.queue_oldest_age = gauge("queue_oldest_age_seconds", "How long the oldest waiting text has waited.")
        self.batch_inputs = histogram("batch_inputs", "Texts per batch.", _SIZES[:11])
        self.batch_tokens = histogram("batch_tokens", "Tokens per batch, padding included.", _SIZES)
        self.batch_padding_ratio = histogram("batch_padding_ratio", "Share of padding among a batch's tokens.", _RATIOS)
        self.batch_splits = counter("batch_splits_total", "Batches halved because they failed.", ["reason"])
        self.model_bytes = gauge("model_bytes", "Bytes of the model's parts.", ["component", "device"])
        self.ready = gauge("ready", "1 when predictions are answered.")
        self.draining = gauge("draining", "1 when the server is about to end.")
        self.model_load_duration = gauge("model_load_duration_seconds", "Time to open, verify and load the bundle.")
        self.warmup_duration = gauge("warmup_duration_seconds", "Time of the warm-up runs.")
        self.worker_heartbeat_age = gauge(
            "worker_heartbeat_age_seconds", "How long an engine has been at a stage of its batch.", ["worker"]
        )
        self.worker_restarts = counter("worker_restarts_total", "Processes of engines that were lost and replaced.", ["worker"])
        self.batch_token_budget = gauge(
            "batch_token_budget", "Tokens in one batch, at most; less than set after memory did not suffice.", ["worker"]
        )
        self.reloads = counter("reloads_total", "Attempts to replace the model by another bundle.", ["result"])
        self.model = Info("fanin_model", "The model that is served.", registry=self.registry)
        Info("fanin_build", "The program that serves.", registry=self.registry).info(versions())
        self.device_memory: Callable[[], dict[str, dict[str, int]]] = dict  # by device, as Engine.device_memory has it
        self.engine_pids: Callable[[], set[int]] = set
        self.registry.register(_Memory(self))
        stages = ("tokenize", "queue", "encoder", "head", "serialize")
        self.stage = {name: stage_duration.labels(name) for name in stages}
        for reason in ("queue-full", "loading", "draining", "engine-stopped"):
            self.rejected.labels(reason)
        for reason in ("error", "memory"):
            self.batch_splits.labels(reason)
        for result in ("ok", "failed"):
            self.reloads.labels(result)
        for stage in ("tokenize", "queue", "encoder", "head"):
            self.cancelled.labels(stage)

    def observe_batch(self, lengths: Sequence[int], padded: int) -> None:
        """Books a batch of texts of `lengths` tokens, each padded to `padded`."""
        total = padded * len(lengths)
        self.batch_inputs.observe(len(lengths))
        self.batch_tokens.observe(total)
        self.batch_padding_ratio.observe(1 - sum(lengths) / total)


class _Memory(Collector):
    """What is asked of the system at each scrape. It takes some milliseconds for a large process."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[GaugeMetricFamily]:
        host = GaugeMetricFamily(
            "fanin_host_memory_bytes", "Memory of the server's processes, and of its cgroup.", labels=["kind"]
        )
        for kind, size in memory_bytes({os.getpid()} | self._metrics.engine_pids()).items():
            host.add_metric([kind], size)
        labels = ["device", "kind"]
        device = GaugeMetricFamily("fanin_device_memory_bytes", "Memory of a device, whoever uses it.", labels=labels)
        allocator = GaugeMetricFamily("fanin_allocator_bytes", "Memory that allocators hold and hand out.", labels=labels)
        for name, sizes in ({"cpu": heap_bytes()} | self._metrics.device_memory()).items():
            for kind, size in sizes.items():
                (device if kind in ("used", "total") else allocator).add_metric([name, kind], size)
        yield from (host, device, allocator)


def versions() -> dict[str, str]:
    """Versions of this program and of what it predicts with."""
    found = {"python": platform.python_version()}
    for package in ("fanin", "onnxruntime", "tokenizers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"  # run from its sources
    return found
