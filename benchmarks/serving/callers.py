"""Many callers at once: 32 tasks of one process with one problem each, against the service with batching and without.

A call is a solve with its gradient in one round trip. What is timed is the service: each caller writes a body that is
ready on a connection of its own, and reads the reply without looking into it. The services run beside each other and
are loaded in turns, so that what else the machine does falls on all of them.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import httpx
import torch
from torch import Tensor

from argrad.problems import QP
from argrad.wire import SAFETENSORS, decode, encode
from argrad.wire.messages import SolverDocument, SolveReply, SolveRequest
from benchmarks.workloads import optnet
from examples.with_service import free_port, is_ready

CALLERS = 32
START_TIMEOUT_S = 120.0
MIXED = (20, 60)
"""Least and largest n of the problems of mixed shapes, drawn uniformly; m = n."""

SERVE = ("-m", "argrad_service")
IDENTITY = ("-m", "benchmarks.serving.identity")


@dataclass(frozen=True)
class Case:
    """What the callers ask."""

    name: str
    solver: str
    problems: Sequence[QP]
    cotangents: Sequence[Tensor]


def cases(seed: int) -> list[Case]:
    """One size or mixed sizes, and `auto`, whose solves are so short that the service's own work shows."""
    sizes = torch.randint(MIXED[0], MIXED[1] + 1, (CALLERS,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        _case("n = m = 10, pdipm", "pdipm", [10] * CALLERS, seed),
        _case("n = m = 50, pdipm", "pdipm", [50] * CALLERS, seed),
        _case("n = m from 20 to 60, pdipm", "pdipm", sizes, seed),
        _case("n = m = 10, auto", "auto", [10] * CALLERS, seed),
        _case("n = m = 50, auto", "auto", [50] * CALLERS, seed),
    ]


def _case(name: str, solver: str, sizes: Sequence[int], seed: int) -> Case:
    drawn = [optnet(n, 1, seed=seed + i) for i, n in enumerate(sizes)]
    problems = [QP(**{k: t[0] if t.shape[0] == 1 else t for k, t in w.parameters.items()}) for w in drawn]
    return Case(name, solver, problems, [w.grad_z[0] for w in drawn])


def measure(seed: int, *, seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Throughput and latency of every case on every service.

    Args:
        seed: Of the problems.
        seconds: That each case loads each service for in each round.
        rounds: Of all services in turns.
    """
    found = []
    with ExitStack() as stack:
        started = {
            "batching": stack.enter_context(_serving(SERVE)),
            "no batching": stack.enter_context(_serving(SERVE, ARGRAD_BATCHING="false")),
            "no solver": stack.enter_context(_serving(IDENTITY)),
        }
        for case in cases(seed):
            print(case.name, file=sys.stderr)
            taken: dict[str, list[float]] = {who: [] for who in started}
            rates: dict[str, list[float]] = {who: [] for who in started}
            before = _batches(started["batching"])
            for _ in range(rounds):
                for who, url in started.items():
                    latencies, took = asyncio.run(_load(url, case, seconds))
                    taken[who] += latencies
                    rates[who].append(len(latencies) / took)
            after = _batches(started["batching"])
            found.append(
                {
                    "name": case.name,
                    "mean_batch": (after[0] - before[0]) / max(1.0, after[1] - before[1]),
                    "differs": asyncio.run(_difference(started, case)),
                    "who": {
                        who: {
                            "calls_per_s": median(rates[who]),
                            "median_ms": 1e3 * median(times),
                            "p99_ms": 1e3 * sorted(times)[int(0.99 * len(times))],
                            "calls": len(times),
                        }
                        for who, times in taken.items()
                    },
                }
            )
    return found


def render(found: Sequence[dict[str, Any]]) -> str:
    """The table: calls a second and latency, and how many times those without batching."""
    lines = [
        f"{CALLERS} callers at once, one problem each, solved and differentiated in one call.",
        "",
        "| problems | service | calls/s | to no batching | median ms | p99 ms | mean batch | gradient differs by |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in found:
        plain = case["who"]["no batching"]["calls_per_s"]
        for who, row in case["who"].items():
            own = f"{case['mean_batch']:.1f} | {case['differs']:.0e}" if who == "batching" else " | "
            lines.append(
                f"| {case['name']} | {who} | {row['calls_per_s']:.0f} | {row['calls_per_s'] / plain:.2f} "
                f"| {row['median_ms']:.3g} | {row['p99_ms']:.3g} | {own} |"
            )
    return "\n".join(lines)


async def _load(url: str, case: Case, seconds: float) -> tuple[list[float], float]:
    """Seconds that each call took, once every caller has made one call; and for how long it went on."""
    latencies: list[float] = []
    callers = [await _Caller.connected(url, body) for body in _bodies(case)]
    try:
        await asyncio.gather(*(caller.call() for caller in callers))
        began = time.perf_counter()

        async def repeat(caller: _Caller) -> None:
            while (start := time.perf_counter()) < began + seconds:
                await caller.call()
                latencies.append(time.perf_counter() - start)

        await asyncio.gather(*(repeat(caller) for caller in callers))
        return latencies, time.perf_counter() - began
    finally:
        for caller in callers:
            caller.close()


async def _difference(started: dict[str, str], case: Case) -> float:
    """Largest difference of a gradient with batching, all callers at once, from the one without."""

    async def gradients(url: str) -> list[dict[str, Tensor]]:
        callers = [await _Caller.connected(url, body) for body in _bodies(case)]
        replies = await asyncio.gather(*(caller.call() for caller in callers))
        for caller in callers:
            caller.close()
        decoded = [decode(SolveReply, reply, SAFETENSORS)[1] for reply in replies]
        return [{name: t for name, t in out.items() if name.startswith("gradients.")} for out in decoded]

    merged, alone = await gradients(started["batching"]), await gradients(started["no batching"])
    pairs = [(a[name], b[name]) for a, b in zip(merged, alone, strict=True) for name in b]
    return max(float((a - b).norm() / b.norm().clamp(min=1.0)) for a, b in pairs)


def _bodies(case: Case) -> list[bytes]:
    request = SolveRequest(solver=SolverDocument(name=case.solver))
    return [
        b"".join(
            encode(request, {f"problem.{k}": t for k, t in p.parameters().items()} | {"upstream.z": z}, SAFETENSORS)
        )
        for p, z in zip(case.problems, case.cotangents, strict=True)
    ]


@dataclass(frozen=True)
class _Caller:
    """A connection, and the request that goes over it again and again."""

    request: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def connected(cls, url: str, body: bytes) -> _Caller:
        host, _, port = url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = (
            f"POST /v1/solve HTTP/1.1\r\nhost: x\r\ncontent-type: {SAFETENSORS}\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return cls(head.encode() + body, reader, writer)

    async def call(self) -> bytearray:
        """Send, and return the reply's body."""
        self.writer.write(self.request)
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if not head.startswith(b"HTTP/1.1 200") or length is None:
            raise RuntimeError(f"the service answered {head[:40]!r}")
        return bytearray(await self.reader.readexactly(int(length[1])))

    def close(self) -> None:
        """Close the connection."""
        self.writer.close()


def _batches(url: str) -> tuple[float, float]:
    """Calls in batches, and batches, since the start of a service."""
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    calls, batches = (re.search(rf"^argrad_batch_calls_{end} (\S+)$", text, re.MULTILINE) for end in ("sum", "count"))
    if calls is None or batches is None:
        raise RuntimeError("the service counts no batches")
    return float(calls[1]), float(batches[1])


@contextmanager
def _serving(module: Sequence[str], **settings: str) -> Iterator[str]:
    """A service in a process of its own."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | {"ARGRAD_PORT": str(port), "ARGRAD_LOG_LEVEL": "warning"} | settings
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([sys.executable, *module], env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not is_ready(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError("no service: " + log.read().decode(errors="replace")[-600:])
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            process.wait(20)
