"""Callers at once: 32 tasks of one process, or one, against the service with batching and without.

A call is a solve with its gradient in one round trip. What is timed is the service: each caller writes a body that is
ready on a connection of its own, and reads the reply without looking into it. The services run beside each other and
are loaded in turns, so that what else the machine does falls on all of them.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import httpx
import torch
from torch import Tensor

from argrad.problems import QP
from argrad.wire import SAFETENSORS, decode, encode
from argrad.wire.messages import SolverDocument, SolveReply, SolveRequest
from benchmarks.serving.services import IDENTITY, SERVE, serving
from benchmarks.workloads import optnet

CALLERS = 32
MIXED = (20, 60)
"""Least and largest n of the problems of mixed shapes, drawn uniformly; m = n."""


BATCHING, PLAIN, NO_SOLVER = "batching", "no batching", "no solver"
"""The services: with batching and without; and one that answers without solving, which shows what all else takes."""


@dataclass(frozen=True)
class Case:
    """What the callers ask.

    Args:
        key: Names the case in results.
        name: What the table calls it.
        solver: Who solves.
        problems: One a caller.
        cotangents: Of their solutions.
        turns: Into how many a round is divided: more where less is to be told apart.
    """

    key: str
    name: str
    solver: str
    problems: Sequence[QP]
    cotangents: Sequence[Tensor]
    turns: int = 1


def cases(seed: int) -> list[Case]:
    """One size or mixed sizes; `auto`, whose solves are so short that other work shows; and a lone caller."""
    sizes = torch.randint(MIXED[0], MIXED[1] + 1, (CALLERS,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        _case("pdipm 10", "n = m = 10, pdipm", "pdipm", [10] * CALLERS, seed),
        _case("pdipm 50", "n = m = 50, pdipm", "pdipm", [50] * CALLERS, seed),
        _case("pdipm mixed", "n = m from 20 to 60, pdipm", "pdipm", sizes, seed),
        _case("auto 10", "n = m = 10, auto", "auto", [10] * CALLERS, seed),
        _case("auto 50", "n = m = 50, auto", "auto", [50] * CALLERS, seed),
        replace(_case("lone auto 10", "n = m = 10, auto", "auto", [10], seed), turns=10),
        replace(_case("lone pdipm 50", "n = m = 50, pdipm", "pdipm", [50], seed), turns=10),
    ]


def _case(key: str, name: str, solver: str, sizes: Sequence[int], seed: int) -> Case:
    """OptNet's random problems, n = m, one a caller."""
    drawn = [optnet(n, 1, seed=seed + i) for i, n in enumerate(sizes)]
    problems = [QP(**{k: t[0] for k, t in w.parameters.items()}) for w in drawn]
    callers = f"{len(sizes)} caller{'s' if len(sizes) > 1 else ''}"
    return Case(key, f"{name}, {callers}", solver, problems, [w.grad_z[0] for w in drawn])


def measure(seed: int, *, seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Throughput and latency of every case on every service.

    Args:
        seed: Of the problems.
        seconds: That each case loads each service for in each round.
        rounds: Of all services in turns.
    """
    with ExitStack() as stack:
        started = {
            BATCHING: stack.enter_context(serving(SERVE)),
            PLAIN: stack.enter_context(serving(SERVE, ARGRAD_BATCHING="false")),
            NO_SOLVER: stack.enter_context(serving(IDENTITY)),
        }
        return [_measure_one(case, started, seconds=seconds, rounds=rounds) for case in cases(seed)]


def _measure_one(case: Case, started: Mapping[str, str], *, seconds: float, rounds: int) -> dict[str, Any]:
    print(case.name, file=sys.stderr)
    taken: dict[str, list[float]] = {who: [] for who in started}
    rates: dict[str, list[float]] = {who: [] for who in started}
    before = _batches(started[BATCHING])
    for _ in range(rounds * case.turns):
        for who, url in started.items():
            latencies, took = asyncio.run(_load(url, case, seconds / case.turns))
            taken[who] += latencies
            rates[who].append(len(latencies) / took)
    after = _batches(started[BATCHING])
    return {
        "key": case.key,
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


def render(found: Sequence[dict[str, Any]]) -> str:
    """The table: calls a second and latency, and how many times those of the other services."""
    lines = [
        "Callers at once, one problem each, solved and differentiated in one call.",
        "",
        "| problems | service | calls/s | to no batching | to no solver | median ms | p99 ms | mean batch "
        "| gradient differs by |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in found:
        for who, row in case["who"].items():
            ratios = " | ".join(f"{rate_ratio(case, who, other):.2f}" for other in (PLAIN, NO_SOLVER))
            own = f"{case['mean_batch']:.1f} | {case['differs']:.0e}" if who == BATCHING else " | "
            lines.append(
                f"| {case['name']} | {who} | {row['calls_per_s']:.0f} | {ratios} "
                f"| {row['median_ms']:.3g} | {row['p99_ms']:.3g} | {own} |"
            )
    return "\n".join(lines)


def rate_ratio(case: Mapping[str, Any], who: str, other: str) -> float:
    """How many times as many calls one service answers as another."""
    return float(case["who"][who]["calls_per_s"] / case["who"][other]["calls_per_s"])


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


async def _difference(started: Mapping[str, str], case: Case) -> float:
    """Largest difference of a gradient with batching, all callers at once, from the one without."""

    async def gradients(url: str) -> list[dict[str, Tensor]]:
        callers = [await _Caller.connected(url, body) for body in _bodies(case)]
        replies = await asyncio.gather(*(caller.call() for caller in callers))
        for caller in callers:
            caller.close()
        decoded = [decode(SolveReply, reply, SAFETENSORS)[1] for reply in replies]
        return [{name: t for name, t in out.items() if name.startswith("gradients.")} for out in decoded]

    merged, alone = await gradients(started[BATCHING]), await gradients(started[PLAIN])
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
            "POST /v1/solve HTTP/1.1\r\nhost: localhost\r\n"
            f"content-type: {SAFETENSORS}\r\ncontent-length: {len(body)}\r\n\r\n"
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
