"""λ ≥ 0 with s = c + Rλ ≥ 0 and λᵀs = 0: which rows are active, for a symmetric positive semidefinite R.

References:
    Júdice & Pires, A block principal pivoting algorithm for large-scale strictly monotone linear complementarity
    problems, Computers & Operations Research 21 (1994): the exchange rule and its safeguard.
    Goldfarb & Idnani, A numerically stable dual method for solving strictly convex quadratic programs, Mathematical
    Programming 27 (1983): one row at a time, for a singular R.
"""

from __future__ import annotations

import contextlib

import numpy as np

from benchmarks.reference.truth import Array, Mask

_MOST_EXCHANGES = 400
_PATIENCE = 3
_SINGULAR = (1e-11, 1e-13, 1e-9, 1e-15, 1e-7)
"""Curvatures relative to a row's own up to which it counts as dependent on others, tried in turn: rounding in R depends
on the problem. Whoever asks confirms the set by the optimality conditions of the problem itself."""


def active_rows(R: Array, c: Array, *, rank: int) -> Mask:
    """The active rows.

    Args:
        R: `(m, m)`.
        c: `(m,)`.
        rank: Largest rank that R can have; where it is below m, exchanging blocks would meet singular matrices.

    Raises:
        ArithmeticError: there is no such λ, or it was not found.
    """
    if len(c) <= rank:
        found = _exchange(R, c)
        if found is not None:
            return found
    for singular in _SINGULAR[:-1]:
        with contextlib.suppress(ArithmeticError):
            return _add_one_by_one(R, c, singular)
    return _add_one_by_one(R, c, _SINGULAR[-1])


def _exchange(R: Array, c: Array) -> Mask | None:
    """Exchange every infeasible index at once; one at a time while that brings no progress. None: it did not end."""
    active = c < 0
    fewest, patience = len(c) + 1, _PATIENCE
    for _ in range(_MOST_EXCHANGES):
        lam = np.zeros(len(c))
        try:
            lam[active] = np.linalg.solve(R[np.ix_(active, active)], -c[active])
        except np.linalg.LinAlgError:
            return None
        slack = c + R[:, active] @ lam[active]
        wrong = np.flatnonzero(np.where(active, lam < 0, slack < 0))
        if len(wrong) == 0:
            return active
        if len(wrong) < fewest:
            fewest, patience = len(wrong), _PATIENCE
        elif patience > 0:
            patience -= 1
        else:
            wrong = wrong[-1:]
        active[wrong] = ~active[wrong]
    return None


def _add_one_by_one(R: Array, c: Array, singular: float) -> Mask:
    """Bring the most violated row in, and put out what its multiplier drives to zero on the way."""
    lam, working = np.zeros(len(c)), [0][:0]
    allowed = 1e-13 * (1 + np.abs(c).max())
    for _ in range(20 * len(c) + 20):
        slack = c + R @ lam
        row = int(np.argmin(slack))
        if slack[row] >= -allowed:
            active = np.zeros(len(c), dtype=bool)
            active[working] = True
            return active
        missing = -slack[row]
        while True:
            change = np.linalg.solve(R[np.ix_(working, working)], R[working, row])
            curvature = R[row, row] - R[row, working] @ change
            whole = missing / curvature if curvature > singular * R[row, row] else np.inf
            falling = change > 0
            steps = np.where(falling, lam[working] / np.where(falling, change, 1.0), np.inf)
            step = min(whole, steps.min(initial=np.inf))
            if not np.isfinite(step):
                raise ArithmeticError("the inequalities contradict each other")
            lam[working] -= step * change
            lam[row] += step
            if step == whole:
                working.append(row)
                break
            missing -= step * curvature
            lam[working.pop(int(np.argmin(steps)))] = 0.0
    raise ArithmeticError("no active set was found")
