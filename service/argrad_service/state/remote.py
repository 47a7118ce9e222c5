"""What replicas share, in Redis; what cannot be shared there now is kept by each replica for itself."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from redis.asyncio import Redis

from argrad_service.state import scripts
from argrad_service.state.alone import MemoryShared
from argrad_service.state.link import Link, Unavailable
from argrad_service.state.rates import in_seconds
from argrad_service.state.shared import Claim, Replica, SharedHealth, Space, answered, mark_of, read_mark
from argrad_service.state.tokens import Seal
from argrad_service.state.writer import Writer

BEAT_S = 2.0
"""Seconds between heartbeats."""

REPLICA_TTL_S = 7.0
"""Seconds after its last heartbeat for which a replica counts as alive."""

LEASE_S = 10.0
"""Seconds for which a key is claimed; heartbeats renew it for as long as the work goes on."""

PROBE_S = 0.5
"""Seconds between attempts while something is wrong."""

_DOUBT_S = 0.05
_FLUSH_S = 1.0
_LAYOUT = 1


class RedisShared:
    """Keeps what replicas share in one Redis server, on one event loop.

    Args:
        url: Of the server.
        prefix: Before every key.
        timeout_s: Seconds that a command may take.
        ttl_s: Seconds for which records of each space are kept.
        largest: Bytes of the largest record of each space.
        idempotency_ttl_s: Seconds for which replies are kept for repeated calls.
        alone: Does what it can while the server is gone.
        seal: Closes records, so that nobody without the secret can change them unnoticed.
        replica: This process, now.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str,
        timeout_s: float,
        ttl_s: Mapping[Space, float],
        largest: Mapping[Space, int],
        idempotency_ttl_s: float,
        alone: MemoryShared,
        seal: Seal,
        replica: Callable[[], Replica],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._prefix, self._seal, self._alone, self._replica = f"{prefix}{_LAYOUT}:", seal, alone, replica
        self._ttl_ms = {space: max(1, int(1e3 * seconds)) for space, seconds in ttl_s.items()}
        self._largest, self._reply_ttl_ms = largest, max(1, int(1e3 * idempotency_ttl_s))
        self.link = Link(url, timeout_s=timeout_s, clock=clock)
        self.writer = Writer(self.link)
        register = self.link.redis.register_script
        self._scripts = {name: register(getattr(scripts, name)) for name in _SCRIPTS}
        self._replicas: tuple[Replica, ...] = ()
        self._claims: dict[Claim, bytes] = {}
        self._found: Counter[tuple[str, str]] = Counter()
        self._fallbacks: Counter[str] = Counter()
        self._tasks: list[asyncio.Task[None]] = []
        self._abandoning: set[asyncio.Future[None]] = set()

    @property
    def is_shared(self) -> bool:
        """See `Shared`."""
        return True

    async def start(self) -> None:
        """See `Shared`; waits for the first heartbeat, or for its timeout."""
        await self._beat()
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self.writer.run())]

    async def stop(self) -> None:
        """See `Shared`."""
        if not self.link.line.is_open:
            await self.writer.flush(_FLUSH_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        where, me = self._replica_keys(), self._replica().id

        async def leave(redis: Redis) -> None:
            pipeline = redis.pipeline(transaction=False)
            pipeline.zrem(where[0], me)
            pipeline.hdel(where[1], me)
            await pipeline.execute()

        with contextlib.suppress(Unavailable):
            await self.link.run("beat", leave, is_write=True)
        with contextlib.suppress(Exception):  # a connection that is broken anyway
            await self.link.close()

    async def take(self, owner: str, *, per_minute: float, burst: float | None = None, cost: float = 1.0) -> float:
        """See `RateCounter`; by this replica's own count while Redis is gone."""
        cost_s, burst_s = in_seconds(per_minute, burst, cost)
        try:
            reply = await self._run_script("TAKE", [self._key("rate", owner)], [repr(cost_s), repr(burst_s)])
        except Unavailable:
            self._fallbacks["rate"] += 1
            return await self._alone.take(owner, per_minute=per_minute, burst=burst, cost=cost)
        return float(reply)

    async def get(self, space: Space, owner: str, name: str) -> bytes | None:
        """See `Shared`."""
        key = self._key(space, owner, name)

        async def work(redis: Redis) -> bytes | None:
            found: Any = await redis.get(key)
            return None if found is None else bytes(found)

        try:
            sealed = await self.link.run("get", work, is_write=False, nbytes=self._largest[space])
        except Unavailable:
            self._found[space, "unavailable"] += 1
            return None
        record = None if sealed is None else self._seal.open(key, sealed)
        self._found[space, "miss" if sealed is None else "broken" if record is None else "hit"] += 1
        return record

    async def put(self, space: Space, owner: str, name: str, record: bytes) -> bool:
        """See `Shared`."""
        if len(record) > self._largest[space]:
            return False
        key, ttl_ms = self._key(space, owner, name), self._ttl_ms[space]
        sealed = await asyncio.to_thread(self._seal.close, key, record)
        try:
            await self.link.run("put", lambda r: r.set(key, sealed, px=ttl_ms), is_write=True, nbytes=len(sealed))
        except Unavailable:
            return False
        return True

    def put_later(
        self, space: Space, owner: str, name: str, record: Callable[[], bytes], nbytes: int, *, is_cheap: bool = False
    ) -> None:
        """See `Shared`."""
        key = self._key(space, owner, name)
        self.writer.set(key, lambda: self._seal.close(key, record()), self._ttl_ms[space], nbytes, is_cheap=is_cheap)

    async def delete(self, space: Space, owner: str, name: str) -> bool:
        """See `Shared`."""
        key = self._key(space, owner, name)
        self.writer.delete(key)  # comes after what is on its way already
        try:
            # Not a write as the breakers see it: it is let through where memory is out.
            return bool(await self.link.run("delete", lambda r: r.delete(key), is_write=False))
        except Unavailable:
            return False

    def delete_later(self, space: Space, owner: str, name: str) -> None:
        """See `Shared`."""
        self.writer.delete(self._key(space, owner, name))

    async def claim(self, owner: str, key: str, fingerprint: bytes) -> Claim | bytes:
        """See `Shared`; among the calls to this replica alone while Redis is gone."""
        where = self._key("once", owner, key)
        claim = Claim(owner, key, mark_of(fingerprint, secrets.token_bytes(16)))
        try:
            found = await self._run_script("CLAIM", [where], [claim.mark, int(1e3 * LEASE_S)])
        except Unavailable:
            self._fallbacks["idempotency"] += 1
            return await self._alone.claim(owner, key, fingerprint)
        # The mark may be ours: the reply to a first attempt was lost.
        if found is None or found == claim.mark:
            self._claims[claim] = where
            return claim
        reply = self._seal.open(where, read_mark(found, fingerprint))
        if reply is None:
            # Nobody with our secret wrote it: as good as nothing.
            return await self._alone.claim(owner, key, fingerprint)
        return reply

    async def finish(self, claim: Claim, reply: bytes) -> None:
        """See `Shared`."""
        where = self._claims.pop(claim, None)
        if where is not None:
            text = answered(claim, self._seal.close(where, reply))
            with contextlib.suppress(Unavailable):
                await self._run_script("FINISH", [where], [claim.mark, text, self._reply_ttl_ms])
                return
            self._fallbacks["idempotency"] += 1
        self._alone.finish_now(claim, reply)

    def abandon(self, claim: Claim) -> None:
        """See `Shared`; where Redis is gone, the claim lapses by itself."""
        where = self._claims.pop(claim, None)
        if where is None:
            self._alone.abandon(claim)
            return

        async def give_up() -> None:
            with contextlib.suppress(Unavailable):
                await self._run_script("ABANDON", [where], [claim.mark], is_write=False)

        task = asyncio.ensure_future(give_up())
        self._abandoning.add(task)
        task.add_done_callback(self._abandoning.discard)

    def sweep(self) -> None:
        """See `Shared`."""
        self._alone.sweep()

    def health(self) -> SharedHealth:
        """See `Shared`."""
        line, room = self.link.line.counts(), self.link.room.counts()
        degraded = {}
        if line.is_open:
            degraded["redis"] = (
                f"{line.reason}; tokens, problems, idempotency and rates are this replica's own meanwhile"
            )
        elif room.is_open:
            degraded["redis"] = f"{room.reason}; nothing new is shared, idempotency and rates are this replica's own"
        counters: dict[tuple[str, str], float] = {
            ("written", ""): self.writer.written,
            ("dropped", ""): self.writer.dropped,
        }
        for name, breaker in (("line", line), ("room", room)):
            counters["breaker_opened", name] = breaker.opened
            counters["breaker_open_seconds", name] = breaker.open_s
        counters |= {("errors", kind): number for kind, number in self.link.errors.items()}
        counters |= {("commands", what): number for what, number in self.link.commands.items()}
        counters |= {("command_seconds", what): number for what, number in self.link.seconds.items()}
        counters |= {("fallbacks", what): number for what, number in self._fallbacks.items()}
        counters |= {(f"{space}_records", result): number for (space, result), number in self._found.items()}
        gauges: dict[tuple[str, str], float] = {
            ("breaker_open", "line"): line.is_open,
            ("breaker_open", "room"): room.is_open,
            ("waiting_writes", ""): self.writer.waiting,
        }
        return SharedHealth("redis", degraded, self._replicas, counters, gauges)

    async def _run_script(self, name: str, keys: Sequence[bytes], args: Sequence[Any], *, is_write: bool = True) -> Any:
        script = self._scripts[name]
        nbytes = sum(len(arg) for arg in args if isinstance(arg, bytes))

        async def work(_: Redis) -> Any:
            return await script(keys=keys, args=args)

        return await self.link.run(name.lower(), work, is_write=is_write, nbytes=nbytes)

    async def _watch(self) -> None:
        """Send heartbeats, which are the probes too: soon again after a failure, steadily while it lasts."""
        while True:
            self.link.trouble.clear()
            line, room = self.link.line, self.link.room
            is_open = line.is_open or room.is_open
            delay_s = PROBE_S if is_open else _DOUBT_S if line.is_in_doubt else BEAT_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    # While a breaker is open nothing new can happen but time.
                    await (asyncio.sleep(2 * delay_s) if is_open else self.link.trouble.wait())
            await self._beat()

    async def _beat(self) -> None:
        """Say that this replica lives, hear who else does, and keep what is claimed."""
        replica, where = self._replica(), self._replica_keys()
        described = json.dumps(asdict(replica))
        claimed, lease_ms = list(self._claims.values()), int(1e3 * LEASE_S)
        script = self._scripts["BEAT"]

        async def work(redis: Redis) -> list[bytes]:
            found: list[bytes] = await script(keys=where, args=[replica.id, described, int(1e3 * REPLICA_TTL_S)])
            if claimed:
                pipeline = redis.pipeline(transaction=False)
                for key in claimed:
                    pipeline.pexpire(key, lease_ms)
                await pipeline.execute()
            return found

        try:
            alive = await self.link.run("beat", work, is_write=True, is_probe=True)
        except Unavailable:
            self._replicas = (replica,)
        else:
            self._replicas = tuple(sorted(map(_read_replica, alive), key=lambda one: one.id))

    def _replica_keys(self) -> tuple[bytes, bytes]:
        return f"{self._prefix}replicas:seen".encode(), f"{self._prefix}replicas:about".encode()

    def _key(self, space: str, owner: str, name: str = "") -> bytes:
        """Where something is kept: owners and names are any text, and nobody who lists keys shall read tokens."""
        parts = [hashlib.sha256(text.encode()).hexdigest()[:32] for text in (owner, name)]
        return f"{self._prefix}{space}:{':'.join(parts)}".encode()


def _read_replica(text: bytes) -> Replica:
    """A heartbeat, perhaps of another version of the service."""
    said = json.loads(text)
    return Replica(
        id=str(said.get("id")),
        version=str(said.get("version")),
        address=str(said.get("address")),
        in_flight=int(said.get("in_flight", 0)),
    )


_SCRIPTS = ("CLAIM", "FINISH", "ABANDON", "TAKE", "BEAT")
