"""`proxqp`: the dense proximal augmented Lagrangian solver of the package proxsuite (extra `proxqp`), QPs.

Each problem is a call that holds no lock, on our own threads: the package's batch call runs on OpenMP, which a forked
child does not survive. Form: Az = b (ν), Gz ≤ h (λ). Warm start: the point and its multipliers.

Reference: Bambade, El-Kazdadi, Taylor & Carpentier, ProxQP, RSS 2022.
"""

from __future__ import annotations

import threading
from typing import cast

import numpy as np
from proxsuite import proxqp
from pydantic import Field

from argrad.problems import Status
from argrad_service.engine.data import Data
from argrad_service.engine.finish import Guess
from argrad_service.engine.forward.libraries import Answer, Array, Arrays, Session, solve_batch
from argrad_service.engine.options import OwnOptions, SolverOptions
from argrad_service.engine.point import Point

TIGHTER = 0.1
"""The library's tolerance, as a fraction of the caller's."""

_Output, _Start = proxqp.QPSolverOutput, proxqp.InitialGuess
_CLAIMS = {
    _Output.PROXQP_SOLVED: Status.OPTIMAL,
    _Output.PROXQP_MAX_ITER_REACHED: Status.MAX_ITERATIONS,
    _Output.PROXQP_PRIMAL_INFEASIBLE: Status.INFEASIBLE,
    _Output.PROXQP_DUAL_INFEASIBLE: Status.UNBOUNDED,
}


class Options(OwnOptions):
    """Options of ProxQP."""

    polish: bool = Field(default=True)
    """Confirm the active set and solve exactly on it; without, the library's last iterate is returned as it is."""

    rho: float = Field(default=1e-6, ge=1e-12, le=1)
    """Primal proximal weight."""


def solve(data: Data, options: SolverOptions, warm: Guess | None) -> Point:
    """Solve a batch of dense QPs by ProxQP, on the CPU.

    Args:
        data: The problems.
        options: Tolerance; max_iterations bounds the outer iterations; who asks to stop, between two problems.
        warm: Where to begin.
    """
    own = cast("Options", options.own)

    def open_session(arrays: Arrays, is_over: threading.Event) -> Session:  # noqa: ARG001 - has no callback
        return _Session(arrays, options, own)

    return solve_batch(data, options, open_session, warm=warm, polish=own.polish)


class _Session(Session):
    """One thread's settings."""

    def __init__(self, arrays: Arrays, options: SolverOptions, own: Options) -> None:
        self._arrays, self._options, self._rho = arrays, options, own.rho

    def solve(self, i: int) -> Answer:
        """Solve the i-th problem."""
        arrays, p = self._arrays, self._arrays.p
        Q, C = (block[0 if len(block) == 1 else i] for block in (cast("Array", arrays.Q), arrays.C))
        has_equalities, has_inequalities = p > 0, arrays.r > p
        z, y = (None, None) if arrays.start is None else (arrays.start[0][i], arrays.start[1][i])
        found = proxqp.dense.solve_no_gil(
            Q,
            arrays.q[i],
            C[:p] if has_equalities else None,
            arrays.d[i, :p] if has_equalities else None,
            C[p:] if has_inequalities else None,
            np.full(arrays.r - p, -np.inf) if has_inequalities else None,
            arrays.d[i, p:] if has_inequalities else None,
            x=z,
            y=None if y is None or not has_equalities else y[:p],
            z=None if y is None or not has_inequalities else y[p:],
            eps_abs=TIGHTER * self._options.tolerance,
            eps_rel=TIGHTER * self._options.tolerance,
            rho=self._rho,
            max_iter=self._options.max_iterations,
            check_duality_gap=True,
            eps_duality_gap_abs=TIGHTER * self._options.tolerance,
            eps_duality_gap_rel=TIGHTER * self._options.tolerance,
            initial_guess=_Start.EQUALITY_CONSTRAINED_INITIAL_GUESS if z is None else _Start.WARM_START,
        )
        return Answer(
            z=np.array(found.x),
            y=np.concatenate([found.y, found.z]),
            status=_CLAIMS.get(found.info.status, Status.NUMERICAL_ERROR),
            iterations=int(found.info.iter),
        )
