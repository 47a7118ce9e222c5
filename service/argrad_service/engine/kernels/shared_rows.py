"""Strictly convex QPs that share Q and rows: pivoting by the inverse of the Gram matrix, which is formed once.

With M = T⁻¹ the slacks of the rows that are not active, few where most rows are, give the rest (`kernels.active_set`
has the terms):

    s = c + Ty,  s = 0 on the active rows a,  y = 0 on the others i:    M_ii s_i = (Mc)_i,    y = M(s − c)

A candidate set costs a factor of the size of i, or one of the size of a where that is smaller. Signs found so are
only a guess, for M has the condition of T: the last set is solved by its own factor, and exchanged further if need be.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from argrad_service.engine.kernels.active_set import (
    PATIENCE,
    SIGN,
    SOLVED,
    UNDECIDED,
    collect,
    factor_set,
    goldfarb_idnani,
    largest,
)
from argrad_service.engine.kernels.batch import _judge
from argrad_service.engine.kernels.kkt import solve_kkt
from argrad_service.engine.kernels.lapack import cholesky, gram, solve_lower, solve_rows, solve_upper

ROUNDS = 60
"""Candidate sets tried before the dual active set takes over."""

LEAST_BATCH = 8
"""A smaller batch does not earn the inverse."""

LEAST_ROWS = 40
"""With fewer rows a factor of the active set costs less than what it saves."""


@njit(nogil=True, cache=True, error_model="numpy")
def invert(lapack, T, M, work):  # type: ignore[no-untyped-def]
    """M = T⁻¹, both triangles; False where the rows are nearly dependent."""
    r = T.shape[0]
    lower, rows = T.copy(), np.eye(r)
    if not factor_set(lapack, lower, r, work):
        return False
    solve_rows(lapack, lower, rows, work)
    gram(lapack, rows, M, work)
    for i in range(r):
        for j in range(i):
            M[j, i] = M[i, j]
    return True


@njit(nogil=True, cache=True, error_model="numpy")
def _block(lapack, matrix, index, k, lower, work):  # type: ignore[no-untyped-def]
    """Factor of a principal block; False where it is nearly singular."""
    for i in range(k):
        row = matrix[index[i]]
        for j in range(i + 1):
            lower[i, j] = row[index[j]]
    return factor_set(lapack, lower, k, work)


@njit(nogil=True, cache=True, error_model="numpy")
def _by_active(lapack, T, c, index, k, lower, y, s, at, work):  # type: ignore[no-untyped-def]
    """Y and s `(r,)` of the rows in `index`, from T; `at` gets the multipliers in order. False where singular."""
    if not _block(lapack, T, index, k, lower, work):
        return False
    for i in range(k):
        at[i] = -c[index[i]]
    solve_lower(lapack, lower, k, at, work)
    solve_upper(lapack, lower, k, at, work)
    y[:] = 0.0
    s[:] = c
    for i in range(k):
        row, factor = T[index[i]], at[i]
        y[index[i]] = factor
        for j in range(c.shape[0]):
            s[j] += factor * row[j]
    return True


@njit(nogil=True, cache=True, error_model="numpy")
def _by_rest(lapack, M, Mc, rest, k, lower, y, s, at, work):  # type: ignore[no-untyped-def]
    """Y and s `(r,)` from M, with `rest` the rows that are not active. False where singular."""
    for i in range(k):
        for j in range(i + 1):
            lower[i, j] = M[rest[i], rest[j]]
        at[i] = Mc[rest[i]]
    if k and cholesky(lapack, lower, k, work) != 0:
        return False
    solve_lower(lapack, lower, k, at, work)
    solve_upper(lapack, lower, k, at, work)
    s[:] = 0.0
    for j in range(y.shape[0]):
        y[j] = -Mc[j]
    for i in range(k):
        row, factor = M[rest[i]], at[i]
        s[rest[i]] = factor
        for j in range(y.shape[0]):
            y[j] += factor * row[j]
    for i in range(k):
        y[rest[i]] = 0.0
    return True


@njit(nogil=True, cache=True, error_model="numpy")
def _mark_wrong(active, p, y, s, wrong):  # type: ignore[no-untyped-def]
    """Mark the inequalities whose sign contradicts their membership; how many there are, and the last of them."""
    y_size, count, last = 0.0, 0, -1
    for i in range(y.shape[0]):
        y_size = max(y_size, abs(y[i]))
    least_y, least_s = -SIGN * y_size, -SIGN * largest(s)
    for i in range(p, active.shape[0]):
        wrong[i] = not y[i] >= least_y if active[i] else not s[i] >= least_s
        if wrong[i]:
            count, last = count + 1, i
    return count, last


@njit(nogil=True, cache=True, error_model="numpy")
def _pivot(lapack, T, M, c, p, lower, index, rest, active, y, s, at, Mc, wrong, work):  # type: ignore[no-untyped-def]
    """Exchange wrong rows until none is left, as `active_set.pivot`; `at` gets the multipliers of the active rows.

    Returns:
        The number of active rows, or −1 where it gave up; and the rounds it took.
    """
    r = c.shape[0]
    for i in range(r):
        active[i] = i < p or c[i] < 0.0
        Mc[i] = np.dot(M[i], c)
    best, patience, is_exact, c_size = r + 1, PATIENCE, False, largest(c)
    for done in range(ROUNDS):
        k = collect(active, index)
        free = 0
        for i in range(r):
            if not active[i]:
                rest[free] = i
                free += 1
        takes_rest = not is_exact and 2 * free < r
        if takes_rest:
            is_found = _by_rest(lapack, M, Mc, rest, free, lower, y, s, at, work)
        else:
            is_found = _by_active(lapack, T, c, index, k, lower, y, s, at, work)
        if not is_found:
            if not takes_rest:
                return -1, done
            is_exact = True  # from here on by T itself
            continue
        count, last = _mark_wrong(active, p, y, s, wrong)
        if count == 0 and takes_rest:
            is_exact = True
            continue
        if count == 0:
            # With a singular system signs can look right while the equations do not hold.
            off = 0.0
            for i in range(k):
                off = max(off, abs(s[index[i]]))
            return k if off <= 1e2 * SIGN * max(largest(s), c_size) else -1, done + 1
        patience = PATIENCE if count < best else patience - 1
        best = min(best, count)
        for i in range(p, r):
            if wrong[i] and (patience > 0 or i == last):
                active[i] = not active[i]
    return -1, ROUNDS


@njit(nogil=True, cache=True, error_model="numpy")
def solve_shared_range(  # type: ignore[no-untyped-def]
    lapack,
    letters,
    start,
    stop,
    Q,
    q,
    C,
    d,
    p,
    L,
    X,
    scale,
    T,
    M,
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
    """Solve problems start … stop − 1; arguments as of `batch.solve_range`, with one Q, C, L, X, scale and T for all.

    Args:
        M: `(r, r)`, the inverse of the Gram matrix.
    """
    n, r, K = q.shape[1], C.shape[1], S.shape[1]
    work = (np.zeros(4, np.int32), letters, np.zeros(2))
    c, s, half_q, at, all_y = np.empty(r), np.empty(r), np.empty(n), np.empty(r + 1), np.empty(r)
    r1, r2, scratch = np.empty(n), np.empty(K), np.empty((3, max(K, n)))
    rest, Mc, wrong = np.empty(r, np.int64), np.empty(r), np.zeros(r, np.bool_)
    Q_0, C_0, L_0, X_0, T_0, scale_0 = Q[0], C[0], L[0], X[0], T[0], scale[0]
    for b in range(start, stop):
        S_b, index_b = S[b], index[b]
        half_q[:] = q[b]
        solve_lower(lapack, L_0, n, half_q, work)
        for i in range(r):
            c[i] = scale_0[i] * d[b, i] + np.dot(X_0[i], half_q)
        k, steps[b] = _pivot(lapack, T_0, M, c, p, S_b, index_b, rest, active[b], all_y, s, at, Mc, wrong, work)
        if k < 0:
            most = 20 * (r + n) + 100
            k, more, code[b] = goldfarb_idnani(lapack, X_0, c, p, S_b, index_b, active[b], at, s, scratch, most, work)
            steps[b] += more
            if code[b] != SOLVED:
                continue
            k = collect(active[b], index_b)
            if not _block(lapack, T_0, index_b, k, S_b, work):
                code[b] = UNDECIDED
                continue
        count[b] = k
        for j in range(n):
            r1[j] = -q[b, j]
        for i in range(k):
            r2[i] = scale_0[index_b[i]] * d[b, index_b[i]]
        solve_kkt(lapack, Q_0, C_0, L_0, X_0, scale_0, index_b, k, S_b, r1, r2, z[b], at, scratch, work)
        y[b] = 0.0
        for i in range(k):
            row = index_b[i]
            # What is negative by rounding is zero.
            y[b, row] = at[i] * scale_0[row] if row < p else max(at[i] * scale_0[row], 0.0)
        code[b] = _judge(Q_0, q[b], C_0, d[b], p, z[b], y[b], room[b], r1, report[b])
