"""Two ways to the active set of one strictly convex QP in dual form (rows x_i of unit length, x = L⁻¹Cᵀ scaled).

With y = [ν; λ], c = d + X L⁻¹q and T = XXᵀ:  s = c + Ty;  s = 0 on equalities, 0 ≤ λ ⟂ s ≥ 0 on the rest.

`pivot`: block principal pivoting (Júdice & Pires, 1994; Kim & Park, 2011). Nothing is re-formed between rounds but the
Cholesky factor of T on the candidate set. For at most as many inequalities as free variables.

`goldfarb_idnani`: the dual active-set method (Goldfarb & Idnani, Math. Program. 27, 1983). Its working set is always
independent, it needs no T, and it recognises infeasible problems. For everything that `pivot` cannot do.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from argrad_service.engine.kernels.lapack import cholesky, solve_lower, solve_upper

SOLVED, INFEASIBLE, NOT_DEFINITE, DEGENERATE, UNDECIDED = 0, 1, 2, 3, 4
"""What a kernel says of a problem; the last three are for another solver."""

SIGN = 1e-10
"""A multiplier or slack is negative below minus this, times the largest of its kind."""

PIVOT = 1e-10
"""A row whose squared distance from the span of others is below this is dependent on them."""

CLEAR = 1e-7
"""A slack that stays below minus this on a dependent row proves infeasibility; between, another solver decides."""

WEAK = 1e-10
"""A row with λ ≤ WEAK ‖λ‖∞ and s ≤ WEAK (1 + |h|) is weakly active, as in `argrad_service.engine.solution`."""

PATIENCE = 3
"""Rounds without a new best number of wrong rows before rows move one at a time."""


@njit(nogil=True, cache=True)
def factor_set(lapack, lower, k, work):  # type: ignore[no-untyped-def]
    """Cholesky factor of the leading k × k block, in place; False if its rows are nearly dependent."""
    if k == 0:
        return True
    if cholesky(lapack, lower, k, work) != 0:
        return False
    for i in range(k):
        if not lower[i, i] * lower[i, i] > PIVOT:
            return False
    return True


@njit(nogil=True, cache=True)
def collect(active, index):  # type: ignore[no-untyped-def]
    """Write the positions of the active rows to `index`; their number, or −1 if there are more than it holds."""
    k = 0
    for i in range(active.shape[0]):
        if active[i]:
            if k == index.shape[0]:
                return -1
            index[k] = i
            k += 1
    return k


@njit(nogil=True, cache=True)
def largest(vector):  # type: ignore[no-untyped-def]
    """Largest absolute entry, and never below 1e-3."""
    size = 1e-3
    for i in range(vector.shape[0]):
        size = max(size, abs(vector[i]))
    return size


@njit(nogil=True, cache=True)
def pivot(lapack, T, c, p, lower, index, active, y, s, rounds, work):  # type: ignore[no-untyped-def]
    """Exchange wrong rows until none is left.

    Args:
        lapack: Addresses.
        T: `(r, r)`, the Gram matrix, both triangles.
        c: `(r,)`.
        p: Equalities, which come first and stay active.
        lower: `(K, K)`, gets the factor of T on the active set.
        index: `(K,)`, gets the active rows in order.
        active: `(r,)`, gets which rows are active.
        y: `(r + 1,)`, gets the multipliers of the active rows in order.
        s: `(r,)`, gets the slacks.
        rounds: Candidate sets tried at most.
        work: Scratch of the LAPACK calls.

    Returns:
        The number of active rows, or −1 where it gave up; and the rounds it took.
    """
    r = c.shape[0]
    for i in range(r):
        active[i] = i < p or c[i] < 0.0
    best, patience, c_size = r + 1, PATIENCE, largest(c)
    for done in range(rounds):
        k = collect(active, index)
        if k < 0:
            return -1, done
        for i in range(k):
            for j in range(i + 1):
                lower[i, j] = T[index[i], index[j]]
        if not factor_set(lapack, lower, k, work):
            return -1, done
        y_size = 0.0
        for i in range(k):
            y[i] = -c[index[i]]
        solve_lower(lapack, lower, k, y, work)
        solve_upper(lapack, lower, k, y, work)
        s[:] = c
        for i in range(k):
            y_size = max(y_size, abs(y[i]))
            row, factor = T[index[i]], y[i]
            for j in range(r):
                s[j] += factor * row[j]
        s_size = largest(s)
        least_y, least_s, most_left = -SIGN * y_size, -SIGN * s_size, 1e2 * SIGN * max(s_size, c_size)
        wrong, last, at = 0, -1, 0
        for i in range(r):
            if active[i]:
                # With a singular system signs can look right while the equations do not hold.
                if not abs(s[i]) <= most_left:
                    return -1, done
                if i >= p and not y[at] >= least_y:
                    wrong, last = wrong + 1, i
                at += 1
            elif not s[i] >= least_s:
                wrong, last = wrong + 1, i
        if wrong == 0:
            return k, done + 1
        patience = PATIENCE if wrong < best else patience - 1
        best = min(best, wrong)
        if patience <= 0:
            active[last] = not active[last]
            continue
        at = 0
        for i in range(r):
            if active[i]:
                active[i] = i < p or y[at] >= least_y
                at += 1
            else:
                active[i] = not s[i] >= least_s
    return -1, rounds


@njit(nogil=True, cache=True)
def _drop(lower, k, at):  # type: ignore[no-untyped-def]
    """Remove row `at` from a Cholesky factor of size k, by rotations."""
    for i in range(at, k - 1):
        for j in range(i + 2):
            lower[i, j] = lower[i + 1, j]
    for i in range(at, k - 1):
        length = np.hypot(lower[i, i], lower[i, i + 1])
        cosine, sine = lower[i, i] / length, lower[i, i + 1] / length
        lower[i, i], lower[i, i + 1] = length, 0.0
        for j in range(i + 1, k - 1):
            left, right = lower[j, i], lower[j, i + 1]
            lower[j, i] = cosine * left + sine * right
            lower[j, i + 1] = cosine * right - sine * left


@njit(nogil=True, cache=True)
def _choose(s, active, p):  # type: ignore[no-untyped-def]
    """The inequality with the most negative slack, or −1."""
    chosen, worst = -1, -SIGN * largest(s)
    for i in range(p, s.shape[0]):
        if not active[i] and s[i] < worst:
            chosen, worst = i, s[i]
    return chosen


@njit(nogil=True, cache=True)
def goldfarb_idnani(lapack, X, c, p, lower, index, active, y, s, scratch, steps, work):  # type: ignore[no-untyped-def]
    """Add the worst row to the working set, dropping rows whose multipliers reach zero on the way, until none is wrong.

    With row i entering along y_i = t and l = L⁻¹X_W x_i, w = L⁻ᵀl:  y_W −= tw,  s += tX(x_i − X_Wᵀw); the curvature is
    1 − ‖l‖².

    Args:
        lapack: Addresses.
        X: `(r, n)`, rows of unit length.
        c: `(r,)`.
        p: Equalities, which come first, enter first and never leave.
        lower: `(K, K)`, the factor of the working set.
        index: `(K,)`, gets the working set in the order of entering.
        active: `(r,)`, gets which rows are in it.
        y: `(r + 1,)`, gets its multipliers.
        s: `(r,)`, gets the slacks.
        scratch: `(3, max(K, n))`.
        steps: Most steps.
        work: Scratch of the LAPACK calls.

    Returns:
        The number of active rows, the steps taken, and SOLVED, INFEASIBLE or UNDECIDED.
    """
    r, n = X.shape
    l, w, half = scratch[0], scratch[1], scratch[2]
    active[:] = False
    s[:] = c
    k, entered, done = 0, 0, 0
    while True:
        is_equality = entered < p
        i = entered if is_equality else _choose(s, active, p)
        if i < 0:
            return k, done, SOLVED
        # An equality is driven to zero from whichever side it is on.
        sign = -1.0 if is_equality and s[i] > 0 else 1.0
        gained = 0.0
        while True:
            done += 1
            if done > steps:
                return k, done, UNDECIDED
            for j in range(k):
                l[j] = np.dot(X[index[j]], X[i])
            solve_lower(lapack, lower, k, l, work)
            curvature = 1.0
            for j in range(k):
                curvature -= l[j] * l[j]
                w[j] = l[j]
            solve_upper(lapack, lower, k, w, work)
            to_bound, leaving = np.inf, -1
            for j in range(k):
                if index[j] >= p and sign * w[j] > 0 and y[j] < to_bound * sign * w[j]:
                    to_bound, leaving = y[j] / (sign * w[j]), j
            is_free = curvature > PIVOT
            to_zero = -sign * s[i] / curvature if is_free else np.inf
            if to_zero == np.inf and to_bound == np.inf:
                # No multipliers of the working set keep this row: a certificate, if it is clearly violated.
                return k, done, INFEASIBLE if abs(s[i]) > CLEAR * largest(s) else UNDECIDED
            step = sign * min(to_bound, to_zero)
            gained += step
            for j in range(k):
                y[j] -= step * w[j]
            if is_free:
                half[:n] = X[i]
                for j in range(k):
                    row, factor = X[index[j]], w[j]
                    for m in range(n):
                        half[m] -= factor * row[m]
                for j in range(r):
                    s[j] += step * np.dot(X[j], half[:n])
            if to_zero <= to_bound:
                if k == index.shape[0]:
                    return k, done, UNDECIDED
                lower[k, :k] = l[:k]
                lower[k, k] = np.sqrt(curvature)
                index[k], y[k], active[i], s[i] = i, gained, True, 0.0
                k += 1
                break
            active[index[leaving]] = False
            _drop(lower, k, leaving)
            for j in range(leaving, k - 1):
                index[j], y[j] = index[j + 1], y[j + 1]
            k -= 1
        if is_equality:
            entered += 1
