"""How many calls, and how many bytes of their bodies, are in the house at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PendingLimits:
    """Most calls and most body bytes."""

    calls: int
    nbytes: int


@dataclass
class Pending:
    """Counts calls from their first byte to their last; on the event loop only, so there is no lock.

    Args:
        limits: What may be here at once.
    """

    limits: PendingLimits
    calls: int = 0
    nbytes: int = 0

    def enter(self) -> bool:
        """Count one more call; False if there are too many."""
        if self.calls >= self.limits.calls:
            return False
        self.calls += 1
        return True

    def grow(self, nbytes: int) -> bool:
        """Count bytes of a call that has entered; False if there are too many, except for a call that is alone."""
        if self.calls > 1 and self.nbytes + nbytes > self.limits.nbytes:
            return False
        self.nbytes += nbytes
        return True

    def leave(self, nbytes: int) -> None:
        """Forget a call and the bytes that it was counted for."""
        self.calls -= 1
        self.nbytes -= nbytes
