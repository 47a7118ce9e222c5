"""What replicas add on one machine: the same load on one service, on one behind the proxy, and on several behind it.

    make bench-replicas                    or python -m benchmarks.replicas --replicas 3 --seconds 10

Replicas, proxy and callers share the cores: more of them than cores add no throughput, only a failure that nobody
notices. How the load fell on them is counted by each itself.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from argrad.bench import Plan, run
from argrad.bench.plan import options_of
from argrad.bench.result import ResultDocument
from benchmarks.machine import circumstances, write_results
from benchmarks.machine import load as machine_load
from tests.conftest import free_port
from tests.deploy.names import serving_names
from tests.deploy.support import Replica, proxy

CALLS = ("/v1/solve", "/v1/vjp")
BASE = "1"


@dataclass(frozen=True)
class Load:
    """What callers do: a forward and a backward pass each step, in two calls.

    Args:
        callers: That are there at once; each begins a step when its last is over.
        n: Variables, and inequalities.
        batch: Problems of a call.
    """

    callers: int
    n: int
    batch: int

    def plan(self, url: str, seconds: float) -> Plan:
        """The load on an address."""
        return Plan(
            url=url,
            callers=self.callers,
            duration_s=seconds,
            warmup_s=2.0,
            n=self.n,
            m=self.n,
            batch=self.batch,
            step="solve+vjp",
            options=options_of("auto", "auto", "float64"),
        )

    def __str__(self) -> str:
        return f"{self.callers} callers, n = m = {self.n}, batch {self.batch}"


LOADS = (Load(callers=32, n=10, batch=1), Load(callers=16, n=50, batch=16), Load(callers=8, n=100, batch=64))


@dataclass(frozen=True)
class Measured:
    """One turn.

    Args:
        result: What the callers saw.
        served: Calls that each replica answered.
    """

    result: ResultDocument
    served: list[float]


@contextlib.contextmanager
def deployed(count: int, threads: int, place: Path) -> Iterator[tuple[str, list[Replica]]]:
    """Replicas behind the shipped proxy: its address, and they themselves."""
    port = free_port()
    settings = {"ARGRAD_TORCH_THREADS": str(threads), "ARGRAD_LOG_LEVEL": "warning"}
    hosts = [f"127.0.0.{2 + i}" for i in range(count)]
    replicas = [Replica(host, port, place / f"{host}.log", settings) for host in hosts]
    try:
        for replica in replicas:
            replica.start()
        for replica in replicas:
            replica.wait_until_ready()
        with serving_names(hosts) as names, proxy(names, port, place / "caddy.log") as (url, _):
            yield url, replicas
    finally:
        for replica in replicas:
            replica.stop()


def measure(load: Load, url: str, replicas: list[Replica], seconds: float) -> Measured:
    """Load an address, and count who served it."""
    before = [_served(replica) for replica in replicas]
    result = run(load.plan(url, seconds))
    return Measured(result, [_served(replica) - count for replica, count in zip(replicas, before, strict=True)])


def _served(replica: Replica) -> float:
    return sum(replica.posts(route) for route in CALLS)


def main(argv: list[str]) -> int:
    """Measure in turns, and print a table of medians."""
    parser = argparse.ArgumentParser(description="Throughput of replicas beside one service.")
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each row; fewer than 3 are a trial")
    parser.add_argument("--out", type=Path, help="results file")
    options = parser.parse_args(argv)
    cores = len(os.sched_getaffinity(0))
    threads = max(1, cores // options.replicas)
    turns: dict[tuple[Load, str], list[Measured]] = {}
    results: dict[str, Any] = {**circumstances(), "replicas": options.replicas, "seconds": options.seconds}
    with contextlib.ExitStack() as stack:
        places = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2)]
        one_url, one = stack.enter_context(deployed(1, cores, places[0]))
        url, several = stack.enter_context(deployed(options.replicas, threads, places[1]))
        rows = {
            "1, no proxy": (one[0].url, one),
            BASE: (one_url, one),
            f"{options.replicas}": (url, several),
        }
        for load in LOADS:  # in turns: a slow spell of the machine meets all rows of a load
            for round_ in range(options.rounds):
                order = list(rows.items())
                for name, (address, replicas) in order[round_ % len(order) :] + order[: round_ % len(order)]:
                    turns.setdefault((load, name), []).append(measure(load, address, replicas, options.seconds))
    title = (
        f"{cores} cores; one replica has {cores} threads, each of several {threads}; medians of {options.rounds} turns"
    )
    results |= {"rounds": options.rounds, "threads": {"one": cores, "each of several": threads}}
    results["rows"] = [_row(load, name, measured, turns[load, BASE]) for (load, name), measured in turns.items()]
    results["machine"]["load_at_end"] = machine_load()
    _show(results["rows"], title)
    target = write_results(results, "deployment", "replicas", is_trial=options.rounds < 3, out=options.out)
    print(f"written to {target}", file=sys.stderr)
    return 0


def _row(load: Load, name: str, measured: list[Measured], base: list[Measured]) -> dict[str, Any]:
    """Medians of the turns; how the load fell on the replicas is of all turns together."""
    rate = _rate(measured)
    latencies = [m.result.latency_ms for m in measured if m.result.latency_ms is not None]
    served = [sum(counts) for counts in zip(*(m.served for m in measured), strict=True)]
    return {
        "load": str(load),
        "replicas": name,
        "steps_per_s": rate,
        "steps_per_s_by_turn": [m.result.steps_per_s for m in measured],
        "of_one": rate / _rate(base) if _rate(base) else None,
        "p50_ms": median(latency.p50 for latency in latencies) if latencies else None,
        "p99_ms": median(latency.p99 for latency in latencies) if latencies else None,
        "errors": sum(sum(m.result.errors.values()) for m in measured),
        "resent": sum(m.result.resent for m in measured),
        "shares": [count / max(1.0, sum(served)) for count in served],
    }


def _show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table("load", "replicas", "steps/s", "of one", "p50 ms", "p99 ms", "errors", "resent", "steps/s of each")
    table.title = title
    for row in rows:
        table.add_row(
            row["load"],
            row["replicas"],
            f"{row['steps_per_s']:.1f}",
            _number(row["of_one"], ".2f"),
            _number(row["p50_ms"], ".1f"),
            _number(row["p99_ms"], ".1f"),
            str(row["errors"]),
            str(row["resent"]),
            ", ".join(f"{row['steps_per_s'] * share:.1f} ({share:.0%})" for share in row["shares"]),
        )
    Console(width=140).print(table)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _rate(measured: list[Measured]) -> float:
    return median(m.result.steps_per_s for m in measured)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
