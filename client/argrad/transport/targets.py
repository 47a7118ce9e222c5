"""Several addresses of one service: which replica a call goes to, and which are passed over for a while."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from argrad.transport.address import Address
from argrad.transport.retries import Clock

_FIRST_REST_S = 0.1
_LONGEST_REST_S = 1.0
_SILENT_REST_S = 15.0
"""After a connection that was not even refused: each look at such an address costs its caller seconds."""


@dataclass(eq=False)
class Target:
    """One address, and how it fared.

    Args:
        index: Its place in the list.
        address: Where it is.
        has_answered: Whether anything ever answered there.
        failures: Since it was last well.
        rests_until: When it is tried again, if others are well.
    """

    index: int
    address: Address
    has_answered: bool = False
    failures: int = 0
    rests_until: float = field(default=0.0, repr=False)

    @property
    def where(self) -> str:
        """Its address, for messages."""
        address = self.address
        return str(address.base) if address.uds is None else f"http+unix://{address.uds}"

    @property
    def way(self) -> str:
        """Its address, and the proxy on the way, without a password."""
        proxy = self.address.proxy
        return self.where if proxy is None else f"{self.where} by the proxy {proxy.rpartition('@')[2]}"


class Targets:
    """The addresses of a client.

    A call goes to the address that its affinity key ranks first (rendezvous hashing: each key has an order of its own,
    and an address that is lost or won moves the keys of that address alone), so that what belongs to a solve goes where
    the solve went. An address that failed rests, twice as long each time; then one call looks whether it is back, and
    the others follow once it is.

    Args:
        addresses: At least one.
        clock: Monotonic seconds.
    """

    def __init__(self, addresses: Sequence[Address], clock: Clock) -> None:
        self.all = tuple(Target(i, address) for i, address in enumerate(addresses))
        self._clock = clock

    @property
    def have_answered(self) -> bool:
        """Whether any of them ever did."""
        return any(target.has_answered for target in self.all)

    def ranked(self, key: str | None) -> Sequence[Target]:
        """All of them, in the order of a key; without one, as they were given."""
        if len(self.all) == 1 or key is None:
            return self.all
        return sorted(self.all, key=lambda target: _score(key, target.where))

    def choose(self, ranked: Sequence[Target], tried: Collection[Target]) -> Target | None:
        """The next address that a call tries; None once all that make sense were.

        Args:
            ranked: In the order of the call.
            tried: In this round.
        """
        if len(ranked) == 1:
            return None if tried else ranked[0]
        now = self._clock()
        awake = [target for target in ranked if not target.failures or now >= target.rests_until]
        for target in awake or ranked:
            if target not in tried:
                if target.failures:  # others need not look while this call does
                    target.rests_until = now + _LONGEST_REST_S
                return target
        return None

    def answered(self, target: Target) -> None:
        """Note that an address is well."""
        target.has_answered = True
        target.failures = 0

    def failed(self, target: Target, *, is_silent: bool = False, rest_s: float | None = None) -> None:
        """Note that an address is not.

        Args:
            target: Which.
            is_silent: Nobody answered in time; a refusal, or a broken connection, is an answer.
            rest_s: Seconds for which it wants to be left alone.
        """
        target.failures += 1
        rest = min(_LONGEST_REST_S, _FIRST_REST_S * 2.0 ** min(target.failures, 30))
        rest = _SILENT_REST_S if is_silent else rest
        rest *= random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret
        target.rests_until = self._clock() + max(rest, min(rest_s or 0.0, _SILENT_REST_S))


def _score(key: str, where: str) -> bytes:
    return hashlib.blake2b(f"{key} {where}".encode(), digest_size=8).digest()
