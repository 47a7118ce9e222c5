"""When a call is tried again, and how often all calls of a client together are."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """When to try again, and how long to wait before.

    Args:
        retries: Further attempts, at every address, after the first; None for as many as the deadline allows.
        first_delay_s: Bound on the wait before the first retry; doubles with each. What is waited is drawn from nothing
            to the bound, so that calls that failed together do not come back together.
        max_delay_s: Bound on that bound: a service that is back is found by then. A longer Retry-After is honoured.
        first_contact_s: For how long connections may fail where no service ever answered: the address may be wrong.
            Where TLS says that it is, there is no wait.
    """

    retries: int | None = None
    first_delay_s: float = 0.05
    max_delay_s: float = 0.8
    first_contact_s: float = 20.0

    def delay(self, attempt: int, retry_after_s: float | None) -> float:
        """Seconds to wait after attempt number `attempt`, counted from zero."""
        longest = min(self.max_delay_s, self.first_delay_s * 2.0 ** min(attempt, 30))
        if retry_after_s:  # who names the moment wants callers apart, and not late
            longest = min(longest, 0.5 * retry_after_s)
        return (retry_after_s or 0.0) + random.uniform(0.0, longest)  # noqa: S311 - jitter, not a secret


class RetryBudget:
    """Bounds the retries of all calls of a client together, so that trouble is not answered by a storm.

    A retry costs one. A call that is answered earns a tenth, up to a small reserve, and each second earns a few, so
    that a lone caller can wait for a service that is away. A retry that is answered gets its cost back, and one more:
    where many wait, one finds that the service is back, then two go, then four. Who finds the budget empty waits.

    Args:
        clock: Monotonic seconds.
        reserve: Retries that may follow each other at once while nothing is answered.
        per_s: Retries that each second allows.
    """

    _EARNED, _MOST = 0.1, 128.0
    _SAID_EVERY_S = 30.0

    def __init__(self, clock: Clock = time.monotonic, *, reserve: float = 10.0, per_s: float = 2.5) -> None:
        self._clock, self._reserve, self._per_s = clock, reserve, per_s
        self._left, self._at = reserve, clock()
        self._said_at: float | None = None
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Pay for one retry; False if the budget is spent."""
        with self._lock:
            now = self._clock()
            if self._left < self._reserve:
                self._left = min(self._reserve, self._left + self._per_s * (now - self._at))
            self._at = now
            if self._left < 1.0:
                return False
            self._left -= 1.0
            return True

    def answered(self, *, is_paid: bool) -> None:
        """Note that a call got its result, by an attempt that cost nothing or one that it paid for."""
        if is_paid:
            with self._lock:
                self._left = min(self._MOST, self._left + 2.0)
        elif self._left < self._reserve:
            with self._lock:
                self._left = min(self._reserve, self._left + self._EARNED)

    def may_say(self) -> bool:
        """Whether it is time to tell the log that calls are waiting; every half minute."""
        with self._lock:
            now = self._clock()
            if self._said_at is not None and now - self._said_at < self._SAID_EVERY_S:
                return False
            self._said_at = now
            return True
