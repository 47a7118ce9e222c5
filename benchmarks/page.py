"""`python -m benchmarks --page`: docs/benchmarks.md from the committed results, and from nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.groups import GROUPS
from benchmarks.machine import ROOT
from benchmarks.report import SCHEMA, Record, circumstances, render_group, render_remote

PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"

_INTRODUCTION = """# Benchmarks

Written by `make bench-page` from the newest [results](../benchmarks/results) of each group; do not edit.
How it is measured, and how to repeat it: [benchmarks/README.md](../benchmarks/README.md).

Each library solves the same problems, drawn afresh at each run, forward and backward through autograd, in a process of
its own, all taking turns. Times are medians in milliseconds of one run: compare ratios of one table, not milliseconds
of two. Errors are relative, against active sets found independently of argrad: an element of the batch is *missed* in
z beyond 1e-6 and in the gradient beyond 1e-5. *Best* is the fastest peer with z ≤ 1e-6 and gradient ≤ 1e-4 on at least
99 % of the elements; a peer that is faster and not right is in the table, and not the best. *Ratio* is that row's time
over argrad's, so that below 1 the row is faster. *Cosine* is between the gradient and the exact one, on average.
"""


def write_page(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Write the page; groups without results are named."""
    page.write_text(render_page(results))


def render_page(results: Path = RESULTS) -> str:
    """The page's text, from every results file of that folder that is of this schema and was no quick run."""
    files = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    usable = [one for one in files if one.get("schema") == SCHEMA and not one["is_quick"]]
    usable.sort(key=lambda one: str(one["date"]))
    lines = [_INTRODUCTION]
    lines += _lost(usable)
    missing = []
    for name in GROUPS:
        found = _newest(usable, name)
        if found is None:
            missing.append(name)
            continue
        run, group = found
        lines += [*render_group(group, level="##"), f"<sub>{circumstances(run)}</sub>", ""]
    remote = [run for run in usable if run.get("remote")]
    if remote:
        lines += ["## The way to the service and back", "", *render_remote(remote[-1]["remote"]), ""]
        lines += [f"<sub>{circumstances(remote[-1])}</sub>", ""]
    lines += _on_a_gpu(results / "gpu")
    if missing:
        lines += [f"Not yet measured: {', '.join(missing)}.", ""]
    return "\n".join(lines)


def _on_a_gpu(results: Path) -> list[str]:
    """What `benchmarks/gpu.py` has written, or that nothing was measured."""
    lines = ["## On a GPU", ""]
    for path in sorted(results.glob("*.json")):
        run = json.loads(path.read_text())
        lines.append(f"- [{path.name}](../benchmarks/results/gpu/{path.name}): {run['device']}, {run['date']}")
    if len(lines) == 2:
        lines.append(
            "Not yet measured: nothing of argrad has run on CUDA so far, and the tests that need it are skipped "
            "without it. `python benchmarks/gpu.py` compares with the CPU and times, with torch and NumPy alone."
        )
    return [*lines, ""]


def _newest(usable: list[Record], name: str) -> tuple[Record, Record] | None:
    """The newest run with the group, with the cases of older runs that it has not (larger sizes are run apart)."""
    runs = [(run, group) for run in usable for group in run["groups"] if group["name"] == name]
    if not runs:
        return None
    run, group = runs[-1]
    seen = {case["name"] for case in group["cases"]}
    older: list[dict[str, Any]] = []
    for _, other in reversed(runs[:-1]):
        new = [case for case in other["cases"] if case["name"] not in seen]
        older += new
        seen |= {case["name"] for case in new}
    return run, {**group, "cases": [*group["cases"], *older]}


def _lost(usable: list[Record]) -> list[str]:
    """Where a peer wins, or a figure is not reached, first of all."""
    found = []
    for name in GROUPS:
        newest = _newest(usable, name)
        for case in [] if newest is None else newest[1]["cases"]:
            ratio, goal = case["ratio"], case["goal"]
            if ratio is not None and ratio < 1:
                found.append(f"- {case['name']}: {case['best']} is {1 / ratio:.1f} times as fast as argrad.")
            elif ratio is not None and goal is not None and ratio < goal:
                found.append(
                    f"- {case['name']}: 1/{goal:g} is wanted, 1/{ratio:.1f} is reached; {case['best']} is next."
                )
            if not case["is_right"]:
                found.append(f"- {case['name']}: argrad's answers are not all within the bounds.")
    return ["## Where argrad falls short", "", *found, ""] if found else []
