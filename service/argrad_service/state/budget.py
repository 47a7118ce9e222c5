"""What both stores in this process are: least recently used first out, under a byte budget and a time to live."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from argrad_service.state.store import StateCounts

Key = tuple[str, str]
"""Owner and name: what another owner keeps under the same name is another entry."""


@dataclass
class _Entry:
    value: Any
    nbytes: int
    expires_at: float


class BudgetedStore:
    """An LRU of opaque values by owner and name; only `put` and `resize` evict. Safe on any thread.

    Args:
        budget_bytes: Sum of `nbytes` that is held at most.
        ttl_s: Seconds after its last use for which a value is kept.
        clock: Monotonic seconds.
    """

    def __init__(self, *, budget_bytes: int, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.budget_bytes = budget_bytes
        self._ttl_s, self._clock = ttl_s, clock
        # Ordered by last use, which with one time to live is the order of expiry too.
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._lock = threading.Lock()
        self._held_bytes = 0
        self._hits = self._misses = self._evictions = self._expirations = self._refusals = 0

    def put(self, key: Key, value: Any, nbytes: int) -> bool:
        """Keep a value in place of what the key named; False where it alone is over the budget."""
        dropped: list[_Entry] = []
        with self._lock:
            dropped += self._drop_expired()
            if nbytes > self.budget_bytes:
                self._refusals += 1
                return False
            if key in self._entries:
                dropped.append(self._pop(key))
            dropped += self._make_room(nbytes)
            self._entries[key] = _Entry(value, nbytes, self._clock() + self._ttl_s)
            self._held_bytes += nbytes
        # What was dropped is freed here, outside the lock: large tensors take time.
        return True

    def get(self, key: Key) -> Any:
        """The value of a key, which becomes the most recently used; None where there is none."""
        with self._lock:
            entry = self._find(key)
            if entry is None:
                return None
            entry.expires_at = self._clock() + self._ttl_s
            self._entries.move_to_end(key)
            self._hits += 1
            return entry.value

    def peek(self, key: Key) -> Any:
        """The value of a key, which is not counted as a use; None where there is none."""
        with self._lock:
            entry = self._entries.get(key)
            return None if entry is None or entry.expires_at <= self._clock() else entry.value

    def resize(self, key: Key, value: Any, nbytes: int) -> bool:
        """Count a value anew that grew since it was put; False where it is not there, or is over the budget now."""
        dropped: list[_Entry] = []
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry.value is not value:
                return False
            if nbytes > self.budget_bytes:
                return False
            entry.expires_at = self._clock() + self._ttl_s
            self._entries.move_to_end(key)
            self._held_bytes -= entry.nbytes
            entry.nbytes = 0
            dropped += self._make_room(nbytes)
            entry.nbytes = nbytes
            self._held_bytes += nbytes
        return True

    def delete(self, key: Key) -> bool:
        """Forget a value early; False where there is none."""
        with self._lock:
            if self._find(key) is None:
                return False
            dropped = self._pop(key)
        del dropped
        return True

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

    def _find(self, key: Key) -> _Entry | None:
        entry = self._entries.get(key)
        if entry is None or entry.expires_at <= self._clock():
            self._misses += 1
            return None
        return entry

    def _make_room(self, nbytes: int) -> list[_Entry]:
        dropped = []
        while self._held_bytes + nbytes > self.budget_bytes:
            dropped.append(self._pop(next(iter(self._entries))))
            self._evictions += 1
        return dropped

    def _pop(self, key: Key) -> _Entry:
        entry = self._entries.pop(key)
        self._held_bytes -= entry.nbytes
        return entry

    def _drop_expired(self) -> list[_Entry]:
        now, dropped = self._clock(), []
        while self._entries:
            key, entry = next(iter(self._entries.items()))
            if entry.expires_at > now:
                break
            dropped.append(self._pop(key))
            self._expirations += 1
        return dropped
