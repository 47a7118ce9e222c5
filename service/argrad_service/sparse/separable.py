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

from argrad_service.sparse.finish import Guess
from argrad_service.sparse.matrices import Index, Mask, Vector
from argrad_service.sparse.problem import Problem
from argrad_service.sparse.system import Solved

CONSISTENT = 1e-12
"""Relative distance of b from the range of aᵀz beyond which there is no feasible point."""


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
        return np.minimum(np.maximum(free, self.lower), self.upper), free


def recognise(problem: Problem) -> Separable | None:
    """The problem in separable form, or None if it is none."""
    reading = problem.matrices.reading
    if reading is None or (problem.d[reading.empty] < 0).any():  # 0 ≤ h < 0 is infeasible, for others to prove
        return None
    lower, upper = (of.tightest(problem.n, problem.d) for of in (reading.lower, reading.upper))
    if lower is None or upper is None:
        return None
    return Separable(
        d=reading.d,
        q=problem.q,
        a=reading.a,
        b=float(problem.d[0]) if problem.p else 0.0,
        lower=-lower[0],
        upper=upper[0],
        lower_row=lower[1],
        upper_row=upper[1],
    )


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
    points = _breakpoints(s, touched)
    # Without bounds z is ν·slope − start: rounded otherwise than in `at`, it only says between which points ν is.
    slope, start, z = -s.a / s.d, s.q / s.d, np.empty_like(s.d)
    below, above, steps = -1, len(points), 0
    while above - below > 1:
        middle = (below + above) // 2
        steps += 1
        np.multiply(slope, points[middle], out=z)
        np.subtract(z, start, out=z)
        np.maximum(z, s.lower, out=z)
        np.minimum(z, s.upper, out=z)
        if float(s.a @ z) > s.b:
            below = middle
        else:
            above = middle
    low, high = (float(points[k]) if 0 <= k < len(points) else end for k, end in ((below, -np.inf), (above, np.inf)))
    rate, nu = _line(s, touched, low, high)
    scale = 1 + abs(nu)
    if rate == 0.0 or not low - CONSISTENT * scale <= nu <= high + CONSISTENT * scale:
        # A level stretch at the end of the range: at b, or the range does not reach it.
        return (None if nu == 0.0 and rate == 0.0 else np.inf), steps
    nu = min(max(nu, low), high)
    if nu >= high - CONSISTENT * scale and above < len(points):
        # At a corner: beyond it g may be level, and any ν of that stretch would do.
        beyond = int(np.searchsorted(points, high, side="right"))
        beyond_rate, distance = _line(s, touched, high, float(points[beyond]) if beyond < len(points) else np.inf)
        if beyond_rate == 0.0 and distance == 0.0:
            return None, steps
    return nu, steps


def _breakpoints(s: Separable, touched: Mask) -> Vector:
    """The finite ν at which a variable that the equality touches reaches a bound, ascending."""
    where = slice(None) if touched.all() else touched
    a, d, q = s.a[where], s.d[where], s.q[where]
    points = np.concatenate([(-q - d * bound[where]) / a for bound in (s.lower, s.upper)])
    points.sort()
    first, last = np.searchsorted(points, -np.inf, side="right"), np.searchsorted(points, np.inf, side="left")
    return points[first:last]


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
    weights = np.where((free > s.lower) & (free < s.upper) & touched, s.a / s.d, 0.0)
    slope = float(weights @ s.a)
    fixed = np.where(weights != 0.0, 0.0, s.a * z)
    distance = s.b - float(fixed.sum())
    if slope == 0.0:
        return 0.0, 0.0 if abs(distance) <= CONSISTENT * (1 + abs(s.b) + float(np.abs(fixed).sum())) else np.inf
    return slope, -(distance + float(weights @ s.q)) / slope


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
        starts = problem.C.indptr[rows[problem.p :]]
        self._at, self._g = problem.C.indices[starts], problem.C.data[starts]
        self._is_free = np.ones(problem.n, dtype=bool)
        self._is_free[self._at] = False
        self._weights = np.where(self._is_free, separable.a / separable.d, 0.0)
        self._slope = float(self._weights @ separable.a)

    @property
    def is_regular(self) -> bool:
        """Whether the rows are independent: no two bounds on one variable, and a free variable in the equality."""
        is_once = self._n - np.count_nonzero(self._is_free) == len(self._at)
        return (self._p == 0 or self._slope > 0) and bool(is_once)

    @property
    def nbytes(self) -> int:
        """Bytes held beyond the problem's own."""
        return int(self._at.nbytes + self._g.nbytes + self._is_free.nbytes + self._weights.nbytes)

    def solve(self, right: Vector) -> Solved:
        """Solve K x = right, `(n + k,)` or `(n + k, j)`; the error is that of the equality and of rounding."""
        s, systems = self._s, right.reshape(len(right), -1).T
        r1, r2 = systems[:, : self._n], systems[:, self._n :]
        x = np.zeros_like(r1)
        x[:, self._at] = r2[:, self._p :] / self._g
        nu, error = np.zeros((len(systems), self._p)), 0.0
        if self._p:
            nu[:, 0] = (r1 @ self._weights + x @ s.a - r2[:, 0]) / self._slope
        unexplained = r1 - nu @ s.a[None] if self._p else r1
        x = np.where(self._is_free, unexplained / s.d, x)
        y = (unexplained - s.d * x)[:, self._at] / self._g
        if self._p:
            norms = np.maximum(np.abs(systems).max(axis=1, initial=0.0), np.finfo(float).tiny)
            size = 1 + np.abs(s.a * x).max(axis=1) / norms
            error = float((np.abs(x @ s.a - r2[:, 0]) / norms / size).max(initial=0.0))
        return Solved(np.concatenate([x, nu, y], axis=1).T.reshape(right.shape), error)
