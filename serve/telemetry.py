"""Traces for OpenTelemetry, if an exporter is configured: a span per request, with one for each stage of a prediction.

The environment variables are OpenTelemetry's own (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, …). The
packages come with the extra `otel` and are imported only here, only then.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import Scope

from models.extras import missing
from serve.backend import Answer

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_UNTRACED = {"/health", "/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"}  # probes would be most of it


def tracing() -> Tracing | None:
    """As the environment says; None when it says nothing. ImportError without the extra `otel`."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or not any(map(os.environ.get, _ENDPOINTS)):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return Tracing(OTLPSpanExporter())
    except ModuleNotFoundError as error:
        raise ImportError(f"OpenTelemetry: {missing(error, 'otel')}") from error


class Tracing:
    """Makes spans of requests that are over, and exports them in a thread of its own.

    A request with a `traceparent` continues that trace, sampled or not as it says.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry import propagate, trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._trace, self._extract = trace, propagate.extract
        name = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "fanin"}
        self._provider = TracerProvider(resource=Resource.create(name), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("fanin.serve")

    def record(
        self, scope: Scope, method: str, route: str, code: int, began: float, ended: float, answer: Answer | None
    ) -> None:
        """Books a request that lasted from `began` to `ended` (time.perf_counter). Its stages are laid end to end."""
        if route in _UNTRACED:
            return
        base_ns = time.time_ns() - int(time.perf_counter() * 1e9)

        def at(moment: float) -> int:
            return base_ns + int(moment * 1e9)

        attributes: dict[str, str | int] = {
            "http.request.method": method,
            "http.route": route,
            "http.response.status_code": code,
            "fanin.request_id": scope["state"]["id"],
        }
        if answer:
            attributes["fanin.inputs"] = len(answer.tokens)
            attributes["fanin.tokens"] = sum(len(text.ids) for text in answer.tokens)
        span = self._tracer.start_span(
            f"{method} {route}",
            context=self._extract(Headers(scope=scope)),
            kind=self._trace.SpanKind.SERVER,
            start_time=at(began),
            attributes=attributes,
        )
        if answer and span.is_recording():
            inside = self._trace.set_span_in_context(span)
            stages = {
                "tokenize": answer.tokenize_s,
                "queue": answer.queue_s,
                "encode": answer.encode_s,
                "head": answer.head_s,
            }
            start = began
            for name, seconds in stages.items():
                self._tracer.start_span(name, context=inside, start_time=at(start)).end(at(start + seconds))
                start += seconds
        if code >= 500:
            span.set_status(self._trace.StatusCode.ERROR)
        span.end(at(ended))

    def close(self) -> None:
        """Exports what is left."""
        self._provider.shutdown()
