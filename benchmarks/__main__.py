"""`make bench`: time engine and service beside their peers, print a table, write a results file."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.contestants import Contestant, Engine, Proxsuite, Qpth
from benchmarks.machine import ROOT, circumstances
from benchmarks.measures import judge, record, time_together
from benchmarks.reference import exact
from benchmarks.remote import time_remote
from benchmarks.report import render
from benchmarks.workloads import optnet

SIZES = (10, 50, 100)
BATCHES = (1, 64, 128)


def main(arguments: list[str]) -> int:
    """Measure what the arguments ask for; returns the exit status."""
    options = _parser().parse_args(arguments)
    options.seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    url = os.environ.get("ARGRAD_URL")
    if not url and not options.no_remote:
        print("ARGRAD_URL names no service: run `make bench`, or give --no-remote", file=sys.stderr)
        return 2
    results: dict[str, Any] = {**circumstances(), "seed": options.seed, "peers": [], "remote": []}
    for n in options.sizes:
        for batch in options.batches:
            results["peers"].append(_compare(n, batch, options))
    if url and not options.no_remote:
        print("remote step beside the step in process", file=sys.stderr)
        results["remote"] = [asdict(step) for step in time_remote(url, seed=options.seed, quick=options.quick)]
    target = options.out or _default_target(results)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")
    print(render(results))
    print(f"written to {target}", file=sys.stderr)
    return 0


def _compare(n: int, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    workload = optnet(n, batch, seed=options.seed)
    print(workload.name, file=sys.stderr)
    truth = exact(workload.problem, workload.grad_z)
    contestants: list[Contestant] = [Engine(), Engine("pdipm"), Qpth(), Proxsuite()]
    for contestant in contestants:
        contestant.prepare(workload)
    times = time_together(contestants, budget_s=2 if options.quick else 12, most=5 if options.quick else 40)
    rows = []
    for contestant in contestants:
        accuracy = judge(workload.problem, contestant.answer(), truth)
        about = {"name": contestant.name, "settings": contestant.settings}
        rows.append(about | record(times[contestant.name], accuracy))
    return {
        "name": workload.name,
        "n": n,
        "batch": batch,
        "smallest_margin": float(truth.margin.min()),
        "contestants": rows,
    }


def _default_target(results: dict[str, Any]) -> Path:
    return ROOT / "benchmarks" / "results" / f"{results['date'][:10]}-{results['commit'].rstrip('+')}.json"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="n = m; none leaves the peers out")
    parser.add_argument("--batches", type=int, nargs="*", default=BATCHES)
    parser.add_argument("--seed", type=int, help="of the random problems; drawn afresh by default, and recorded")
    parser.add_argument("--quick", action="store_true", help="few repeats")
    parser.add_argument("--no-remote", action="store_true", help="leave the service out")
    parser.add_argument("--out", type=Path, help="results file; by default benchmarks/results/DATE-COMMIT.json")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
