"""A circuit breaker: what fails is left alone until a probe gets through."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class BreakerCounts:
    """What a breaker has seen.

    Args:
        is_open: Whether what it guards is left alone now.
        reason: Words of the last failure while it is open.
        opened: Times it opened.
        open_s: Seconds it was open, in all.
    """

    is_open: bool
    reason: str | None
    opened: int
    open_s: float


class Breaker:
    """Opens after failures in a row, and closes at the next success; who uses it probes. For one thread.

    Args:
        threshold: Failures in a row at which it opens.
        clock: Monotonic seconds.
    """

    def __init__(self, *, threshold: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._threshold, self._clock = threshold, clock
        self._failures = self._opened = 0
        self._open_s = 0.0
        self._opened_at: float | None = None
        self._reason = ""

    @property
    def is_open(self) -> bool:
        """Whether what it guards is to be left alone."""
        return self._opened_at is not None

    @property
    def is_in_doubt(self) -> bool:
        """Whether the last attempt failed."""
        return self._failures > 0

    def succeed(self) -> None:
        """Note a success."""
        self._failures = 0
        if self._opened_at is not None:
            self._open_s += self._clock() - self._opened_at
            self._opened_at = None

    def fail(self, reason: str) -> None:
        """Note a failure."""
        self._failures, self._reason = self._failures + 1, reason
        if self._opened_at is None and self._failures >= self._threshold:
            self._opened_at = self._clock()
            self._opened += 1

    def counts(self) -> BreakerCounts:
        """What it has seen so far."""
        now_open_s = 0.0 if self._opened_at is None else self._clock() - self._opened_at
        return BreakerCounts(
            is_open=self.is_open,
            reason=self._reason if self.is_open else None,
            opened=self._opened,
            open_s=self._open_s + now_open_s,
        )
