"""Which workloads there are, in groups that can be asked for by name, and what is to be reached on each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from benchmarks import workloads
from benchmarks.contestants.field import PEERS, Entrant, our_variants, ours
from benchmarks.workloads import Workload

TRUNCATIONS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""ε of Alt-Diff's table 2."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One workload of a group.

    Args:
        draw: Makes it, given the `seed`.
        goal: How many times faster than the best peer argrad is to be.
        variants: Whether all of argrad's solvers and methods take part, not its choice alone.
        entrants: In place of argrad and the peers.
    """

    draw: Callable[..., Workload]
    goal: float | None = None
    variants: bool = False
    entrants: tuple[Entrant, ...] | None = None

    def field(self, *, with_variants: bool) -> list[Entrant]:
        """Who takes part."""
        if self.entrants is not None:
            return list(self.entrants)
        return [ours(), *(our_variants() if self.variants and with_variants else ()), *PEERS]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of each group is wanted."""

    quick: bool = False
    large: bool = False


def _optnet(size: Size) -> Iterator[Case]:
    batch = 16 if size.quick else 128
    for n in (10, 50, 100):
        yield Case(draw=partial(workloads.optnet, n, batch), goal=5, variants=n == 50)
    yield Case(draw=partial(workloads.optnet, 100, 1), goal=2)


def _tiny(size: Size) -> Iterator[Case]:
    batch = 256 if size.quick else 4096
    yield Case(draw=partial(workloads.optnet, 5, batch, m=10), goal=10)


def _tv(size: Size) -> Iterator[Case]:
    points, batch = (30, 4) if size.quick else (100, 32)
    yield Case(draw=partial(workloads.total_variation, points, batch), goal=8)


def _altdiff(size: Size) -> Iterator[Case]:
    sizes = [(300, 100, 40)] if size.quick else [(1500, 500, 200)]
    for n, m, p in sizes + ([(3000, 1000, 500)] if size.large else []):
        yield Case(draw=partial(workloads.altdiff, n, m, p), goal=1.5)


def _bpqp(size: Size) -> Iterator[Case]:
    sizes = [(100, 20)] if size.quick else [(500, 100)]
    for n, m in sizes + ([(3000, 1000), (5000, 2000)] if size.large else []):
        goal = 2.0 if n > 500 else 1.5
        yield Case(draw=partial(workloads.bpqp, n, m), goal=goal)
        yield Case(draw=partial(workloads.bpqp_active, n, m), goal=goal, variants=n <= 500)


def _bpqp_lp(size: Size) -> Iterator[Case]:
    for n, m in [(100, 20)] if size.quick else [(100, 20), (500, 100)]:
        yield Case(draw=partial(workloads.bpqp_lp, n, m))


def _vertex(size: Size) -> Iterator[Case]:
    yield Case(draw=partial(workloads.vertex_lp, 20, 40, 5, 8 if size.quick else 32), variants=True)
    if not size.quick:
        yield Case(draw=partial(workloads.vertex_lp, 100, 200, 10, 8))


def _sparsemax(size: Size) -> Iterator[Case]:
    for n in [300] if size.quick else [3000] + ([10_000] if size.large else []):
        yield Case(draw=partial(workloads.sparsemax, n), goal=50)


def _softmax(size: Size) -> Iterator[Case]:
    for n, m, p in [(100, 30, 10)] if size.quick else [(100, 30, 10), (300, 100, 20), (500, 200, 20)]:
        yield Case(draw=partial(workloads.softmax, n, m, p), goal=6)


def _accuracy(size: Size) -> Iterator[Case]:
    batch = 8 if size.quick else 100
    yield Case(draw=partial(workloads.bpqp, 100, 20, batch=batch))
    yield Case(draw=partial(workloads.bpqp_active, 100, 20, batch=batch))


def _truncation(size: Size) -> Iterator[Case]:
    sizes = [(200, 60, 30)] if size.quick else [(1500, 500, 200)]
    for n, m, p in sizes + ([(3000, 1000, 500)] if size.large else []):
        yield Case(draw=partial(workloads.altdiff, n, m, p), entrants=_truncated())


def _truncated() -> tuple[Entrant, ...]:
    """With argrad's choice, and then OptNet and both modes of `altdiff` for each ε."""
    found = [ours()]
    for epsilon in TRUNCATIONS:
        found.append(
            Entrant(
                name=f"qpth, ε = {epsilon:.0e}",
                settings=f"eps {epsilon:.0e}",
                factory="optnet:Qpth",
                arguments={"eps": epsilon},
                package="qpth",
            )
        )
        for mode in ("forward", "transposed"):
            arguments = {
                "solver": "admm",
                "method": "altdiff",
                "solver_options": {"truncation": epsilon, "polish": False},
                "method_options": {"truncation": epsilon, "mode": mode},
                "tolerance": 0.1,
            }
            found.append(
                Entrant(
                    name=f"argrad altdiff, {mode}, ε = {epsilon:.0e}",
                    settings=f"admm truncated at {epsilon:.0e}, unpolished; altdiff truncated there too, {mode}",
                    factory="ours:Argrad",
                    arguments=arguments,
                )
            )
    return tuple(found)


GROUPS: dict[str, tuple[str, Callable[[Size], Iterator[Case]]]] = {
    "optnet": ("OptNet's random QPs, every gradient", _optnet),
    "tiny": ("Thousands of tiny QPs, every gradient", _tiny),
    "tv": ("Total variation with a learned D, gradient of D", _tv),
    "altdiff": ("Alt-Diff's dense quadratic layer", _altdiff),
    "bpqp": ("The BPQP slides' QPs", _bpqp),
    "bpqp-lp": ("The BPQP slides' “LP”", _bpqp_lp),
    "vertex": ("Linear programs with a vertex", _vertex),
    "sparsemax": ("Constrained sparsemax", _sparsemax),
    "softmax": ("Constrained softmax", _softmax),
    "accuracy": ("Accuracy of the gradient on the BPQP slides' QPs", _accuracy),
    "truncation": ("Truncation: Alt-Diff's table 2", _truncation),
}
"""Title and cases of each group, in the order in which they are run."""
