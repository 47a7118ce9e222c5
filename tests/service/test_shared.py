"""What replicas share, by its protocol: the same tests for both stores, Redis by a real server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import pytest

from argrad_service.state import (
    IdempotencyInProgress,
    IdempotencyMismatch,
    MemoryShared,
    Replica,
    Seal,
    Shared,
)
from argrad_service.state.remote import RedisShared
from tests.redis_server import RedisServer

pytestmark = pytest.mark.anyio

FINGERPRINT, OTHER = b"1" * 32, b"2" * 32
Make = Callable[..., Shared]


def alone(**more: float) -> MemoryShared:
    given = {"idempotency_ttl_s": 60.0, "idempotency_budget_bytes": 1 << 20, "record_budget_bytes": 1 << 20, **more}
    return MemoryShared(**given, replica=lambda: Replica("me", "0", "here", 1))


def remote(server: RedisServer, *, name: str = "me", secret: str = "secret", **more: float) -> RedisShared:
    return RedisShared(
        server.url,
        prefix="test:",
        timeout_s=more.get("timeout_s", 1.0),
        ttl_s={"state": more.get("ttl_s", 60.0), "problem": 60.0},
        largest={"state": 1 << 16, "problem": 1 << 16},
        idempotency_ttl_s=more.get("idempotency_ttl_s", 60.0),
        alone=alone(),
        seal=Seal(secret),
        replica=lambda: Replica(name, "0", "here", 1),
    )


@pytest.fixture(params=["memory", "redis"])
async def shared(request: pytest.FixtureRequest, anyio_backend: str) -> AsyncIterator[Shared]:
    store: Shared = alone() if request.param == "memory" else remote(request.getfixturevalue("redis_server"))
    await store.start()
    yield store
    await store.stop()


async def found(store: Shared, name: str, owner: str = "me") -> bytes | None:
    """A record once what is being written is written."""
    await asyncio.sleep(0.05)
    return await store.get("state", owner, name)


async def test_a_record_is_found_as_it_was_put_by_its_owner_and_in_its_space_alone(shared: Shared):
    record = bytes(range(256)) * 3
    assert await shared.put("problem", "me", "name", record)
    assert await shared.get("problem", "me", "name") == record
    assert await shared.get("problem", "you", "name") is None
    assert await shared.get("state", "me", "name") is None
    assert await shared.get("problem", "me", "another") is None


async def test_a_record_put_later_is_found_soon_and_the_last_word_counts(shared: Shared):
    shared.put_later("state", "me", "one", lambda: b"1", 1)
    shared.put_later("state", "me", "two", lambda: b"2", 1)
    shared.put_later("state", "me", "two", lambda: b"3", 1)
    shared.put_later("state", "me", "gone", lambda: b"4", 1)
    shared.delete_later("state", "me", "gone")
    assert [await found(shared, name) for name in ("one", "two", "gone")] == [b"1", b"3", None]


async def test_a_record_that_is_deleted_is_gone_and_says_whether_it_was_there(shared: Shared):
    await shared.put("state", "me", "name", b"1")
    assert not await shared.delete("state", "you", "name")
    assert await shared.delete("state", "me", "name")
    assert not await shared.delete("state", "me", "name")
    assert await found(shared, "name") is None


async def test_owners_and_names_may_be_any_text(shared: Shared):
    names = ["", " ", "a:b", "a", "é\n", "*", "x" * 10_000]
    for i, owner in enumerate(names):
        for j, name in enumerate(names):
            await shared.put("state", owner, name, f"{i} {j}".encode())
    for i, owner in enumerate(names):
        for j, name in enumerate(names):
            assert await shared.get("state", owner, name) == f"{i} {j}".encode()


async def test_a_key_is_claimed_once_and_its_reply_replayed(shared: Shared):
    claim = await shared.claim("me", "key", FINGERPRINT)
    assert not isinstance(claim, bytes)
    with pytest.raises(IdempotencyInProgress, match="is being served"):
        await shared.claim("me", "key", FINGERPRINT)
    with pytest.raises(IdempotencyMismatch, match="another request"):
        await shared.claim("me", "key", OTHER)
    await shared.finish(claim, b"the reply")
    assert [await shared.claim("me", "key", FINGERPRINT) for _ in range(2)] == [b"the reply"] * 2
    with pytest.raises(IdempotencyMismatch, match="another request"):
        await shared.claim("me", "key", OTHER)


async def test_another_owner_s_key_is_another_key(shared: Shared):
    claim = await shared.claim("me", "key", FINGERPRINT)
    assert not isinstance(claim, bytes)
    await shared.finish(claim, b"mine")
    assert not isinstance(await shared.claim("you", "key", OTHER), bytes)


async def test_a_claim_that_is_given_up_is_the_next_one_s(shared: Shared):
    first = await shared.claim("me", "key", FINGERPRINT)
    assert not isinstance(first, bytes)
    shared.abandon(first)
    await asyncio.sleep(0.05)
    second = await shared.claim("me", "key", OTHER)
    assert not isinstance(second, bytes)
    shared.abandon(first)
    await shared.finish(first, b"late")
    await asyncio.sleep(0.05)
    with pytest.raises(IdempotencyInProgress):
        await shared.claim("me", "key", OTHER)
    await shared.finish(second, b"2")
    assert await shared.claim("me", "key", OTHER) == b"2"


async def test_of_many_claims_at_once_one_is_granted(shared: Shared):
    results = await asyncio.gather(*(shared.claim("me", "key", FINGERPRINT) for _ in range(50)), return_exceptions=True)
    assert sum(isinstance(result, IdempotencyInProgress) for result in results) == 49


async def test_rates_are_counted_by_owner_and_a_refused_call_costs_nothing(shared: Shared):
    waits = [await shared.take("me", per_minute=60, burst=3) for _ in range(6)]
    assert waits[:3] == [0.0] * 3
    assert waits[3:] == [pytest.approx(1.0, abs=0.2)] * 3
    assert await shared.take("you", per_minute=60, burst=3) == 0.0


async def test_a_bucket_fills_again_with_time(shared: Shared):
    began = time.monotonic()
    assert await shared.take("me", per_minute=1200, burst=1) == 0.0
    wait = await shared.take("me", per_minute=1200, burst=1)
    if time.monotonic() - began < 0.04:
        assert 0 < wait <= 0.05
    await asyncio.sleep(0.06)
    assert await shared.take("me", per_minute=1200, burst=1) == 0.0


async def test_a_replica_sees_itself_and_nothing_is_degraded(shared: Shared):
    health = shared.health()
    assert health.replicas == (Replica("me", "0", "here", 1),)
    assert health.degraded == {}


async def test_replies_expire(anyio_backend: str, redis_server: RedisServer):
    now = 0.0
    memory = MemoryShared(idempotency_ttl_s=0.2, idempotency_budget_bytes=1 << 20, clock=lambda: now)
    redis_ = remote(redis_server, idempotency_ttl_s=0.2)
    for store in (memory, redis_):
        claim = await store.claim("me", "key", FINGERPRINT)
        assert not isinstance(claim, bytes)
        await store.finish(claim, b"reply")
        assert await store.claim("me", "key", FINGERPRINT) == b"reply"
    now = 0.5
    await asyncio.sleep(0.3)
    for store in (memory, redis_):
        assert not isinstance(await store.claim("me", "key", OTHER), bytes)
    await redis_.stop()


async def test_memory_for_replies_is_bounded():
    store = alone(idempotency_budget_bytes=1000)
    for i in range(20):
        claim = await store.claim("me", f"{i}", FINGERPRINT)
        assert not isinstance(claim, bytes)
        await store.finish(claim, b"x" * 200)
    gauges = store.health().gauges
    assert gauges["idempotency_bytes", ""] <= 1000
    assert await store.claim("me", "19", FINGERPRINT) == b"x" * 200
    assert not isinstance(await store.claim("me", "0", FINGERPRINT), bytes)


async def test_replicas_see_one_another_until_one_leaves(redis_server: RedisServer):
    one, two = remote(redis_server, name="one"), remote(redis_server, name="two")
    await one.start()
    await two.start()
    await one._beat()
    assert [replica.id for replica in one.health().replicas] == ["one", "two"]
    await two.stop()
    await one._beat()
    assert [replica.id for replica in one.health().replicas] == ["one"]
    await one.stop()


async def test_a_replica_that_says_nothing_for_a_time_is_gone(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("argrad_service.state.remote.REPLICA_TTL_S", 0.2)
    one, two = remote(redis_server, name="one"), remote(redis_server, name="two")
    await one._beat()
    await two._beat()
    assert len(two.health().replicas) == 2
    await asyncio.sleep(0.3)
    await two._beat()
    assert [replica.id for replica in two.health().replicas] == ["two"]
    await one.stop()
    await two.stop()


async def test_a_heartbeat_keeps_a_claim_for_as_long_as_the_work_goes_on(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("argrad_service.state.remote.LEASE_S", 0.3)
    one, two = remote(redis_server, name="one"), remote(redis_server, name="two")
    claim = await one.claim("me", "key", FINGERPRINT)
    assert not isinstance(claim, bytes)
    for _ in range(4):
        await asyncio.sleep(0.15)
        await one._beat()
    with pytest.raises(IdempotencyInProgress):
        await two.claim("me", "key", FINGERPRINT)
    await asyncio.sleep(0.4)  # a replica that is dead sends no heartbeat
    assert not isinstance(await two.claim("me", "key", FINGERPRINT), bytes)
    await one.stop()
    await two.stop()


async def test_what_another_secret_closed_or_anybody_changed_is_not_opened(redis_server: RedisServer):
    one, two = remote(redis_server, name="one"), remote(redis_server, secret="another")
    await one.put("state", "me", "name", b"record")
    assert await two.get("state", "me", "name") is None
    key = next(iter(redis_server.admin.scan_iter("test:1:state:*")))
    redis_server.admin.setrange(key, 35, "X")
    assert await one.get("state", "me", "name") is None
    assert one.health().counters["state_records", "broken"] == 1
    await one.stop()
    await two.stop()


async def test_nobody_who_lists_keys_reads_an_owner_a_token_or_a_key(redis_server: RedisServer):
    store = remote(redis_server)
    await store.put("state", "the owner", "the token", b"record")
    await store.claim("the owner", "the key", FINGERPRINT)
    await store.take("the owner", per_minute=1)
    keys = redis_server.admin.keys("*")
    assert len(keys) == 3
    assert not any("the" in key for key in keys)
    assert all(0 < redis_server.admin.pttl(key) <= 61_000 for key in keys), "everything there expires"
    await store.stop()


async def test_a_record_over_the_limit_is_not_put(redis_server: RedisServer):
    store = remote(redis_server)
    assert not await store.put("problem", "me", "name", bytes((1 << 16) + 1))
    assert redis_server.admin.keys("*problem*") == []
    await store.stop()
