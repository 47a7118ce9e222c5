"""Latencies in buckets whose width grows with the value: any number of them in a few kilobytes, percentiles to 1 %."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator

_PARTS = 128
"""Buckets of an octave: a bucket is at most 1/128 of its values wide."""

_LEAST_S = 1e-6
_ROUNDING = 1e-6  # 99.9 % of 5000 is 4995, and a little more in floating point


class Histogram:
    """Counts of durations, in seconds; those below a microsecond count as one."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self.count = 0
        self.total_s = self.longest_s = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self._counts[_bucket(seconds)] += 1
        self.count += 1
        self.total_s += seconds
        self.longest_s = max(self.longest_s, seconds)

    @property
    def mean_s(self) -> float:
        """Exact mean.

        Raises:
            ZeroDivisionError: nothing was counted.
        """
        return self.total_s / self.count

    def percentile(self, per_cent: float) -> float:
        """Seconds that this share of the durations do not exceed, within 1 %; 100 is the longest, exactly.

        Raises:
            ValueError: nothing was counted.
        """
        if not self.count:
            raise ValueError("an empty histogram has no percentiles")
        wanted = max(1, math.ceil(self.count * per_cent / 100.0 - _ROUNDING))
        if wanted == self.count:
            return self.longest_s
        buckets = sorted(self._counts)
        reached = itertools.accumulate(self._counts[bucket] for bucket in buckets)
        bucket = next(bucket for bucket, total in zip(buckets, reached, strict=True) if total >= wanted)
        return min(0.5 * (_edge(bucket) + _edge(bucket + 1)), self.longest_s)

    def coarse(self, per_octave: int) -> Iterator[tuple[float, float, int]]:
        """Fewer, wider buckets without gaps, from the shortest duration to the longest.

        Args:
            per_octave: How many; a divisor of 128.

        Yields:
            Least and most seconds, and the count.
        """
        width = _PARTS // per_octave
        merged: Counter[int] = Counter()
        for bucket, count in self._counts.items():
            merged[bucket // width] += count
        for wide in range(min(merged), max(merged) + 1) if merged else ():
            yield _edge(wide * width), _edge((wide + 1) * width), merged[wide]


def _bucket(seconds: float) -> int:
    """Octaves above a microsecond times `_PARTS`, and the place within the octave, which is divided evenly."""
    mantissa, exponent = math.frexp(max(seconds, _LEAST_S) / _LEAST_S)
    return (exponent - 1) * _PARTS + int((2.0 * mantissa - 1.0) * _PARTS)


def _edge(bucket: int) -> float:
    octave, place = divmod(bucket, _PARTS)
    return _LEAST_S * math.ldexp(1.0 + place / _PARTS, octave)
