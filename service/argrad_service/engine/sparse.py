"""Sparse problems: the engine's four functions for a `SparseQP`, on the CPU and in the memory of its patterns.

A library finds a point and the active-set finish makes it exact, both in a worker process (`argrad_service.sparse`).
Derivatives use one factorisation of the KKT system of the active rows, formed here when the first is asked for, in the
order of elimination that the worker found; SuperLU releases Python's lock meanwhile.

    [ Q    C_aᵀ ] [d_z]      [g_z − Gᵀg_s]
    [ C_a   0   ] [d_y] = −  [g_ν; g_λ,a ]        d_y = [d_ν; μ_a],  μ = 0 on inactive rows

This is `kkt`, and the KKT system of the backward QP that `bpqp` poses (½z̃ᵀQz̃ + gᵀz̃ subject to C_a z̃ = −g_y): solved
directly, the two are one computation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pydantic import Field
from scipy import sparse
from torch import Tensor

from argrad.errors import MissingExtraError, ProblemError
from argrad.problems import Adjoint, Flag, Solution
from argrad.problems.sparse import SparseQP
from argrad_service.engine.backward.adjoints import INACCURATE
from argrad_service.engine.options import OwnOptions, SolverOptions, Stopped, describe_options, read_options
from argrad_service.engine.outcome import Backward, Tangents
from argrad_service.engine.registry import is_there
from argrad_service.engine.sparse_outcome import SparseForward, as_array, conclude, csr, stack
from argrad_service.sparse.matrices import Matrix
from argrad_service.sparse.pool import WORKERS, TaskStopped
from argrad_service.sparse.problem import Problem, Request
from argrad_service.sparse.separable import Separable, recognise
from argrad_service.sparse.separable import solve as solve_separable
from argrad_service.sparse.tasks import Confirm, Found, Solve

AUTO = "auto"
KIND = "sparse_qp"


class OsqpOptions(OwnOptions):
    """What OSQP alone understands."""

    max_steps: int = Field(20_000, ge=1, le=1_000_000)
    """Splitting steps of a problem, in place of `max_iterations`."""


BREAKPOINT = "breakpoint"
SOLVERS: dict[str, tuple[str, type[OwnOptions]]] = {
    "clarabel": ("Interior point method by the Clarabel library, finished on the exact active set.", OwnOptions),
    BREAKPOINT: (
        "Exact search for the multiplier of the one equality, where Q is diagonal and every inequality a bound.",
        OwnOptions,
    ),
    "osqp": ("Operator splitting by the OSQP library, finished on the exact active set.", OsqpOptions),
}
"""Summary and own options of each; `auto` takes `breakpoint` where the problem is of its form, else the first."""

METHODS = {
    "kkt": "Implicit differentiation of the KKT conditions on the exact active set.",
    "bpqp": "The backward QP of BPQP, solved by one sparse factorisation: the same numbers as kkt.",
}
"""Summary of each; the first is what `auto` takes."""


def solve(problem: SparseQP, *, solver: str, options: SolverOptions) -> SparseForward:
    """Solve one problem; see `argrad_service.engine.solve`.

    Raises:
        ProblemError: there is no solver of that name for sparse problems, or an option is wrong.
        Stopped: `options.should_stop()` was true.
        MemoryError: the factor does not fit.
    """
    data = stack(problem)
    separable = recognise(data) if solver in (AUTO, BREAKPOINT) else None
    name = next(iter(SOLVERS)) if solver == AUTO else solver
    if name not in SOLVERS:
        raise ProblemError("solver.name", repr(name), f"one of {', '.join([AUTO, *SOLVERS])} for a sparse problem")
    own = options.own
    if not isinstance(own, OwnOptions):
        if solver == AUTO and own:
            raise ProblemError("solver.options", "options for auto", "a solver by name, for each has its own")
        own = read_options(SOLVERS[name][1], own, inside="solver.options")
    if separable is not None and (searched := _search(data, separable)) is not None:
        return conclude(problem, data, searched, options, solver=BREAKPOINT, separable=separable)
    if name == BREAKPOINT:
        wanted = "a positive diagonal Q, rows of G with one entry each, at most one equality, and a unique multiplier"
        raise ProblemError("solver.name", f"{name!r} for a problem that is not separable", wanted)
    if not is_there(name):
        raise MissingExtraError(f"solver {name!r}", "service")
    request = Request(name=name, tolerance=options.tolerance, max_iterations=options.max_iterations, **own.model_dump())
    found = _run(Solve(problem=data, request=request), options)
    return conclude(problem, data, found, options, solver=name)


def _search(data: Problem, separable: Separable) -> Found | None:
    solved = solve_separable(data, separable)
    if solved is None:
        return None
    status, guess, steps = solved
    return Found(status=status, guess=guess, is_exact=True, iterations=steps, order=None, factor_nbytes=0)


def at_point(problem: SparseQP, solution: Solution, *, options: SolverOptions) -> SparseForward:
    """Take over a point that someone else computed; see `argrad_service.engine.at_point`."""
    data = stack(problem)
    z = as_array(solution.z[0])
    y = np.concatenate([as_array(solution.nu[0]), as_array(solution.lam[0])])
    return conclude(problem, data, _run(Confirm(problem=data, z=z, y=y), options), options, solver="caller")


def vjp(
    forward: SparseForward, upstream: Mapping[str, Tensor], *, method: str, options: Mapping[str, Any] | None
) -> Backward:
    """Pull cotangents `(1, ·)` or `(k, 1, ·)` back to an adjoint of the same leading dimensions."""
    name = _method(method, options)
    data = forward.data
    given = {key: as_array(block) for key, block in upstream.items()}
    has_k = next(iter(given.values())).ndim == 3
    count = next(iter(given.values())).shape[0] if has_k else 1
    g = {key: block.reshape(count, -1) for key, block in given.items()}
    status, flags = str(forward.status[0]), forward.flags[0]
    if forward.is_optimal:
        system, is_nonunique, is_dependent = forward.system()
        rows = system.rows
        flags = _flags(forward, is_nonunique, is_dependent)
        right = np.zeros((count, data.n + len(rows)))
        if "z" in g:
            np.negative(g["z"], out=right[:, : data.n])
        if "s" in g:
            right[:, : data.n] += (data.C[data.p :].T @ g["s"].T).T
        if "nu" in g or "lam" in g:
            on_rows = [g.get(key, np.zeros((count, size))) for key, size in (("nu", data.p), ("lam", data.m))]
            right[:, data.n :] -= np.concatenate(on_rows, axis=1)[:, rows]
        solved = system.solve(right.T)
        status = _verdict(is_nonunique, is_dependent and bool(right[:, data.n :].any()), solved.error)
    if status == "ok":
        d_z, d_y = solved.x[: data.n].T, np.zeros((count, len(data.d)))
        d_y[:, rows] = solved.x[data.n :].T
        if "s" in g:
            d_y[:, data.p :] -= g["s"]
    else:
        d_z, d_y = np.full((count, data.n), np.nan), np.full((count, len(data.d)), np.nan)
    lead = (count, 1) if has_k else (1,)
    blocks = {"z": d_z, "nu": d_y[:, : data.p], "mu": d_y[:, data.p :]}
    adjoint = {key: torch.from_numpy(block.reshape(*lead, block.shape[1])) for key, block in blocks.items()}
    return Backward(adjoint=Adjoint(**adjoint), gradient_status=(status,), flags=(flags,), method=name)


def jvp(
    forward: SparseForward, tangents: Mapping[str, Tensor], *, method: str, options: Mapping[str, Any] | None
) -> Tangents:
    """Push tangents of values and vectors forward to tangents of the solution, `(1, ·)` each.

    K [ż; ẏ_a] = −[Q̇z + q̇ + Ċᵀy;  Ċ_a z − ḋ_a],    ṡ = ḣ − Ġz − Gż
    """
    name = _method(method, options)
    if name != "kkt":
        raise ProblemError("differentiation.method", repr(name), "one of auto, kkt: bpqp has no forward mode")
    data, problem = forward.data, forward.problem
    z, nu, lam = (as_array(block[0]) for block in (forward.solution.z, forward.solution.nu, forward.solution.lam))
    given = {key: as_array(block) for key, block in tangents.items()}
    moved = {key: np.full(n, np.nan) for key, n in (("z", data.n), ("nu", data.p), ("lam", data.m), ("s", data.m))}
    status, flags = str(forward.status[0]), forward.flags[0]
    if forward.is_optimal:
        system, is_nonunique, is_dependent = forward.system()
        rows = system.rows
        flags = _flags(forward, is_nonunique, is_dependent)
        assert isinstance(problem, SparseQP)  # noqa: S101 - a sparse outcome has a sparse problem

        def matrix(key: str, r: int) -> Matrix:
            values = given.get(f"{key}_values")
            if values is None:
                return sparse.csr_matrix((r, data.n))
            return csr(problem.matrices[key], values, r)

        Q, A, G = matrix("Q", data.n), matrix("A", data.p), matrix("G", data.m)
        is_bound = np.isfinite(as_array(problem.h)) if problem.h is not None else np.ones(0, dtype=bool)
        r1 = -(0.5 * (Q @ z + Q.T @ z) + given.get("q", 0.0) + A.T @ nu + G.T @ lam)
        room = np.where(is_bound, given.get("h", 0.0) - G @ z, 0.0)
        right = np.concatenate([np.zeros(data.p) + given.get("b", 0.0) - A @ z, room])
        solved = system.solve(np.concatenate([r1, right[rows]]))
        status = _verdict(is_nonunique, is_on_dependent=False, error=solved.error)
        if status == "ok":
            dz, dy = solved.x[: data.n], np.zeros(len(data.d))
            dy[rows] = solved.x[data.n :]
            ds = room - data.C[data.p :] @ dz
            ds[forward.active[data.p :]] = 0.0
            moved |= {"z": dz, "s": ds}
            if not is_dependent:
                moved |= {"nu": dy[: data.p], "lam": dy[data.p :]}
    blocks = {key: torch.from_numpy(block).unsqueeze(0) for key, block in moved.items()}
    return Tangents(solution=Solution(**blocks), gradient_status=(status,), flags=(flags,), method=name)


def describe() -> dict[str, dict[str, Any]]:
    """What each solver does with sparse problems, by name, for GET /v1/solvers."""
    methods = [
        {"name": name, "summary": summary, "problems": [KIND], "jvp": name == "kkt", "options": {}}
        for name, summary in METHODS.items()
    ]
    return {
        name: {"summary": summary, "problems": [KIND], "methods": methods, "own_options": describe_options(own)}
        for name, (summary, own) in SOLVERS.items()
    }


def _run(task: Solve | Confirm, options: SolverOptions) -> Found:
    try:
        found: Found = WORKERS.run(task, options.should_stop)
    except TaskStopped:
        raise Stopped from None
    return found


def _method(name: str, options: Mapping[str, Any] | None) -> str:
    chosen = next(iter(METHODS)) if name == AUTO else name
    if chosen not in METHODS:
        wanted = f"one of {', '.join([AUTO, *METHODS])} for a sparse problem"
        raise ProblemError("differentiation.method", repr(name), wanted)
    read_options(OwnOptions, options or {}, inside="differentiation.options")
    return chosen


def _verdict(is_nonunique: bool, is_on_dependent: bool, error: float) -> str:
    if is_nonunique:
        return "nonunique"
    if is_on_dependent:
        return "dependent"
    return "ok" if error <= INACCURATE else "inaccurate"


def _flags(forward: SparseForward, is_nonunique: bool, is_dependent: bool) -> tuple[Flag, ...]:
    raised = {Flag.DEGENERATE: forward.is_weak, Flag.DEPENDENT: is_dependent, Flag.NONUNIQUE: is_nonunique}
    return tuple(flag for flag, is_raised in raised.items() if is_raised)
