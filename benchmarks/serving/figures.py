"""What is wanted of the service, and whether it was found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.serving import loads, memory
from benchmarks.serving.callers import BATCHING, NO_SOLVER, PLAIN, rate_ratio
from benchmarks.serving.training import LARGE, REGISTERED, REMOTE, SMALL, TESSERACT, UNIX, overhead_ms


@dataclass(frozen=True)
class Figure:
    """A bound, and what was measured.

    Args:
        name: What it bounds.
        wanted: The bound.
        found: What was measured.
        unit: Of both.
        is_least: Whether it bounds from below.
    """

    name: str
    wanted: float
    found: float
    unit: str = ""
    is_least: bool = False

    @property
    def is_met(self) -> bool:
        """Whether what was measured keeps the bound."""
        return self.found >= self.wanted if self.is_least else self.found <= self.wanted


def figures(results: Mapping[str, Any]) -> Iterator[Figure]:
    """Every bound that a run of all parts can tell.

    Args:
        results: Of all parts, as the results file holds them.
    """
    yield from _of_steps(_by_key(results["steps"]))
    yield from _of_callers(_by_key(results["callers"]))
    for row in results["liveness"]:
        yield Figure(f"/health/live p99, {row['name']}", 20.0, row["p99_ms"], "ms")
    for case in results["overload"]:
        yield Figure(f"goodput left without the cache, {case['name']}", 0.7, loads.left_of(case), "×", is_least=True)
    for row in results["memory"]:
        yield Figure(f"peak to 2 × body + workspace, {row['name']}", 1.0, memory.share_of(row), "×")


def _of_steps(cases: Mapping[str, Any]) -> Iterator[Figure]:
    for key, wanted, share in ((SMALL, 1.6, 1 / 4), (LARGE, 45.0, 1 / 10)):
        case = cases[key]
        own = overhead_ms(case, REMOTE)
        yield Figure(f"overhead of a step, {case['name']}", wanted, own, "ms")
        yield Figure(f"the same beside Tesseract's, {case['name']}", share, own / overhead_ms(case, TESSERACT), "×")
    yield Figure(f"the same over a unix socket, {cases[SMALL]['name']}", 1.2, overhead_ms(cases[SMALL], UNIX), "ms")
    case = cases[REGISTERED]
    yield Figure(f"overhead of a step, {case['name']}", 6.0, overhead_ms(case, REMOTE), "ms")


def _of_callers(cases: Mapping[str, Any]) -> Iterator[Figure]:
    for key, wanted in (("pdipm 50", 2.5), ("pdipm 10", 4.0), ("pdipm mixed", 2.0)):
        case = cases[key]
        yield Figure(
            f"rate to no batching, {case['name']}", wanted, rate_ratio(case, BATCHING, PLAIN), "×", is_least=True
        )
        ratio = case["who"][BATCHING]["p99_ms"] / case["who"][PLAIN]["p99_ms"]
        yield Figure(f"p99 to no batching, {case['name']}", 1.0, ratio, "×")
    case = cases["pdipm mixed"]
    yield Figure(f"gradient with batching differs by, {case['name']}", 1e-10, case["differs"])
    for key in ("auto 10", "auto 50"):
        case = cases[key]
        yield Figure(
            f"rate to no solver, {case['name']}", 0.7, rate_ratio(case, BATCHING, NO_SOLVER), "×", is_least=True
        )
    for key in ("lone auto 10", "lone pdipm 50"):
        case = cases[key]
        ratio = case["who"][BATCHING]["median_ms"] / case["who"][PLAIN]["median_ms"]
        yield Figure(f"median to no batching, {case['name']}", 1.03, ratio, "×")


def render(found: Sequence[Figure]) -> str:
    """The table: wanted, found, met."""
    lines = ["| figure | wanted | found | |", "| --- | ---: | ---: | --- |"]
    for figure in found:
        sign, unit = "≥" if figure.is_least else "≤", f" {figure.unit}".rstrip()
        verdict = "met" if figure.is_met else "**short**"
        lines.append(f"| {figure.name} | {sign} {figure.wanted:.3g}{unit} | {figure.found:.3g}{unit} | {verdict} |")
    return "\n".join(lines)


def _by_key(cases: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {case["key"]: case for case in cases}
