"""The active-set finish: from a good guess of the active set to the exact solution, one factorisation a guess.

Rows with a negative multiplier leave, rows with a negative slack enter, all at once; when the number of wrong rows has
not fallen below its best for some rounds, only the last wrong one moves (block principal pivoting: Júdice & Pires,
1994). A set without wrong rows is the active set, and the solution of its KKT system is exact up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from argrad_service.sparse.matrices import Mask, Vector
from argrad_service.sparse.problem import Problem, size
from argrad_service.sparse.system import Order, System

SIGN_TOLERANCE = 1e-10
"""A multiplier or slack is negative if it is below minus this, times the largest of its kind."""

CONSISTENT = 1e-6
"""Relative residual up to which the equations of a candidate set count as solved."""

ROUNDS = 12
"""Candidate sets tried at most."""

_PATIENCE = 3


class Guess(NamedTuple):
    """Where the finish begins: active rows `(p + m,)`, z `(n,)`, y = [ν; λ] `(p + m,)`."""

    active: Mask
    z: Vector
    y: Vector


@dataclass(frozen=True, kw_only=True, eq=False)
class Finished:
    """What the finish found.

    Args:
        guess: The exact solution if `is_exact`, else the guess that came in.
        is_exact: Whether the active set was confirmed.
        order: Of elimination, for a `System` of the active rows; None if none was factored.
        nbytes: Bytes of its factor.
    """

    guess: Guess
    is_exact: bool
    order: Order | None = None
    nbytes: int = 0


def finish(problem: Problem, guess: Guess, *, rounds: int = ROUNDS) -> Finished:
    """Exchange wrong rows until none is left, or give up after so many candidate sets."""
    active = guess.active.copy()
    best, patience = len(active) + 1, _PATIENCE
    for _ in range(rounds):
        system, z, y, is_consistent = _candidate(problem, active, guess)
        wrong = _wrong_rows(problem, active, z, y)
        count = int(wrong.sum())
        if count == 0:
            if not is_consistent:
                break
            y[problem.p :] = np.maximum(y[problem.p :], 0.0)
            return Finished(guess=Guess(active, z, y), is_exact=True, order=system.order, nbytes=system.nbytes)
        patience = _PATIENCE if count < best else patience - 1
        best = min(best, count)
        if patience > 0:
            active ^= wrong
        else:
            active[np.flatnonzero(wrong)[-1]] ^= True
        del system
    return Finished(guess=guess, is_exact=False)


def _candidate(problem: Problem, active: Mask, guess: Guess) -> tuple[System, Vector, Vector, bool]:
    """Solve the equality-constrained QP of a candidate set; where it has many solutions, the one near the guess."""
    rows = np.flatnonzero(active)
    system = System(problem, rows)
    z0, y0 = guess.z, np.where(active, guess.y, 0.0)
    right = np.concatenate([-(problem.q + problem.Q @ z0 + problem.C.T @ y0), (problem.d - problem.C @ z0)[rows]])
    step, _ = system.solve(right)
    z, y = z0 + step[: problem.n], y0
    y[rows] += step[problem.n :]
    # The step is judged with the terms that it was made from: a guess that is exact has nothing left to solve.
    Qz, Cty, Cz = problem.Q @ z, problem.C.T @ y, (problem.C @ z)[rows]
    stationarity = size(Qz + problem.q + Cty) / (1e-3 + max(size(Qz), size(problem.q), size(Cty)))
    feasibility = size(Cz - problem.d[rows]) / (1e-3 + max(size(Cz), size(problem.d[rows])))
    return system, z, y, max(stationarity, feasibility) <= CONSISTENT


def _wrong_rows(problem: Problem, active: Mask, z: Vector, y: Vector) -> Mask:
    """Rows whose sign contradicts their membership."""
    s = problem.d - problem.C @ z
    leaves = active & ~(y >= -SIGN_TOLERANCE * size(y))
    enters = ~active & ~(s >= -SIGN_TOLERANCE * (1e-3 + size(s)))
    wrong: Mask = leaves | enters
    wrong[: problem.p] = False
    return wrong
