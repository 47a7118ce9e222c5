"""What a worker process is asked to do: find the exact solution of a problem, or confirm that of a caller."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from argrad_service.sparse.finish import Finished, Guess, finish
from argrad_service.sparse.matrices import Mask, Vector
from argrad_service.sparse.problem import Problem, Request, active_at, residuals
from argrad_service.sparse.system import Order, is_convex

NONCONVEX = 1e-9
"""Q is convex if it is positive semidefinite up to this, relative to its largest entry."""

NEAR = 1e-4
"""Scaled KKT residual up to which a caller's point counts as a solution."""

_POINT_ROUNDS = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Solve:
    """Solve a problem."""

    problem: Problem
    request: Request

    def run(self) -> Found:
        """The exact solution, or the last point and why there is no better one."""
        # The libraries are loaded in the worker alone.
        from argrad_service.sparse.solvers import stages

        problem, request = self.problem, self.request
        if not is_convex(problem.Q, NONCONVEX):
            return _unsolved(problem, "nonconvex")
        last = _unsolved(problem, "numerical_error")
        for stage in stages(problem, request):
            if stage.verdict in ("infeasible", "unbounded"):
                return _found(_nothing_active(problem, stage.z, stage.y), stage.verdict, stage.iterations)
            if not (np.isfinite(stage.z).all() and np.isfinite(stage.y).all()):
                last = _unsolved(problem, "numerical_error", stage.iterations)
                continue
            guess = Guess(active_at(problem, stage.z, stage.y), stage.z, stage.y)
            done = finish(problem, guess)
            if done.is_exact:
                return _found(done, "optimal", stage.iterations)
            is_good = residuals(problem, stage.z, stage.y).scaled <= request.tolerance
            status = "optimal" if is_good else stage.verdict
            last = _found(done, "numerical_error" if status == "point" else status, stage.iterations)
        return last


@dataclass(frozen=True, kw_only=True, eq=False)
class Confirm:
    """Confirm or correct the active set of a caller's point."""

    problem: Problem
    z: Vector
    y: Vector

    def run(self) -> Found:
        """The exact solution; `numerical_error` where the point is not near one."""
        problem = self.problem
        if not is_convex(problem.Q, NONCONVEX):
            return _unsolved(problem, "nonconvex")
        guess = Guess(active_at(problem, self.z, self.y), self.z, self.y)
        is_near = residuals(problem, self.z, self.y).scaled <= NEAR
        done = finish(problem, guess, rounds=_POINT_ROUNDS)
        return _found(done, "optimal" if is_near else "numerical_error", 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """What came of a task.

    Args:
        status: A word of `argrad.Status`.
        guess: Point and active set; exact if `is_exact`.
        is_exact: Whether the active set was confirmed.
        iterations: Of the library.
        order: Of elimination of the active set's system, if one was factored.
        factor_nbytes: Bytes of that factor.
    """

    status: str
    guess: Guess
    is_exact: bool
    iterations: int
    order: Order | None
    factor_nbytes: int


def _found(done: Finished, status: str, iterations: int) -> Found:
    return Found(
        status=status,
        guess=done.guess,
        is_exact=done.is_exact,
        iterations=iterations,
        order=done.order,
        factor_nbytes=done.nbytes,
    )


def _nothing_active(problem: Problem, z: Vector, y: Vector) -> Finished:
    z, y = np.nan_to_num(z), np.nan_to_num(y)
    return Finished(guess=Guess(_equalities(problem), z, y), is_exact=False)


def _unsolved(problem: Problem, status: str, iterations: int = 0) -> Found:
    guess = Guess(_equalities(problem), np.zeros(problem.n), np.zeros(len(problem.d)))
    return _found(Finished(guess=guess, is_exact=False), status, iterations)


def _equalities(problem: Problem) -> Mask:
    return np.arange(len(problem.d)) < problem.p
