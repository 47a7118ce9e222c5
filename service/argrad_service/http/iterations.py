"""A histogram of the solvers' iterations, by problem: a batch is counted at once."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

import torch
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from torch import Tensor

BOUNDS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 10_000)
"""Upper bounds of the classes; one more class has what is above."""

_BOUNDS = torch.tensor(BOUNDS)

_FEW = 512
"""Problems up to which Python counts them faster than torch."""


class Iterations(Collector):
    """Counts problems by solver and class of iterations; on the event loop only, so there is no lock."""

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, int] = {}

    def count(self, solver: str, iterations: Tensor) -> None:
        """Count the problems of one call.

        Args:
            solver: Who solved them.
            iterations: Of each, int64, of any shape, on the CPU.
        """
        counts = self._counts.setdefault(solver, [0] * (len(BOUNDS) + 1))
        if iterations.numel() <= _FEW:
            each = iterations.reshape(-1).tolist()
            number = sum(each)
            for value, found in Counter(each).items():
                counts[bisect_left(BOUNDS, value)] += found
        else:
            number = int(iterations.sum())
            classes = torch.bucketize(iterations.reshape(-1), _BOUNDS)
            for i, found in enumerate(torch.bincount(classes, minlength=len(counts)).tolist()):
                counts[i] += found
        self._sums[solver] = self._sums.get(solver, 0) + number

    def collect(self) -> Iterator[Metric]:
        """The metric of this moment."""
        family = HistogramMetricFamily(
            "argrad_solver_iterations", "Iterations of the solver, by problem.", labels=["solver"]
        )
        bounds = [*(str(float(bound)) for bound in BOUNDS), "+Inf"]
        for solver, counts in self._counts.items():
            buckets = list(zip(bounds, itertools.accumulate(counts), strict=True))
            family.add_metric([solver], buckets=buckets, sum_value=self._sums[solver])
        yield family
