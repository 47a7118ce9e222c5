"""What the service asks of whoever keeps forward state and registered problems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


class StateGone(Exception):  # noqa: N818 - not an error: every caller holds what a miss needs
    """The token names no state: lost, evicted, expired, forged, foreign or another owner's.

    One answer for all of them: a restart with a new signing key must look like any other miss, and a
    guess must learn nothing.
    """

    def __init__(self) -> None:
        super().__init__("the state token names no state here: send problem and solution instead")


class ProblemGone(Exception):  # noqa: N818 - not an error: every caller holds what a miss needs
    """The caller has no problem registered under that digest: never had, or it was evicted, deleted or expired.

    Another owner's is the same answer: nobody learns what others have registered.
    """

    def __init__(self) -> None:
        super().__init__("no problem is registered here under that digest: register it again")


@dataclass(frozen=True)
class StateCounts:
    """What a store has done so far, and what it holds."""

    entries: int
    held_bytes: int
    hits: int
    misses: int
    evictions: int
    expirations: int
    refusals: int
    signed_misses: int = 0


class StateStore(Protocol):
    """Keeps opaque values under tokens; every method may be called from any thread."""

    def put(self, value: Any, *, nbytes: int, owner: str) -> str | None:
        """Keep a value and return its token, or None where it alone is over the budget."""
        ...

    def get(self, token: str, *, owner: str) -> Any:
        """The value of a token, which stays valid.

        Raises:
            StateGone: whatever the reason.
        """
        ...

    def peek(self, token: str, *, owner: str) -> Any:
        """The value of a token, or None; nobody has used it by that."""
        ...

    def restore(self, token: str, value: Any, *, nbytes: int, owner: str) -> bool:
        """Keep a value under a token that was given out before, here or by another replica, in place of what it named.

        False where the value alone is over the budget, or the token is not one of that owner's.
        """
        ...

    def delete(self, token: str, *, owner: str) -> None:
        """Forget a value early.

        Raises:
            StateGone: whatever the reason.
        """
        ...

    def sweep(self) -> None:
        """Drop what has expired."""
        ...

    def clear(self) -> None:
        """Drop everything."""
        ...

    def counts(self) -> StateCounts:
        """Counters and what is held now."""
        ...


class ProblemStore(Protocol):
    """Keeps registered problems by owner and digest; every method may be called from any thread."""

    @property
    def budget_bytes(self) -> int:
        """Bytes that are held at most."""
        ...

    def put(self, digest: str, value: Any, *, nbytes: int, owner: str) -> bool:
        """Keep a problem; False where it alone is over the budget."""
        ...

    def get(self, digest: str, *, owner: str) -> Any:
        """The problem of a digest.

        Raises:
            ProblemGone: the owner has none under it.
        """
        ...

    def peek(self, digest: str, *, owner: str) -> Any:
        """The problem of a digest, or None; nobody has used it by that."""
        ...

    def resize(self, digest: str, value: Any, *, nbytes: int, owner: str) -> bool:
        """Count a problem anew that grew; False where it is not there any more, or does not fit."""
        ...

    def delete(self, digest: str, *, owner: str) -> None:
        """Forget a problem.

        Raises:
            ProblemGone: the owner has none under that digest.
        """
        ...

    def sweep(self) -> None:
        """Drop what has expired."""
        ...

    def clear(self) -> None:
        """Drop everything."""
        ...

    def counts(self) -> StateCounts:
        """Counters and what is held now."""
        ...
