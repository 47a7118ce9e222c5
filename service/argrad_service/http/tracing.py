"""Spans of requests and their stages, for an OpenTelemetry collector; imported only where one is named.

A span begins and ends where its record says that the request did: nothing is traced along the way. What
OpenTelemetry's own variables say (OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS, …) holds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from argrad._version import __version__
from argrad_service.http.record import Record

_CARRIED = (b"traceparent", b"tracestate")
_FLUSH_MS = 5000


class Tracing:
    """Exports a span for each request, with a child for each stage.

    Args:
        exporter: Gets the spans, on a thread of its own.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        own = Resource({SERVICE_NAME: "argrad", SERVICE_VERSION: __version__})
        # The library's own handlers at exit and its global provider are left alone: an application owns neither.
        self._provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("argrad_service", __version__)
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, endpoint: str) -> Tracing:
        """Export to a collector that speaks OTLP over HTTP.

        Args:
            endpoint: Its base URL, such as `http://127.0.0.1:4318`.
        """
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return cls(OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces"))

    def record(self, method: str, route: str, status: int, headers: Mapping[bytes, bytes], record: Record) -> str:
        """Write the spans of a request that is over.

        Args:
            method: Of the request.
            route: Template of its path.
            status: That was answered.
            headers: Of the request; its `traceparent` is the parent.
            record: Knows the stages.

        Returns:
            The trace's id, 32 hexadecimal digits.
        """
        now, elapsed_s = time.time_ns(), time.perf_counter() - record.began
        start = now - _ns(elapsed_s)
        span = self._tracer.start_span(
            f"{method} {route}",
            context=self._parent(headers),
            kind=SpanKind.SERVER,
            start_time=start,
            attributes={
                "http.request.method": method,
                "http.route": route,
                "http.response.status_code": status,
                "argrad.request_id": record.request_id,
                "argrad.problems": sum(record.problems.values()),
                "argrad.body_bytes_in": record.request_bytes,
                "argrad.body_bytes_out": record.reply_bytes,
            },
        )
        if record.problem_type is not None:
            span.set_attribute("error.type", record.problem_type)
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR, record.detail))
        context = set_span_in_context(span)
        for stage, begin_s in record.stage_starts().items():
            begin = start + _ns(begin_s)
            child = self._tracer.start_span(stage, context=context, start_time=begin)
            child.end(begin + _ns(1e-3 * record.stages_ms[stage]))
        span.end(now)
        return format_trace_id(span.get_span_context().trace_id)

    def close(self) -> None:
        """Send what has not been sent, for some seconds at most."""
        self._provider.force_flush(_FLUSH_MS)
        self._provider.shutdown()

    def _parent(self, headers: Mapping[bytes, bytes]) -> Context:
        carrier = {name.decode(): headers[name].decode("latin-1") for name in _CARRIED if name in headers}
        # An empty context, not the current one: the event loop is in many requests at once.
        return self._propagator.extract(carrier, context=Context())


def _ns(seconds: float) -> int:
    return int(1e9 * seconds)
