"""Problems with entropy and no quadratic term: a range of a batch, solved or differentiated problem by problem."""

from __future__ import annotations

import numpy as np
from numba import njit

from argrad_service.engine.kernels.active_set import DEGENERATE, SOLVED, UNDECIDED
from argrad_service.engine.kernels.entropic import (
    SMALLEST_LOG,
    TINY,
    begin_at,
    dot,
    exchange,
    factor_rows,
    largest_of,
    solve_rows_system,
)
from argrad_service.engine.kernels.entropic_path import advance, begin, level_of
from argrad_service.engine.kernels.kkt import ROUNDING

WEAK = 1e-10
"""A row with λ ≤ WEAK ‖λ‖∞ and s ≤ WEAK (1 + |h|) is weakly active, as in `argrad_service.engine.solution`."""

STAGES = (1e-1, 1e-3, 1e-6, 1e-10)
"""Values of μ and of the scaled residual at which the interior point method tries the finish."""

ROUNDS = 6
"""Sets that the finish tries at one stage."""

FIRST_ROUNDS = 8
"""The same from a cold start, before the interior point method."""

FIRST_STEPS = 25
"""Newton steps from a cold start: most problems need eight, and one that needs more is better begun inside."""

FINISH_STEPS = 60
"""Newton steps of the finish at one stage."""


@njit(nogil=True, cache=True, error_model="numpy")
def _live_rows(C, d, p, live, y):  # type: ignore[no-untyped-def]
    """Write the rows that can bind to `live` and clear y on the others: the number of the first."""
    k = 0
    for i in range(d.shape[0]):
        is_live = i < p or d[i] < 0
        for j in range(C.shape[1]):
            if is_live:
                break
            is_live = C[i, j] != 0.0
        if is_live:
            live[k] = i
            k += 1
        else:
            y[i] = 0.0
    return k


@njit(nogil=True, cache=True, error_model="numpy")
def _judge(q, tau, C, d, p, z, y, s, slope, report):  # type: ignore[no-untyped-def]
    """Residuals as `argrad_service.engine.data.residuals` has them, and whether a row is weakly active."""
    n = q.shape[0]
    primal, Cz_size, dy, lam_size = 0.0, 0.0, 0.0, 0.0
    for i in range(d.shape[0]):
        along = dot(C[i], z)
        s[i] = d[i] - along
        off = abs(s[i]) if i < p else max(-s[i], 0.0)
        if not off <= primal:
            primal = off
        Cz_size = max(Cz_size, abs(along))
        dy += d[i] * y[i]
        if i >= p:
            lam_size = max(lam_size, y[i])
    slope[:] = 0.0
    for i in range(d.shape[0]):
        if y[i] != 0.0:
            for j in range(n):
                slope[j] += y[i] * C[i, j]
    pull_size, q_size, dual, qz, total = largest_of(slope), 0.0, 0.0, 0.0, 0.0
    for j in range(n):
        own = tau * (1.0 + np.log(max(z[j], TINY)))
        is_small = z[j] <= TINY
        missed = q[j] + own + slope[j]
        missed = max(-missed, 0.0) if is_small else abs(missed)
        if not missed <= dual:
            dual = missed
        q_size = max(q_size, abs(q[j]) if is_small else abs(q[j] + own))
        qz += (q[j] + own) * z[j]
        total += z[j]
    gap = abs(qz + dy)
    report[0], report[1], report[2], report[3] = primal, dual, gap, qz - tau * total
    by_size = max(dual / (1.0 + max(q_size, pull_size)), gap / (1.0 + max(abs(qz), abs(dy))))
    scaled = max(primal / (1.0 + max(Cz_size, largest_of(d))), by_size)
    report[4] = scaled if scaled >= 0 else np.inf
    for i in range(p, d.shape[0]):
        if y[i] <= WEAK * lam_size and s[i] <= WEAK * (1.0 + abs(d[i])):
            return True
    return False


@njit(nogil=True, cache=True, error_model="numpy")
def solve_range(  # type: ignore[no-untyped-def]
    lapack,
    letters,
    start,
    stop,
    q,
    tau,
    C,
    d,
    p,
    most,
    has_guess,
    S,
    root,
    unit,
    index,
    count,
    active,
    z,
    y,
    report,
    iterations,
    code,
):
    """Solve problems start … stop − 1.

    Args:
        lapack: Addresses.
        letters: BLAS flags.
        start: First problem.
        stop: One behind the last.
        q: `(B, n)`.
        tau: `(B,)`.
        C: `(1 or B, r, n)`, equalities first.
        d: `(B, r)`.
        p: Number of equalities.
        most: Iterations at most.
        has_guess: Whether `active`, z and y hold a guess to be tried in place of a cold start.
        S: `(B, K, K)`, gets factors of the active sets.
        root: `(B, n)`, gets √(z/τ).
        unit: `(B, K)`, gets factors by which the active rows are scaled.
        index: `(B, K)`, gets the active rows.
        count: `(B,)`, gets their numbers.
        active: `(B, r)`, gets which rows are active.
        z: `(B, n)`, gets the solutions.
        y: `(B, r)`, gets the multipliers.
        report: `(B, 5)`, gets primal residual, dual residual, gap, objective and scaled residual.
        iterations: `(B,)`, gets Newton steps from a cold start and those of the interior point method.
        code: `(B,)`, gets SOLVED, DEGENERATE where a row is weakly active, or UNDECIDED.
    """
    n, r = q.shape[1], d.shape[1]
    size = max(n, r)
    work = (np.zeros(4, np.int32), letters, np.zeros(2))
    X, scratch, vectors = np.empty((max(r, 1), n)), np.empty((7, size)), np.empty((9, size))
    T = np.empty((max(r, 1), max(r, 1)))
    w, s, inside_w, inside_y, inside_s = np.empty(n), np.zeros(r), np.empty(n), np.empty(r), np.zeros(r)
    likely, marks, live = np.empty(r, np.bool_), np.empty(r, np.bool_), np.empty(r, np.int64)
    for b in range(start, stop):
        C_b, guess = C[b if C.shape[0] > 1 else 0], active[b]
        problem = (q[b], tau[b], C_b, d[b], p)
        places = (X, S[b], unit[b])
        iterations[b], code[b] = 0, UNDECIDED
        if has_guess:
            begin_at(q[b], tau[b], C_b, z[b], y[b], w)
            steps = FINISH_STEPS
        else:
            w[:] = np.log(level_of(C_b, d[b], p))
            y[b] = 0.0
            for i in range(r):
                guess[i] = i < p
            steps = min(FIRST_STEPS, most)
        k, taken = exchange(
            lapack, *problem, guess, index[b], w, y[b], s, *places, FIRST_ROUNDS, steps, scratch, marks, work
        )
        if not has_guess:
            iterations[b] = taken
        if k < 0:
            now = begin(*problem, inside_w, inside_y, inside_s)
            k_live = _live_rows(C_b, d[b], p, live, inside_y)
            for i in range(r):
                likely[i] = i < p
            for target in STAGES:
                now, taken, is_stuck = advance(
                    lapack,
                    *problem,
                    live,
                    k_live,
                    inside_w,
                    inside_y,
                    inside_s,
                    now,
                    likely,
                    X,
                    T,
                    vectors,
                    scratch,
                    target,
                    most - iterations[b],
                    work,
                )
                iterations[b] += taken
                guess[:] = likely
                y[b] = inside_y
                for j in range(n):
                    z[b, j] = np.exp(inside_w[j])
                begin_at(q[b], tau[b], C_b, z[b], inside_y, w)
                k, _taken = exchange(
                    lapack, *problem, guess, index[b], w, y[b], s, *places, ROUNDS, FINISH_STEPS, scratch, marks, work
                )
                if k >= 0 or is_stuck:
                    break
        if k < 0:
            continue
        for j in range(n):
            z[b, j] = np.exp(w[j]) if w[j] > SMALLEST_LOG else 0.0
            root[b, j] = np.sqrt(z[b, j] / tau[b])
        for i in range(p, r):
            y[b, i] = max(y[b, i], 0.0)
        count[b] = k
        if not factor_rows(lapack, C_b, index[b], k, root[b], *places, work):
            continue
        is_weak = _judge(*problem, z[b], y[b], s, scratch[0, :n], report[b])
        code[b] = DEGENERATE if is_weak else SOLVED


@njit(nogil=True, cache=True, error_model="numpy")
def differentiate_range(  # type: ignore[no-untyped-def]
    lapack, letters, start, stop, C, S, root, unit, index, count, r1, r2, x, y, error
):
    """Solve the KKT systems of problems start … stop − 1 for j right-hand sides each, refined at most twice.

    Args:
        lapack: Addresses.
        letters: BLAS flags.
        start: First problem.
        stop: One behind the last.
        C, S, root, unit, index, count: As `solve_range` left them.
        r1: `(B, j, n)`.
        r2: `(B, j, r)`, of which the active rows are looked at; `(0, 0, 0)` for zeros.
        x: `(B, j, n)`, gets the solutions.
        y: `(B, j, r)`, zeros; gets the multipliers of the active rows.
        error: `(B,)`, gets the largest relative residual.
    """
    n, K = r1.shape[2], S.shape[1]
    work = (np.zeros(4, np.int32), letters, np.zeros(2))
    X, u, e1, has_rows = np.empty((max(K, 1), n)), np.empty(n), np.empty(n), r2.shape[0] > 0
    e2, more, right, v = np.empty(K), np.empty(K), np.empty(K), np.empty(K)
    for b in range(start, stop):
        C_b, k, S_b, unit_b, error[b] = C[b if C.shape[0] > 1 else 0], count[b], S[b], unit[b], 0.0
        for i in range(k):
            for j in range(n):
                X[i, j] = C_b[index[b, i], j] * root[b, j] * unit_b[i]
        for c in range(r1.shape[1]):
            size, last = 0.0, np.inf
            for j in range(n):
                e1[j] = root[b, j] * r1[b, c, j]
                u[j] = 0.0
                size = max(size, abs(e1[j]))
            for i in range(k):
                right[i] = r2[b, c, index[b, i]] if has_rows else 0.0
                e2[i], v[i] = right[i], 0.0
                size = max(size, abs(unit_b[i] * e2[i]))
            for _ in range(3):
                solve_rows_system(lapack, X, S_b, unit_b, k, e1, e2, more, work)
                for j in range(n):
                    u[j] += e1[j]
                    e1[j] = root[b, j] * r1[b, c, j] - u[j]
                found = 0.0
                for i in range(k):
                    v[i] += more[i]
                    factor = v[i] / unit_b[i]
                    e2[i] = right[i] - dot(X[i], u) / unit_b[i]
                    found = max(found, abs(unit_b[i] * e2[i]))
                    for j in range(n):
                        e1[j] -= factor * X[i, j]
                for j in range(n):
                    if not abs(e1[j]) <= found:
                        found = abs(e1[j])
                if not found < 0.5 * last or found <= ROUNDING * size:
                    break
                last = found
            for j in range(n):
                x[b, c, j] = root[b, j] * u[j]
            for i in range(k):
                y[b, c, index[b, i]] = v[i]
            found = found / size if size > 0 else found
            if not found <= error[b]:
                error[b] = found
