"""`osqp`: the operator splitting library of that name (1.x), QPs and LPs, finished on the exact active set.

Form: ½xᵀPx + qᵀx with l ≤ Ax ≤ u, here A = C, u = d and l = d on equalities, −∞ elsewhere, whose dual is y = [ν; λ] of
`Data`. Each thread sets OSQP up once (patterns are the union over the batch) and updates q, l and u for the next
problem, P and A only where the batch does not share them; ρ and the start are reset, so that one problem leaves nothing
to the next. A coarse run comes first: mostly its active set is right, or the finish makes it so, and the exact solution
follows; only what it leaves open is iterated to the tolerance. Warm start: the point and its multipliers.

Reference: Stellato, Banjac, Goulart, Bemporad & Boyd, OSQP, Math. Prog. Comp. 12, 2020.
"""

from __future__ import annotations

import threading
from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor

from argrad.problems import Status
from argrad_service.engine.data import Data
from argrad_service.engine.finish import Guess
from argrad_service.engine.forward.libraries import Answer, Arrays, OpenSession, Session, solve_batch
from argrad_service.engine.forward.osqp_session import Interrupted, Numbers, Patterns, open_osqp
from argrad_service.engine.forward.patterns import of_matrix, of_triangle
from argrad_service.engine.options import OwnOptions, SolverOptions, Stopped
from argrad_service.engine.point import CODE, Point

ITERATIONS_PER_UNIT = 100
"""ADMM iterations that one of the caller's max_iterations stands for."""

TIGHTER = 0.1
"""The library's tolerances, as a fraction of the caller's."""

DRAFT_EPS = 1e-5
"""Tolerances of the first run."""

DRAFT_ITERATIONS = 1000
"""ADMM iterations of the first run at most."""

INFEASIBLE = 1e-6
"""The library's tolerance of certificates; ours are checked after."""

_CLAIMS = {
    "solved": Status.OPTIMAL,
    "solved inaccurate": Status.MAX_ITERATIONS,
    "maximum iterations reached": Status.MAX_ITERATIONS,
    "primal infeasible": Status.INFEASIBLE,
    "primal infeasible inaccurate": Status.INFEASIBLE,
    "dual infeasible": Status.UNBOUNDED,
    "dual infeasible inaccurate": Status.UNBOUNDED,
}


class Options(OwnOptions):
    """Options of OSQP; its tolerances are a tenth of the call's, which counts iterations in hundreds."""

    rho: float = Field(default=0.1, ge=1e-6, le=1e6)
    """Penalty ρ at the start; a thousand times as much on equalities."""

    adaptive_rho: bool = Field(default=True)
    """Adapt ρ to the residuals every 50 iterations, each time a factorisation; not in LPs, where it slows OSQP down."""

    alpha: float = Field(default=1.6, gt=0, lt=2)
    """Over-relaxation α."""

    sigma: float = Field(default=1e-6, ge=1e-12, le=1)
    """Proximal weight σ of the primal variables."""

    polish: bool = Field(default=True)
    """Confirm the active set and solve exactly on it; without, the library's last iterate is returned as it is."""

    own_polishing: bool = Field(default=False)
    """OSQP's own polishing after its last iteration; needless where ours follows."""


def solve(data: Data, options: SolverOptions, warm: Guess | None) -> Point:
    """Solve a batch of QPs or LPs by OSQP, on the CPU.

    Args:
        data: The problems.
        options: Tolerance; max_iterations in hundreds of ADMM iterations; who asks to stop.
        warm: Where to begin.
    """
    own = cast("Options", options.own)
    most = options.max_iterations * ITERATIONS_PER_UNIT
    if not own.polish:
        opener = _opener(data, own, TIGHTER * options.tolerance, most)
        return solve_batch(data, options, opener, warm=warm, polish=False)
    opener = _opener(data, own, max(DRAFT_EPS, TIGHTER * options.tolerance), _draft(most))
    point = solve_batch(data, options, opener, warm=warm, is_draft=True)
    is_open = (point.status != CODE[Status.OPTIMAL]) & (point.status != CODE[Status.NONCONVEX])
    left = torch.nonzero(is_open).squeeze(-1)
    if len(left):
        _go_on(data.select(left), left, point, options, most)
    return point


def _go_on(data: Data, left: Tensor, point: Point, options: SolverOptions, most: int) -> None:
    """Solve to the end what the draft has left open, and write it to the point."""
    start = Guess(active=point.active, z=point.z, y=point.y).select(left)
    opener = _opener(data, cast("Options", options.own), TIGHTER * options.tolerance, most - _draft(most))
    rest = solve_batch(data, options, opener, warm=start)
    rest.iterations += point.iterations[left]
    for name in ("active", "z", "y", "iterations", "status", "is_exact"):
        getattr(point, name)[left] = getattr(rest, name)


def _draft(most: int) -> int:
    """ADMM iterations of the first run."""
    return min(DRAFT_ITERATIONS, most // 2)


def _opener(data: Data, own: Options, eps: float, most: int) -> OpenSession:
    settings = {
        "eps_abs": eps,
        "eps_rel": eps,
        "eps_prim_inf": INFEASIBLE,
        "eps_dual_inf": INFEASIBLE,
        "max_iter": most,
        "rho": own.rho,
        "adaptive_rho": int(own.adaptive_rho and not data.is_linear),
        "alpha": own.alpha,
        "sigma": own.sigma,
        "polishing": own.own_polishing,
    }

    def open_session(arrays: Arrays, is_over: threading.Event) -> Session:
        return _Session(arrays, settings, is_over)

    return open_session


class _Session(Session):
    """One thread's OSQP."""

    def __init__(self, arrays: Arrays, settings: dict[str, Any], is_over: threading.Event) -> None:
        self._arrays, self._lower = arrays, arrays.lower_bounds()
        self._P, self._A = of_triangle(arrays.Q, arrays.n), of_matrix(arrays.C)
        patterns = Patterns(
            n=arrays.n,
            r=arrays.r,
            P=(self._P.indices, self._P.starts),
            A=(self._A.indices, self._A.starts),
            settings=settings,
        )
        self._osqp = open_osqp(patterns, is_over.is_set)
        self._is_first = True

    def solve(self, i: int) -> Answer:
        """Solve the i-th problem."""
        arrays = self._arrays
        keeps_P, keeps_A = (pattern.is_shared and not self._is_first for pattern in (self._P, self._A))
        numbers = Numbers(
            P=None if keeps_P else self._P.values(i),
            q=arrays.q[i],
            A=None if keeps_A else self._A.values(i),
            l=self._lower[i],
            u=arrays.d[i],
            start=None if arrays.start is None else (arrays.start[0][i], arrays.start[1][i]),
        )
        self._is_first = False
        try:
            found = self._osqp.solve(numbers)
        except Interrupted as error:
            raise Stopped from error
        return Answer(
            z=found.x,
            y=found.y,
            status=_CLAIMS.get(found.status, Status.NUMERICAL_ERROR),
            iterations=found.iterations,
        )

    def close(self) -> None:
        """End OSQP's process, if it has one."""
        self._osqp.close()
