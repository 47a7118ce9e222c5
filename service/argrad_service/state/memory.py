"""Forward state and registered problems in this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from argrad_service.state.budget import BudgetedStore
from argrad_service.state.store import ProblemGone, StateCounts, StateGone
from argrad_service.state.tokens import TokenSigner


class MemoryStateStore:
    """An LRU of opaque values under tokens.

    Only `put` evicts, so that callers who keep no state cannot push out what others' backward passes need.

    Args:
        budget_bytes: Sum of `nbytes` that is held at most.
        ttl_s: Seconds after its last use for which a value is kept.
        signer: Makes and checks the tokens.
        clock: Monotonic seconds.
    """

    def __init__(
        self, *, budget_bytes: int, ttl_s: float, signer: TokenSigner, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._signer = signer
        self._held = BudgetedStore(budget_bytes=budget_bytes, ttl_s=ttl_s, clock=clock)
        self._signed_misses = 0

    def put(self, value: Any, *, nbytes: int, owner: str) -> str | None:
        """Keep a value and return its token, or None where it alone is over the budget."""
        token = self._signer.new(owner)
        return token if self._held.put((owner, token), (value,), nbytes) else None

    def get(self, token: str, *, owner: str) -> Any:
        """The value of a token, which becomes the most recently used and stays valid.

        Raises:
            StateGone: whatever the reason.
        """
        # A token that is held here was signed here: its signature says nothing more.
        held = self._held.get((owner, token))
        if held is None:
            self._signer.check(token, owner)
            self._signed_misses += 1
            raise StateGone
        return held[0]

    def peek(self, token: str, *, owner: str) -> Any:
        """The value of a token, or None; nobody has used it by that."""
        held = self._held.peek((owner, token))
        return None if held is None else held[0]

    def restore(self, token: str, value: Any, *, nbytes: int, owner: str) -> bool:
        """Keep a value under a token of before; False where it alone is over the budget, or the token is foreign."""
        try:
            self._signer.check(token, owner)
        except StateGone:
            return False
        return self._held.put((owner, token), (value,), nbytes)

    def delete(self, token: str, *, owner: str) -> None:
        """Forget a value early.

        Raises:
            StateGone: whatever the reason.
        """
        if not self._held.delete((owner, token)):
            raise StateGone

    def sweep(self) -> None:
        """Drop what has expired."""
        self._held.sweep()

    def clear(self) -> None:
        """Drop everything."""
        self._held.clear()

    def counts(self) -> StateCounts:
        """Counters and what is held now."""
        return replace(self._held.counts(), signed_misses=self._signed_misses)


class MemoryProblemStore:
    """An LRU of registered problems, each under the digest of its content and its owner.

    Args:
        budget_bytes: Sum of `nbytes` that is held at most.
        ttl_s: Seconds after its last use for which a problem is kept.
        clock: Monotonic seconds.
    """

    def __init__(self, *, budget_bytes: int, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._held = BudgetedStore(budget_bytes=budget_bytes, ttl_s=ttl_s, clock=clock)

    @property
    def budget_bytes(self) -> int:
        """Bytes that are held at most."""
        return self._held.budget_bytes

    def put(self, digest: str, value: Any, *, nbytes: int, owner: str) -> bool:
        """Keep a problem; False where it alone is over the budget."""
        return self._held.put((owner, digest), value, nbytes)

    def get(self, digest: str, *, owner: str) -> Any:
        """The problem of a digest, which becomes the most recently used.

        Raises:
            ProblemGone: the owner has none under it.
        """
        value = self._held.get((owner, digest))
        if value is None:
            raise ProblemGone
        return value

    def peek(self, digest: str, *, owner: str) -> Any:
        """The problem of a digest, or None; nobody has used it by that."""
        return self._held.peek((owner, digest))

    def resize(self, digest: str, value: Any, *, nbytes: int, owner: str) -> bool:
        """Count a problem anew that grew; False where it is not there any more, or does not fit."""
        return self._held.resize((owner, digest), value, nbytes)

    def delete(self, digest: str, *, owner: str) -> None:
        """Forget a problem.

        Raises:
            ProblemGone: the owner has none under that digest.
        """
        if not self._held.delete((owner, digest)):
            raise ProblemGone

    def sweep(self) -> None:
        """Drop what has expired."""
        self._held.sweep()

    def clear(self) -> None:
        """Drop everything."""
        self._held.clear()

    def counts(self) -> StateCounts:
        """Counters and what is held now."""
        return self._held.counts()
