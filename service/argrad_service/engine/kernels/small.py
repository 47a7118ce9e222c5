"""Small strictly convex QPs, thousands in a batch: all of `batch` without a call, a view or an allocation a problem.

The mathematics is that of `active_set.goldfarb_idnani` and of `kkt`. With few rows their Gram matrix T = XXᵀ is formed
first, and the dual active set moves in it alone: with row i entering along y_i = t, l = L_W⁻¹T_Wi and w = L_W⁻ᵀl,

    y_W −= tw,   s += t(T_i − T_W w),   curvature T_ii − ‖l‖².

A problem of five variables takes a microsecond, of which a call of LAPACK or a slice of an array would be most; so
loops are plain. All but the search, which takes another way in every problem, is done in lanes.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from argrad_service.engine.kernels import lanes
from argrad_service.engine.kernels.active_set import (
    CLEAR,
    DEGENERATE,
    INFEASIBLE,
    NOT_DEFINITE,
    PIVOT,
    SIGN,
    SOLVED,
    UNDECIDED,
)
from argrad_service.engine.kernels.vectors import LANES, add_product, set_copy, set_product


@njit(nogil=True, cache=True)
def _enter(T, i, S, per_s, k, l, w, index):  # type: ignore[no-untyped-def]
    """The direction in which row i enters: l, w, and the curvature along it."""
    curvature = T[i, i]
    for j in range(k):
        value = T[index[j], i]
        for m in range(j):
            value -= S[j, m] * l[m]
        value *= per_s[j]
        l[j] = value
        curvature -= value * value
    for j in range(k - 1, -1, -1):
        value = l[j]
        for m in range(j + 1, k):
            value -= S[m, j] * w[m]
        w[j] = value * per_s[j]
    return curvature


@njit(nogil=True, cache=True)
def _drop(S, per_s, k, at):  # type: ignore[no-untyped-def]
    """Remove row `at` from the Cholesky factor S of size k, by rotations."""
    for i in range(at, k - 1):
        for j in range(i + 2):
            S[i, j] = S[i + 1, j]
    for i in range(at, k - 1):
        length = np.sqrt(S[i, i] * S[i, i] + S[i, i + 1] * S[i, i + 1])
        cosine, sine = S[i, i] / length, S[i, i + 1] / length
        S[i, i], S[i, i + 1] = length, 0.0
        per_s[i] = 1.0 / length
        for j in range(i + 1, k - 1):
            left, right = S[j, i], S[j, i + 1]
            S[j, i] = cosine * left + sine * right
            S[j, i + 1] = cosine * right - sine * left


@njit(nogil=True, cache=True)
def _choose(s, active, p, r):  # type: ignore[no-untyped-def]
    """The inequality with the most negative slack, or −1; and the size of the largest, never below 1e-3."""
    chosen, worst, size = -1, 0.0, 1e-3
    for i in range(r):
        size = max(size, abs(s[i]))
        if i >= p and s[i] < worst and not active[i]:
            chosen, worst = i, s[i]
    return chosen if worst < -SIGN * size else -1, size


@njit(nogil=True, cache=True)
def _search(T, p, r, S, per_s, index, active, y, s, l, w, most):  # type: ignore[no-untyped-def]
    """The active set, from slacks s at y = 0: the number of its rows, the steps, and what `active_set` says."""
    for i in range(r):
        active[i] = False
    k, entered, done, steps = 0, 0, 0, 20 * (r + most) + 100
    while True:
        i, size = _choose(s, active, p, r)
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
            curvature = _enter(T, i, S, per_s, k, l, w, index)
            to_bound, leaving = np.inf, -1
            for j in range(k):
                fall = sign * w[j]
                if fall > 0 and index[j] >= p and y[j] < to_bound * fall:
                    to_bound, leaving = y[j] / fall, j
            is_free = curvature > PIVOT
            to_zero = -sign * s[i] / curvature if is_free else np.inf
            if to_zero == np.inf and to_bound == np.inf:
                # No multipliers of the working set keep this row: a certificate, if it is clearly violated.
                return k, done, INFEASIBLE if abs(s[i]) > CLEAR * size else UNDECIDED
            if not np.isfinite(to_zero) and leaving < 0:
                return k, done, UNDECIDED
            step = sign * min(to_bound, to_zero)
            gained += step
            for j in range(r):
                s[j] += step * T[i, j] if is_free else 0.0
            for j in range(k):
                factor, row = step * w[j], index[j]
                y[j] -= factor
                if is_free:
                    for m in range(r):
                        s[m] -= factor * T[row, m]
            if to_zero <= to_bound:
                if k == most:
                    return k, done, UNDECIDED
                for j in range(k):
                    S[k, j] = l[j]
                S[k, k] = np.sqrt(curvature)
                per_s[k] = 1.0 / S[k, k]
                index[k], y[k], active[i], s[i] = i, gained, True, 0.0
                k, is_in = k + 1, True
            else:
                active[index[leaving]] = False
                _drop(S, per_s, k, leaving)
                for j in range(leaving, k - 1):
                    index[j], y[j] = index[j + 1], y[j + 1]
                k -= 1
        if is_equality:
            entered += 1


@njit(nogil=True, cache=True)
def _pad(k, most, n, v, C, scale, X, S, r2):  # type: ignore[no-untyped-def]
    """Rows from k on of lane v that change nothing, so that it goes along with lanes that have more."""
    for i in range(k, most):
        scale[i, v] = r2[i, v] = 0.0
        for j in range(n):
            C[i, j, v] = X[i, j, v] = 0.0
        for j in range(i):
            S[i, j, v] = 0.0
        S[i, i, v] = 1.0


@njit(nogil=True, cache=True)
def _slacks(L, per_l, X, scale, q, d, n, r, u, s):  # type: ignore[no-untyped-def]
    """Slacks s = d + X L⁻¹q of the scaled rows at y = 0, with L⁻¹q in u."""
    for i in range(n):
        set_copy(u, i, q, i)
    lanes.solve_lower(L, per_l, n, u)
    for i in range(r):
        set_product(s, i, scale, i, d, i)
    for j in range(n):
        for i in range(r):
            add_product(s, i, X, i * n + j, u, j)


@njit(nogil=True, cache=True)
def solve_small_range(  # type: ignore[no-untyped-def]
    start,
    stop,
    given_Q,
    Q,
    q,
    C,
    d,
    p,
    is_ready,
    L,
    X,
    scale,
    T,
    S,
    index,
    count,
    active,
    z,
    y,
    room,
    report,
    steps,
    code,
):
    """`batch.solve_range` for problems of few variables and rows; the same arguments, without those of LAPACK.

    `given_Q` of one matrix or more is what Q gets the symmetric parts of; with none Q is there already.
    """
    n, r, most = q.shape[1], d.shape[1], S.shape[1]
    Q_v, q_v, d_v, r1 = np.empty((n, n, LANES)), np.empty((n, LANES)), np.empty((r, LANES)), np.empty((n, LANES))
    L_v, per_l, fails = np.empty((n, n, LANES)), np.empty((n, LANES)), np.empty(LANES)
    C_v, X_v, scale_v = np.empty((r, n, LANES)), np.empty((r, n, LANES)), np.empty((r, LANES))
    T_v, S_v, per_s, loses = np.empty((r, r, LANES)), np.empty((most, most, LANES)), np.empty((most, LANES)), fails
    C_on, X_on, scale_on = np.empty((most, n, LANES)), np.empty((most, n, LANES)), np.empty((most, LANES))
    r2, z_v, y_on, y_v = np.empty((most, LANES)), np.empty((n, LANES)), np.empty((most, LANES)), np.empty((r, LANES))
    s_v, error, report_v, verdict = (
        np.empty((r, LANES)),
        np.empty(LANES),
        np.empty((5, LANES)),
        np.empty(LANES, np.int64),
    )
    least, kkt_room, judge_room = np.empty((n, LANES)), lanes.room_for_kkt(n, most), lanes.room_for_judge(n, r)
    # Of one problem, for the search.
    T_1, S_1, per_1, s_1, y_1 = np.empty((r, r)), np.empty((most, most)), np.empty(most), np.empty(r), np.empty(most)
    l, w, index_1, active_1 = np.empty(most), np.empty(most), np.empty(most, np.int64), np.empty(r, np.bool_)
    keeps, is_new = T.shape[0] > 0, X.shape[0] > 1 and not is_ready
    for first in range(start, stop, LANES):
        size = min(LANES, stop - first)
        if given_Q.shape[0] > 0:
            lanes.load_symmetric(given_Q, first, size, Q_v, Q)
        else:
            lanes.load_matrix(Q, first, size, Q_v)
        lanes.load_matrix(C, first, size, C_v)
        lanes.load_vector(q, first, size, q_v)
        lanes.load_vector(d, first, size, d_v)
        for v in range(LANES):
            fails[v] = 0.0
        if L.shape[0] == 1 or is_ready:
            lanes.load_matrix(L, first, size, L_v)
            lanes.invert_diagonal(L_v, n, per_l)
        else:
            for i in range(n * n):
                set_copy(L_v, i, Q_v, i)
            lanes.factor(L_v, n, PIVOT, True, per_l, fails, least)
        if is_new:
            lanes.whiten(C_v, L_v, per_l, n, r, X_v, scale_v)
        else:
            lanes.load_matrix(X, first, size, X_v)
            lanes.load_vector(scale, first, size, scale_v)
        if is_new or not keeps:
            lanes.gram(X_v, n, r, T_v)
        else:
            lanes.load_matrix(T, first, size, T_v)
        _slacks(L_v, per_l, X_v, scale_v, q_v, d_v, n, r, r1, s_v)
        widest = 0
        for v in range(size):
            b, k, done, found = first + v, 0, 0, NOT_DEFINITE
            if fails[v] == 0.0:
                for i in range(r):
                    s_1[i] = s_v[i, v]
                    for j in range(i + 1):
                        T_1[i, j] = T_1[j, i] = T_v[i, j, v]
                k, done, found = _search(T_1, p, r, S_1, per_1, index_1, active_1, y_1, s_1, l, w, most)
                if is_new:
                    _store(L_v, X_v, scale_v, n, r, v, L, X, scale, b)
                if is_new and keeps:
                    for i in range(r):
                        for j in range(i + 1):
                            T[b, i, j] = T[b, j, i] = T_v[i, j, v]
            steps[b], code[b], k = done, found, 0
            # Rows in order: the factor that the search has updated has gathered rounding, and is formed anew.
            for i in range(r):
                active[b, i] = found != NOT_DEFINITE and active_1[i]
                if found == SOLVED and active_1[i]:
                    index[b, k] = i
                    scale_on[k, v], r2[k, v] = scale_v[i, v], scale_v[i, v] * d_v[i, v]
                    for j in range(n):
                        C_on[k, j, v], X_on[k, j, v] = C_v[i, j, v], X_v[i, j, v]
                    for j in range(k + 1):
                        S_v[k, j, v] = T_v[i, index[b, j], v]
                    k += 1
            count[b] = k
            for i in range(k, most):
                index[b, i] = 0
            _pad(k, most, n, v, C_on, scale_on, X_on, S_v, r2)
            widest = max(widest, k)
        for v in range(size, LANES):
            _pad(0, most, n, v, C_on, scale_on, X_on, S_v, r2)
        for v in range(LANES):
            loses[v] = 0.0
        lanes.factor(S_v, widest, PIVOT, False, per_s, loses, kkt_room[1])
        for i in range(n):
            for v in range(LANES):
                r1[i, v] = -q_v[i, v]
        lanes.solve_kkt(
            Q_v, L_v, per_l, C_on, scale_on, X_on, S_v, per_s, n, widest, r1, r2, z_v, y_on, error, kkt_room
        )
        for i in range(r):
            for v in range(LANES):
                y_v[i, v] = 0.0
        for v in range(size):
            b = first + v
            for i in range(count[b]):
                row = index[b, i]
                value = y_on[i, v] * scale_on[i, v]
                # What is negative by rounding is zero.
                y_v[row, v] = value if row < p else max(value, 0.0)
        lanes.judge(Q_v, q_v, C_v, d_v, p, n, r, z_v, y_v, report_v, s_v, verdict, judge_room)
        for v in range(size):
            b = first + v
            if code[b] == SOLVED:
                code[b] = verdict[v] if loses[v] == 0.0 else UNDECIDED
            if code[b] != SOLVED and code[b] != DEGENERATE:
                count[b] = 0
                for i in range(n):
                    z[b, i] = 0.0
                for i in range(r):
                    y[b, i] = 0.0
                for i in range(p, r):
                    room[b, i - p] = 0.0
                for i in range(5):
                    report[b, i] = 0.0
                continue
            for i in range(n):
                z[b, i] = z_v[i, v]
            for i in range(r):
                y[b, i] = y_v[i, v]
            for i in range(p, r):
                room[b, i - p] = s_v[i, v]
            for i in range(5):
                report[b, i] = report_v[i, v]
            for i in range(count[b]):
                for j in range(i + 1):
                    S[b, i, j] = S_v[i, j, v]


@njit(nogil=True, cache=True)
def _store(L_v, X_v, scale_v, n, r, v, L, X, scale, b):  # type: ignore[no-untyped-def]
    """What a derivative needs of lane v, to where problem b keeps it."""
    if L.shape[0] > 1:
        for i in range(n):
            for j in range(i + 1):
                L[b, i, j] = L_v[i, j, v]
    for i in range(r):
        scale[b, i] = scale_v[i, v]
        for j in range(n):
            X[b, i, j] = X_v[i, j, v]


@njit(nogil=True, cache=True)
def differentiate_small_range(  # type: ignore[no-untyped-def]
    start, stop, Q, C, L, X, scale, S, index, count, r1, r2, x, y, error
):
    """`batch.differentiate_range` for what `solve_small_range` solved; the same arguments, without those of LAPACK."""
    n, most, has_r2 = r1.shape[2], S.shape[1], r2.shape[0] > 0
    Q_v, L_v, per_l = np.empty((n, n, LANES)), np.empty((n, n, LANES)), np.empty((n, LANES))
    S_v, per_s, found = np.empty((most, most, LANES)), np.empty((most, LANES)), np.empty(LANES)
    C_on, X_on, scale_on = np.empty((most, n, LANES)), np.empty((most, n, LANES)), np.empty((most, LANES))
    right, scaled, z_v, y_v = (
        np.empty((n, LANES)),
        np.empty((most, LANES)),
        np.empty((n, LANES)),
        np.empty((most, LANES)),
    )
    kkt_room = lanes.room_for_kkt(n, most)
    for first in range(start, stop, LANES):
        size, widest = min(LANES, stop - first), 0
        lanes.load_matrix(Q, first, size, Q_v)
        lanes.load_matrix(L, first, size, L_v)
        lanes.invert_diagonal(L_v, n, per_l)
        for v in range(LANES):
            b = first + min(v, size - 1)
            c, at = b if C.shape[0] > 1 else 0, b if X.shape[0] > 1 else 0
            for i in range(count[b]):
                row = index[b, i]
                scale_on[i, v] = scale[at, row]
                for j in range(n):
                    C_on[i, j, v], X_on[i, j, v] = C[c, row, j], X[at, row, j]
                for j in range(i + 1):
                    S_v[i, j, v] = S[b, i, j]
            _pad(count[b], most, n, v, C_on, scale_on, X_on, S_v, scaled)
            widest = max(widest, count[b])
        lanes.invert_diagonal(S_v, widest, per_s)
        for j in range(r1.shape[1]):
            for v in range(LANES):
                b = first + min(v, size - 1)
                for i in range(n):
                    right[i, v] = r1[b, j, i]
                for i in range(count[b]):
                    scaled[i, v] = r2[b, j, index[b, i]] * scale_on[i, v] if has_r2 else 0.0
            lanes.solve_kkt(
                Q_v, L_v, per_l, C_on, scale_on, X_on, S_v, per_s, n, widest, right, scaled, z_v, y_v, found, kkt_room
            )
            for v in range(size):
                b = first + v
                for i in range(n):
                    x[b, j, i] = z_v[i, v]
                for i in range(count[b]):
                    y[b, j, index[b, i]] = y_v[i, v] * scale_on[i, v]
                if j == 0 or not found[v] <= error[b]:
                    error[b] = found[v]
