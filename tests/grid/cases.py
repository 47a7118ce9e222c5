"""The grid: solvers and methods of the registry, kinds, situations, dtypes, batched or shared matrices.

A solver or method that is added to the registry is in the grid by that; one that ends or approximates in a way of its
own has a row in `AS_EXACT_AS` too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from argrad_service.engine import SolverOptions
from argrad_service.engine.registry import METHODS, SOLVERS
from tests.grid.covering import cover
from tests.grid.situations import IMPOSSIBLE, SITUATIONS

KINDS = ("qp", "lp", "entropy")
DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True, order=True)
class Case:
    """One cell of the grid."""

    solver: str
    method: str
    kind: str
    sharing: str
    dtype: str
    situation: str

    def __str__(self) -> str:
        return "-".join(vars(self).values())


@dataclass(frozen=True, kw_only=True)
class Exactness:
    """How a pair of solver and method is run, and what error its gradients may have.

    Args:
        gradient: Error of a gradient, relative to its size.
        is_exact: Whether the gradient is the solution's own: then one that does not exist is refused. If not, one that
            is flagged `truncated` may be anything.
        tolerance, own: Of the solver, where the gradient asks for others than it has.
        options: Of the method.
    """

    gradient: float = 1e-7
    is_exact: bool = True
    tolerance: float = 1e-8
    own: Mapping[str, object] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)


AS_EXACT_AS = {
    ("*", "altdiff"): Exactness(gradient=1e-6),
    ("*", "smoothed"): Exactness(gradient=1e-5, is_exact=False, options={"smoothing": "barrier", "t": 1e10}),
    ("barrier", "unrolled"): Exactness(
        gradient=1e-5, is_exact=False, own={"polish": False, "epsilon": 1e-9}, options={"last": 20}
    ),
    ("pgd", "unrolled"): Exactness(gradient=1e-5, is_exact=False, tolerance=1e-10, own={"polish": False}),
    ("admm", "unrolled"): Exactness(
        gradient=1e-5, is_exact=False, own={"rho": 5.0}, options={"iterations": 3000, "last": 1500}
    ),
}
"""What falls short of the default, by solver (* for any) and method."""

ITERATIONS = {"admm": {"nearly-singular": 2000, "infeasible": 100, "unbounded": 100, "*": 500}, "pgd": {"*": 20}}
"""Limits other than the default 100, by solver and situation: some of these problems need more, and one that has no
solution takes all of them."""

TOO_SLOW = {("pgd", "unrolled", "nearly-singular")}
"""What would take millions of steps: gradient descent without the exact finish, at a condition of a million."""


def exactness(case: Case) -> Exactness:
    """Of the pair in a case."""
    default = AS_EXACT_AS.get(("*", case.method), Exactness())
    return AS_EXACT_AS.get((case.solver, case.method), default)


def has_two_sides(case: Case) -> bool:
    """Whether the solution has a derivative on each side, of which an approximate one is neither."""
    return case.situation == "weakly-active" and not exactness(case).is_exact


def limit(case: Case) -> int:
    """Iterations that a case may take."""
    limits = ITERATIONS.get(case.solver, {})
    return limits.get(case.situation, limits.get("*", SolverOptions.max_iterations))


def all_cases() -> list[Case]:
    """Every cell whose solver is installed and takes the kind, and whose method works with both."""
    return [
        Case(solver.name, method, kind, sharing, dtype, situation)
        for solver in SOLVERS.values()
        if solver.is_installed
        for method in solver.methods
        for kind in KINDS
        if kind in solver.kinds and kind in METHODS[method].kinds
        for situation in SITUATIONS
        if (kind, situation) not in IMPOSSIBLE and (solver.name, method, situation) not in TOO_SLOW
        for sharing in ("batched", "shared")
        for dtype in DTYPES
    ]


def pairwise_cases() -> list[Case]:
    """A few of them that contain every pair of values of two axes."""
    cases = all_cases()
    return sorted(cases[i] for i in cover([tuple(vars(case).values()) for case in cases]))
