"""Which solvers and which differentiation methods there are, and what pairs with what.

A solver is a function from stacked data to a `Point`; a method is a pair of functions from an outcome to an adjoint
and to tangents. Both meet at the outcome, so that a new one of either kind is one file and one line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from argrad.errors import ProblemError
from argrad_service.engine.backward import kkt
from argrad_service.engine.data import Data
from argrad_service.engine.finish import Guess
from argrad_service.engine.forward import pdipm
from argrad_service.engine.outcome import Backward, Forward, SolverOptions, Tangents
from argrad_service.engine.point import Point

AUTO = "auto"


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


SOLVERS = {
    solver.name: solver
    for solver in (
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


def find_solver(name: str) -> Solver:
    """The solver of that name; `auto` is the first of the table.

    Raises:
        ProblemError: there is none.
    """
    if name == AUTO:
        return next(iter(SOLVERS.values()))
    if name not in SOLVERS:
        raise ProblemError("solver.name", repr(name), f"one of {', '.join([AUTO, *SOLVERS])}")
    return SOLVERS[name]


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
