"""Writing behind the caller's back: what is lost here costs somebody one more message."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from argrad_service.state.link import Link, Unavailable

MAX_WAITING_BYTES = 64 * 1024**2
"""Bytes of records that wait to be written at most; further ones are dropped."""

MAX_WAITING = 10_000
"""Commands that wait at most."""

LINGER_S = 0.02
"""Seconds for which what is to be forgotten waits for a record to travel with."""

_AT_ONCE = 64
_BYTES_AT_ONCE = 4 * 1024**2


@dataclass(frozen=True)
class _Write:
    """A record to be kept, or with `record` None a key to be forgotten."""

    record: Callable[[], bytes] | None
    ttl_ms: int = 0
    nbytes: int = 0
    is_cheap: bool = True


class Writer:
    """Sets and deletes keys in the order in which that was asked, several at once; of one key the last word counts.

    Args:
        link: The line.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._waiting: dict[bytes, _Write] = {}
        self._nbytes = 0
        self._is_wanted, self._is_idle = asyncio.Event(), asyncio.Event()
        self._is_idle.set()
        self.written = self.dropped = 0

    @property
    def waiting(self) -> int:
        """Commands that wait."""
        return len(self._waiting)

    def set(self, key: bytes, record: Callable[[], bytes], ttl_ms: int, nbytes: int, *, is_cheap: bool) -> None:
        """Keep a record soon, unless too much waits already or nobody would take it.

        Args:
            key: Its place.
            record: Makes it.
            ttl_ms: Milliseconds for which it is kept.
            nbytes: About how long it is.
            is_cheap: Whether the event loop may make it: a change of threads would cost more.
        """
        is_full = len(self._waiting) >= MAX_WAITING or self._nbytes + nbytes > MAX_WAITING_BYTES
        if is_full or self._link.line.is_open or self._link.room.is_open:
            self.dropped += 1
            return
        self._add(key, _Write(record, ttl_ms, nbytes, is_cheap))
        self._is_wanted.set()

    def delete(self, key: bytes) -> None:
        """Forget a key soon; where that cannot be, it expires."""
        if len(self._waiting) >= MAX_WAITING or self._link.line.is_open:
            self._remove(key)
            return
        self._add(key, _Write(None))
        asyncio.get_running_loop().call_later(LINGER_S, self._is_wanted.set)

    def _add(self, key: bytes, write: _Write) -> None:
        self._remove(key)
        self._waiting[key] = write
        self._nbytes += write.nbytes
        self._is_idle.clear()

    def _remove(self, key: bytes) -> None:
        before = self._waiting.pop(key, None)
        if before is not None:
            self._nbytes -= before.nbytes

    async def run(self) -> None:
        """Write for ever."""
        while True:
            await self._is_wanted.wait()
            while self._waiting:
                await self._write(self._taken())
            self._is_wanted.clear()
            self._is_idle.set()

    async def flush(self, timeout_s: float) -> None:
        """Return once nothing waits, or the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._is_idle.wait()

    def _taken(self) -> list[tuple[bytes, _Write]]:
        taken: list[tuple[bytes, _Write]] = []
        nbytes = 0
        while self._waiting and len(taken) < _AT_ONCE and nbytes < _BYTES_AT_ONCE:
            key = next(iter(self._waiting))
            write = self._waiting[key]
            self._remove(key)
            taken.append((key, write))
            nbytes += write.nbytes
        return taken

    async def _write(self, taken: list[tuple[bytes, _Write]]) -> None:
        if all(write.is_cheap for _, write in taken):
            pairs = list(filter(None, map(_made, taken)))
        else:
            pairs = await asyncio.to_thread(lambda: list(filter(None, map(_made, taken))))
        if len(pairs) < len(taken):
            self._link.errors["record"] += len(taken) - len(pairs)
            self.dropped += len(taken) - len(pairs)

        async def work(redis: Redis) -> list[object]:
            if len(pairs) == 1:
                key, ttl_ms, record = pairs[0]
                return [await (redis.delete(key) if record is None else redis.set(key, record, px=ttl_ms))]
            pipeline = redis.pipeline(transaction=False)
            for key, ttl_ms, record in pairs:
                if record is None:
                    pipeline.delete(key)
                else:
                    pipeline.set(key, record, px=ttl_ms)
            replies: list[object] = await pipeline.execute(raise_on_error=False)
            return replies

        nbytes = sum(len(record) for _, _, record in pairs if record is not None)
        try:
            replies = await self._link.run("write", work, is_write=nbytes > 0, nbytes=nbytes)
        except Unavailable:
            self.dropped += len(pairs)
            return
        refused = [reply for reply in replies if isinstance(reply, ResponseError)]
        for reply in refused:
            self._link.refuse(reply)
        self.dropped += len(refused)
        self.written += len(replies) - len(refused)


def _made(item: tuple[bytes, _Write]) -> tuple[bytes, int, bytes | None] | None:
    """Key, time to live and record; None where the record cannot be made, which is nobody's business but its own."""
    key, write = item
    try:
        return key, write.ttl_ms, None if write.record is None else write.record()
    except Exception:
        return None
