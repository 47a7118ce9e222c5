"""Small strictly convex QPs, thousands in a batch: all of `batch` without a call, a view or an allocation a problem.

The mathematics is that of `active_set.goldfarb_idnani` and of `kkt`. With few rows their Gram matrix T = XXᵀ is formed
first, and the dual active set moves in it alone: with row i entering along y_i = t, l = L_W⁻¹T_Wi and w = L_W⁻ᵀl,

    y_W −= tw,   s += t(T_i − T_W w),   curvature T_ii − ‖l‖².

A problem of five variables takes a microsecond or two, of which a call of LAPACK or a slice of an array would be most;
so loops are plain, arrays are those of the whole batch, with the position b of the problem in front, and what divides
often is inverted once.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from argrad_service.engine.kernels.active_set import (
    CLEAR,
    DEGENERATE,
    INFEASIBLE,
    NOT_DEFINITE,
    PIVOT,
    SIGN,
    SOLVED,
    UNDECIDED,
    WEAK,
)
from argrad_service.engine.kernels.kkt import ROUNDING

MOST_VARIABLES = 12
"""Up to so many variables plain loops are faster than calls."""

MOST_ROWS = 48
"""And with up to so many rows their Gram matrix is cheaper than what it saves."""


EXACT = 2e-15
"""Residual, relative to the right-hand side and to Qz, that needs no refinement."""


@njit(nogil=True, cache=True)
def _factor(Q, a, L, b, n, per_l):  # type: ignore[no-untyped-def]
    """L[b] of Q[a], and what its diagonal divides by; False if that is not clearly definite."""
    for i in range(n):
        for j in range(i):
            value = Q[a, i, j]
            for k in range(j):
                value -= L[b, i, k] * L[b, j, k]
            L[b, i, j] = value * per_l[j]
        value = Q[a, i, i]
        for k in range(i):
            value -= L[b, i, k] * L[b, i, k]
        if not value > PIVOT * Q[a, i, i]:
            return False
        L[b, i, i] = np.sqrt(value)
        per_l[i] = 1.0 / L[b, i, i]
    return True


@njit(nogil=True, cache=True)
def _invert_diagonal(matrix, b, n, out):  # type: ignore[no-untyped-def]
    for i in range(n):
        out[i] = 1.0 / matrix[b, i, i]


@njit(nogil=True, cache=True)
def _whiten(C, a, L, b, per_l, X, scale, x, n, r):  # type: ignore[no-untyped-def]
    """X[x]: the rows of C[a] L[b]⁻ᵀ at unit length, and scale[x] by which they were multiplied."""
    for i in range(r):
        length = 0.0
        for j in range(n):
            value = C[a, i, j]
            for k in range(j):
                value -= L[b, j, k] * X[x, i, k]
            value *= per_l[j]
            X[x, i, j] = value
            length += value * value
        factor = 1.0 / np.sqrt(length) if length > 0 else 1.0
        scale[x, i] = factor
        for j in range(n):
            X[x, i, j] *= factor


@njit(nogil=True, cache=True)
def _gram(X, x, T, t, n, r):  # type: ignore[no-untyped-def]
    """T[t] = X[x]X[x]ᵀ, both triangles."""
    for i in range(r):
        for j in range(i + 1):
            value = 0.0
            for k in range(n):
                value += X[x, i, k] * X[x, j, k]
            T[t, i, j] = value
            T[t, j, i] = value


@njit(nogil=True, cache=True)
def _enter(T, t, i, S, b, per_s, k, l, w, index):  # type: ignore[no-untyped-def]
    """The direction in which row i enters: l, w, and the curvature along it."""
    curvature = T[t, i, i]
    for j in range(k):
        value = T[t, index[b, j], i]
        for m in range(j):
            value -= S[b, j, m] * l[m]
        value *= per_s[j]
        l[j] = value
        curvature -= value * value
    for j in range(k - 1, -1, -1):
        value = l[j]
        for m in range(j + 1, k):
            value -= S[b, m, j] * w[m]
        w[j] = value * per_s[j]
    return curvature


@njit(nogil=True, cache=True)
def _drop(S, b, k, at):  # type: ignore[no-untyped-def]
    """Remove row `at` from the Cholesky factor S[b] of size k, by rotations."""
    for i in range(at, k - 1):
        for j in range(i + 2):
            S[b, i, j] = S[b, i + 1, j]
    for i in range(at, k - 1):
        length = np.sqrt(S[b, i, i] * S[b, i, i] + S[b, i, i + 1] * S[b, i, i + 1])
        cosine, sine = S[b, i, i] / length, S[b, i, i + 1] / length
        S[b, i, i], S[b, i, i + 1] = length, 0.0
        for j in range(i + 1, k - 1):
            left, right = S[b, j, i], S[b, j, i + 1]
            S[b, j, i] = cosine * left + sine * right
            S[b, j, i + 1] = cosine * right - sine * left


@njit(nogil=True, cache=True)
def _choose(s, active, b, p, r):  # type: ignore[no-untyped-def]
    """The inequality with the most negative slack, or −1; and the size of the largest, never below 1e-3."""
    chosen, worst, size = -1, 0.0, 1e-3
    for i in range(r):
        size = max(size, abs(s[i]))
        if i >= p and s[i] < worst and not active[b, i]:
            chosen, worst = i, s[i]
    return chosen if worst < -SIGN * size else -1, size


@njit(nogil=True, cache=True)
def _search(T, t, p, r, S, b, per_s, index, active, y, s, l, w, most):  # type: ignore[no-untyped-def]
    """The active set, from slacks s at y = 0: the number of its rows, the steps, and what `active_set` says."""
    for i in range(r):
        active[b, i] = False
    k, entered, done, steps = 0, 0, 0, 20 * (r + most) + 100
    while True:
        i, size = _choose(s, active, b, p, r)
        is_equality = entered < p
        if is_equality:
            i = entered
        if i < 0:
            return k, done, SOLVED
        # An equality is driven to zero from whichever side it is on.
        sign = -1.0 if is_equality and s[i] > 0 else 1.0
        gained, is_in = 0.0, False
        while not is_in:
            done += 1
            if done > steps:
                return k, done, UNDECIDED
            curvature = _enter(T, t, i, S, b, per_s, k, l, w, index)
            to_bound, leaving = np.inf, -1
            for j in range(k):
                fall = sign * w[j]
                if fall > 0 and index[b, j] >= p and y[j] < to_bound * fall:
                    to_bound, leaving = y[j] / fall, j
            is_free = curvature > PIVOT
            to_zero = -sign * s[i] / curvature if is_free else np.inf
            if to_zero == np.inf and to_bound == np.inf:
                # No multipliers of the working set keep this row: a certificate, if it is clearly violated.
                return k, done, INFEASIBLE if abs(s[i]) > CLEAR * size else UNDECIDED
            step = sign * min(to_bound, to_zero)
            gained += step
            for j in range(r):
                s[j] += step * T[t, i, j] if is_free else 0.0
            for j in range(k):
                factor, row = step * w[j], index[b, j]
                y[j] -= factor
                if is_free:
                    for m in range(r):
                        s[m] -= factor * T[t, row, m]
            if to_zero <= to_bound:
                if k == most:
                    return k, done, UNDECIDED
                for j in range(k):
                    S[b, k, j] = l[j]
                S[b, k, k] = np.sqrt(curvature)
                per_s[k] = 1.0 / S[b, k, k]
                index[b, k], y[k], active[b, i], s[i] = i, gained, True, 0.0
                k, is_in = k + 1, True
            else:
                active[b, index[b, leaving]] = False
                _drop(S, b, k, leaving)
                for j in range(leaving, k - 1):
                    index[b, j], y[j] = index[b, j + 1], y[j + 1]
                k -= 1
                _invert_diagonal(S, b, k, per_s)
        if is_equality:
            entered += 1


@njit(nogil=True, cache=True)
def _factor_set(T, t, S, b, per_s, index, active, r):  # type: ignore[no-untyped-def]
    """S[b] anew, rows in order: the updated factor has gathered rounding. False if they are nearly dependent."""
    k = 0
    for i in range(r):
        if active[b, i]:
            index[b, k] = i
            k += 1
    for i in range(k):
        for j in range(i + 1):
            value = T[t, index[b, i], index[b, j]]
            for m in range(j):
                value -= S[b, i, m] * S[b, j, m]
            if j < i:
                S[b, i, j] = value * per_s[j]
            elif not value > PIVOT:
                return False
            else:
                S[b, i, i] = np.sqrt(value)
                per_s[i] = 1.0 / S[b, i, i]
    return True


@njit(nogil=True, cache=True)
def _solve_once(L, a, per_l, X, x, index, S, b, per_s, k, n, u, r2, y):  # type: ignore[no-untyped-def]
    """`kkt._solve_once`: u holds r₁ and gets the solution, y gets the multipliers of the scaled rows."""
    for i in range(n):
        value = u[i]
        for j in range(i):
            value -= L[a, i, j] * u[j]
        u[i] = value * per_l[i]
    for i in range(k):
        row, value = index[b, i], -r2[i]
        for j in range(n):
            value += X[x, row, j] * u[j]
        for j in range(i):
            value -= S[b, i, j] * y[j]
        y[i] = value * per_s[i]
    for i in range(k - 1, -1, -1):
        value = y[i]
        for j in range(i + 1, k):
            value -= S[b, j, i] * y[j]
        y[i] = value * per_s[i]
    for i in range(k):
        row, factor = index[b, i], y[i]
        for j in range(n):
            u[j] -= factor * X[x, row, j]
    for i in range(n - 1, -1, -1):
        value = u[i]
        for j in range(i + 1, n):
            value -= L[a, j, i] * u[j]
        u[i] = value * per_l[i]


@njit(nogil=True, cache=True)
def _residual(Q, a, C, c, scale, x, index, b, k, n, r1, r2, z, y, e1, e2):  # type: ignore[no-untyped-def]
    """e₁ = r₁ − Qz − C_aᵀy and e₂ = r₂ − C_a z on the scaled rows; their largest entry, and that of r₁ − Qz."""
    size, term = 0.0, 0.0
    for i in range(n):
        value = r1[i]
        for j in range(n):
            value -= Q[a, i, j] * z[j]
        e1[i] = value
        term = max(term, abs(value))
    for i in range(k):
        row, value = index[b, i], 0.0
        factor = y[i] * scale[x, row]
        for j in range(n):
            e1[j] -= factor * C[c, row, j]
            value += C[c, row, j] * z[j]
        e2[i] = r2[i] - scale[x, row] * value
        size = max(size, abs(e2[i]))
    for i in range(n):
        size = max(size, abs(e1[i]))
    return size, term


@njit(nogil=True, cache=True)
def _solve_kkt(  # type: ignore[no-untyped-def]
    Q, a, C, c, L, l, per_l, X, scale, x, index, S, b, per_s, k, n, r1, r2, z, y, e1, e2, dy
):
    """`kkt.solve_kkt` without calls: z and y of r₁, r₂, refined at most twice; the relative residual."""
    size = 0.0
    for i in range(n):
        z[i] = r1[i]
        size = max(size, abs(r1[i]))
    for i in range(k):
        size = max(size, abs(r2[i]))
    _solve_once(L, l, per_l, X, x, index, S, b, per_s, k, n, z, r2, y)
    error, term = _residual(Q, a, C, c, scale, x, index, b, k, n, r1, r2, z, y, e1, e2)
    for _ in range(2):
        if error <= EXACT * max(size, term):
            break
        _solve_once(L, l, per_l, X, x, index, S, b, per_s, k, n, e1, e2, dy)
        for i in range(n):
            z[i] += e1[i]
        for i in range(k):
            y[i] += dy[i]
        last = error
        error, term = _residual(Q, a, C, c, scale, x, index, b, k, n, r1, r2, z, y, e1, e2)
        if not error < 0.5 * last or error <= ROUNDING * size:
            break
    return error / size if size > 0 else error


@njit(nogil=True, cache=True)
def _judge(Q, a, q, C, c, d, b, p, n, r, z, y, room, gradient, report):  # type: ignore[no-untyped-def]
    """`batch.judge` without views: slacks and report of problem b, and what is to be said of it."""
    primal, row_size, d_size, lam_size, dy, total = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for j in range(n):
        gradient[j] = 0.0
    for i in range(r):
        value, factor = 0.0, y[b, i]
        for j in range(n):
            value += C[c, i, j] * z[b, j]
        if factor != 0.0:
            for j in range(n):
                gradient[j] += factor * C[c, i, j]
            dy += d[b, i] * factor
        violation = abs(value - d[b, i]) if i < p else value - d[b, i]
        primal, row_size, d_size = max(primal, violation), max(row_size, abs(value)), max(d_size, abs(d[b, i]))
        total += value + d[b, i]
        if i >= p:
            room[b, i - p] = 0.0 if factor > 0 else max(d[b, i] - value, 0.0)
            lam_size = max(lam_size, factor)
    dual, term_size, zQz, qz = 0.0, 0.0, 0.0, 0.0
    for i in range(n):
        value = 0.0
        for j in range(n):
            value += Q[a, i, j] * z[b, j]
        zQz, qz, total = zQz + z[b, i] * value, qz + z[b, i] * q[b, i], total + value + q[b, i] + gradient[i]
        dual = max(dual, abs(value + q[b, i] + gradient[i]))
        term_size = max(term_size, abs(value), abs(q[b, i]), abs(gradient[i]))
    gap = abs(zQz + qz + dy)
    report[b, 0], report[b, 1], report[b, 2], report[b, 3] = primal, dual, gap, 0.5 * zQz + qz
    report[b, 4] = max(
        primal / (1 + max(row_size, d_size)), dual / (1 + term_size), gap / (1 + max(abs(zQz), abs(qz), abs(dy)))
    )
    # Comparisons above are false of NaN: what is not finite, or has overflowed, would pass as solved.
    if not np.isfinite(total + primal + dual + gap + zQz + qz):
        return UNDECIDED
    for i in range(p, r):
        if y[b, i] <= WEAK * lam_size and room[b, i - p] <= WEAK * (1 + abs(d[b, i])):
            return DEGENERATE
    return SOLVED


@njit(nogil=True, cache=True)
def solve_small_range(  # type: ignore[no-untyped-def]
    start, stop, Q, q, C, d, p, is_ready, L, X, scale, T, S, index, count, active, z, y, room, report, steps, code
):
    """`batch.solve_range` for problems of few variables and rows; the same arguments, without those of LAPACK."""
    n, r, most = q.shape[1], d.shape[1], S.shape[1]
    s, l, w, u = np.empty(r), np.empty(most + 1), np.empty(most + 1), np.empty(n)
    multipliers, r1, r2 = np.empty(most + 1), np.empty(n), np.empty(most + 1)
    e1, e2, dy = np.empty(n), np.empty(most + 1), np.empty(most + 1)
    point, per_l, per_s = np.empty(n), np.empty(n), np.empty(most + 1)
    own_gram = np.empty((1, r, r))
    keeps = T.shape[0] > 0
    for b in range(start, stop):
        a, c = b if Q.shape[0] > 1 else 0, b if C.shape[0] > 1 else 0
        l_at, x = b if L.shape[0] > 1 else 0, b if X.shape[0] > 1 else 0
        count[b], steps[b] = 0, 0
        if L.shape[0] == 1 or is_ready:
            _invert_diagonal(L, l_at, n, per_l)
        elif not _factor(Q, a, L, b, n, per_l):
            code[b] = NOT_DEFINITE
            continue
        is_new = X.shape[0] > 1 and not is_ready
        if is_new:
            _whiten(C, c, L, l_at, per_l, X, scale, x, n, r)
        gram, t = (T, x) if keeps else (own_gram, 0)
        if is_new or not keeps:
            _gram(X, x, gram, t, n, r)
        for i in range(n):
            value = q[b, i]
            for j in range(i):
                value -= L[l_at, i, j] * u[j]
            u[i] = value * per_l[i]
            r1[i] = -q[b, i]
        for i in range(r):
            value = scale[x, i] * d[b, i]
            for j in range(n):
                value += X[x, i, j] * u[j]
            s[i] = value
        k, steps[b], found = _search(gram, t, p, r, S, b, per_s, index, active, multipliers, s, l, w, most)
        if found == SOLVED and not _factor_set(gram, t, S, b, per_s, index, active, r):
            found = UNDECIDED
        code[b] = found
        if found != SOLVED:
            continue
        count[b] = k
        for i in range(k):
            r2[i] = scale[x, index[b, i]] * d[b, index[b, i]]
        _solve_kkt(
            Q, a, C, c, L, l_at, per_l, X, scale, x, index, S, b, per_s, k, n, r1, r2, point, multipliers, e1, e2, dy
        )
        for i in range(n):
            z[b, i] = point[i]
        for i in range(r):
            y[b, i] = 0.0
        for i in range(k):
            row = index[b, i]
            value = multipliers[i] * scale[x, row]
            # What is negative by rounding is zero.
            y[b, row] = value if row < p else max(value, 0.0)
        code[b] = _judge(Q, a, q, C, c, d, b, p, n, r, z, y, room, u, report)


@njit(nogil=True, cache=True)
def differentiate_small_range(  # type: ignore[no-untyped-def]
    start, stop, Q, C, L, X, scale, S, index, count, r1, r2, x, y, error
):
    """`batch.differentiate_range` for what `solve_small_range` solved; the same arguments, without those of LAPACK."""
    n, most = r1.shape[2], S.shape[1]
    right, scaled, point, multipliers = np.empty(n), np.zeros(most), np.empty(n), np.empty(most)
    e1, e2, dy, per_l, per_s = np.empty(n), np.empty(most), np.empty(most), np.empty(n), np.empty(most)
    has_r2 = r2.shape[0] > 0
    for b in range(start, stop):
        a, c = b if Q.shape[0] > 1 else 0, b if C.shape[0] > 1 else 0
        l, v, k = b if L.shape[0] > 1 else 0, b if X.shape[0] > 1 else 0, count[b]
        _invert_diagonal(L, l, n, per_l)
        _invert_diagonal(S, b, k, per_s)
        worst = 0.0
        for j in range(r1.shape[1]):
            for i in range(n):
                right[i] = r1[b, j, i]
            if has_r2:
                for i in range(k):
                    scaled[i] = r2[b, j, index[b, i]] * scale[v, index[b, i]]
            found = _solve_kkt(
                Q,
                a,
                C,
                c,
                L,
                l,
                per_l,
                X,
                scale,
                v,
                index,
                S,
                b,
                per_s,
                k,
                n,
                right,
                scaled,
                point,
                multipliers,
                e1,
                e2,
                dy,
            )
            for i in range(n):
                x[b, j, i] = point[i]
            for i in range(k):
                y[b, j, index[b, i]] = multipliers[i] * scale[v, index[b, i]]
            if not found <= worst:
                worst = found
        error[b] = worst
