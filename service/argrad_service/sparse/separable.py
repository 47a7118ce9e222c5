r"""Separable QPs, exactly, in the time of a sort: a diagonal Q, bounds, and at most one equality.

    minimise Σ ½dᵢzᵢ² + qᵢzᵢ   subject to   aᵀz = b (ν),   lb ≤ z ≤ ub,        d > 0

For a given ν the solution is zᵢ(ν) = clip(−(qᵢ + aᵢν)/dᵢ, lbᵢ, ubᵢ), and g(ν) = aᵀz(ν) falls from breakpoint to
breakpoint, along straight lines. A binary search over the sorted breakpoints finds the line on which g(ν) = b (Held,
Wolfe & Crowder, Math. Program. 6, 1974; Kiwiel, Math. Program. 112, 2008, for the history). Sparsemax, projections on
simplex and box, and capped versions of both are of this form.

With F the variables between their bounds, the KKT system needs no factorisation: see `SeparableSystem`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from argrad_service.sparse.finish import Guess
from argrad_service.sparse.problem import Mask, Problem, Vector
from argrad_service.sparse.system import Solved

CONSISTENT = 1e-12
"""Relative distance of b from the range of aᵀz beyond which there is no feasible point."""

Index = NDArray[np.intp]


@dataclass(frozen=True, kw_only=True, eq=False)
class Separable:
    """A separable problem.

    Args:
        d: `(n,)`, positive.
        q: `(n,)`.
        a: `(n,)`, the equality's row; zero where there is none.
        b: Its right-hand side.
        lower: `(n,)`, −inf where there is no bound.
        upper: `(n,)`, +inf likewise.
        lower_row: `(n,)`, position of the row that is the lower bound; −1 where there is none.
        upper_row: `(n,)`, likewise.
    """

    d: Vector
    q: Vector
    a: Vector
    b: float
    lower: Vector
    upper: Vector
    lower_row: Index
    upper_row: Index

    def at(self, nu: float) -> tuple[Vector, Vector]:
        """Z(ν), and what it would be without bounds."""
        free = -(self.q + self.a * nu) / self.d
        return np.clip(free, self.lower, self.upper), free


def recognise(problem: Problem) -> Separable | None:
    """The problem in separable form, or None if it is none."""
    n, p, Q, C = problem.n, problem.p, problem.Q, problem.C
    if p > 1 or Q.nnz != n or not (Q.indptr == np.arange(n + 1)).all() or not (Q.indices == np.arange(n)).all():
        return None
    if not (Q.data > 0).all():
        return None
    counts = np.diff(C.indptr)
    if (counts[p:] > 1).any():
        return None
    a = np.zeros(n)
    if p:
        a[C.indices[: counts[0]]] = C.data[: counts[0]]
    # Rows of one entry g: g z ≤ h is a bound h / g; an empty row binds nothing.
    rows = p + np.flatnonzero(counts[p:])
    where, g = C.indices[C.indptr[rows]], C.data[C.indptr[rows]]
    bound = problem.d[rows] / g
    lower, lower_row = _tightest(n, rows[g < 0], where[g < 0], -bound[g < 0])
    upper, upper_row = _tightest(n, rows[g > 0], where[g > 0], bound[g > 0])
    if (problem.d[p:][counts[p:] == 0] < 0).any():
        return None  # 0 ≤ h < 0: infeasible, for others to prove
    if _has_twins(where[g < 0], -bound[g < 0], lower) or _has_twins(where[g > 0], bound[g > 0], upper):
        return None  # two rows are one bound: should it be active, they are dependent
    b = float(problem.d[0]) if p else 0.0
    return Separable(
        d=Q.data, q=problem.q, a=a, b=b, lower=-lower, upper=upper, lower_row=lower_row, upper_row=upper_row
    )


def _tightest(n: int, rows: Index, where: Index, bound: Vector) -> tuple[Vector, Index]:
    """The least of several bounds on a variable, and its row."""
    order = np.argsort(-bound, kind="stable")  # the last assignment to a variable stays
    least, row = np.full(n, np.inf), np.full(n, -1)
    least[where[order]], row[where[order]] = bound[order], rows[order]
    return least, row


def _has_twins(where: Index, bound: Vector, least: Vector) -> bool:
    tight = where[bound == least[where]]
    is_tight = np.zeros(len(least), dtype=bool)
    is_tight[tight] = True
    return int(np.count_nonzero(is_tight)) < len(tight)


def solve(problem: Problem, separable: Separable) -> tuple[str, Guess, int] | None:
    """Solve a separable problem.

    Returns:
        A word of `argrad.Status`, the exact point with its active set, and the evaluations of g(ν); None where ν is not
        unique, because no variable that the equality touches is between its bounds.
    """
    s = separable
    active = np.arange(len(problem.d)) < problem.p
    y = np.zeros(len(problem.d))
    if (s.lower > s.upper).any():
        return "infeasible", Guess(active, np.clip(-s.q / s.d, s.lower, s.upper), y), 0
    nu, steps = 0.0, 0
    if problem.p:
        found, steps = _find_multiplier(s)
        if found is None:
            return None
        if np.isinf(found):
            return "infeasible", Guess(active, s.at(0.0)[0], y), steps
        nu = found
    z, free = s.at(nu)
    y[: problem.p] = nu
    force = -(s.d * z + s.q + s.a * nu)
    for rows, is_pressed in ((s.lower_row, free < s.lower), (s.upper_row, free > s.upper)):
        pressed = rows[is_pressed]
        active[pressed] = True
        y[pressed] = force[is_pressed] / problem.C.data[problem.C.indptr[pressed]]
    return "optimal", Guess(active, z, y), steps


def _find_multiplier(s: Separable) -> tuple[float | None, int]:
    """ν with aᵀz(ν) = b; infinite if b is out of reach, None if ν is not unique. And the evaluations that it took."""
    touched = s.a != 0
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = [-(s.q + s.d * side)[touched] / s.a[touched] for side in (s.lower, s.upper)]
    points = np.sort(np.concatenate(ends))
    points = points[np.isfinite(points)]
    points = points[np.diff(points, prepend=-np.inf) > 0]
    below, above, steps = -1, len(points), 0
    while above - below > 1:
        middle = (below + above) // 2
        steps += 1
        if float(s.a @ s.at(points[middle])[0]) > s.b:
            below = middle
        else:
            above = middle
    edges = np.concatenate([[-np.inf], points, [np.inf]])
    low, high = float(edges[above]), float(edges[above + 1])
    slope, nu = _line(s, touched, low, high)
    scale = 1 + abs(nu)
    if slope == 0.0 or not low - CONSISTENT * scale <= nu <= high + CONSISTENT * scale:
        # A level stretch at the end of the range: at b, or the range does not reach it.
        return (None if nu == 0.0 and slope == 0.0 else np.inf), steps
    nu = min(max(nu, low), high)
    if nu >= high - CONSISTENT * scale and above + 2 < len(edges):
        # At a corner: beyond it g may be level, and any ν of that stretch would do.
        beyond, distance = _line(s, touched, high, float(edges[above + 2]))
        if beyond == 0.0 and distance == 0.0:
            return None, steps
    return nu, steps


def _line(s: Separable, touched: Mask, low: float, high: float) -> tuple[float, float]:
    """−g′ between two breakpoints, and the ν at which that line reaches b; where it is level, 0 or inf: is it at b?"""
    if np.isinf(low) and np.isinf(high):
        inside = 0.0
    elif np.isinf(low):
        inside = high - 1 - abs(high)
    elif np.isinf(high):
        inside = low + 1 + abs(low)
    else:
        inside = 0.5 * (low + high)
    z, free = s.at(inside)
    moves = (free > s.lower) & (free < s.upper) & touched
    slope = float(np.sum(s.a[moves] ** 2 / s.d[moves]))
    fixed = s.a[~moves] * z[~moves]
    distance = s.b - float(fixed.sum())
    if slope == 0.0:
        return 0.0, 0.0 if abs(distance) <= CONSISTENT * (1 + abs(s.b) + float(np.abs(fixed).sum())) else np.inf
    return slope, -(distance + float(np.sum(s.a[moves] * s.q[moves] / s.d[moves]))) / slope


class SeparableSystem:
    r"""The KKT system of a separable problem on its active rows, solved in O(n) a right-hand side.

    With r = [r₁; r_e; r_b] on variables, equality and bounds g z_j = …, and F the variables without an active bound:

        x_j = r_b / g,   ν = (Σ_F a r₁/d + Σ_B a x − r_e) / Σ_F a²/d,   x_F = (r₁ − aν)/d,   y = (r₁ − d x − aν)_j / g

    Args:
        problem: The problem.
        separable: The same in separable form.
        rows: Positions of the active rows, ascending, the equality first.
    """

    def __init__(self, problem: Problem, separable: Separable, rows: Index) -> None:
        self.rows = rows
        self._s, self._p, self._n = separable, problem.p, problem.n
        bounds = rows[problem.p :]
        self._at = problem.C.indices[problem.C.indptr[bounds]]
        self._g = problem.C.data[problem.C.indptr[bounds]][:, None]
        self._is_free = np.ones(problem.n, dtype=bool)
        self._is_free[self._at] = False
        a, d = separable.a[self._is_free], separable.d[self._is_free]
        self._slope = float(np.sum(a * a / d))

    @property
    def is_regular(self) -> bool:
        """Whether the rows are independent: no two bounds on one variable, and a free variable in the equality."""
        is_once = self._n - np.count_nonzero(self._is_free) == len(self._at)
        return (self._p == 0 or self._slope > 0) and bool(is_once)

    @property
    def nbytes(self) -> int:
        """Bytes held beyond the problem's own."""
        return int(self._at.nbytes + self._g.nbytes + self._is_free.nbytes)

    def solve(self, right: Vector) -> Solved:
        """Solve K x = right, `(n + k,)` or `(n + k, j)`; the error is that of the equality and of rounding."""
        columns = right.reshape(len(right), -1)
        s, free = self._s, self._is_free
        a, d = s.a[:, None], s.d[:, None]
        r1, r2 = columns[: self._n], columns[self._n :]
        x = np.zeros_like(r1)
        x[self._at] = r2[self._p :] / self._g
        nu = np.zeros((1, columns.shape[1]))
        if self._p:
            known = (a[~free] * x[~free]).sum(axis=0) - r2[0]
            nu[0] = ((a * r1 / d)[free].sum(axis=0) + known) / self._slope
        x[free] = ((r1 - a * nu) / d)[free]
        y = (r1 - d * x - a * nu)[self._at] / self._g
        out = np.concatenate([x, nu[: self._p], y])
        error = 0.0
        if self._p:
            norms = np.maximum(np.abs(columns).max(axis=0, initial=0.0), np.finfo(float).tiny)
            size = 1 + np.abs(a * x).max(axis=0) / norms
            error = float((np.abs((a * x).sum(axis=0) - r2[0]) / norms / size).max(initial=0.0))
        return Solved(out.reshape(right.shape), error)
