"""Traces: what is in a request's spans, and that a real server sends them to a collector."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.serve.harness import ROOT, TEXTS, Process

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@contextmanager
def collector() -> Iterator[tuple[str, list[Any]]]:
    """Its address, and the spans that came."""
    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
            for resource in request.resource_spans:
                facts = {each.key: each.value.string_value for each in resource.resource.attributes}
                for scope in resource.scope_spans:
                    spans.extend((facts["service.name"], span) for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield "http://{}:{}".format(*server.server_address), spans
        server.shutdown()
        thread.join()


def test_each_request_is_a_span_with_its_stages_inside(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with collector() as (address, spans):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        process = Process(bundle_path)
        with httpx.Client(base_url=process.url, timeout=30) as client:
            client.post("/predict", json={"inputs": TEXTS[:2]}, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
            client.post("/predict", json={"inputs": TEXTS[:2]}, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
            client.post("/predict", json={"inputs": ""}, headers={"X-Request-Id": "bad"})
            client.get("/livez")
        assert process.end() == (0, "")  # and what was left is exported
    assert {service for service, _ in spans} == {"fanin"}
    by_name: dict[str, list[Any]] = {}
    for _, span in spans:
        by_name.setdefault(span.name, []).append(span)
    assert {name: len(found) for name, found in by_name.items()} == {
        "POST /predict": 2, "tokenize": 1, "queue": 1, "encode": 1, "head": 1
    }  # fmt: skip
    (whole,) = (span for span in by_name["POST /predict"] if span.trace_id.hex() == TRACE)
    (bad,) = (span for span in by_name["POST /predict"] if span.trace_id.hex() != TRACE)
    assert whole.parent_span_id.hex() == PARENT
    stages = [by_name[name][0] for name in ("tokenize", "queue", "encode", "head")]
    assert {stage.parent_span_id for stage in stages} == {whole.span_id}
    moments = [whole.start_time_unix_nano, *(moment for stage in stages for moment in _times(stage)), whole.end_time_unix_nano]
    assert moments == sorted(moments)
    facts = {each.key: each.value for each in whole.attributes}
    assert facts["http.route"].string_value == "/predict"
    assert facts["http.response.status_code"].int_value == 200
    assert facts["fanin.inputs"].int_value == 2
    assert {each.key: each.value for each in bad.attributes}["fanin.request_id"].string_value == "bad"


def _times(span: Any) -> tuple[int, int]:
    return span.start_time_unix_nano, span.end_time_unix_nano


def test_nothing_of_it_is_imported_unless_it_is_switched_on(bundle_path: Path) -> None:
    code = """
import sys
from serve import telemetry
import serve.server
assert telemetry.tracing() is None
print([name for name in sys.modules if name.startswith("opentelemetry.") and name.split(".")[1] in ("sdk", "exporter")])
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    for more in ({}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:1", "OTEL_SDK_DISABLED": "true"}):
        command = [sys.executable, "-c", code]
        result = subprocess.run(
            command, cwd=ROOT, env=environment | more, capture_output=True, text=True, timeout=60, check=True
        )
        assert result.stdout == "[]\n"


def test_without_its_packages_it_says_how_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from serve import telemetry

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ImportError, match=r"pip install 'fanin\[otel\]'"):
        telemetry.tracing()
