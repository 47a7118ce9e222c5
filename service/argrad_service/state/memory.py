"""Forward state in this process: least recently used first out, under a byte budget and a time to live."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from argrad_service.state.store import StateCounts, StateGone
from argrad_service.state.tokens import TokenSigner


@dataclass
class _Entry:
    value: Any
    nbytes: int
    owner: str
    expires_at: float


class MemoryStateStore:
    """An LRU of opaque values.

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
        self._budget_bytes, self._ttl_s, self._signer, self._clock = budget_bytes, ttl_s, signer, clock
        # Ordered by last use, which with one time to live is the order of expiry too.
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._lock = threading.Lock()
        self._held_bytes = 0
        self._hits = self._misses = self._evictions = self._expirations = self._refusals = 0

    def put(self, value: Any, *, nbytes: int, owner: str) -> str | None:
        """Keep a value and return its token, or None where it alone is over the budget."""
        dropped: list[_Entry] = []
        with self._lock:
            dropped += self._drop_expired()
            if nbytes > self._budget_bytes:
                self._refusals += 1
                return None
            while self._held_bytes + nbytes > self._budget_bytes:
                dropped.append(self._pop(next(iter(self._entries))))
                self._evictions += 1
            token = self._signer.new(owner)
            self._entries[token] = _Entry(value, nbytes, owner, self._clock() + self._ttl_s)
            self._held_bytes += nbytes
        # What was dropped is freed here, outside the lock: large tensors take time.
        return token

    def get(self, token: str, *, owner: str) -> Any:
        """The value of a token, which becomes the most recently used and stays valid.

        Raises:
            StateGone: whatever the reason.
        """
        with self._lock:
            entry = self._find(token, owner)
            entry.expires_at = self._clock() + self._ttl_s
            self._entries.move_to_end(token)
            self._hits += 1
            return entry.value

    def delete(self, token: str, *, owner: str) -> None:
        """Forget a value early.

        Raises:
            StateGone: whatever the reason.
        """
        with self._lock:
            self._find(token, owner)
            dropped = self._pop(token)
        del dropped

    def sweep(self) -> None:
        """Drop what has expired."""
        with self._lock:
            dropped = self._drop_expired()
        del dropped

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            dropped, self._entries, self._held_bytes = self._entries, OrderedDict(), 0
        del dropped

    def counts(self) -> StateCounts:
        """Counters and what is held now."""
        with self._lock:
            return StateCounts(
                entries=len(self._entries),
                held_bytes=self._held_bytes,
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                expirations=self._expirations,
                refusals=self._refusals,
            )

    def _find(self, token: str, owner: str) -> _Entry:
        """The entry of a token; the caller holds the lock."""
        entry = self._entries.get(token)
        # A token that is held here was signed here: its signature says nothing more.
        if entry is None or entry.owner != owner or entry.expires_at <= self._clock():
            self._misses += 1
            raise StateGone
        return entry

    def _pop(self, token: str) -> _Entry:
        entry = self._entries.pop(token)
        self._held_bytes -= entry.nbytes
        return entry

    def _drop_expired(self) -> list[_Entry]:
        now, dropped = self._clock(), []
        while self._entries:
            token, entry = next(iter(self._entries.items()))
            if entry.expires_at > now:
                break
            dropped.append(self._pop(token))
            self._expirations += 1
        return dropped
