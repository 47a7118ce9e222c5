"""A line to Redis that never keeps anybody waiting for long, and says what is wrong with it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from typing import TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from argrad_service.state.breaker import Breaker

PROTOCOL = 2
"""RESP version, the same on every server and with every version of the client library."""

BYTES_PER_S = 50e6
"""What the line carries at least: large records get that much more time."""

_CONNECTIONS = 64
_FAILURES_IN_A_ROW = 3
"""One lost reply may be this process's own event loop, held up."""

T = TypeVar("T")


class Unavailable(Exception):  # noqa: N818 - whoever asks goes on without
    """Redis is not asked now, did not answer in time, or refused."""


class Link:
    """Commands to one Redis server, under a timeout and two circuit breakers; on one event loop.

    `line` is open while the server does not answer, `room` while it answers and refuses to write: out of memory, a
    replica, unable to save. Reads go on then.

    Args:
        url: `redis://`, `rediss://` or `unix://`.
        timeout_s: Seconds that a command may take, connecting included.
        clock: Monotonic seconds.
    """

    def __init__(self, url: str, *, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.timeout_s = timeout_s
        self.line = Breaker(threshold=_FAILURES_IN_A_ROW, clock=clock)
        # What the server says itself needs no second time.
        self.room = Breaker(threshold=1, clock=clock)
        self.trouble = asyncio.Event()
        self.errors: Counter[str] = Counter()
        self.commands: Counter[str] = Counter()
        self.seconds: dict[str, float] = defaultdict(float)
        # One new attempt at once: connections of before a restart of the server are found broken only in use.
        self.redis: Redis = Redis.from_pool(
            BlockingConnectionPool.from_url(
                url,
                max_connections=_CONNECTIONS,
                timeout=None,
                protocol=PROTOCOL,
                retry=Retry(NoBackoff(), 1),
                socket_timeout=None,
                socket_connect_timeout=timeout_s,
            )
        )

    async def run(
        self,
        what: str,
        work: Callable[[Redis], Awaitable[T]],
        *,
        is_write: bool,
        nbytes: int = 0,
        is_probe: bool = False,
    ) -> T:
        """Do something with the server.

        Args:
            what: Name of the work, for metrics.
            work: Commands.
            is_write: Whether they write.
            nbytes: Bytes that travel, if they may be many.
            is_probe: Whether to try although a breaker is open.

        Raises:
            Unavailable: whatever the reason.
        """
        if not is_probe and (self.line.is_open or (is_write and self.room.is_open)):
            raise Unavailable
        began = time.perf_counter()
        try:
            async with asyncio.timeout(self.timeout_s + nbytes / BYTES_PER_S):
                result = await work(self.redis)
        except ResponseError as error:
            self.refuse(error)
            raise Unavailable from None
        except (RedisError, OSError, TimeoutError) as error:
            is_late = isinstance(error, TimeoutError)
            self.errors["timeout" if is_late else "connection"] += 1
            self.line.fail(f"no answer within {self.timeout_s:g} s" if is_late else _words(error))
            self.trouble.set()
            raise Unavailable from None
        finally:
            self.commands[what] += 1
            self.seconds[what] += time.perf_counter() - began
        self.line.succeed()
        if is_write:
            self.room.succeed()
        return result

    def refuse(self, error: ResponseError) -> None:
        """Note that the server answered with an error."""
        self.line.succeed()
        self.errors[type(error).__name__.removesuffix("Error")] += 1
        self.room.fail(_words(error))
        self.trouble.set()

    async def close(self) -> None:
        """Close every connection."""
        await self.redis.aclose()


def _words(error: Exception) -> str:
    """What an error says, at a length for a probe; addresses are in it, passwords are not."""
    return (str(error) or type(error).__name__)[:200]
