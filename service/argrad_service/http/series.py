"""Counters and histograms of the event loop: what prometheus_client's do, in a fraction of their time.

Its metrics lock, and look for the class of a value one bound after the other. A call counts a dozen values, on the
event loop alone, which takes a third of what its solve takes. Here a count is one look into a dictionary; the library
writes the text.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

Labels = tuple[str, ...]


class Counts(Collector):
    """A counter; on the event loop only, so there is no lock.

    Args:
        name: Of the metric, without `_total`.
        text: What it says.
        labels: Names of its labels.
    """

    def __init__(self, name: str, text: str, labels: Sequence[str]) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._found: defaultdict[Labels, float] = defaultdict(float)

    def add(self, labels: Labels, number: float = 1.0) -> None:
        """Count."""
        self._found[labels] += number

    def collect(self) -> Iterator[Metric]:
        """The metric of this moment."""
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for labels, number in self._found.items():
            family.add_metric(labels, number)
        yield family


class Histogram(Collector):
    """A histogram; on the event loop only, so there is no lock.

    Args:
        name: Of the metric.
        text: What it says.
        labels: Names of its labels.
        bounds: Upper bounds of its classes, rising; one more class has what is above.
    """

    def __init__(self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float]) -> None:
        self._name, self._text, self._labels, self._bounds = name, text, labels, bounds
        self._found: dict[Labels, list[int]] = {}
        self._sums: defaultdict[Labels, float] = defaultdict(float)

    def observe(self, labels: Labels, value: float) -> None:
        """Count a value in its class."""
        counts = self._found.get(labels)
        if counts is None:
            counts = self._found[labels] = [0] * (len(self._bounds) + 1)
        counts[bisect_left(self._bounds, value)] += 1
        self._sums[labels] += value

    def collect(self) -> Iterator[Metric]:
        """The metric of this moment."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        for labels, counts in self._found.items():
            buckets = list(zip(bounds, itertools.accumulate(counts), strict=True))
            family.add_metric(labels, buckets=buckets, sum_value=self._sums[labels])
        yield family
