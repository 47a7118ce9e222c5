"""Redis slow, gone, empty or full: nothing is lost, nobody waits long, and it is used again once it is back."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

import argrad
from tests.redis_server import RedisServer
from tests.service.support import D, make_app, running_app, serving, simplex, wait_until

TIMEOUT_S = 0.2
STEPS = 40
KEY = {"Idempotency-Key": "a-key"}


def settings(server: RedisServer, **more: Any) -> dict[str, Any]:
    return {
        "redis_url": server.url,
        "redis_timeout_s": TIMEOUT_S,
        "rate_limit_per_minute": 1e6,
        "log_level": "error",
        **more,
    }


@dataclass
class Replica:
    """A replica under uvicorn: its client, and what its probes say."""

    url: str
    client: argrad.Client

    def metric(self, line: str) -> float:
        text = httpx.get(f"{self.url}/metrics", trust_env=False).text
        return next((float(row.rpartition(" ")[2]) for row in text.splitlines() if row.startswith(line)), 0.0)

    def status(self) -> str:
        response = httpx.get(f"{self.url}/health/ready", trust_env=False)
        assert response.status_code == 200, "degraded is still ready"
        status: str = response.json()["status"]
        return status


@contextlib.contextmanager
def replicas(server: RedisServer) -> Iterator[tuple[Replica, Replica]]:
    with contextlib.ExitStack() as stack:
        both = []
        for _ in range(2):
            url = stack.enter_context(serving(make_app(**settings(server))))
            both.append(Replica(url, stack.enter_context(argrad.Client(url))))
        yield both[0], both[1]


def train(one: Replica, two: Replica, at: dict[int, Callable[[], None]]) -> tuple[list[float], float]:
    """Learn q so that z comes near a target: forward at one replica, backward at the other.

    Args:
        one: Solves at even steps, and differentiates at odd ones.
        two: The other way round.
        at: What happens between forward and backward of a step.

    Returns:
        The losses, and the longest time of a step in seconds, without what happened between.
    """
    random = torch.Generator().manual_seed(7)
    root = torch.randn(8, 8, generator=random, dtype=D)
    fixed = {
        "Q": 0.1 * root @ root.mT + torch.eye(8, dtype=D),
        "G": -torch.eye(8, dtype=D),
        "h": torch.zeros(8, dtype=D),
    }
    target, q = torch.rand(16, 8, generator=random, dtype=D), -torch.rand(16, 8, generator=random, dtype=D)
    losses, longest_s = [], 0.0
    for step in range(STEPS):
        forward, backward = (one, two) if step % 2 == 0 else (two, one)
        began = time.monotonic()
        result = forward.client.solve(argrad.QP(**fixed, q=q), keep_state=True)
        took_s = time.monotonic() - began
        difference: Tensor = result.solution["z"] - target
        losses.append(0.5 * float((difference**2).sum()))
        at.get(step, lambda: None)()
        began = time.monotonic()
        gradients = backward.client.vjp(result, {"z": difference}, wrt=["q"], gradients="full").gradients
        assert gradients is not None
        q = q - 0.5 * gradients["q"]
        longest_s = max(longest_s, took_s + time.monotonic() - began)
    return losses, longest_s


def shares(one: Replica, two: Replica) -> bool:
    """Whether a token of one replica is found by the other."""
    before = two.metric('argrad_shared_states_total{result="hit"}')
    with httpx.Client(trust_env=False) as client:
        token = client.post(f"{one.url}/v1/solve", json={"problem": simplex()}).json()["state"]
        time.sleep(0.1)
        client.post(f"{two.url}/v1/vjp", json={"state": token, "upstream": {"z": [1, 0]}})
    return two.metric('argrad_shared_states_total{result="hit"}') == before + 1


@pytest.fixture(scope="module")
def undisturbed(redis_session: RedisServer) -> list[float]:
    redis_session.reset()
    with replicas(redis_session) as (one, two):
        losses, _ = train(one, two, {})
        hits = [replica.metric('argrad_shared_states_total{result="hit"}') for replica in (one, two)]
    assert sum(hits) > STEPS / 2, "backward passes found the other replica's states"
    assert losses[-1] < 0.5 * losses[0]
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["killed", "restarted empty", "paused for 5 s", "out of memory"])
def test_a_training_loop_loses_nothing(fault: str, redis_server: RedisServer, undisturbed: list[float]):
    server, seen, paused_at = redis_server, set[str](), [0.0]
    begin = {"killed": server.kill, "paused for 5 s": server.pause, "out of memory": server.fill}
    end = {"killed": server.start, "paused for 5 s": server.resume, "out of memory": server.drain}
    breaker = "room" if fault == "out of memory" else "line"
    with replicas(server) as (one, two):

        def restart() -> None:
            server.kill()
            server.start()

        def fail() -> None:
            paused_at[0] = time.monotonic()
            begin[fault]()

        def look() -> None:
            wait_until(lambda: one.status() == two.status() == "degraded")
            seen.add("degraded")

        def recover() -> None:
            if fault == "paused for 5 s":
                time.sleep(max(0.0, paused_at[0] + 5.0 - time.monotonic()))
            end[fault]()
            wait_until(lambda: one.status() == two.status() == "ready")
            seen.add("ready")

        at = {10: restart} if fault == "restarted empty" else {10: fail, 20: look, 30: recover}
        losses, longest_s = train(one, two, at)
        assert losses[:20] == pytest.approx(undisturbed[:20], rel=1e-9)
        assert losses == pytest.approx(undisturbed, rel=1e-6)
        assert longest_s < 3.0
        if fault == "restarted empty":
            misses = [replica.metric('argrad_shared_states_total{result="miss"}') for replica in (one, two)]
            assert sum(misses) >= 1, "the state of that step was lost, and sent again"
        else:
            assert seen == {"degraded", "ready"}
            for replica in (one, two):
                assert replica.metric(f'argrad_redis_breaker_opened_total{{breaker="{breaker}"}}') >= 1
                assert replica.metric(f'argrad_redis_breaker_open_seconds_total{{breaker="{breaker}"}}') > 0
                assert replica.metric('argrad_shared_fallbacks_total{what="rate"}') > 0
                assert replica.metric("argrad_redis_errors_total") >= 1
                assert replica.metric('argrad_requests_total{route="/v1/vjp",status="500"') == 0
        assert shares(one, two)
        assert shares(two, one)


@pytest.mark.anyio
async def test_a_service_starts_without_its_redis_and_finds_it_later(redis_server: RedisServer):
    redis_server.kill()
    async with running_app(make_app(**settings(redis_server))) as client:
        report = (await client.get("/health/ready")).json()
        assert report["checks"]["shared"]["store"] == "redis"
        assert report["checks"]["shared"]["replicas"] == 1
        for _ in range(4):
            response = await client.post("/v1/solve", json={"problem": simplex()})
            assert response.json()["solution"]["z"] == pytest.approx([0.25, 0.75])
        report = (await client.get("/health/ready")).json()
        assert report["status"] == "degraded"
        assert "this replica's own meanwhile" in report["checks"]["shared"]["degraded"]["redis"]
        assert "argrad_degraded 1.0" in (await client.get("/metrics")).text
        redis_server.start()
        until = time.monotonic() + 10
        while (await client.get("/health/ready")).json()["status"] != "ready":
            assert time.monotonic() < until
            await asyncio.sleep(0.05)
        assert "argrad_degraded 0.0" in (await client.get("/metrics")).text


@pytest.mark.anyio
async def test_what_redis_cannot_do_now_each_replica_does_for_itself(redis_server: RedisServer):
    async with running_app(make_app(**settings(redis_server, rate_limit_per_minute=12))) as client:
        redis_server.pause()
        began = time.monotonic()
        first = await client.post("/v1/solve", json={"problem": simplex()}, headers=KEY)
        again = await client.post("/v1/solve", json={"problem": simplex()}, headers=KEY)
        assert first.json()["solution"]["z"] == pytest.approx([0.25, 0.75])
        assert again.headers["idempotent-replayed"] == "true"
        assert time.monotonic() - began < 10 * TIMEOUT_S
        statuses = [(await client.post("/v1/solve", json={"problem": simplex()})).status_code for _ in range(20)]
        assert set(statuses) == {200, 429}, "the limit holds, by this replica's own count"
        metrics = (await client.get("/metrics")).text
        assert 'argrad_shared_fallbacks_total{what="idempotency"}' in metrics


@pytest.mark.anyio
async def test_a_full_redis_is_read_and_not_written(redis_server: RedisServer):
    async with (
        running_app(make_app(**settings(redis_server))) as one,
        running_app(make_app(**settings(redis_server))) as two,
    ):
        token = (await one.post("/v1/solve", json={"problem": simplex()})).json()["state"]
        await asyncio.sleep(0.05)
        redis_server.fill()
        for i in range(3):
            response = await one.post("/v1/solve", json={"problem": simplex()}, headers={"Idempotency-Key": f"{i}"})
            assert response.status_code == 200
        report = (await one.get("/health/ready")).json()
        assert report["status"] == "degraded"
        assert "nothing new is shared" in report["checks"]["shared"]["degraded"]["redis"]
        response = await two.post("/v1/vjp", json={"state": token, "upstream": {"z": [1, 0]}})
        assert response.status_code == 200, "what is there is still found"


@pytest.mark.anyio
async def test_nothing_hangs_when_everybody_asks_a_redis_that_is_paused(redis_server: RedisServer):
    async with running_app(make_app(**settings(redis_server))) as client:
        redis_server.pause()
        began = time.monotonic()
        token = (await client.post("/v1/solve", json={"problem": simplex()})).json()["state"]
        calls = [client.post("/v1/vjp", json={"state": token, "upstream": {"z": [1, 0]}}) for _ in range(100)]
        replies = await asyncio.gather(*calls)
        assert {reply.status_code for reply in replies} == {200}
        assert time.monotonic() - began < 5.0
