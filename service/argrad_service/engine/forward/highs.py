"""`highs`: the simplex, interior point and active-set codes of that library, for LPs and convex QPs.

An LP's optimal basis names its active rows: the answer is exact and its multipliers are those of that basis. The QP
solver is an active-set code that can take very long; it ends at a time limit, and then says so (`max_iterations`, and
`ran_out_of_time` among the measures). Form: l ≤ Cz ≤ d with free variables; row duals are −y. Warm start: the point
and its multipliers, from which the simplex method crosses over to a basis.

Reference: Huangfu & Hall, Parallelizing the dual revised simplex method, Math. Prog. Comp. 10, 2018.
"""

from __future__ import annotations

import threading
from typing import Any, Literal, cast

import highspy
import numpy as np
from pydantic import Field

from argrad.problems import Status
from argrad_service.engine.data import Data
from argrad_service.engine.finish import Guess
from argrad_service.engine.forward.libraries import Answer, Array, Arrays, Session, solve_batch
from argrad_service.engine.forward.patterns import Pattern, of_matrix, of_triangle
from argrad_service.engine.options import OwnOptions, SolverOptions
from argrad_service.engine.point import Point

TIGHTER = 0.1
"""The library's feasibility tolerances, as a fraction of the caller's."""

TIGHTEST = 1e-10
"""The least tolerance that the library takes."""

LOOSEST = 1e-7
"""The largest that it is given: its default."""

_Model = highspy.HighsModelStatus
_CLAIMS = {
    _Model.kOptimal: Status.OPTIMAL,
    _Model.kInfeasible: Status.INFEASIBLE,
    _Model.kUnbounded: Status.UNBOUNDED,
    _Model.kUnboundedOrInfeasible: Status.INFEASIBLE,
    _Model.kIterationLimit: Status.MAX_ITERATIONS,
    _Model.kTimeLimit: Status.MAX_ITERATIONS,
}


class Options(OwnOptions):
    """Options of HiGHS."""

    algorithm: Literal["simplex", "ipm"] = Field(default="simplex")
    """Of LPs: the dual simplex method, or the interior point method and a crossover to a basis."""

    presolve: bool = Field(default=False)
    """Reduce an LP before it is solved; on dense rows this costs more than it saves, and it hears no wish to stop."""

    time_limit_s: float = Field(default=60.0, ge=1e-3, le=86_400)
    """Seconds after which one problem is given up, with the status `max_iterations`."""


def solve(data: Data, options: SolverOptions, warm: Guess | None) -> Point:
    """Solve a batch of LPs or convex QPs by HiGHS, on the CPU.

    Args:
        data: The problems.
        options: Tolerance; max_iterations in units of n + p + m pivots, or in iterations of the interior point method;
            who asks to stop: simplex and interior point iterations are interrupted, the QP solver's are not.
        warm: Where to begin.
    """
    own = cast("Options", options.own)

    def open_session(arrays: Arrays, is_over: threading.Event) -> Session:
        return _Session(arrays, options, own, is_over)

    return solve_batch(data, options, open_session, warm=warm)


class _Quiet(highspy.Highs):
    """The library without its greeting, which it writes when callbacks are enabled, before it can be told not to."""

    def enableCallbacks(self) -> None:
        """Enable them in silence."""
        self.setOptionValue("output_flag", False)
        super().enableCallbacks()


class _Session(Session):
    """One thread's settings; every problem is a model of its own, for the library keeps no state worth keeping."""

    def __init__(self, arrays: Arrays, options: SolverOptions, own: Options, is_over: threading.Event) -> None:
        self._arrays, self._is_over = arrays, is_over
        self._Q: Pattern = of_triangle(arrays.Q, arrays.n)
        self._C: Pattern = of_matrix(arrays.C)
        tolerance = min(max(TIGHTER * options.tolerance, TIGHTEST), LOOSEST)
        pivots = min(options.max_iterations * (arrays.n + arrays.r), 2**31 - 1)
        self._settings: dict[str, Any] = {
            "threads": 1,
            "solver": own.algorithm if arrays.Q is None else "choose",
            "presolve": "on" if own.presolve else "off",
            "time_limit": own.time_limit_s,
            "primal_feasibility_tolerance": tolerance,
            "dual_feasibility_tolerance": tolerance,
            "ipm_optimality_tolerance": tolerance,
            "simplex_iteration_limit": pivots,
            "ipm_iteration_limit": options.max_iterations,
            "qp_iteration_limit": pivots,
        }

    def solve(self, i: int) -> Answer:
        """Solve the i-th problem."""
        arrays = self._arrays
        highs = _Quiet()
        for name, value in self._settings.items():
            highs.setOptionValue(name, value)
        highs.passModel(self._model(i))
        if arrays.Q is None:
            highs.cbSimplexInterrupt += self._listen
            highs.cbIpmInterrupt += self._listen
        if arrays.start is not None:
            start = highspy.HighsSolution()
            start.col_value, start.row_dual = arrays.start[0][i], -arrays.start[1][i]
            highs.setSolution(start)
        highs.run()
        return self._answer(highs)

    def _listen(self, event: highspy.HighsCallbackEvent) -> None:
        if self._is_over.is_set():
            event.interrupt()

    def _model(self, i: int) -> highspy.HighsModel:
        arrays, n = self._arrays, self._arrays.n
        model = highspy.HighsModel()
        lp = model.lp_
        lp.num_col_, lp.num_row_ = n, arrays.r
        lp.col_cost_ = arrays.q[i]
        lp.col_lower_, lp.col_upper_ = np.full(n, -highspy.kHighsInf), np.full(n, highspy.kHighsInf)
        lower = arrays.d[i].copy()
        lower[arrays.p :] = -highspy.kHighsInf
        lp.row_lower_, lp.row_upper_ = lower, arrays.d[i]
        lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        lp.a_matrix_.num_col_, lp.a_matrix_.num_row_ = n, arrays.r
        lp.a_matrix_.start_, lp.a_matrix_.index_ = self._C.starts, self._C.indices
        lp.a_matrix_.value_ = self._C.values(i)
        if arrays.Q is not None:
            model.hessian_.dim_ = n
            model.hessian_.format_ = highspy.HessianFormat.kTriangular
            # Its triangle is the lower one by columns: our upper one by rows.
            start, index, value = _transposed(self._Q, self._Q.values(i))
            model.hessian_.start_, model.hessian_.index_, model.hessian_.value_ = start, index, value
        return model

    def _answer(self, highs: highspy.Highs) -> Answer:
        arrays = self._arrays
        status, solution, info = highs.getModelStatus(), highs.getSolution(), highs.getInfo()
        z, y = np.array(solution.col_value, dtype=float), -np.array(solution.row_dual, dtype=float)
        active = None
        if arrays.Q is None and status == _Model.kOptimal and highs.getBasis().valid:
            basic = highspy.HighsBasisStatus.kBasic
            active = np.array([row != basic for row in highs.getBasis().row_status], dtype=bool)
            active[: arrays.p] = True
        iterations = info.simplex_iteration_count + info.ipm_iteration_count + info.qp_iteration_count
        return Answer(
            z=z if z.size == arrays.n else np.full(arrays.n, np.nan),
            y=y if y.size == arrays.r else np.full(arrays.r, np.nan),
            status=_CLAIMS.get(status, Status.NUMERICAL_ERROR),
            iterations=max(int(iterations), 0),
            active=active,
            ran_out_of_time=status == _Model.kTimeLimit,
        )


def _transposed(pattern: Pattern, values: Array) -> tuple[Any, Any, Array]:
    """Starts, indices and values of the transposed matrix, column by column."""
    order = np.lexsort((pattern.columns, pattern.indices))
    starts = np.searchsorted(pattern.indices[order], np.arange(pattern.shape[0] + 1)).astype(np.int32)
    return starts, pattern.columns[order], values[order]
