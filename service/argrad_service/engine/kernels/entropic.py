"""One problem with entropy and no quadratic term: its active set, and Newton's method in log z on it.

    q + τ(1 + log z) + C_aᵀy = 0,    C_a z = d_a;    with R = D(√(z/τ)), X = C_a R:
    S = XXᵀ,   S dy = −XRF − (d_a − C_a z),   dw = −(F + C_aᵀdy)/τ,   F the residual of stationarity

`argrad_service.engine.entropy` has the derivation; this is the same iteration, one problem at a time, with matrices of
the size of the active set. `exchange` walks from a guess of the active set to the set itself, whatever the guess came
from: none at all, a caller's point, or the interior point method of `entropic_path`.

Arrays that every function here knows, of one problem with n variables and r rows, p of them equalities:

    q `(n,)`, tau, C `(r, n)`, d `(r,)`: the problem;
    w `(n,)`: log z;  y `(r,)`: multipliers;  s `(r,)`: slacks d − Cz;
    X `(r, n)`, S `(K, K)`, unit `(K,)`: rows of the active set, scaled to unit length by `unit`, and the factor.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from argrad_service.engine.kernels.active_set import PATIENCE, collect, factor_set
from argrad_service.engine.kernels.lapack import gram, solve_lower, solve_upper

CONVERGED = 1e-7
"""The step of log z below which Newton's method, being quadratic, has converged."""

ROUGH = 0.1
"""The step of log z below which the signs of multipliers and slacks are worth looking at."""

SOLVED = 1e-9
"""Relative residual up to which an active set's equations count as solved."""

SIGN = 1e-10
"""A multiplier or slack is negative below minus this, times the largest of its kind."""

TRUSTED = 1e-3
"""Entries of a guess above this fraction of its largest are taken as they are, smaller ones from stationarity."""

LARGEST_LOG = 700.0
"""Bound on log z, below what overflows."""

SMALLEST_LOG = -708.0
"""Log of a z that is zero."""

TINY = 2.2250738585072014e-308
"""Smallest normal float64."""


@njit(nogil=True, cache=True, error_model="numpy")
def dot(a, b):  # type: ignore[no-untyped-def]
    """Inner product over the length of b, in four sums: without fastmath one would wait for itself."""
    n = b.shape[0]
    even = n - n % 4
    s0, s1, s2, s3 = 0.0, 0.0, 0.0, 0.0
    for j in range(0, even, 4):
        s0 += a[j] * b[j]
        s1 += a[j + 1] * b[j + 1]
        s2 += a[j + 2] * b[j + 2]
        s3 += a[j + 3] * b[j + 3]
    for j in range(even, n):
        s0 += a[j] * b[j]
    return (s0 + s1) + (s2 + s3)


@njit(nogil=True, cache=True, error_model="numpy")
def largest_of(vector):  # type: ignore[no-untyped-def]
    """‖v‖∞; NaN stays NaN."""
    size = 0.0
    for i in range(vector.shape[0]):
        value = abs(vector[i])
        if not value <= size:
            size = value
    return size


@njit(nogil=True, cache=True, error_model="numpy")
def slope_at(q, tau, C, y, w, out):  # type: ignore[no-untyped-def]
    """Stationarity q + τ(1 + w) + Cᵀy; rows whose multiplier is zero are not looked at."""
    for j in range(q.shape[0]):
        out[j] = q[j] + tau * (1.0 + w[j])
    for i in range(y.shape[0]):
        if y[i] != 0.0:
            row, factor = C[i], y[i]
            for j in range(q.shape[0]):
                out[j] += factor * row[j]


@njit(nogil=True, cache=True, error_model="numpy")
def begin_at(q, tau, C, z, y, w):  # type: ignore[no-untyped-def]
    """W of a guess: large entries as they are, small ones as stationarity has them."""
    n = q.shape[0]
    high = 0.0
    for j in range(n):
        high = max(high, z[j])
    floor = TRUSTED * high if high > 0 else 1.0
    top = np.log(floor)
    for j in range(n):
        w[j] = 0.0
    slope_at(q, tau, C, y, w, w)
    for j in range(n):
        by_slope = min(-w[j] / tau, top)
        w[j] = np.log(z[j]) if z[j] > floor else by_slope


@njit(nogil=True, cache=True, error_model="numpy")
def move(w, dw, alpha):  # type: ignore[no-untyped-def]
    """Move w by α dw as `argrad_service.engine.entropy.move` does; a large entry never far beyond its linear model."""
    cap = -np.inf
    for j in range(w.shape[0]):
        cap = max(cap, w[j])
    cap -= 2.3
    for j in range(w.shape[0]):
        step = alpha * dw[j]
        if step > 0:
            w[j] = max(w[j] + np.log1p(step), min(w[j] + step, cap))
        else:
            w[j] += step
        w[j] = min(w[j], LARGEST_LOG)


@njit(nogil=True, cache=True, error_model="numpy")
def factor_rows(lapack, C, index, k, root, X, S, unit, work):  # type: ignore[no-untyped-def]
    """X: the rows C_a R scaled to unit length; S: the factor of XXᵀ. False where the rows are nearly dependent."""
    n = root.shape[0]
    for i in range(k):
        row, length = C[index[i]], 0.0
        for j in range(n):
            X[i, j] = row[j] * root[j]
            length += X[i, j] * X[i, j]
        unit[i] = 1.0 / np.sqrt(length) if length > 0 else 1.0
        for j in range(n):
            X[i, j] *= unit[i]
    gram(lapack, X[:k], S, work)
    return factor_set(lapack, S, k, work)


@njit(nogil=True, cache=True, error_model="numpy")
def solve_rows_system(lapack, X, S, unit, k, u, r2, y, work):  # type: ignore[no-untyped-def]
    """[I Xᵀ; X 0] [u; y] = [u; D(unit) r₂]; u is overwritten, y gets the multipliers of the unscaled rows."""
    n = u.shape[0]
    for i in range(k):
        y[i] = dot(X[i], u) - unit[i] * r2[i]
    solve_lower(lapack, S, k, y, work)
    solve_upper(lapack, S, k, y, work)
    for i in range(k):
        row, factor = X[i], y[i]
        for j in range(n):
            u[j] -= factor * row[j]
        y[i] *= unit[i]


@njit(nogil=True, cache=True, error_model="numpy")
def slacks_at(C, d, w, z, s):  # type: ignore[no-untyped-def]
    """Z = e^w and s = d − Cz."""
    for j in range(w.shape[0]):
        z[j] = np.exp(w[j])
    for i in range(d.shape[0]):
        s[i] = d[i] - dot(C[i], z)


@njit(nogil=True, cache=True, error_model="numpy")
def newton(lapack, q, tau, C, d, index, k, w, y, s, X, S, unit, target, steps, scratch, work):  # type: ignore[no-untyped-def]
    """Newton's method on one active set, from w and y, until the step of w is below the target.

    Args:
        lapack: Addresses.
        q, tau, C, d, w, y, s, X, S, unit: See above; y is zero off the active set, s is that before the last step.
        index: The active rows.
        k: Their number.
        target: Bound on the last step, relative to 1 + ‖w‖∞.
        steps: Steps at most.
        scratch: `(5, max(n, r))`.
        work: Scratch of the LAPACK calls.

    Returns:
        The steps taken, or −1 where the rows are nearly dependent or the numbers are not finite; and the last step,
        relative.
    """
    n = q.shape[0]
    z, root, slope, u, dy = scratch[0, :n], scratch[1, :n], scratch[2, :n], scratch[3, :n], scratch[4]
    last, is_near = np.inf, False
    for taken in range(steps):
        slacks_at(C, d, w, z, s)
        slope_at(q, tau, C, y, w, slope)
        for j in range(n):
            root[j] = np.sqrt(z[j] / tau)
            u[j] = -root[j] * slope[j]
        if not factor_rows(lapack, C, index, k, root, X, S, unit, work):
            return -1, np.inf
        for i in range(k):
            root[i] = s[index[i]]
        solve_rows_system(lapack, X, S, unit, k, u, root, dy, work)
        for i in range(k):
            row, factor = C[index[i]], dy[i]
            y[index[i]] += factor
            for j in range(n):
                slope[j] += factor * row[j]
        size = largest_of(w)
        last = 0.0
        for j in range(n):
            u[j] = -slope[j] / tau
            # Where z is that small, before and after, it does not count: rounding moves its logarithm.
            if max(w[j], w[j] + u[j]) > SMALLEST_LOG and not abs(u[j]) <= last:
                last = abs(u[j])
        if not last < np.inf:
            return -1, np.inf
        move(w, u, 1.0)
        step = last
        last /= 1.0 + size
        if last <= target:
            # A step of 1e-7 ‖w‖ leaves more than rounding where ‖w‖ is large: one more does not.
            if is_near or step <= target or target == ROUGH:
                return taken + 1, last
            is_near = True
    return steps, last


@njit(nogil=True, cache=True, error_model="numpy")
def holds(q, tau, C, d, index, k, w, y, s, scratch):  # type: ignore[no-untyped-def]
    """Whether the equations of the active rows and of stationarity hold at w, y; z and s are left in place."""
    n = q.shape[0]
    z, slope, pull = scratch[0, :n], scratch[2, :n], scratch[3, :n]
    slacks_at(C, d, w, z, s)
    bound = SOLVED * (1e-3 + largest_of(d))
    for i in range(k):
        if not abs(s[index[i]]) <= bound:
            return False
    pull[:] = 0.0
    for i in range(k):
        row, factor = C[index[i]], y[index[i]]
        for j in range(n):
            pull[j] += factor * row[j]
    size = max(largest_of(q), largest_of(pull))
    for j in range(n):
        slope[j] = tau * (1.0 + max(w[j], SMALLEST_LOG))
        size = max(size, abs(slope[j]))
    for j in range(n):
        missed = q[j] + slope[j] + pull[j]
        # An underflowed z is right if it wants to be smaller still.
        off = -missed if w[j] <= SMALLEST_LOG else abs(missed)
        if not off <= SOLVED * size:
            return False
    return True


@njit(nogil=True, cache=True, error_model="numpy")
def mark_wrong(active, p, y, s, wrong):  # type: ignore[no-untyped-def]
    """Mark the inequalities whose sign contradicts their membership; how many there are, and the last of them."""
    count, last = 0, -1
    least_y, least_s = -SIGN * largest_of(y), -SIGN * (1e-3 + largest_of(s))
    for i in range(p, active.shape[0]):
        wrong[i] = not y[i] >= least_y if active[i] else not s[i] >= least_s
        if wrong[i]:
            count += 1
            last = i
    return count, last


@njit(nogil=True, cache=True, error_model="numpy")
def exchange(  # type: ignore[no-untyped-def]
    lapack, q, tau, C, d, p, active, index, w, y, s, X, S, unit, rounds, steps, scratch, marks, work
):
    """Exchange wrong rows until none is left, as `argrad_service.engine.finish` does, by Newton's method throughout.

    A set is left as soon as the signs can be told, at a step of `ROUGH`, and only the last one is solved to the end.

    Args:
        lapack: Addresses.
        q, tau, C, d, p, w, y, s, X, S, unit: See above; w and y are the guess and become the solution.
        active: `(r,)`, the guess and then the set.
        index: `(K,)`, gets the active rows.
        rounds: Sets tried at most.
        steps: Newton steps at most, over all of them.
        scratch: See `newton`.
        marks: `(r,)`.
        work: Scratch of the LAPACK calls.

    Returns:
        The number of active rows, or −1 where no set was confirmed; and the steps taken.
    """
    best, patience, total = active.shape[0] + 1, PATIENCE, 0
    for _ in range(rounds):
        k = collect(active, index)
        if k < 0:
            return -1, total
        for i in range(active.shape[0]):
            if not active[i]:
                y[i] = 0.0
        target = ROUGH
        while True:
            taken, _last = newton(
                lapack, q, tau, C, d, index, k, w, y, s, X, S, unit, target, steps - total, scratch, work
            )
            if taken < 0:
                return -1, total
            total += taken
            is_solved = holds(q, tau, C, d, index, k, w, y, s, scratch)
            count, last = mark_wrong(active, p, y, s, marks)
            if count > 0 or target == CONVERGED or total >= steps:
                break
            target = CONVERGED
        if count == 0:
            return (k if is_solved and target == CONVERGED and _last <= 10.0 * CONVERGED else -1), total
        if total >= steps:
            return -1, total
        patience = PATIENCE if count < best else patience - 1
        best = min(best, count)
        for i in range(p, active.shape[0]):
            if marks[i] and (patience > 0 or i == last):
                active[i] = not active[i]
    return -1, total
