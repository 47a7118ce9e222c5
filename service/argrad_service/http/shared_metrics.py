"""Metrics of what replicas share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from argrad_service.state import Shared

_COUNTERS = {
    "state_records": ("argrad_shared_states", "Tokens that named nothing here, by what the store had.", "result"),
    "problem_records": ("argrad_shared_problems", "Digests under which nothing was here, likewise.", "result"),
    "written": ("argrad_shared_writes", "Records written or forgotten behind the callers' back.", ""),
    "dropped": ("argrad_shared_writes_dropped", "Records that nobody could take.", ""),
    "fallbacks": ("argrad_shared_fallbacks", "Rates and idempotency keys that this replica kept for itself.", "what"),
    "errors": ("argrad_redis_errors", "Commands that Redis did not answer in time or refused, by kind.", "kind"),
    "commands": ("argrad_redis_commands", "Commands, by what they were for.", "what"),
    "command_seconds": ("argrad_redis_command_seconds", "Seconds that commands took, likewise.", "what"),
    "breaker_opened": ("argrad_redis_breaker_opened", "Times that Redis was given up for the time being.", "breaker"),
    "breaker_open_seconds": ("argrad_redis_breaker_open_seconds", "Seconds without Redis.", "breaker"),
}
_GAUGES = {
    "breaker_open": (
        "argrad_redis_breaker_open",
        "1 while Redis is left alone (line) or not written to (room).",
        "breaker",
    ),
    "waiting_writes": ("argrad_shared_waiting_writes", "Records that wait to be written.", ""),
    "idempotency_entries": ("argrad_idempotency_entries", "Replies kept in memory for repeated calls.", ""),
    "idempotency_bytes": ("argrad_idempotency_bytes", "Their bytes.", ""),
}


class SharedMetrics(Collector):
    """Reads the store's health at each scrape.

    Args:
        shared: The store.
        idempotent: Calls with an Idempotency-Key so far, by what it named.
    """

    def __init__(self, shared: Shared, idempotent: Mapping[str, int]) -> None:
        self._shared, self._idempotent = shared, idempotent

    def collect(self) -> Iterator[Metric]:
        """The metrics of this moment."""
        health = self._shared.health()
        yield GaugeMetricFamily("argrad_replicas", "Replicas whose heartbeats are fresh.", len(health.replicas))
        yield GaugeMetricFamily(
            "argrad_degraded", "1 while something does not work as it should.", bool(health.degraded)
        )
        idempotent = CounterMetricFamily(
            "argrad_idempotent_requests", "Calls with an Idempotency-Key, by what it named.", labels=["result"]
        )
        for result, count in self._idempotent.items():
            idempotent.add_metric([result], count)
        yield idempotent
        for name, (full, text, label) in _COUNTERS.items():
            counter = CounterMetricFamily(full, text, labels=[label] if label else [])
            for (found, value), number in health.counters.items():
                if found == name:
                    counter.add_metric([value] if label else [], number)
            yield counter
        for name, (full, text, label) in _GAUGES.items():
            gauge = GaugeMetricFamily(full, text, labels=[label] if label else [])
            for (found, value), number in health.gauges.items():
                if found == name:
                    gauge.add_metric([value] if label else [], number)
            yield gauge
