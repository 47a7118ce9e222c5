"""The KKT system of one strictly convex QP on its active set, solved from its factors and refined.

[ Q    C_aᵀ ] [x]   [r₁]          u = L⁻¹r₁,   y = S⁻¹(X_a u − r₂),   x = L⁻ᵀ(u − X_aᵀy),   S = X_a X_aᵀ
[ C_a   0   ] [y] = [r₂]
"""

from __future__ import annotations

import numpy as np
from numba import njit

from argrad_service.engine.kernels.lapack import solve_lower, solve_upper

ROUNDING = 2e-14
"""Residual, relative to the right-hand side, below which one refinement was enough."""


@njit(nogil=True, cache=True)
def _solve_once(lapack, L, X, index, k, S, x, r2, y, work):  # type: ignore[no-untyped-def]
    """X holds r₁ and gets the solution; y gets the multipliers of the scaled rows."""
    n = X.shape[1]
    solve_lower(lapack, L, n, x, work)
    for i in range(k):
        y[i] = np.dot(X[index[i]], x) - r2[i]
    solve_lower(lapack, S, k, y, work)
    solve_upper(lapack, S, k, y, work)
    for i in range(k):
        row, factor = X[index[i]], y[i]
        for j in range(n):
            x[j] -= factor * row[j]
    solve_upper(lapack, L, n, x, work)


@njit(nogil=True, cache=True)
def _residual(Q, C, scale, index, k, r1, r2, x, y, e1, e2):  # type: ignore[no-untyped-def]
    """e₁ = r₁ − Qx − C_aᵀy and e₂ = r₂ − C_a x on the scaled rows; their largest entry."""
    size = 0.0
    for j in range(x.shape[0]):
        e1[j] = r1[j] - np.dot(Q[j], x)
    for i in range(k):
        row, factor = C[index[i]], y[i] * scale[index[i]]
        for j in range(x.shape[0]):
            e1[j] -= factor * row[j]
        e2[i] = r2[i] - scale[index[i]] * np.dot(row, x)
        size = max(size, abs(e2[i]))
    for j in range(x.shape[0]):
        size = max(size, abs(e1[j]))
    return size


@njit(nogil=True, cache=True)
def solve_kkt(lapack, Q, C, L, X, scale, index, k, S, r1, r2, x, y, scratch, work):  # type: ignore[no-untyped-def]
    """Solve for one right-hand side, refined at most twice against Q and C themselves.

    Args:
        lapack: Addresses.
        Q: `(n, n)`, symmetric.
        C: `(r, n)`.
        L: `(n, n)`, factor of Q.
        X: `(r, n)`, rows of C L⁻ᵀ, scaled.
        scale: `(r,)`, of the rows.
        index: `(K,)`, the active rows.
        k: Their number.
        S: `(K, K)`, factor of their Gram matrix.
        r1: `(n,)`.
        r2: `(K,)`, of the scaled rows.
        x: `(n,)`, gets the solution.
        y: `(≥ K,)`, gets the multipliers of the scaled rows.
        scratch: `(3, max(K, n))`.
        work: Scratch of the LAPACK calls.

    Returns:
        The residual, relative to the right-hand side.
    """
    n = x.shape[0]
    e1, e2, dy = scratch[0, :n], scratch[1], scratch[2]
    size = 0.0
    for j in range(n):
        x[j] = r1[j]
        size = max(size, abs(r1[j]))
    for i in range(k):
        size = max(size, abs(r2[i]))
    _solve_once(lapack, L, X, index, k, S, x, r2, y, work)
    error = _residual(Q, C, scale, index, k, r1, r2, x, y, e1, e2)
    for _ in range(2):
        _solve_once(lapack, L, X, index, k, S, e1, e2, dy, work)
        for j in range(n):
            x[j] += e1[j]
        for i in range(k):
            y[i] += dy[i]
        last, error = error, _residual(Q, C, scale, index, k, r1, r2, x, y, e1, e2)
        if not error < 0.5 * last or error <= ROUNDING * size:
            break
    return error / size if size > 0 else error
