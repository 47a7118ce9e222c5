"""Which solvers and which differentiation methods there are, and what pairs with what.

A solver is a function from stacked data to a `Point`; a method is a pair of functions from an outcome to an adjoint
and to tangents. Both meet at the outcome, so that a new one of either kind is one file and one line here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from argrad.errors import MissingExtraError, ProblemError
from argrad_service.engine.backward import kkt
from argrad_service.engine.data import Data
from argrad_service.engine.finish import Guess
from argrad_service.engine.forward import pdipm
from argrad_service.engine.outcome import Backward, Forward, SolverOptions, Tangents
from argrad_service.engine.point import Point

AUTO = "auto"
FALLBACK = "pdipm"
"""Solves what `pivoting` could not decide."""


@dataclass(frozen=True, kw_only=True)
class Solver:
    """A forward solver.

    Args:
        name: What requests call it.
        solve: The function itself.
        summary: What it is, in a sentence.
        problems: Kinds of problems that it takes.
        devices: Where it runs.
        methods: Differentiation methods that work with it; the first is what `auto` takes.
        warm_starts: Whether it makes use of a warm start.
    """

    name: str
    solve: Callable[[Data, SolverOptions, Guess | None], Point]
    summary: str
    problems: tuple[str, ...]
    devices: tuple[str, ...]
    methods: tuple[str, ...]
    warm_starts: bool


@dataclass(frozen=True, kw_only=True)
class Method:
    """A differentiation method: `vjp` pulls cotangents back, `jvp` pushes tangents forward."""

    name: str
    vjp: Callable[[Forward, Mapping[str, Tensor]], Backward]
    jvp: Callable[[Forward, Mapping[str, Tensor]], Tangents]
    summary: str


MOST_VARIABLES_OF_MANY_ROWS = 64
"""With more rows than variables `auto` takes `pivoting` up to this size: beyond it the dual active set takes as many
steps as there are active rows, each a pass over all rows, and the batched interior point is faster."""


def _solve_by_pivoting(data: Data, options: SolverOptions, warm: Guess | None) -> Point:
    # Imported when first asked for: compiled kernels take a second to load, and a bare client has no numba.
    from argrad_service.engine.forward import pivoting

    return pivoting.solve(data, options, warm)


SOLVERS = {
    solver.name: solver
    for solver in (
        Solver(
            name="pivoting",
            solve=_solve_by_pivoting,
            summary="Exact active sets of strictly convex problems by compiled kernels; hard ones go to pdipm.",
            problems=("qp", "qp_two_sided"),
            devices=("cpu",),
            methods=("kkt",),
            warm_starts=False,
        ),
        Solver(
            name="pdipm",
            solve=pdipm.solve,
            summary="Batched primal-dual interior point method, finished on the exact active set.",
            problems=("qp", "qp_two_sided"),
            devices=("cpu", "cuda"),
            methods=("kkt",),
            warm_starts=True,
        ),
    )
}

METHODS = {
    method.name: method
    for method in (
        Method(
            name=kkt.NAME,
            vjp=kkt.vjp,
            jvp=kkt.jvp,
            summary="Implicit differentiation of the KKT conditions on the exact active set, by the forward factor.",
        ),
    )
}


def has_kernels() -> bool:
    """Whether the packages are there that `pivoting` is compiled with."""
    return all(importlib.util.find_spec(name) is not None for name in ("numba", "scipy", "threadpoolctl"))


def find_solver(name: str, data: Data, warm: Guess | None) -> Solver:
    """The solver of that name; `auto` chooses by device, size and warm start.

    Raises:
        ProblemError: there is none, or it does not run on the problem's device.
        MissingExtraError: its packages are not installed.
    """
    if name == AUTO:
        return SOLVERS["pivoting" if _suits_pivoting(data, warm) else "pdipm"]
    if name not in SOLVERS:
        raise ProblemError("solver.name", repr(name), f"one of {', '.join([AUTO, *SOLVERS])}")
    solver = SOLVERS[name]
    if data.q.device.type not in solver.devices:
        raise ProblemError("solver.name", f"{name!r} on {data.q.device.type}", f"a solver for {data.q.device.type}")
    if name == "pivoting" and not has_kernels():
        raise MissingExtraError("solver 'pivoting'", "service")
    return solver


def _suits_pivoting(data: Data, warm: Guess | None) -> bool:
    is_small = data.m <= data.n - data.p or data.n <= MOST_VARIABLES_OF_MANY_ROWS
    return warm is None and data.q.device.type == "cpu" and is_small and has_kernels()


def find_method(name: str, solver: str) -> Method:
    """The method of that name for an outcome of that solver; `auto` is the solver's first.

    Raises:
        ProblemError: there is none, or it does not work with the solver.
    """
    known = SOLVERS[solver].methods if solver in SOLVERS else tuple(METHODS)
    if name == AUTO:
        return METHODS[known[0]]
    if name not in known:
        raise ProblemError("differentiation.method", repr(name), f"one of {', '.join([AUTO, *known])} with {solver}")
    return METHODS[name]


def describe() -> list[dict[str, Any]]:
    """The table of solvers, for people and for GET /v1/solvers."""
    return [
        {
            "name": solver.name,
            "summary": solver.summary,
            "problems": list(solver.problems),
            "devices": list(solver.devices),
            "warm_starts": solver.warm_starts,
            "methods": [{"name": name, "summary": METHODS[name].summary} for name in solver.methods],
            "options": {
                "tolerance": {"default": SolverOptions.tolerance, "least": 1e-12, "most": 0.1},
                "max_iterations": {"default": SolverOptions.max_iterations, "least": 1, "most": 10_000},
            },
        }
        for solver in SOLVERS.values()
    ]
