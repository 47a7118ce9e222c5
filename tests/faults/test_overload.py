"""Five times as many calls as the service can do: it goes on as before, and tells the others when to come."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch

import argrad
from argrad_service.engine.options import SolverOptions
from tests.conftest import running_service
from tests.service.support import D, HookedEngine, make_app, serving, simplex

pytestmark = pytest.mark.alone

SOLVE_S = 0.1
"""Of the solver, for each call: capacity is known, and the callers in this process have the cores for themselves."""

QUEUE = 8
FACTOR = 5
PATIENCE_S = 60.0
LONG_S = 10.0


@dataclass(frozen=True)
class Work:
    """What is called for.

    Args:
        document: Of the request.
        wanted: z.
        callers: So many keep the solver busy, and none of them is refused.
    """

    document: dict[str, Any]
    wanted: list[float]
    callers: int


@dataclass
class Load:
    """What callers got.

    Args:
        seconds: Of the run, from its first call to the end of its last.
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


class Caller:
    """Sends one request again and again, on as many connections as it takes; costs a tenth of what httpx does.

    Callers that are slower than the service they overload would be the ones whose calls wait.

    Args:
        url: Of the service.
        document: Of the request.
    """

    def __init__(self, url: str, document: dict[str, Any]) -> None:
        parts, body = urlsplit(url), json.dumps(document).encode()
        self._address = parts.hostname, parts.port
        head = f"POST /v1/solve HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Length: {len(body)}\r\n"
        self._request = f"{head}Content-Type: application/json\r\n\r\n".encode() + body
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the reply."""
        while self._idle:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):  # closed while nobody used it
                return await self._exchange(*self._idle.pop())
        return await self._exchange(*await asyncio.open_connection(*self._address))

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> tuple[int, dict[str, str], bytes]:
        try:
            writer.write(self._request)
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            body = await reader.readexactly(int(headers["content-length"]))
        except BaseException:
            writer.close()
            raise
        self._idle.append((reader, writer))
        return int(first.split()[1]), headers, body

    def close(self) -> None:
        """Close the connections."""
        for _, writer in self._idle:
            writer.close()


async def call(caller: Caller, work: Work, load: Load) -> None:
    began = time.perf_counter()
    status, headers, body = await asyncio.wait_for(caller.post(), PATIENCE_S)
    load.took_s.append(time.perf_counter() - began)
    load.statuses[status] += 1
    if status == 200:
        assert json.loads(body)["solution"]["z"] == pytest.approx(work.wanted, rel=1e-9, abs=1e-12)
    else:
        assert json.loads(body)["type"] == "overloaded"
        load.retry_after.append(headers.get("retry-after"))


async def closed_loop(url: str, work: Work, seconds: float) -> Load:
    """As many callers as keep the solver busy, each of which calls again once it has its result: the peak."""
    load, began = Load(), time.monotonic()

    async def call_on(caller: Caller) -> None:
        while time.monotonic() < began + seconds:
            await call(caller, work, load)

    with contextlib.closing(Caller(url, work.document)) as caller:
        await asyncio.gather(*(call_on(caller) for _ in range(work.callers)))
    load.seconds = time.monotonic() - began  # the last calls were counted, and so is their time
    return load


async def open_loop(url: str, work: Work, rate: float, seconds: float) -> Load:
    """So many calls a second, whatever becomes of those before."""
    load, calls = Load(), set[asyncio.Task[None]]()
    with contextlib.closing(Caller(url, work.document)) as caller:
        began, sent = time.monotonic(), 0
        while (now := time.monotonic() - began) < seconds:
            for _ in range(int(now * rate) - sent):
                calls.add(asyncio.create_task(call(caller, work, load)))
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
        check(url, Work({"problem": simplex(), "keep_state": False}, [0.25, 0.75], QUEUE // 2), seconds)


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_the_real_engine_in_a_process_of_its_own_keeps_its_goodput_too(tmp_path: Path):
    """Batching as ever; each solve takes tens of milliseconds, so that the callers leave it the cores."""
    random = torch.Generator().manual_seed(0)
    root = torch.randn(10, 10, generator=random, dtype=D)
    given = {
        "Q": root @ root.mT + 0.1 * torch.eye(10, dtype=D),
        "q": torch.randn(10, generator=random, dtype=D),
        "G": torch.cat([torch.eye(10, dtype=D), -torch.eye(10, dtype=D)]),
        "h": torch.full((20,), 0.3, dtype=D),
    }
    options = {"polish": False, "adaptive": False, "rho": 0.01}
    solver = {"name": "admm", "tolerance": 1e-12, "max_iterations": 1000, "options": options}
    document = {
        "problem": {name: tensor.tolist() for name, tensor in given.items()},
        "solver": solver,
        "keep_state": False,
    }
    with running_service(tmp_path / "log.txt", "--max-queue", str(QUEUE), "--log-level", "error") as (url, _):
        wanted = httpx.post(f"{url}/v1/solve", json=document, trust_env=False, timeout=60).json()["solution"]["z"]
        exact = argrad.Client("local").solve(argrad.QP(**given)).solution["z"]
        assert wanted == pytest.approx(exact.tolist(), abs=1e-3), "it is this problem's, if a rough one"
        check(url, Work(document, wanted, QUEUE), 60.0)


def check(url: str, work: Work, seconds: float) -> None:
    """Find the peak, then call five times as often."""
    peak = asyncio.run(closed_loop(url, work, min(seconds, 10.0)))
    assert set(peak.statuses) == {200}
    load = asyncio.run(open_loop(url, work, FACTOR * peak.goodput, seconds))
    after = httpx.get(f"{url}/health/ready", trust_env=False).json()["checks"]["solver"]
    assert load.statuses.total() > 0.9 * FACTOR * peak.goodput * seconds, "the load was there"
    assert set(load.statuses) == {200, 429}, load.statuses
    assert load.goodput >= 0.9 * peak.goodput, (load.goodput, peak.goodput)
    assert all(text is not None and 1 <= int(text) <= 60 for text in load.retry_after)
    # Who is let in waits for those in the queue and for as many that are being solved; three times as long is a hang.
    assert max(load.took_s) < max(LONG_S, 3 * (2 * QUEUE + 1) / load.goodput), "no call hangs"
    assert (after["queued"], after["running"], after["restarts"]) == (0, 0, 0)
