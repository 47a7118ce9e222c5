"""Gradients of the matrices of small problems from adjoints, each written once."""

from __future__ import annotations

from numba import njit


@njit(nogil=True, cache=True)
def form_range(start, stop, p, z, y, d_z, d_y, dQ, dG, dA):  # type: ignore[no-untyped-def]
    """Of problems start … stop − 1:  ∂Q = ½(d_z zᵀ + z d_zᵀ),  ∂C = d_y zᵀ + y d_zᵀ; rows that do not press are zero.

    Args:
        start: First problem.
        stop: One behind the last.
        p: Equalities.
        z: `(B, n)`.
        y: `(B, r)`, multipliers [ν; λ].
        d_z: `(B, 1, n)`.
        d_y: `(B, 1, r)`, the adjoint of the rows [d_ν; μ].
        dQ: Gets `(B, n, n)`; not looked at where it holds no problem, as are the others.
        dG: Gets `(B, m, n)`.
        dA: Gets `(B, p, n)`.
    """
    n = z.shape[1]
    for b in range(start, stop):
        if dQ.shape[0] > 0:
            for i in range(n):
                half, own = 0.5 * d_z[b, 0, i], z[b, i]
                for j in range(n):
                    dQ[b, i, j] = half * z[b, j] + own * (0.5 * d_z[b, 0, j])
        if dA.shape[0] > 0:
            for i in range(p):
                left, own = d_y[b, 0, i], y[b, i]
                for j in range(n):
                    dA[b, i, j] = left * z[b, j] + own * d_z[b, 0, j]
        if dG.shape[0] > 0:
            for i in range(dG.shape[1]):
                left, own = d_y[b, 0, p + i], y[b, p + i]
                if left == 0.0 and own == 0.0:
                    for j in range(n):
                        dG[b, i, j] = 0.0
                else:
                    for j in range(n):
                        dG[b, i, j] = left * z[b, j] + own * d_z[b, 0, j]
