"""How many calls an owner may make: a token bucket each, as one number, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

_PRUNED_AT = 1024


class RateCounter(Protocol):
    """Counts calls by owner against limits that the caller gives; called on the event loop."""

    async def take(self, owner: str, *, per_minute: float, burst: float | None = None, cost: float = 1.0) -> float:
        """Admit a call, or say when to come back.

        A refused call costs nothing. Never raises, and never waits longer than the store behind it may take.

        Args:
            owner: Whose calls are counted together; any text.
            per_minute: Calls that are let through on average, more than 0.
            burst: Calls that may come at once after a time of rest; as many as a minute brings by default, and never
                fewer than one.
            cost: Calls that this one counts as; more than `burst` counts as `burst`.

        Returns:
            Seconds after which the call would be admitted; 0 where it is admitted now.
        """
        ...


class MemoryRateCounter:
    """Counts in this process alone.

    A bucket is one number, the time at which it will be full again (the generic cell rate algorithm): a call is
    admitted if that time, moved on by what the call costs, is at most a burst away.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._full_at: dict[str, float] = {}
        self._pruned_at = _PRUNED_AT

    async def take(self, owner: str, *, per_minute: float, burst: float | None = None, cost: float = 1.0) -> float:
        """Admit a call, or say when to come back."""
        now, (cost_s, burst_s) = self._clock(), in_seconds(per_minute, burst, cost)
        known = self._full_at.get(owner, now)
        if known > now + 1.001 * burst_s:  # no bucket is that empty: the clock was set back, and locks nobody out
            known = now
        full_at = max(known, now) + cost_s
        wait_s = full_at - now - burst_s
        # Rounding of the sums must not refuse the last call of a burst.
        if wait_s > 1e-9 * burst_s:
            return wait_s
        self._full_at[owner] = full_at
        if len(self._full_at) >= self._pruned_at:
            self._prune(now)
        return 0.0

    def _prune(self, now: float) -> None:
        """Forget buckets that are full; doubling the mark keeps this at a constant cost a call."""
        self._full_at = {owner: full_at for owner, full_at in self._full_at.items() if full_at > now}
        self._pruned_at = max(_PRUNED_AT, 2 * len(self._full_at))


def in_seconds(per_minute: float, burst: float | None, cost: float) -> tuple[float, float]:
    """Cost and size of a bucket, in seconds of refilling."""
    size = max(1.0, per_minute if burst is None else burst)
    return 60.0 / per_minute * min(cost, size), 60.0 / per_minute * size
