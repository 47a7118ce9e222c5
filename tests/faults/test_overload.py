"""Five times as many calls as the service can do: it goes on as before, and tells the others when to come."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx
import pytest

from argrad_service.engine.options import SolverOptions
from tests.service.support import HookedEngine, make_app, serving, simplex

SOLVE_S = 0.1
"""Of the solver, for each call: capacity is known, and the callers in this process have the cores for themselves."""

QUEUE = 8
FACTOR = 5
PATIENCE_S = 20.0


@dataclass
class Load:
    """What callers got.

    Args:
        seconds: Of the run, from the first call to the end of its time.
        statuses: How often each HTTP status came.
        took_s: Time of each call.
        retry_after: Of each refusal.
    """

    seconds: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    took_s: list[float] = field(default_factory=list)
    retry_after: list[str | None] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        """Results a second."""
        return self.statuses[200] / self.seconds


async def call(client: httpx.AsyncClient, load: Load) -> None:
    began = time.perf_counter()
    reply = await client.post("/v1/solve", json={"problem": simplex(), "keep_state": False})
    load.took_s.append(time.perf_counter() - began)
    load.statuses[reply.status_code] += 1
    if reply.status_code == 200:
        assert reply.json()["solution"]["z"] == pytest.approx([0.25, 0.75])
    else:
        assert reply.json()["type"] == "overloaded"
        load.retry_after.append(reply.headers.get("retry-after"))


def client_of(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, trust_env=False, timeout=PATIENCE_S, limits=limits)


async def closed_loop(url: str, seconds: float) -> Load:
    """As many callers as keep the solver busy, each of which calls again once it has its result: the peak."""
    load, until = Load(seconds), time.monotonic() + seconds

    async def call_on(client: httpx.AsyncClient) -> None:
        while time.monotonic() < until:
            await call(client, load)

    async with client_of(url) as client:
        await asyncio.gather(*(call_on(client) for _ in range(QUEUE // 2)))
    return load


async def open_loop(url: str, rate: float, seconds: float) -> Load:
    """So many calls a second, whatever becomes of those before."""
    load, calls = Load(seconds), set[asyncio.Task[None]]()
    async with client_of(url) as client:
        began, sent = time.monotonic(), 0
        while (now := time.monotonic() - began) < seconds:
            for _ in range(int(now * rate) - sent):
                calls.add(asyncio.create_task(call(client, load)))
            sent = int(now * rate)
            await asyncio.sleep(0.005)
        await asyncio.gather(*calls)
        load.seconds = time.monotonic() - began
    assert load.statuses.total() == sent, "every call has its answer"
    return load


@pytest.mark.parametrize(
    "seconds", [pytest.param(6.0, marks=pytest.mark.slow), pytest.param(60.0, marks=pytest.mark.faults)]
)
@pytest.mark.timeout(300)
def test_goodput_stays_near_the_peak_and_every_refusal_says_when_to_come_back(seconds: float):
    busy = threading.Lock()

    def occupy(_: SolverOptions) -> None:
        with busy:
            time.sleep(SOLVE_S)

    engine = HookedEngine()
    app = make_app(io.StringIO(), engine, max_queue=QUEUE, batching=False, log_level="error")
    with serving(app) as url:
        engine.on_solve = occupy
        peak = asyncio.run(closed_loop(url, min(seconds, 10.0)))
        assert set(peak.statuses) == {200}
        load = asyncio.run(open_loop(url, FACTOR * peak.goodput, seconds))
        after = httpx.get(f"{url}/health/ready", trust_env=False).json()["checks"]["solver"]
    assert load.statuses.total() > 0.9 * FACTOR * peak.goodput * seconds, "the load was there"
    assert set(load.statuses) == {200, 429}, load.statuses
    assert load.goodput >= 0.9 * peak.goodput, (load.goodput, peak.goodput)
    assert all(text is not None and 1 <= int(text) <= 60 for text in load.retry_after)
    assert max(load.took_s) < PATIENCE_S / 2, "no call hangs"
    assert (after["queued"], after["running"], after["restarts"]) == (0, 0, 0)
