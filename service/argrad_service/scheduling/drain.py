"""How fast the queue empties, as measured, and when whoever is turned away will find a place in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

_SMOOTHING = 0.2
_MAX_WAIT_S = 60


@dataclass
class Drain:
    """Measures the time of a job, and hands out the places that will be free; whoever uses it holds a lock.

    Args:
        threads: Batches that run at the same time.
        clock: Monotonic seconds.
    """

    threads: int
    clock: Callable[[], float]
    _mean_s: float = 0.0
    _next_place_at: float = 0.0
    _running: dict[int, tuple[float, int]] = field(default_factory=dict)

    def begin(self, batch: int, jobs: int) -> None:
        """A batch of so many jobs begins.

        Args:
            batch: Anything that tells it from others that run.
            jobs: Its number of jobs.
        """
        self._running[batch] = self.clock(), jobs

    def end(self, batch: int) -> None:
        """A batch has ended."""
        began, jobs = self._running.pop(batch)
        took_s = (self.clock() - began) / jobs
        self._mean_s += (took_s - self._mean_s) * (_SMOOTHING if self._mean_s else 1.0)

    def next_place_s(self) -> int:
        """Whole seconds until the next place that nobody has been sent away with is free; from 1 to 60.

        Each caller gets a place of its own, so that those who are turned away together do not come back together.
        A batch that runs longer than the mean counts with the time that it has run.
        """
        now = self.clock()
        job_s = max([self._mean_s, *((now - began) / jobs for began, jobs in self._running.values())])
        self._next_place_at = max(self._next_place_at, now) + job_s / self.threads
        # A place that is further away than anybody is told to wait is nobody's.
        self._next_place_at = min(self._next_place_at, now + _MAX_WAIT_S)
        return min(_MAX_WAIT_S, max(1, math.ceil(self._next_place_at - now)))  # a sum may round to more than its parts
