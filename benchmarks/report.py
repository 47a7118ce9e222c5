"""The tables that `make bench` prints; the same text for the same results file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.measures import is_right_enough, total_ms

Record = dict[str, Any]

SCHEMA = 2
"""Of results files; the first had no groups."""


def render(results: Record) -> str:
    """Markdown: where it was measured, a table for each workload, and what the network adds."""
    lines = [circumstances(results), ""]
    for group in results["groups"]:
        lines += render_group(group, level="##")
    if results.get("remote"):
        lines += ["## The way to the service and back", "", *render_remote(results["remote"]), ""]
    return "\n".join(lines)


def circumstances(results: Record) -> str:
    """Where, when and with what it was measured."""
    machine, versions = results["machine"], results["versions"]
    others = ", ".join(f"{name} {number}" for name, number in versions.items() if name != "argrad")
    quick = " **A quick run, on small sizes: its times mean nothing.**" if results["is_quick"] else ""
    return (
        f"argrad {versions['argrad']} ({results['commit']}), {results['date']}, seed {results['seed']}; "
        f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} torch threads, load "
        f"{machine['load_at_start']} before and {machine.get('load_at_end', '?')} after; {others}.{quick}"
    )


def render_group(group: Record, *, level: str) -> list[str]:
    """The group's title, and for each workload a verdict and a table."""
    lines = [f"{level} {group['title']}", ""]
    for case in group["cases"]:
        lines += [f"{level}# {case['name']}", "", verdict(case), "", *_table(case), *_absent(case), ""]
    return lines


def verdict(case: Record) -> str:
    """Who is best, and how argrad compares with what it is to reach."""
    own = next(row for row in case["contestants"] if row["is_ours"])
    about = f"Gradients of {', '.join(case['wrt'])}; {_active(case)}. "
    if own["status"] != "ok":
        return f"{about}argrad failed: {own['why']}."
    missed = f"{own['z_missed']} of {own['elements']} in z and {own['gradient_missed']} of {own['gradient_elements']}"
    right = "argrad misses nothing" if case["is_right"] else f"argrad misses {missed} in the gradient"
    if case["ratio"] is None:
        return f"{about}{right}; no peer is right on 99 % of the elements."
    time = f"takes {_fraction(case['ratio'])} the time of the best peer, {case['best']}"
    if case["goal"] is None:
        return f"{about}{right} and {time}."
    wanted = f"1/{case['goal']:g}"
    reached = "as wanted" if case["ratio"] >= case["goal"] else "**short of what is wanted**"
    return f"{about}{right} and {time}; {wanted} or less is wanted: {reached}."


def _active(case: Record) -> str:
    return f"{case['active_mean']:.0f} active inequalities" + (" on average" if case["elements"] > 1 else "")


def _fraction(ratio: float) -> str:
    return f"1/{ratio:.1f} of" if ratio >= 1 else f"{1 / ratio:.1f} times"


def _table(case: Record) -> list[str]:
    header = (
        "| who | forward ms | backward ms | ratio | z worst | gradient worst (median) | z missed | gradient missed "
        "| cosine |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    )
    own = next(row for row in case["contestants"] if row["is_ours"])
    rows = []
    for row in case["contestants"]:
        if row["status"] != "ok":
            continue
        ratio = f"{total_ms(row) / total_ms(own):.2f}" if own["status"] == "ok" else "–"
        mark = " (best)" if row["name"] == case["best"] else ""
        aside = "" if row["is_ours"] or is_right_enough(row) else " (not right)"
        cells = (
            row["name"] + mark + aside,
            _number(row["forward_ms"]),
            _number(row["backward_ms"]),
            ratio,
            f"{row['z_worst']:.0e}",
            f"{row['gradient_worst']:.0e} ({row['gradient_median']:.0e})",
            f"{row['z_missed']} of {row['elements']}",
            f"{row['gradient_missed']} of {row['gradient_elements']}",
            f"{row['cosine']:.7f}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return [*header, *rows]


def _absent(case: Record) -> list[str]:
    """Those who failed with the reason; those who do not take such problems are left out."""
    rows = [row for row in case["contestants"] if row["status"] != "ok" and not row["why"].startswith("takes no")]
    if not rows:
        return []
    return ["", *(f"- {row['name']}: {row['status']} ({row['why']})" for row in rows)]


def render_remote(steps: Sequence[Record]) -> list[str]:
    """The table of the remote step."""
    header = (
        "| forward + backward through autograd | engine ms | in process ms | remote ms | ratio | difference ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    )
    rows = []
    for step in steps:
        cells = (
            f"{step['name']}, {step['solver']}",
            _number(step["engine_ms"]),
            _number(step["in_process_ms"]),
            _number(step["remote_ms"]),
            f"{step['remote_ms'] / step['in_process_ms']:.2f}",
            _number(step["remote_ms"] - step["in_process_ms"]),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return ["Ratio and difference: remote to in process.", "", *header, *rows]


def _number(milliseconds: float) -> str:
    """Three significant digits."""
    return f"{milliseconds:.0f}" if abs(milliseconds) >= 100 else f"{milliseconds:#.3g}".rstrip(".")
