"""The engine: batches of optimisation problems in, solutions and their derivatives out.

Knows nothing of HTTP, Redis or event loops. Every function takes and returns tensors with one batch dimension; a
problem without one counts as a batch of one. Data are converted to float64 on the engine's device; whoever calls
rounds the result to the dtype that the caller sent.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from argrad.errors import MissingExtraError
from argrad.problems import QP, Solution, Status
from argrad.problems.sparse import SparseQP
from argrad_service.engine import shortcut
from argrad_service.engine.data import Data, stack
from argrad_service.engine.finish import Guess
from argrad_service.engine.forward import pivoting
from argrad_service.engine.forward.fallback import fall_back
from argrad_service.engine.options import SolverOptions, Stopped
from argrad_service.engine.outcome import Backward, Forward, Outcome, Tangents
from argrad_service.engine.point import CODE, Point, guess_at, point_of
from argrad_service.engine.prepared import Prepared, kept
from argrad_service.engine.registry import (
    AUTO,
    CALLER,
    FALLBACK,
    PIVOTING,
    SHARED_OPTIONS,
    SOLVERS,
    describe,
    find_method,
    find_solver,
    is_there,
)
from argrad_service.engine.solution import conclude

SPARSE_PACKAGE = "scipy"

__all__ = [
    "Backward",
    "Forward",
    "Outcome",
    "Prepared",
    "SolverOptions",
    "Stopped",
    "Tangents",
    "at_point",
    "default_device",
    "jvp",
    "solve",
    "solvers",
    "vjp",
]


def default_device() -> torch.device:
    """The GPU if there is one, the CPU otherwise."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def solve(
    problem: QP,
    *,
    solver: str = "auto",
    options: SolverOptions | None = None,
    warm_start: Solution | None = None,
    device: torch.device | None = None,
    prepared: Prepared | None = None,
    check: Callable[[], None] | None = None,
) -> Outcome:
    """Solve a batch of problems.

    Args:
        problem: Finite data (`QP.check_finite`), any device; float32 is solved in float64.
        solver: Name of a solver, or `auto`.
        options: Tolerance, iteration limit, who asks to stop, and the solver's own options by name.
        warm_start: A point to begin with, such as the last solution of a similar batch; blocks `(B, ·)`.
        device: Where to solve; by default `default_device()`.
        prepared: Keeps what the next solve with the same parameters reuses: the symmetric part of Q, the stacked rows,
            and the factors of `pivoting` on the CPU. The result is the same to the last bit.
        check: Looks at the values of a problem that nobody has looked at, and raises if one is not finite. The compiled
            kernels find such values by themselves: where they solve the whole batch it is not called.

    Returns:
        Verdict, solution and residuals of each problem. No problem's verdict is an exception, and no problem's failure
        touches another's result.

    Raises:
        ProblemError: there is no solver of that name, it does not take the problem, or an option is wrong.
        Stopped: `options.should_stop()` was true between two iterations.
    """
    options = options or SolverOptions()
    if isinstance(problem, SparseQP):
        return cast("Outcome", _sparse().solve(problem, solver=solver, options=options))
    takes_kernels = solver in shortcut.NAMES and _is_on_cpu(problem, device) and SOLVERS[PIVOTING].is_installed
    if takes_kernels and warm_start is None and prepared is None:
        outcome = shortcut.solve(problem, options)
        if outcome is not None:
            return outcome
    problem, data = _prepare(problem, device, prepared)
    warm = None if warm_start is None else _guess(data, warm_start)
    chosen, options = find_solver(solver, data, options, warm)
    if check is None:
        point = chosen.module.solve(data, options, warm)
    elif chosen.module is pivoting and data.q.device.type == "cpu":
        point = pivoting.solve_compiled(data, options, check)
    else:
        check()
        point = chosen.module.solve(data, options, warm)
    name = chosen.name
    if solver == AUTO and name != FALLBACK and point.is_fallback is None:
        _fall_back(data, point, options)
    if solver == AUTO and point.is_fallback is not None and bool(point.is_fallback.all()):
        name, point.is_fallback = FALLBACK, None
    return conclude(problem, data, point, options, solver=name)


def at_point(
    problem: QP,
    solution: Solution,
    *,
    options: SolverOptions | None = None,
    device: torch.device | None = None,
    prepared: Prepared | None = None,
) -> Outcome:
    """Take a solution that someone else computed, and factor what its derivatives need.

    The active set is read off the point and confirmed by one solve; the outcome holds the exact solution next to it. A
    problem whose point is not near a solution gets the status `numerical_error` and no gradient.

    Args:
        problem: As for `solve`.
        solution: Blocks `(B, ·)`, accurate to about 1e-4 or better.
        options: Tolerance of the exact solution.
        device: Where to compute; by default `default_device()`.
        prepared: See `solve`.
    """
    options = options or SolverOptions()
    if isinstance(problem, SparseQP):
        return cast("Outcome", _sparse().at_point(problem, solution, options=options))
    problem, data = _prepare(problem, device, prepared)
    guess = _guess(data, solution)
    chosen, own = find_solver(AUTO, data, replace(options, own={}), None)
    is_compiled = chosen.module is pivoting and data.q.device.type == "cpu"
    point = pivoting.take_over(data, guess, own) if is_compiled else None
    return conclude(problem, data, point or point_of(data, guess), options, solver=CALLER)


def vjp(
    forward: Outcome,
    upstream: Mapping[str, Tensor],
    *,
    method: str = "auto",
    options: Mapping[str, Any] | None = None,
) -> Backward:
    """Pull cotangents of `z`, `nu`, `lam`, `s` back to an adjoint.

    Args:
        forward: Outcome of `solve` or `at_point`.
        upstream: Cotangents by name, `(B, ·)` each, or `(k, B, ·)` with one k; absent means zero; at least one.
        method: Name of a differentiation method, or `auto`.
        options: The method's own, by name.

    Raises:
        ProblemError: the method does not exist, does not work with the solver or the problem, or an option is wrong.
    """
    if not isinstance(forward, Forward):
        return cast("Backward", _sparse().vjp(forward, upstream, method=method, options=options))
    chosen, own = find_method(method, forward, options)
    found = chosen.module.vjp(forward, upstream, own)
    return replace(found, method_options=own.in_use()) if chosen.module.Options.model_fields else found


def jvp(
    forward: Outcome,
    tangents: Mapping[str, Tensor],
    *,
    method: str = "auto",
    options: Mapping[str, Any] | None = None,
) -> Tangents:
    """Push tangents of the parameters forward to tangents of the solution.

    Args:
        forward: Outcome of `solve` or `at_point`.
        tangents: Tangents by parameter name, each shaped like the parameter; absent means zero.
        method: Name of a differentiation method, or `auto`.
        options: The method's own, by name.

    Raises:
        ProblemError: the method does not exist, does not work with the solver or the problem, or an option is wrong.
    """
    if not isinstance(forward, Forward):
        return cast("Tangents", _sparse().jvp(forward, tangents, method=method, options=options))
    chosen, own = find_method(method, forward, options, is_jvp=True)
    found = chosen.module.jvp(forward, tangents, own)
    return replace(found, method_options=own.in_use()) if chosen.module.Options.model_fields else found


def solvers() -> list[dict[str, Any]]:
    """The table of solvers and their methods.

    Under `sparse` stands what a solver does with problems of kind `sparse_qp`, where the packages for them are
    installed; a solver that takes no others has an entry of its own.
    """
    sparse = _sparse().describe() if is_there(SPARSE_PACKAGE) else {}
    table = [entry | ({"sparse": sparse[entry["name"]]} if entry["name"] in sparse else {}) for entry in describe()]
    dense = {entry["name"] for entry in table}
    return table + [
        {"name": name, "devices": ["cpu"], "warm_starts": False, "installed": True, "options": SHARED_OPTIONS, **entry}
        for name, entry in sparse.items()
        if name not in dense
    ]


def _sparse() -> ModuleType:
    """What solves and differentiates sparse problems; imported when the first comes, for SciPy takes a moment.

    Raises:
        MissingExtraError: SciPy is not installed.
    """
    if not is_there(SPARSE_PACKAGE):
        raise MissingExtraError("a sparse problem", "service")
    return importlib.import_module("argrad_service.engine.sparse")


def _fall_back(data: Data, point: Point, options: SolverOptions) -> None:
    """Let `FALLBACK` solve what the solver that `auto` chose has left undecided, flagged."""
    undecided = torch.nonzero(point.status == CODE[Status.MAX_ITERATIONS]).squeeze(-1)
    if len(undecided):
        fall_back(data, undecided, point, options)


def _is_on_cpu(problem: QP, device: torch.device | None) -> bool:
    return (device or default_device()).type == problem.q.device.type == "cpu"


def _prepare(problem: QP, device: torch.device | None, prepared: Prepared | None) -> tuple[QP, Data]:
    target = device or default_device()

    def moved(tensor: Tensor) -> Tensor:
        return kept(prepared, str(target), [tensor], lambda: tensor.detach().to(device=target, dtype=torch.float64))

    problem = QP.of_checked({name: moved(tensor) for name, tensor in problem.parameters().items()})
    return problem, stack(problem, prepared)


def _guess(data: Data, solution: Solution) -> Guess:
    z, nu, lam = (t.to(data.q) for t in (solution.z, solution.nu, solution.lam))
    return guess_at(data, z, torch.cat([nu, lam], dim=1))
