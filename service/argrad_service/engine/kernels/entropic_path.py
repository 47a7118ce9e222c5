"""The interior point method of `argrad_service.engine.forward.entropic`, problem by problem, in matrices of its rows.

    q + τ(1 + log z) + Aᵀν + Gᵀλ = 0,   Az = b,   Gz + s = h,   λ∘s = μ,   λ, s > 0

with Mehrotra's predictor and corrector for λ and s; the Newton matrix is C R²Cᵀ + D(0, s/λ). Arrays are named as in
`kernels.entropic`; λ is the tail of y, and s `(r,)` has room for the equalities, which is not used.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from argrad_service.engine.kernels.entropic import dot, largest_of, move, slope_at
from argrad_service.engine.kernels.lapack import cholesky, gram, solve_lower, solve_upper

FIRST_TAU = 0.15
"""τ begins at this fraction of the spread of q, if the problem's is smaller."""

FALL = 0.25
"""Factor by which τ falls once the residual is below `NEAR_PATH`."""

NEAR_PATH = 0.1
"""Scaled residual below which τ falls."""

MOST_AHEAD = 10.0
"""Violation of the rows, as a multiple of μ, above which μ does not fall."""

STEP_TO_BOUNDARY = 0.995
"""Fraction of the way to the nearest bound that a step may go."""

SHORTEST_STEP = 1e-9
"""A problem whose step is shorter is stuck."""

REGULARISATION = 1e-13
"""Added to the diagonal of the rows' matrix, relative to it: equalities may be dependent."""

TINY = 2.2250738585072014e-308
"""Smallest normal float64."""


@njit(nogil=True, cache=True, error_model="numpy")
def level_of(C, d, p):  # type: ignore[no-untyped-def]
    """The z, the same for all variables, that fits the equalities best."""
    fit, size = 0.0, 0.0
    for i in range(p):
        along = 0.0
        for j in range(C.shape[1]):
            along += C[i, j]
        fit += along * d[i]
        size += along * along
    level = fit / max(size, 1e-300)
    return min(max(level, 1e-6), 1e6) if level > 0 else 1.0


@njit(nogil=True, cache=True, error_model="numpy")
def begin(q, tau, C, d, p, w, y, s):  # type: ignore[no-untyped-def]
    """All z alike, as large as the equalities ask; λ and s with a product in the problem's own units. The first τ."""
    level = level_of(C, d, p)
    w[:] = np.log(level)
    y[:p] = 0.0
    n, low, high, mean, spread = q.shape[0], np.inf, -np.inf, 0.0, 0.0
    for j in range(n):
        low, high, mean = min(low, q[j]), max(high, q[j]), mean + q[j] / n
    for j in range(n):
        spread += (q[j] - mean) ** 2 / n
    force = tau + np.sqrt(spread)
    for i in range(p, d.shape[0]):
        along, length = 0.0, 0.0
        for j in range(n):
            along += C[i, j]
            length += C[i, j] * C[i, j]
        s[i] = max(d[i] - level * along, 0.1 * (level + abs(d[i])))
        y[i] = force / max(np.sqrt(length), 1e-3)
    return max(tau, FIRST_TAU * (high - low))


@njit(nogil=True, cache=True, error_model="numpy")
def _solve(lapack, X, S, k, u, r2, y, work):  # type: ignore[no-untyped-def]
    """Y = S⁻¹(Xu − r₂), and u −= Xᵀy."""
    n = u.shape[0]
    for i in range(k):
        y[i] = dot(X[i], u) - r2[i]
    solve_lower(lapack, S, k, y, work)
    solve_upper(lapack, S, k, y, work)
    for i in range(k):
        row, factor = X[i], y[i]
        for j in range(n):
            u[j] -= factor * row[j]


@njit(nogil=True, cache=True, error_model="numpy")
def _direction(lapack, tau, C, live, k, p, y, s, root, slope, away, product, X, S, dw, dy, ds, scratch, work):  # type: ignore[no-untyped-def]
    """The step that brings the linearised residuals to zero, with λ∘Δs + s∘Δλ = −product; refined once."""
    n = root.shape[0]
    u, r1, e1 = scratch[0, :n], scratch[1, :n], scratch[2, :n]
    r2, e2, more, step = scratch[3], scratch[4], scratch[5], scratch[6]
    for j in range(n):
        r1[j] = -root[j] * slope[j]
        u[j] = r1[j]
    for i in range(k):
        row = live[i]
        r2[i] = -away[row] if row < p else product[row] / y[row] - away[row]
    _solve(lapack, X, S, k, u, r2, step, work)
    for j in range(n):
        e1[j] = r1[j] - u[j]
    for i in range(k):
        row, factor = live[i], step[i]
        e2[i] = r2[i] - dot(X[i], u)
        if row >= p:
            e2[i] += s[row] / y[row] * factor
        for j in range(n):
            e1[j] -= factor * X[i, j]
    _solve(lapack, X, S, k, e1, e2, more, work)
    for j in range(n):
        dw[j] = slope[j]
    for i in range(k):
        row = live[i]
        dy[row] = step[i] + more[i]
        factor = dy[row]
        for j in range(n):
            dw[j] += factor * C[row, j]
        if row >= p:
            ds[row] = -(product[row] + s[row] * factor) / y[row]
    for j in range(n):
        dw[j] /= -tau


@njit(nogil=True, cache=True, error_model="numpy")
def _step_length(live, k, p, y, s, dy, ds, fraction):  # type: ignore[no-untyped-def]
    """Largest α ≤ 1 that keeps λ and s within `fraction` of their bounds; 0 where that is not a number."""
    ratio = fraction
    for i in range(k):
        row = live[i]
        if row >= p:
            here = max(-dy[row] / y[row], -ds[row] / s[row])
            if not here <= ratio:
                ratio = here
    alpha = fraction / ratio
    return alpha if alpha > 0 else 0.0


@njit(nogil=True, cache=True, error_model="numpy")
def advance(lapack, q, tau, C, d, p, live, k, w, y, s, now, active, X, S, vectors, scratch, target, most, work):  # type: ignore[no-untyped-def]
    """Iterate until the residual and the relative μ are below the target.

    Args:
        lapack: Addresses.
        q, tau, C, d, p, w, y, s: See above.
        live: `(r,)`, the rows that can bind, equalities first.
        k: Their number.
        now: The τ on its way to that of the problem.
        active: `(r,)`, gets the rows that tend to be active; left alone where no step is taken.
        X: `(≥ k, n)`.
        S: `(≥ k, ≥ k)`.
        vectors: `(9, max(n, r))`.
        scratch: `(7, max(n, r))`.
        target: Bound on both.
        most: Iterations at most.
        work: Scratch of the LAPACK calls.

    Returns:
        The last τ, the iterations taken, and whether it ended because no step was possible.
    """
    n = q.shape[0]
    z, root, slope, dw = vectors[0, :n], vectors[1, :n], vectors[2, :n], vectors[3, :n]
    away, product, dy, ds, corrected = vectors[4], vectors[5], vectors[6], vectors[7], vectors[8]
    m, d_size, q_size = k - p, largest_of(d), largest_of(q)
    for taken in range(most + 1):
        mu, size, off, lam_size = 0.0, d_size, 0.0, 0.0
        for j in range(n):
            z[j] = np.exp(w[j])
        for i in range(k):
            row = live[i]
            along = dot(C[row], z)
            size = max(size, abs(along))
            away[row] = along - d[row]
            if row >= p:
                away[row] += s[row]
                mu += y[row] * s[row] / m
                lam_size = max(lam_size, y[row])
            off = max(off, abs(away[row]))
        force = q_size + tau + lam_size
        size += 1.0
        slope_at(q, now, C, y, w, slope)
        tilt = 0.0
        for j in range(n):
            if z[j] > 0:
                tilt = max(tilt, abs(slope[j]))
        scaled = max(max(off / size, tilt / force), mu / (size * force))
        is_on_way = now > tau
        if scaled <= target and not is_on_way:
            return now, taken, False
        if taken == most:
            return now, taken, True
        if is_on_way and scaled <= NEAR_PATH:
            now = max(tau, FALL * now)
            slope_at(q, now, C, y, w, slope)
        for j in range(n):
            root[j] = np.sqrt(z[j] / now)
        for i in range(k):
            for j in range(n):
                X[i, j] = C[live[i], j] * root[j]
        gram(lapack, X[:k], S, work)
        for i in range(k):
            row = live[i]
            if row >= p:
                S[i, i] += s[row] / y[row]
                product[row] = y[row] * s[row]
            S[i, i] += S[i, i] * REGULARISATION + TINY
        if k > 0 and cholesky(lapack, S, k, work) != 0:
            return now, taken, True
        arrays = root, slope, away
        _direction(lapack, now, C, live, k, p, y, s, *arrays, product, X, S, dw, dy, ds, scratch, work)
        if m > 0:
            alpha = _step_length(live, k, p, y, s, dy, ds, 1.0)
            ahead = 0.0
            for i in range(p, k):
                row = live[i]
                active[row] = dy[row] / y[row] > ds[row] / s[row]
                ahead += (y[row] + alpha * dy[row]) * (s[row] + alpha * ds[row]) / m
            # λ∘s must not fall ahead of the rest: rows that it closes too early are slow to open again.
            centres = off * force > MOST_AHEAD * mu
            sigma = 1.0 if centres else min(max(ahead / mu, 0.0), 1.0) ** 3
            for i in range(p, k):
                row = live[i]
                second = 0.0 if centres else dy[row] * ds[row]
                corrected[row] = product[row] + second - sigma * mu
            _direction(lapack, now, C, live, k, p, y, s, *arrays, corrected, X, S, dw, dy, ds, scratch, work)
        alpha = _step_length(live, k, p, y, s, dy, ds, STEP_TO_BOUNDARY)
        if not (alpha > SHORTEST_STEP and largest_of(dw) < np.inf):
            return now, taken, True
        move(w, dw, alpha)
        for i in range(k):
            row = live[i]
            y[row] += alpha * dy[row]
            if row >= p:
                s[row] += alpha * ds[row]
    return now, most, True
