"""Metrics of several worker processes as those of one service: sums that never fall because a worker was replaced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

_GAUGE = "gauge"
_CREATED = "_created"  # when a process began to count, which has no sum

Labels = tuple[tuple[str, str], ...]


@dataclass
class _Family:
    kind: str
    documentation: str
    values: dict[tuple[str, Labels], float] = field(default_factory=dict)


class Totals:
    """Sums of what workers say of themselves, those that are gone included."""

    def __init__(self) -> None:
        self._last: dict[int, str] = {}
        self._retired: dict[str, _Family] = {}

    def note(self, worker: int, text: str) -> None:
        """What a worker has counted by now, in Prometheus' text format."""
        self._last[worker] = text

    def retire(self, worker: int) -> None:
        """Keep what a worker that has ended counted, as far as it was noted, but not what it held."""
        _add(self._retired, self._last.pop(worker, ""), with_gauges=False)

    def render(self, own: Iterable[Metric] = ()) -> bytes:
        """The sums in the same format.

        Args:
            own: Metrics of the caller, which are not summed.
        """
        families = {
            name: _Family(family.kind, family.documentation, dict(family.values))
            for name, family in self._retired.items()
        }
        for text in self._last.values():
            _add(families, text, with_gauges=True)
        return generate_latest(_Collected([*_metrics(families), *own]))


@dataclass
class _Collected(Collector):
    metrics: list[Metric]

    def collect(self) -> Iterator[Metric]:
        """What there is."""
        yield from self.metrics


def _add(families: dict[str, _Family], text: str, *, with_gauges: bool) -> None:
    for metric in text_string_to_metric_families(text):
        if metric.name.endswith(_CREATED) or (metric.type == _GAUGE and not with_gauges):
            continue
        family = families.setdefault(metric.name, _Family(metric.type, metric.documentation))
        for sample in metric.samples:
            key = (sample.name, tuple(sample.labels.items()))
            family.values[key] = family.values.get(key, 0.0) + sample.value


def _metrics(families: dict[str, _Family]) -> Iterator[Metric]:
    for name, family in families.items():
        metric = Metric(name, family.documentation, family.kind)
        for (sample, labels), value in family.values.items():
            metric.add_sample(sample, dict(labels), value)
        yield metric
