"""`make bench`: time argrad beside its peers, print the tables, write a results file."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.groups import GROUPS, Case, Size
from benchmarks.machine import ROOT, circumstances, load
from benchmarks.page import PAGE, write_page
from benchmarks.race import Field, Limits
from benchmarks.remote import time_remote
from benchmarks.report import SCHEMA, render

REMOTE = "remote"
"""The group that needs a service."""

QUICK = Limits(command_s=30.0, budget_s=0.5, turn_ms=20.0)
FULL = Limits(command_s=90.0, budget_s=6.0, turn_ms=100.0)


def main(arguments: list[str]) -> int:
    """Measure what the arguments ask for; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.page:
        write_page()
        print(f"written to {PAGE.relative_to(ROOT)}", file=sys.stderr)
        return 0
    unknown = sorted(set(options.groups) - {*GROUPS, REMOTE})
    if unknown:
        print(f"no group {', '.join(unknown)}; there are {', '.join([*GROUPS, REMOTE])}", file=sys.stderr)
        return 2
    url = os.environ.get("ARGRAD_URL")
    if REMOTE in options.groups and not url:
        print("ARGRAD_URL names no service: run `make bench`, or leave out the group `remote`", file=sys.stderr)
        return 2
    options.seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    results: dict[str, Any] = {"schema": SCHEMA, "is_quick": options.quick, **circumstances(), "seed": options.seed}
    results["groups"] = _race([name for name in GROUPS if name in options.groups], options)
    if REMOTE in options.groups and url:
        print("remote step beside the step in process", file=sys.stderr)
        results["remote"] = [asdict(step) for step in time_remote(url, seed=options.seed, quick=options.quick)]
    results["machine"]["load_at_end"] = load()
    target = options.out or _default_target(results, options)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")
    print(render(results))
    print(f"written to {target}", file=sys.stderr)
    return 0


def _race(names: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    size, limits = Size(quick=options.quick, large=options.large), QUICK if options.quick else FULL
    if options.limit_s:
        limits = Limits(command_s=options.limit_s, budget_s=limits.budget_s, turn_ms=limits.turn_ms)
    field, found = Field(limits), []
    try:
        for name in names:
            title, cases = GROUPS[name]
            races = [_one(field, case, options) for case in cases(size)]
            found.append({"name": name, "title": title, "cases": races})
    finally:
        field.close()
    return found


def _one(field: Field, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    wanted = [e for e in case.field(with_variants=options.variants) if not options.only or e.name in options.only]
    return field.race(case.draw(seed=options.seed), wanted, goal=case.goal)


def _default_target(results: dict[str, Any], options: argparse.Namespace) -> Path:
    """Results of a quick run, or of some contestants alone, are no results: they stay out of the committed ones."""
    is_whole = not results["is_quick"] and not options.only
    parts = [results["date"][:10], results["commit"].rstrip("+")]
    if set(options.groups) != {*GROUPS, REMOTE}:
        parts.append("-".join(name for name in [*GROUPS, REMOTE] if name in options.groups))
    if options.large:
        parts.append("large")
    return ROOT / ("benchmarks/results" if is_whole else ".cache/bench-trials") / f"{'-'.join(parts)}.json"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    every = [*GROUPS, REMOTE]
    parser.add_argument(
        "--groups", type=lambda text: text.split(","), default=every, help=f"of {','.join(every)}; all by default"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats: whether it works")
    parser.add_argument("--large", action="store_true", help="the largest sizes too: minutes each")
    parser.add_argument("--no-variants", dest="variants", action="store_false", help="argrad's own choice alone")
    parser.add_argument("--only", type=lambda text: text.split(","), help="contestants, by name")
    parser.add_argument("--limit-s", type=float, help="seconds for one step of a contestant before it is ended")
    parser.add_argument("--seed", type=int, help="of the random problems; drawn afresh by default, and recorded")
    parser.add_argument("--out", type=Path, help="results file; by default benchmarks/results/DATE-COMMIT.json")
    parser.add_argument("--page", action="store_true", help="write docs/benchmarks.md from the results, and end")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
