"""`clarabel`: the interior point library of that name, QPs and LPs, finished on the exact active set.

Form: ½zᵀQz + qᵀz with Cz + s = d, s in {0}ᵖ × ℝᵐ₊; its dual is y = [ν; λ] of `Data`. Each thread sets the solver up
once and updates its numbers for the next problem: patterns are the union over the batch, so that they stay the same.
Warm start: not used, the library has none.

Reference: Goulart & Chen, Clarabel: an interior-point solver for conic programs with quadratic objectives, 2024.
"""

from __future__ import annotations

import threading
from typing import cast

import clarabel
import numpy as np
from pydantic import Field
from scipy import sparse

from argrad.problems import Status
from argrad_service.engine.data import Data
from argrad_service.engine.finish import Guess
from argrad_service.engine.forward.libraries import Answer, Array, Arrays, Session, solve_batch
from argrad_service.engine.forward.patterns import Pattern, of_matrix, of_triangle
from argrad_service.engine.options import OwnOptions, SolverOptions
from argrad_service.engine.point import Point

TIGHTER = 0.1
"""The library's tolerance, as a fraction of the caller's: its residuals are scaled otherwise than ours."""

_CLAIMS = {
    "Solved": Status.OPTIMAL,
    "AlmostSolved": Status.OPTIMAL,
    "PrimalInfeasible": Status.INFEASIBLE,
    "AlmostPrimalInfeasible": Status.INFEASIBLE,
    "DualInfeasible": Status.UNBOUNDED,
    "AlmostDualInfeasible": Status.UNBOUNDED,
    "MaxIterations": Status.MAX_ITERATIONS,
}


class Options(OwnOptions):
    """Options of Clarabel."""

    polish: bool = Field(default=True)
    """Confirm the active set and solve exactly on it; without, the library's last iterate is returned as it is."""

    equilibrate: bool = Field(default=True)
    """Scale rows and columns before the solve."""


def solve(data: Data, options: SolverOptions, warm: Guess | None) -> Point:  # noqa: ARG001 - every solver's signature
    """Solve a batch of QPs or LPs by Clarabel, on the CPU.

    Args:
        data: The problems.
        options: Tolerance, interior point iterations of a problem, and who asks to stop: also between iterations.
        warm: Not used.
    """
    own = cast("Options", options.own)

    def open_session(arrays: Arrays, is_over: threading.Event) -> Session:
        return _Session(arrays, options, own, is_over)

    return solve_batch(data, options, open_session, polish=own.polish)


class _Session(Session):
    """One thread's solver, set up at its first problem and updated for the others."""

    def __init__(self, arrays: Arrays, options: SolverOptions, own: Options, is_over: threading.Event) -> None:
        self._arrays, self._is_over = arrays, is_over
        self._P: Pattern = of_triangle(arrays.Q, arrays.n)
        self._A: Pattern = of_matrix(arrays.C)
        settings = clarabel.DefaultSettings()
        settings.verbose = False
        settings.presolve_enable = False  # data updates are refused otherwise
        settings.max_threads = 1
        settings.max_iter = options.max_iterations
        settings.equilibrate_enable = own.equilibrate
        tolerance = TIGHTER * options.tolerance
        settings.tol_feas = settings.tol_gap_abs = settings.tol_gap_rel = tolerance
        self._settings = settings
        self._solver: clarabel.DefaultSolver | None = None

    def solve(self, i: int) -> Answer:
        """Solve the i-th problem."""
        solution = self._ready(i).solve()
        return Answer(
            z=np.array(solution.x),
            y=np.array(solution.z),
            status=_CLAIMS.get(str(solution.status), Status.NUMERICAL_ERROR),
            iterations=int(solution.iterations),
        )

    def _ready(self, i: int) -> clarabel.DefaultSolver:
        arrays = self._arrays
        P, A = self._P.values(i), self._A.values(i)
        q, d = arrays.q[i], arrays.d[i]
        if self._solver is None:
            cones = []
            if arrays.p:
                cones.append(clarabel.ZeroConeT(arrays.p))
            if arrays.r > arrays.p:
                cones.append(clarabel.NonnegativeConeT(arrays.r - arrays.p))
            self._solver = clarabel.DefaultSolver(_csc(self._P, P), q, _csc(self._A, A), d, cones, self._settings)
            self._solver.set_termination_callback(lambda info: self._is_over.is_set())  # noqa: ARG005
            return self._solver
        changed: dict[str, Array] = {"q": q, "b": d}
        if not self._P.is_shared and P.size:
            changed["P"] = P
        if not self._A.is_shared and A.size:
            changed["A"] = A
        self._solver.update(**changed)
        return self._solver


def _csc(pattern: Pattern, values: Array) -> sparse.csc_matrix:
    return sparse.csc_matrix((values, pattern.indices, pattern.starts), shape=pattern.shape)
