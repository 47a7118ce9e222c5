"""A range of a batch, solved or differentiated problem by problem; arrays of the whole batch, outputs in place."""

from __future__ import annotations

import numpy as np
from numba import njit

from argrad_service.engine.kernels.active_set import (
    DEGENERATE,
    NOT_DEFINITE,
    PIVOT,
    SOLVED,
    UNDECIDED,
    WEAK,
    collect,
    factor_set,
    goldfarb_idnani,
    pivot,
)
from argrad_service.engine.kernels.kkt import solve_kkt
from argrad_service.engine.kernels.lapack import cholesky, gram, solve_lower, solve_rows

ROUNDS = 30
"""Rounds of block pivoting before the dual active set takes over."""


@njit(nogil=True, cache=True)
def factor_hessian(lapack, Q, L, work):  # type: ignore[no-untyped-def]
    """L of Q; False if Q is not clearly definite."""
    n = Q.shape[0]
    L[:] = Q
    if cholesky(lapack, L, n, work) != 0:
        return False
    for j in range(n):
        if not L[j, j] * L[j, j] > PIVOT * Q[j, j]:
            return False
    return True


@njit(nogil=True, cache=True)
def whiten(lapack, L, C, X, scale, work):  # type: ignore[no-untyped-def]
    """X: the rows of C L⁻ᵀ, scaled to unit length; zero rows stay."""
    X[:] = C
    solve_rows(lapack, L, X, work)
    for i in range(X.shape[0]):
        length = np.sqrt(np.dot(X[i], X[i]))
        scale[i] = 1.0 / length if length > 0 else 1.0
        for j in range(X.shape[1]):
            X[i, j] *= scale[i]


@njit(nogil=True, cache=True)
def full_gram(lapack, X, T, work):  # type: ignore[no-untyped-def]
    """T = XXᵀ, both triangles."""
    gram(lapack, X, T, work)
    for i in range(T.shape[0]):
        for j in range(i):
            T[j, i] = T[i, j]


@njit(nogil=True, cache=True)
def _find_set(lapack, X, T, c, p, S, index, active, y, s, scratch, work):  # type: ignore[no-untyped-def]
    """Active set and its factor by pivoting, else by the dual active set: number of rows, rounds, code."""
    n, r = X.shape[1], X.shape[0]
    rounds = 0
    if T.shape[0]:
        k, rounds = pivot(lapack, T, c, p, S, index, active, y, s, ROUNDS, work)
        if k >= 0:
            return k, rounds, SOLVED
    k, steps, code = goldfarb_idnani(lapack, X, c, p, S, index, active, y, s, scratch, 20 * (r + n) + 100, work)
    if code == SOLVED:
        # The updated factor has gathered rounding: form it again, rows in order.
        k = collect(active, index)
        for i in range(k):
            for j in range(i + 1):
                S[i, j] = np.dot(X[index[i]], X[index[j]])
        if not factor_set(lapack, S, k, work):
            code = UNDECIDED
    return k, rounds + steps, code


@njit(nogil=True, cache=True)
def _judge(Q, q, C, d, p, z, y, s, gradient, report):  # type: ignore[no-untyped-def]
    """Slacks, and primal residual, dual residual, gap, objective and scaled residual of a point (see `data.Residuals`).

    Returns:
        SOLVED, DEGENERATE where a row is weakly active, UNDECIDED where something is not finite.
    """
    n, r = z.shape[0], y.shape[0]
    primal, row_size, d_size, lam_size, dy, total = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(r):
        value = np.dot(C[i], z)
        violation = abs(value - d[i]) if i < p else value - d[i]
        primal = max(primal, violation)
        row_size, d_size = max(row_size, abs(value)), max(d_size, abs(d[i]))
        dy += d[i] * y[i]
        total += value + d[i]
        if i >= p:
            s[i - p] = 0.0 if y[i] > 0 else max(d[i] - value, 0.0)
            lam_size = max(lam_size, y[i])
    gradient[:n] = 0.0
    for i in range(r):
        if y[i] != 0.0:
            row, factor = C[i], y[i]
            for j in range(n):
                gradient[j] += factor * row[j]
    dual, term_size, zQz, qz = 0.0, 0.0, 0.0, 0.0
    for j in range(n):
        Qz = np.dot(Q[j], z)
        zQz, qz, total = zQz + z[j] * Qz, qz + z[j] * q[j], total + Qz + q[j] + gradient[j]
        dual = max(dual, abs(Qz + q[j] + gradient[j]))
        term_size = max(term_size, abs(Qz), abs(q[j]), abs(gradient[j]))
    gap = abs(zQz + qz + dy)
    report[0], report[1], report[2], report[3] = primal, dual, gap, 0.5 * zQz + qz
    report[4] = max(
        primal / (1 + max(row_size, d_size)), dual / (1 + term_size), gap / (1 + max(abs(zQz), abs(qz), abs(dy)))
    )
    # Comparisons above are false of NaN: what is not finite, or has overflowed, would pass as solved.
    if not np.isfinite(total + primal + dual + gap + zQz + qz):
        return UNDECIDED
    for i in range(p, r):
        if y[i] <= WEAK * lam_size and s[i - p] <= WEAK * (1 + abs(d[i])):
            return DEGENERATE
    return SOLVED


@njit(nogil=True, cache=True)
def solve_range(  # type: ignore[no-untyped-def]
    lapack,
    letters,
    start,
    stop,
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
    """Solve problems start … stop − 1.

    Args:
        lapack: Addresses.
        letters: BLAS flags.
        start: First problem.
        stop: One behind the last.
        Q: `(1 or B, n, n)`.
        q: `(B, n)`.
        C: `(1 or B, r, n)`, equalities first.
        d: `(B, r)`.
        p: Number of equalities.
        is_ready: Whether L, X, scale and T are there already for every problem.
        L: `(1 or B, n, n)`, gets factors of Q; a shared one is there already.
        X: `(1 or B, r, n)`, gets the scaled rows of C L⁻ᵀ; shared ones are there already.
        scale: `(1 or B, r)`, likewise.
        T: `(1 or B, r, r)`, gets the Gram matrices of X where there is block pivoting; a shared one is there already.
            `(0, 0, 0)` where none is wanted.
        S: `(B, K, K)`, gets factors of the active sets.
        index: `(B, K)`, gets the active rows.
        count: `(B,)`, gets their numbers.
        active: `(B, r)`, gets which rows are active.
        z: `(B, n)`, gets the solutions.
        y: `(B, r)`, gets the multipliers.
        room: `(B, r − p)`, gets the slacks.
        report: `(B, 5)`, gets primal residual, dual residual, gap, objective and scaled residual.
        steps: `(B,)`, gets the rounds and steps.
        code: `(B,)`, gets what `active_set` says; DEGENERATE where a row is weakly active,
            UNDECIDED where the data are not finite.
    """
    n, r, K = q.shape[1], C.shape[1], S.shape[1]
    work = (np.zeros(4, np.int32), letters, np.zeros(2))
    c, s, half_q, multipliers = np.empty(r), np.empty(r), np.empty(n), np.empty(r + 1)
    r1, r2, scratch = np.empty(n), np.empty(K), np.empty((3, max(K, n)))
    takes_pivots = r <= n
    own_gram = np.empty((r, r)) if takes_pivots and X.shape[0] > 1 and T.shape[0] == 0 else np.empty((0, 0))
    for b in range(start, stop):
        Q_b, C_b = Q[b if Q.shape[0] > 1 else 0], C[b if C.shape[0] > 1 else 0]
        L_b, x = L[b if L.shape[0] > 1 else 0], b if X.shape[0] > 1 else 0
        X_b, scale_b = X[x], scale[x]
        count[b], steps[b] = 0, 0
        if L.shape[0] > 1 and not is_ready and not factor_hessian(lapack, Q_b, L_b, work):
            code[b] = NOT_DEFINITE
            continue
        gram_b = T[x] if T.shape[0] > 0 else own_gram
        if X.shape[0] > 1 and not is_ready:
            whiten(lapack, L_b, C_b, X_b, scale_b, work)
            if takes_pivots:
                full_gram(lapack, X_b, gram_b, work)
        half_q[:] = q[b]
        solve_lower(lapack, L_b, n, half_q, work)
        for i in range(r):
            c[i] = scale_b[i] * d[b, i] + np.dot(X_b[i], half_q)
        k, steps[b], code[b] = _find_set(
            lapack, X_b, gram_b, c, p, S[b], index[b], active[b], multipliers, s, scratch, work
        )
        if code[b] != SOLVED:
            continue
        count[b] = k
        for j in range(n):
            r1[j] = -q[b, j]
        for i in range(k):
            r2[i] = scale_b[index[b, i]] * d[b, index[b, i]]
        solve_kkt(lapack, Q_b, C_b, L_b, X_b, scale_b, index[b], k, S[b], r1, r2, z[b], multipliers, scratch, work)
        y[b] = 0.0
        for i in range(k):
            row = index[b, i]
            # What is negative by rounding is zero.
            y[b, row] = multipliers[i] * scale_b[row] if row < p else max(multipliers[i] * scale_b[row], 0.0)
        code[b] = _judge(Q_b, q[b], C_b, d[b], p, z[b], y[b], room[b], r1, report[b])


@njit(nogil=True, cache=True)
def differentiate_range(  # type: ignore[no-untyped-def]
    lapack, letters, start, stop, Q, C, L, X, scale, S, index, count, r1, r2, x, y, error
):
    """Solve the KKT systems of problems start … stop − 1 for j right-hand sides each.

    Args:
        lapack: Addresses.
        letters: BLAS flags.
        start: First problem.
        stop: One behind the last.
        Q, C, L, X, scale, S, index, count: As `solve_range` left them.
        r1: `(B, j, n)`.
        r2: `(B, j, r)`, of all rows, of which the active ones are looked at; `(0, 0, 0)` for zeros.
        x: `(B, j, n)`, gets the solutions.
        y: `(B, j, r)`, gets the multipliers of the unscaled rows; comes as zeros.
        error: `(B,)`, gets the largest relative residual.
    """
    n, K = r1.shape[2], S.shape[1]
    work = (np.zeros(4, np.int32), letters, np.zeros(2))
    scaled, multipliers, scratch = np.zeros(K), np.empty(K), np.empty((3, max(K, n)))
    has_r2 = r2.shape[0] > 0
    for b in range(start, stop):
        v = b if X.shape[0] > 1 else 0
        Q_b, C_b = Q[b if Q.shape[0] > 1 else 0], C[b if C.shape[0] > 1 else 0]
        L_b, k = L[b if L.shape[0] > 1 else 0], count[b]
        error[b] = 0.0
        for j in range(r1.shape[1]):
            if has_r2:
                for i in range(k):
                    scaled[i] = r2[b, j, index[b, i]] * scale[v, index[b, i]]
            found = solve_kkt(
                lapack,
                Q_b,
                C_b,
                L_b,
                X[v],
                scale[v],
                index[b],
                k,
                S[b],
                r1[b, j],
                scaled,
                x[b, j],
                multipliers,
                scratch,
                work,
            )
            for i in range(k):
                y[b, j, index[b, i]] = multipliers[i] * scale[v, index[b, i]]
            if not found <= error[b]:
                error[b] = found


@njit(nogil=True, cache=True)
def summarise(code, count, report):  # type: ignore[no-untyped-def]
    """Whether every problem is solved, the most active rows of one, and the largest scaled residual."""
    most, worst = 0, 0.0
    for b in range(code.shape[0]):
        if code[b] != SOLVED:
            return False, most, worst
        most, worst = max(most, count[b]), max(worst, report[b, 4])
    return True, most, worst
