"""What replicas would share, where there is one: idempotency and rates in this process."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable

from argrad_service.state.budget import BudgetedStore
from argrad_service.state.rates import MemoryRateCounter
from argrad_service.state.shared import Claim, Replica, SharedHealth, Space, answered, mark_of, read_mark


class MemoryShared:
    """Keeps everything in memory, on the event loop of one process.

    Args:
        idempotency_ttl_s: Seconds for which replies are kept for repeated calls, after their last use.
        idempotency_budget_bytes: Replies that are kept at most; the least recently used goes first.
        record_budget_bytes: Records that are kept; 0 where nobody but this process could ask for them, which holds
            what they are of anyway.
        replica: This process.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        *,
        idempotency_ttl_s: float,
        idempotency_budget_bytes: int,
        record_budget_bytes: int = 0,
        replica: Callable[[], Replica] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._replies = BudgetedStore(budget_bytes=idempotency_budget_bytes, ttl_s=idempotency_ttl_s, clock=clock)
        self._records = BudgetedStore(budget_bytes=record_budget_bytes, ttl_s=idempotency_ttl_s, clock=clock)
        self._rates = MemoryRateCounter(clock=clock)
        self._replica = replica
        self._counters: Counter[tuple[str, str]] = Counter()

    @property
    def is_shared(self) -> bool:
        """See `Shared`."""
        return self._records.budget_bytes > 0

    async def start(self) -> None:
        """See `Shared`."""

    async def stop(self) -> None:
        """See `Shared`."""

    async def take(self, owner: str, *, per_minute: float, burst: float | None = None, cost: float = 1.0) -> float:
        """See `RateCounter`."""
        return await self._rates.take(owner, per_minute=per_minute, burst=burst, cost=cost)

    async def get(self, space: Space, owner: str, name: str) -> bytes | None:
        """See `Shared`."""
        found: bytes | None = self._records.get((owner, f"{space}:{name}"))
        self._counters[f"{space}_records", "miss" if found is None else "hit"] += 1
        return found

    async def put(self, space: Space, owner: str, name: str, record: bytes) -> bool:
        """See `Shared`."""
        return self._records.put((owner, f"{space}:{name}"), record, len(record))

    def put_later(
        self,
        space: Space,
        owner: str,
        name: str,
        record: Callable[[], bytes],
        nbytes: int,  # noqa: ARG002 - as `Shared` has it, as is the next
        *,
        is_cheap: bool = False,  # noqa: ARG002
    ) -> None:
        """See `Shared`; it is made at once."""
        if self.is_shared:
            made = record()
            self._records.put((owner, f"{space}:{name}"), made, len(made))

    async def delete(self, space: Space, owner: str, name: str) -> bool:
        """See `Shared`."""
        return self._records.delete((owner, f"{space}:{name}"))

    def delete_later(self, space: Space, owner: str, name: str) -> None:
        """See `Shared`."""
        self._records.delete((owner, f"{space}:{name}"))

    async def claim(self, owner: str, key: str, fingerprint: bytes) -> Claim | bytes:
        """See `Shared`."""
        found: bytes | None = self._replies.get((owner, key))
        if found is not None:
            return read_mark(found, fingerprint)
        claim = Claim(owner, key, mark_of(fingerprint, secrets.token_bytes(16)))
        self._replies.put((owner, key), claim.mark, len(claim.mark))
        return claim

    async def finish(self, claim: Claim, reply: bytes) -> None:
        """See `Shared`."""
        self.finish_now(claim, reply)

    def finish_now(self, claim: Claim, reply: bytes) -> None:
        """`finish`, for whoever cannot wait."""
        if self._replies.peek((claim.owner, claim.key)) in (None, claim.mark):
            text = answered(claim, reply)
            self._replies.put((claim.owner, claim.key), text, len(text))

    def abandon(self, claim: Claim) -> None:
        """See `Shared`."""
        if self._replies.peek((claim.owner, claim.key)) == claim.mark:
            self._replies.delete((claim.owner, claim.key))

    def sweep(self) -> None:
        """Drop what has expired."""
        self._replies.sweep()
        self._records.sweep()

    def health(self) -> SharedHealth:
        """See `Shared`."""
        counts = self._replies.counts()
        return SharedHealth(
            store="memory",
            degraded={},
            replicas=() if self._replica is None else (self._replica(),),
            counters=dict(self._counters),
            gauges={("idempotency_entries", ""): counts.entries, ("idempotency_bytes", ""): counts.held_bytes},
        )
