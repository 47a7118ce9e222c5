"""The trace that the caller is in, for those who use OpenTelemetry; who does not pays one look into a dictionary."""

from __future__ import annotations

import sys


def traceparent() -> bytes | None:
    """W3C `traceparent` of the active span; None without one, or where OpenTelemetry has not been imported."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return None
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}".encode("ascii")
