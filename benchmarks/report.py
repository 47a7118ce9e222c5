"""The tables that `make bench` prints; the same text for the same results file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]


def render(results: Record) -> str:
    """Markdown: where it was measured, the engine beside its peers, and what the network adds."""
    machine, versions = results["machine"], results["versions"]
    lines = [
        f"argrad {versions['argrad']} ({results['commit']}), {results['date']}, seed {results['seed']}",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} torch threads, "
        f"torch {versions['torch']}",
        "",
    ]
    if results["peers"]:
        lines += [*_peers(results["peers"]), ""]
    if results["remote"]:
        lines += [*_remote(results["remote"]), ""]
    return "\n".join(lines)


def _peers(workloads: Sequence[Record]) -> list[str]:
    header = (
        "| workload | who | forward ms | backward ms | ratio | KKT residual | z worst | gradient worst (median) |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    )
    rows = []
    for workload in workloads:
        own = next(row for row in workload["contestants"] if row["name"].startswith("argrad"))
        for row in workload["contestants"]:
            ratio = _total(row) / _total(own)
            cells = (
                workload["name"],
                row["name"],
                _number(row["forward_ms"]),
                _number(row["backward_ms"]),
                f"{ratio:.2f}",
                f"{row['kkt_residual']:.0e}",
                f"{row['z_worst']:.0e}",
                f"{row['gradient_worst']:.0e} ({row['gradient_median']:.0e})",
            )
            rows.append(f"| {' | '.join(cells)} |")
    return ["Ratio: forward + backward of that row over argrad's.", "", *header, *rows]


def _remote(steps: Sequence[Record]) -> list[str]:
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


def _total(row: Record) -> float:
    return float(row["forward_ms"] + row["backward_ms"])


def _number(milliseconds: float) -> str:
    """Three significant digits."""
    return f"{milliseconds:.0f}" if abs(milliseconds) >= 100 else f"{milliseconds:#.3g}".rstrip(".")
