"""What the service asks of whoever keeps what replicas share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from argrad_service.state.rates import RateCounter

Space = Literal["state", "problem"]
"""What a record is of: a solved problem that a token stands for, or registered parameters."""

MAX_REPLY_BYTES = 256 * 1024
"""Largest reply that is kept for a repeated call."""


class IdempotencyInProgress(Exception):  # noqa: N818 - a verdict, not a defect
    """A call with the same key is being served."""

    retry_after_s = 1

    def __init__(self) -> None:
        super().__init__("a call with this Idempotency-Key is being served: ask again for its reply")


class IdempotencyMismatch(Exception):  # noqa: N818 - a verdict, not a defect
    """The key was used for another request."""

    def __init__(self) -> None:
        super().__init__(
            "this Idempotency-Key was used for another request, of another route, body or format: take a new one"
        )


@dataclass(frozen=True, eq=False)
class Claim:
    """The right to do the work of a key once.

    Args:
        owner: Whose key it is.
        key: The key.
        mark: What stands under the key meanwhile, and nobody else has written.
    """

    owner: str
    key: str
    mark: bytes


@dataclass(frozen=True)
class Replica:
    """One process of the service, as the others see it.

    Args:
        id: Its own, new at each start.
        version: Of argrad.
        address: Where it listens.
        in_flight: Calls in the house at its last heartbeat.
    """

    id: str
    version: str
    address: str
    in_flight: int


@dataclass(frozen=True)
class SharedHealth:
    """How what is shared fares.

    Args:
        store: `memory` or `redis`.
        degraded: What does not work as it should, and why; empty where all is well.
        replicas: Those whose heartbeats are fresh, this one included.
        counters: Monotonic counters by name and label, for metrics.
        gauges: What is so now, by name and label.
    """

    store: str
    degraded: Mapping[str, str]
    replicas: tuple[Replica, ...]
    counters: Mapping[tuple[str, str], float] = field(default_factory=dict)
    gauges: Mapping[tuple[str, str], float] = field(default_factory=dict)


class Shared(RateCounter, Protocol):
    """Keeps what replicas share, on the event loop of one of them.

    Nothing here is needed for a right answer, so no method raises because the store is slow, full or gone, nor waits
    longer than its timeout: what is not found is sent again by the caller.
    """

    @property
    def is_shared(self) -> bool:
        """Whether anybody else could find a record that is put here."""
        ...

    async def start(self) -> None:
        """Begin to send heartbeats."""
        ...

    async def stop(self) -> None:
        """Write what is waiting, as far as that goes in a second, and say that this replica is gone."""
        ...

    async def get(self, space: Space, owner: str, name: str) -> bytes | None:
        """A record, exactly as it was put; None where there is none, or nobody to ask."""
        ...

    async def put(self, space: Space, owner: str, name: str, record: bytes) -> bool:
        """Keep a record, and return once it is kept; False where it is not."""
        ...

    def put_later(
        self, space: Space, owner: str, name: str, record: Callable[[], bytes], nbytes: int, *, is_cheap: bool = False
    ) -> None:
        """Keep a record some time soon, or not at all.

        Args:
            space: What it is of.
            owner: Whose it is.
            name: Under which it is found.
            record: Makes it.
            nbytes: About how long it will be.
            is_cheap: Whether the event loop may make it; by default another thread does.
        """
        ...

    async def delete(self, space: Space, owner: str, name: str) -> bool:
        """Forget a record; False where there was none, or nobody to ask."""
        ...

    def delete_later(self, space: Space, owner: str, name: str) -> None:
        """Forget a record some time soon, whether or not it is there."""
        ...

    async def claim(self, owner: str, key: str, fingerprint: bytes) -> Claim | bytes:
        """Ask to do the work of a key.

        Args:
            owner: Whose key it is: another's is another key.
            key: Any text.
            fingerprint: Of the request, 32 bytes.

        Returns:
            The right to do it, or the reply of who did.

        Raises:
            IdempotencyInProgress: somebody is at it.
            IdempotencyMismatch: the key stands for another request.
        """
        ...

    async def finish(self, claim: Claim, reply: bytes) -> None:
        """Keep the reply for whoever asks again, and return once it is kept."""
        ...

    def abandon(self, claim: Claim) -> None:
        """Give the claim up: the next who asks does the work."""
        ...

    def sweep(self) -> None:
        """Drop what has expired in this process."""
        ...

    def health(self) -> SharedHealth:
        """How it fares."""
        ...


def mark_of(fingerprint: bytes, nonce: bytes) -> bytes:
    """What stands under a key while its work is done."""
    return b"?" + fingerprint + nonce


def read_mark(found: bytes, fingerprint: bytes) -> bytes:
    """The reply that stands under a key.

    Raises:
        IdempotencyInProgress: there is none yet.
        IdempotencyMismatch: it is the answer to another request.
    """
    if found[1:33] != fingerprint:
        raise IdempotencyMismatch
    if found[:1] == b"?":
        raise IdempotencyInProgress
    return found[33:]


def answered(claim: Claim, reply: bytes) -> bytes:
    """What stands under a key once its work is done."""
    return b"=" + claim.mark[1:33] + reply
