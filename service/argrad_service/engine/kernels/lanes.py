"""Linear algebra on several small problems side by side, one in each lane: a processor works on all lanes at once.

Every array has the lanes behind: entry (i, j) of problem v stands at [i, j, v]. A lane goes through the same operations
in the same order whatever its neighbours hold, so that a problem has the same result, to the last bit, in any company.
Elimination looks to the right: what it updates next does not wait for what it updated last.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from argrad_service.engine.kernels.active_set import DEGENERATE, SOLVED, UNDECIDED, WEAK
from argrad_service.engine.kernels.kkt import ROUNDING
from argrad_service.engine.kernels.vectors import (
    LANES,
    add_product,
    raise_to_size,
    set_copy,
    set_difference,
    set_product,
    set_sum,
    subtract_product,
)

EXACT = 2e-15
"""Residual, relative to the right-hand side and to Qz, that needs no refinement."""


@njit(nogil=True, cache=True, error_model="numpy")
def load_matrix(source, first, count, out):  # type: ignore[no-untyped-def]
    """`out[i, j, v]` from `source[first + v, i, j]`; of one matrix if the source is one.

    What is left of the lanes gets the last of the `count` problems again.
    """
    for v in range(LANES):
        b = first + min(v, count - 1) if source.shape[0] > 1 else 0
        for i in range(out.shape[0]):
            for j in range(out.shape[1]):
                out[i, j, v] = source[b, i, j]


@njit(nogil=True, cache=True, error_model="numpy")
def load_symmetric(source, first, count, out, parts):  # type: ignore[no-untyped-def]
    """`load_matrix` of the symmetric parts, which are written to `parts` as well."""
    n = out.shape[0]
    for v in range(LANES):
        b = first + min(v, count - 1) if source.shape[0] > 1 else 0
        for i in range(n):
            for j in range(i + 1):
                value = (source[b, i, j] + source[b, j, i]) * 0.5
                out[i, j, v] = out[j, i, v] = value
                parts[b, i, j] = parts[b, j, i] = value


@njit(nogil=True, cache=True, error_model="numpy")
def load_vector(source, first, count, out):  # type: ignore[no-untyped-def]
    """`load_matrix` for vectors."""
    for v in range(LANES):
        b = first + min(v, count - 1) if source.shape[0] > 1 else 0
        for i in range(out.shape[0]):
            out[i, v] = source[b, i]


@njit(nogil=True, cache=True, error_model="numpy")
def invert_diagonal(matrix, n, out):  # type: ignore[no-untyped-def]
    """What the diagonal of a factor divides by."""
    for i in range(n):
        for v in range(LANES):
            out[i, v] = 1.0 / matrix[i, i, v]


@njit(nogil=True, cache=True, error_model="numpy")
def factor(A, n, pivot, is_relative, per, fails, least):  # type: ignore[no-untyped-def]
    """The lower Cholesky factor in the place of A, and what its diagonal divides by.

    Args:
        A: `(≥ n, ≥ n, lanes)`, of which the lower triangle of the leading n rows is looked at.
        n: Rows.
        pivot: Least pivot.
        is_relative: Whether that is meant relative to the diagonal of A.
        per: `(n, lanes)`, gets 1 over the diagonal.
        fails: `(lanes,)`, set to 1 where a pivot is not above the least; that lane goes on with 1.
        least: Room, `(≥ n, lanes)`.
    """
    width = A.shape[1]
    for i in range(n):
        for v in range(LANES):
            least[i, v] = pivot * A[i, i, v] if is_relative else pivot
    for k in range(n):
        for v in range(LANES):
            value = A[k, k, v]
            is_good = value > least[k, v]
            fails[v] = fails[v] if is_good else 1.0
            root = np.sqrt(value if is_good else 1.0)
            A[k, k, v] = root
            per[k, v] = 1.0 / root
        for i in range(k + 1, n):
            set_product(A, i * width + k, A, i * width + k, per, k)
        for i in range(k + 1, n):
            for j in range(k + 1, i + 1):
                subtract_product(A, i * width + j, A, i * width + k, A, j * width + k)


@njit(nogil=True, cache=True, error_model="numpy")
def whiten(C, L, per_l, n, r, X, scale):  # type: ignore[no-untyped-def]
    """X: the rows of C L⁻ᵀ at unit length, and scale by which they were multiplied."""
    for i in range(r):
        for j in range(n):
            for v in range(LANES):
                X[i, j, v] = C[i, j, v]
    for k in range(n):
        for i in range(r):
            set_product(X, i * n + k, X, i * n + k, per_l, k)
        for j in range(k + 1, n):
            for i in range(r):
                subtract_product(X, i * n + j, L, j * n + k, X, i * n + k)
    for i in range(r):
        for v in range(LANES):
            scale[i, v] = 0.0
    for j in range(n):
        for i in range(r):
            add_product(scale, i, X, i * n + j, X, i * n + j)
    for i in range(r):
        for v in range(LANES):
            length = scale[i, v]
            is_row = length > 0
            scale[i, v] = 1.0 / np.sqrt(length if is_row else 1.0)
        for j in range(n):
            set_product(X, i * n + j, X, i * n + j, scale, i)


@njit(nogil=True, cache=True, error_model="numpy")
def gram(X, n, r, T):  # type: ignore[no-untyped-def]
    """T = XXᵀ, its lower triangle."""
    for i in range(r):
        for j in range(i + 1):
            set_product(T, i * r + j, X, i * n, X, j * n)
    for k in range(1, n):
        for i in range(r):
            for j in range(i + 1):
                add_product(T, i * r + j, X, i * n + k, X, j * n + k)


@njit(nogil=True, cache=True, error_model="numpy")
def solve_lower(L, per, n, x):  # type: ignore[no-untyped-def]
    """L⁻¹x in the place of x, of the leading n rows."""
    width = L.shape[1]
    for j in range(n):
        set_product(x, j, x, j, per, j)
        for i in range(j + 1, n):
            subtract_product(x, i, L, i * width + j, x, j)


@njit(nogil=True, cache=True, error_model="numpy")
def solve_upper(L, per, n, x):  # type: ignore[no-untyped-def]
    """L⁻ᵀx in the place of x, of the leading n rows."""
    width = L.shape[1]
    for j in range(n - 1, -1, -1):
        set_product(x, j, x, j, per, j)
        for i in range(j):
            subtract_product(x, i, L, j * width + i, x, j)


@njit(nogil=True, cache=True, error_model="numpy")
def _solve_once(L, per_l, n, X, S, per_s, k, u, r2, y):  # type: ignore[no-untyped-def]
    """`kkt._solve_once`: u holds r₁ and gets the solution, y gets the multipliers of the scaled rows."""
    solve_lower(L, per_l, n, u)
    for i in range(k):
        for v in range(LANES):
            y[i, v] = -r2[i, v]
    for j in range(n):
        for i in range(k):
            add_product(y, i, X, i * n + j, u, j)
    solve_lower(S, per_s, k, y)
    solve_upper(S, per_s, k, y)
    for i in range(k):
        for j in range(n):
            subtract_product(u, j, y, i, X, i * n + j)
    solve_upper(L, per_l, n, u)


@njit(nogil=True, cache=True, error_model="numpy")
def _residual(Q, C, scale, n, k, r1, r2, z, y, e1, e2, error, sums):  # type: ignore[no-untyped-def]
    """e₁ = r₁ − Qz − Cᵀy and e₂ = r₂ − Cz on the scaled rows; their largest entry, and in `sums` that of r₁ − Qz."""
    for i in range(n):
        set_copy(e1, i, r1, i)
    for j in range(n):
        for i in range(n):
            subtract_product(e1, i, Q, i * n + j, z, j)
    for v in range(LANES):
        error[v] = sums[_TERM, v] = 0.0
    for i in range(n):
        raise_to_size(sums, _TERM, e1, i)
    for i in range(k):
        set_product(e2, i, C, i * n, z, 0)
    for j in range(1, n):
        for i in range(k):
            add_product(e2, i, C, i * n + j, z, j)
    for i in range(k):
        set_product(sums, _FORCE, scale, i, e2, i)
        set_difference(e2, i, r2, i, sums, _FORCE)
        raise_to_size(error, 0, e2, i)
        set_product(sums, _FORCE, y, i, scale, i)
        for j in range(n):
            subtract_product(e1, j, sums, _FORCE, C, i * n + j)
    for i in range(n):
        raise_to_size(error, 0, e1, i)


_SIZE, _TERM, _LAST, _FORCE = range(4)


@njit(nogil=True, cache=True, error_model="numpy")
def solve_kkt(Q, L, per_l, C, scale, X, S, per_s, n, k, r1, r2, z, y, error, room):  # type: ignore[no-untyped-def]
    """`kkt.solve_kkt` in lanes: z and y of r₁, r₂, refined at most twice where that helps.

    Args:
        Q: `(n, n, lanes)`.
        L: Its factor.
        per_l: 1 over the diagonal of L.
        C: `(≥ k, n, lanes)`, active rows as they were given; zeros for a lane that has fewer.
        scale: `(≥ k, lanes)`, by which they are multiplied.
        X: The same rows, scaled, times L⁻ᵀ.
        S: Factor of XXᵀ; unit rows for a lane that has fewer.
        per_s: 1 over the diagonal of S.
        n: Variables.
        k: Active rows at most.
        r1: `(n, lanes)`.
        r2: `(≥ k, lanes)`, on the scaled rows.
        z: Gets the solution, `(n, lanes)`.
        y: Gets the multipliers of the scaled rows, `(≥ k, lanes)`.
        error: `(lanes,)`, gets the residual relative to the right-hand side.
        room: See `room_for_kkt`.
    """
    e1, e2, dy, sums, goes_on = room
    for v in range(LANES):
        sums[_SIZE, v] = 0.0
    for i in range(n):
        set_copy(z, i, r1, i)
        raise_to_size(sums, _SIZE, r1, i)
    for i in range(k):
        raise_to_size(sums, _SIZE, r2, i)
    _solve_once(L, per_l, n, X, S, per_s, k, z, r2, y)
    _residual(Q, C, scale, n, k, r1, r2, z, y, e1, e2, error, sums)
    rest = 0
    for v in range(LANES):
        goes_on[v] = not error[v] <= EXACT * max(sums[_SIZE, v], sums[_TERM, v])
        rest += goes_on[v]
    for _ in range(2):
        if rest == 0:
            break
        _solve_once(L, per_l, n, X, S, per_s, k, e1, e2, dy)
        for v in range(LANES):
            sums[_LAST, v] = error[v]
            if goes_on[v]:
                for i in range(n):
                    z[i, v] += e1[i, v]
                for i in range(k):
                    y[i, v] += dy[i, v]
        _residual(Q, C, scale, n, k, r1, r2, z, y, e1, e2, error, sums)
        rest = 0
        for v in range(LANES):
            size = sums[_SIZE, v]
            is_done = error[v] <= ROUNDING * size or error[v] <= EXACT * max(size, sums[_TERM, v])
            goes_on[v] = goes_on[v] and error[v] < 0.5 * sums[_LAST, v] and not is_done
            rest += goes_on[v]
    for v in range(LANES):
        error[v] = error[v] / sums[_SIZE, v] if sums[_SIZE, v] > 0 else error[v]


@njit(nogil=True, cache=True)
def room_for_kkt(n, most):  # type: ignore[no-untyped-def]
    """Room for `solve_kkt` with n variables and at most so many active rows."""
    return (
        np.empty((n, LANES)),
        np.empty((most, LANES)),
        np.empty((most, LANES)),
        np.empty((4, LANES)),
        np.empty(LANES, np.bool_),
    )


_PRIMAL, _DUAL, _ROWS, _BOUNDS, _TERMS, _FORCES, _TOTAL, _DY, _ZQZ, _QZ = range(10)


@njit(nogil=True, cache=True, error_model="numpy")
def judge(Q, q, C, d, p, n, r, z, y, report, slack, verdict, room):  # type: ignore[no-untyped-def]
    """`batch.judge` in lanes: slacks and report, and what is to be said of each problem.

    Args:
        Q: `(n, n, lanes)`.
        q: `(n, lanes)`.
        C: `(r, n, lanes)`.
        d: `(r, lanes)`.
        p: Equalities.
        n: Variables.
        r: Rows.
        z: `(n, lanes)`.
        y: `(r, lanes)`.
        report: Gets `(5, lanes)`: primal residual, dual residual, gap, objective, scaled residual.
        slack: Gets the slacks, `(r, lanes)`, of which those of inequalities count.
        verdict: Gets what `active_set` says, `(lanes,)`.
        room: See `room_for_judge`.
    """
    Cz, Cty, Qz, sums = room
    sums[:] = 0.0
    for i in range(r):
        set_product(Cz, i, C, i * n, z, 0)
    for i in range(n):
        set_product(Qz, i, Q, i * n, z, 0)
        for v in range(LANES):
            Cty[i, v] = 0.0
    for j in range(1, n):
        for i in range(r):
            add_product(Cz, i, C, i * n + j, z, j)
        for i in range(n):
            add_product(Qz, i, Q, i * n + j, z, j)
    for i in range(r):
        for j in range(n):
            add_product(Cty, j, y, i, C, i * n + j)
        add_product(sums, _DY, d, i, y, i)
        raise_to_size(sums, _ROWS, Cz, i)
        raise_to_size(sums, _BOUNDS, d, i)
        set_difference(slack, i, d, i, Cz, i)
        if i < p:
            raise_to_size(sums, _PRIMAL, slack, i)
        else:
            raise_to_size(sums, _FORCES, y, i)
        set_sum(sums, _TOTAL, sums, _TOTAL, slack, i)
    for i in range(p, r):
        for v in range(LANES):
            over = -slack[i, v]
            sums[_PRIMAL, v] = max(sums[_PRIMAL, v], over)
            slack[i, v] = 0.0 if y[i, v] > 0 else max(slack[i, v], 0.0)
    for i in range(n):
        add_product(sums, _ZQZ, z, i, Qz, i)
        add_product(sums, _QZ, z, i, q, i)
        raise_to_size(sums, _TERMS, Qz, i)
        raise_to_size(sums, _TERMS, q, i)
        raise_to_size(sums, _TERMS, Cty, i)
        set_sum(Qz, i, Qz, i, q, i)
        set_sum(Qz, i, Qz, i, Cty, i)
        raise_to_size(sums, _DUAL, Qz, i)
        set_sum(sums, _TOTAL, sums, _TOTAL, Qz, i)
    for v in range(LANES):
        primal, dual, zQz, qz, dy = sums[_PRIMAL, v], sums[_DUAL, v], sums[_ZQZ, v], sums[_QZ, v], sums[_DY, v]
        gap = abs(zQz + qz + dy)
        report[0, v], report[1, v], report[2, v], report[3, v] = primal, dual, gap, 0.5 * zQz + qz
        scaled = max(primal / (1 + max(sums[_ROWS, v], sums[_BOUNDS, v])), dual / (1 + sums[_TERMS, v]))
        report[4, v] = max(scaled, gap / (1 + max(abs(zQz), max(abs(qz), abs(dy)))))
        # Comparisons above are false of NaN: what is not finite, or has overflowed, would pass as solved.
        is_finite = np.isfinite(sums[_TOTAL, v] + primal + dual + gap + zQz + qz)
        verdict[v] = SOLVED if is_finite else UNDECIDED
    for i in range(p, r):
        for v in range(LANES):
            is_weak = y[i, v] <= WEAK * sums[_FORCES, v] and slack[i, v] <= WEAK * (1 + abs(d[i, v]))
            if is_weak and verdict[v] == SOLVED:
                verdict[v] = DEGENERATE


@njit(nogil=True, cache=True)
def room_for_judge(n, r):  # type: ignore[no-untyped-def]
    """Room for `judge` with n variables and r rows."""
    return np.empty((r, LANES)), np.empty((n, LANES)), np.empty((n, LANES)), np.empty((10, LANES))
