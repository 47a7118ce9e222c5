"""What shows while `argrad bench` loads a service: how soon it answers probes, and what it does without a cache."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

import httpx

from benchmarks.serving.services import plain_client, serving

_BETWEEN_S = 0.005
_WARMUP_S = 1.0
SMALL, LARGE = "small calls", "large calls"
CACHE, NO_CACHE = "with its cache", "without"


@dataclass(frozen=True)
class Load:
    """What `argrad bench` does.

    Args:
        key: Names the load in results.
        name: What the table calls it.
        flags: Of the command.
    """

    key: str
    name: str
    flags: str

    def start(self, url: str, seed: int, seconds: float) -> subprocess.Popen[bytes]:
        """Begin; half a second after the warm-up the queues are full."""
        fixed = f"--url {url} --seed {seed} --duration {seconds} --warmup {_WARMUP_S} --json - "
        command = [sys.executable, "-m", "argrad.cli", "bench", *fixed.split(), *self.flags.split()]
        return subprocess.Popen(command, stdout=subprocess.PIPE)


def result_of(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """What a load found, once it is over.

    Raises:
        RuntimeError: it failed.
    """
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"argrad bench ended with {process.returncode}")
    found: dict[str, Any] = json.loads(output)
    return found


def loads(batch: int) -> list[Load]:
    """Many small calls; and a few large ones, 20 MB up and as much down where 128 problems are in one."""
    large = f"--callers 4 --n 100 --batch {batch} --gradients full"
    return [
        Load(SMALL, "32 callers, n = m = 50, pdipm", "--callers 32 --n 50 --solver pdipm --gradients full"),
        Load(LARGE, f"4 callers, n = m = 100, batch {batch}, auto", large),
    ]


def overloads() -> list[Load]:
    """More callers than the queue has room for; each solves, and differentiates in a call of its own."""
    flags = "--callers 200 --step solve+vjp --n 50 --solver"
    return [Load(solver, f"200 callers, n = m = 50, {solver}", f"{flags} {solver}") for solver in ("pdipm", "auto")]


def measure_liveness(seed: int, *, seconds: float, batch: int) -> list[dict[str, Any]]:
    """Latency of probes, one after the other on a connection of their own, under each load.

    Args:
        seed: Of the problems.
        seconds: Of each load.
        batch: Problems of a large call.
    """
    found = []
    with serving() as url:
        for load in loads(batch):
            print(f"liveness: {load.name}", file=sys.stderr)
            process = load.start(url, seed, seconds)
            times = sorted(probe(url, process, seconds))
            calls = result_of(process)["steps"]
            at = {"median_ms": median(times), "p99_ms": times[int(0.99 * len(times))], "max_ms": times[-1]}
            found.append({"key": load.key, "name": load.name, "calls": calls, "probes": len(times), **at})
    return found


def probe(url: str, process: subprocess.Popen[bytes], seconds: float) -> list[float]:
    """Milliseconds of each probe of `/health/live` while a load is measured.

    Args:
        url: Of the service.
        process: The load.
        seconds: For which to probe.

    Raises:
        RuntimeError: the load was over before.
    """
    took: list[float] = []
    with plain_client(url) as client:
        before = _calls_of(client)
        # The first step and the warm-up are over when calls have been coming for so long.
        while _calls_of(client) == before and process.poll() is None:
            time.sleep(0.05)
        time.sleep(_WARMUP_S)
        until = time.perf_counter() + seconds
        while (began := time.perf_counter()) < until and process.poll() is None:
            client.get("/health/live").raise_for_status()
            took.append(1e3 * (time.perf_counter() - began))
            time.sleep(_BETWEEN_S)
    if not took:
        raise RuntimeError("the load was over before it was probed")
    return took


def measure_overload(seed: int, *, seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Steps that end well in a second with the cache of forward states and without, in turns.

    Args:
        seed: Of the problems.
        seconds: Of each load in each round.
        rounds: Turns of each.
    """
    found = []
    with ExitStack() as stack:
        started = {
            CACHE: stack.enter_context(serving()),
            NO_CACHE: stack.enter_context(serving(ARGRAD_STATE_BUDGET_BYTES="0")),
        }
        for load in overloads():
            print(f"overload: {load.name}", file=sys.stderr)
            results: dict[str, list[dict[str, Any]]] = {who: [] for who in started}
            for _ in range(rounds):
                for who, url in started.items():
                    results[who].append(result_of(load.start(url, seed, seconds)))
            found.append({"key": load.key, "name": load.name, "who": {w: _goodput(r) for w, r in results.items()}})
    return found


def _goodput(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "steps_per_s": median(result["steps_per_s"] for result in results),
        "p99_ms": median(result["latency_ms"]["p99"] for result in results),
        "refused": sum(result["errors"].get("429 overloaded", 0) for result in results),
        "failed": sum(sum(result["errors"].values()) for result in results),
        "steps": sum(result["steps"] for result in results),
        "resent": sum(result["resent"] for result in results),
    }


def render_liveness(found: Sequence[Mapping[str, Any]]) -> str:
    """The table of the probes."""
    lines = [
        "`/health/live`, asked every 5 ms on a connection of its own, under load.",
        "",
        "| load | calls | probes | median ms | p99 ms | longest ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in found:
        times = " | ".join(f"{row[name]:.3g}" for name in ("median_ms", "p99_ms", "max_ms"))
        lines.append(f"| {row['name']} | {row['calls']} | {row['probes']} | {times} |")
    return "\n".join(lines)


def render_overload(found: Sequence[Mapping[str, Any]]) -> str:
    """The table of what is left without the cache."""
    lines = [
        "Solve and vjp, two calls a step, more callers than the queue holds; with the cache of states and without.",
        "",
        "| load | cache | steps/s | to with cache | p99 ms | steps | sent again | failed (429) |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in found:
        for who, row in case["who"].items():
            lines.append(
                f"| {case['name']} | {who} | {row['steps_per_s']:.0f} | {left_of(case) if who == NO_CACHE else 1:.2f} "
                f"| {row['p99_ms']:.3g} | {row['steps']} | {row['resent']} | {row['failed']} ({row['refused']}) |"
            )
    return "\n".join(lines)


def left_of(case: Mapping[str, Any]) -> float:
    """Share of the goodput that is left without the cache."""
    return float(case["who"][NO_CACHE]["steps_per_s"] / case["who"][CACHE]["steps_per_s"])


def _calls_of(client: httpx.Client) -> float:
    """Calls that a service has answered so far."""
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith('argrad_requests_total{route="/v1/'))
