"""The libraries that find a point: `clarabel`, an interior point method, and `osqp`, an operator splitting.

Each yields points of growing accuracy, and says why where there is none; the active-set finish makes them exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import clarabel
import numpy as np
import osqp
from scipy import sparse

from argrad_service.sparse.matrices import Vector
from argrad_service.sparse.problem import Problem, Request, size

Verdict = Literal["point", "infeasible", "unbounded", "max_iterations", "numerical_error"]

CERTAINTY = 1e-6
"""Relative accuracy with which a certificate must hold."""

OSQP_STAGES = (1e-5, 1e-7, 1e-9)
"""Accuracies at which OSQP's iterate is handed to the finish, one after the other."""

_CLARABEL_TOLERANCE = 1e-9


class Stage(NamedTuple):
    """A point, or why there is none."""

    verdict: Verdict
    z: Vector
    y: Vector
    iterations: int


def stages(problem: Problem, request: Request) -> Iterator[Stage]:
    """Points of growing accuracy."""
    if len(problem.d) == problem.p:
        # Without inequalities the KKT system is all there is, and the finish solves it at once.
        yield Stage("point", np.zeros(problem.n), np.zeros(problem.p), 0)
    yield from (_osqp if request.name == "osqp" else _clarabel)(problem, request)


def _clarabel(problem: Problem, request: Request) -> Iterator[Stage]:
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.max_iter = request.max_iterations
    accuracy = min(_CLARABEL_TOLERANCE, request.tolerance)
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = accuracy
    cones = [clarabel.ZeroConeT(problem.p), clarabel.NonnegativeConeT(problem.m)]
    cones = [cone for cone, rows in zip(cones, (problem.p, problem.m), strict=True) if rows]
    Q = sparse.triu(problem.Q, format="csc")
    solver = clarabel.DefaultSolver(Q, problem.q, problem.C.tocsc(), problem.d, cones, settings)
    found = solver.solve()
    z, y, name = np.array(found.x), np.array(found.z), str(found.status)
    if "PrimalInfeasible" in name:
        verdict: Verdict = "infeasible" if _is_farkas(problem, y) else "numerical_error"
    elif "DualInfeasible" in name:
        verdict = "unbounded" if _is_ray(problem, z) else "numerical_error"
    elif name in ("Solved", "AlmostSolved", "InsufficientProgress"):
        verdict = "point"
    else:
        verdict = "max_iterations" if name in ("MaxIterations", "MaxTime") else "numerical_error"
    iterations = int(found.iterations)
    del solver, found  # their factor, before the finish forms its own
    yield Stage(verdict, z, y, iterations)


def _osqp(problem: Problem, request: Request) -> Iterator[Stage]:
    lower = problem.d.copy()
    lower[problem.p :] = -np.inf
    solver = osqp.OSQP()
    settings = {"verbose": False, "polishing": False, "check_termination": 25, "max_iter": request.max_steps}
    solver.setup(
        sparse.triu(problem.Q, format="csc"), problem.q, problem.C.tocsc(), lower, problem.d, eps_prim_inf=1e-9,
        eps_dual_inf=1e-9, eps_abs=OSQP_STAGES[0], eps_rel=OSQP_STAGES[0], **settings,
    )  # fmt: skip
    steps = 0
    for accuracy in OSQP_STAGES:
        solver.update_settings(eps_abs=accuracy, eps_rel=accuracy, max_iter=max(1, request.max_steps - steps))
        found = solver.solve()
        steps += int(found.info.iter)
        name = str(found.info.status)
        z, y = np.array(found.x), np.array(found.y)
        if "primal infeasible" in name:
            certificate = np.array(found.prim_inf_cert)
            verdict: Verdict = "infeasible" if _is_farkas(problem, certificate) else "numerical_error"
        elif "dual infeasible" in name:
            verdict = "unbounded" if _is_ray(problem, np.array(found.dual_inf_cert)) else "numerical_error"
        elif name.startswith("solved"):
            verdict = "point"
        else:
            verdict = "max_iterations" if "maximum iterations" in name else "numerical_error"
        if verdict != "point" or steps >= request.max_steps:
            yield Stage(verdict, z, y, steps)
            return
        y[problem.p :] = np.maximum(y[problem.p :], 0.0)
        yield Stage(verdict, z, y, steps)


def _is_farkas(problem: Problem, v: Vector) -> bool:
    """Whether v ≥ 0 on inequalities with Cᵀv = 0 and dᵀv < 0: then no point satisfies the constraints."""
    v = v.copy()
    v[problem.p :] = np.maximum(v[problem.p :], 0.0)
    terms = float(np.abs(problem.C).T.dot(np.abs(v)).max(initial=0.0))
    if not np.isfinite(v).all() or size(v) == 0:
        return False
    balance, value = size(problem.C.T @ v), float(problem.d @ v)
    return balance <= CERTAINTY * max(terms, np.finfo(float).tiny) and value < -CERTAINTY * float(
        np.abs(problem.d) @ np.abs(v)
    )


def _is_ray(problem: Problem, d: Vector) -> bool:
    """Whether Qd = 0, C₁d = 0, C₂d ≤ 0 and qᵀd < 0: then a feasible problem's objective falls for ever along d."""
    if not np.isfinite(d).all() or size(d) == 0:
        return False
    moves = problem.C @ d
    moves[problem.p :] = np.maximum(moves[problem.p :], 0.0)
    scale = max(1.0, float(abs(problem.C).max()) if problem.C.nnz else 0.0)
    curvature = max(1.0, float(abs(problem.Q).max()) if problem.Q.nnz else 0.0)
    leaves = max(size(moves) / scale, size(problem.Q @ d) / curvature)
    return leaves <= CERTAINTY * size(d) and float(problem.q @ d) < -CERTAINTY * float(np.abs(problem.q) @ np.abs(d))
