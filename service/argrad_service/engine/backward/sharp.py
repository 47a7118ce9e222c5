r"""The linear system of a barrier point's derivative, by elimination where that is accurate, whole where it is not.

    [ Q   Gᵀ    Aᵀ ] [d_z]      [g_z]
    [ G  −D⁻¹   0  ] [μ  ]  = − [g_λ]      so that (Q + GᵀDG)d_z + Aᵀd_ν = −g_z − GᵀDg_λ,  μ = D(Gd_z + g_λ)
    [ A   0     0  ] [d_ν]      [g_ν]

D grows with the sharpness of the barrier. Beside it the sum Q + GᵀDG loses the small eigenvalues of Q, and with them
the derivative in their directions; the whole matrix keeps them. With μ = Cv, C = √min(1, D), the middle block is
bounded too where D vanishes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from argrad_service.engine.data import Data
from argrad_service.engine.forward.central_path import factor_barrier

REFINEMENTS = 2
"""Steps of iterative refinement."""

ACCURATE = 1e-9
"""Residual, relative to the cotangents, above which the whole system is solved."""


def solve_barrier(
    data: Data, D: Tensor, g_z: Tensor, g_nu: Tensor, g_lam: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve for k cotangents `(B, ·, k)`, with D = λ/s ≥ 0, `(B, m)`.

    Returns:
        d_z `(B, n, k)`, d_ν `(B, p, k)`, μ `(B, m, k)`, and the residual relative to the cotangents, the largest of k,
        `(B,)`.
    """
    found = _eliminated(data, D, g_z, g_nu, g_lam)
    error = _residual(data, D, found, g_z, g_nu, g_lam)
    index = torch.nonzero(~(error <= ACCURATE) & torch.isfinite(D).all(-1)).squeeze(-1)
    if len(index):
        part, given = data.select(index), (g_z[index], g_nu[index], g_lam[index])
        whole = _whole(part, D[index], *given)
        again = _residual(part, D[index], whole, *given)
        is_better = ~(again >= error[index])
        index, again = index[is_better], again[is_better]
        for block, new in zip(found, whole, strict=True):
            block[index] = new[is_better]
        error[index] = again
    return *found, error


def _eliminated(data: Data, D: Tensor, g_z: Tensor, g_nu: Tensor, g_lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By Cholesky factors of Q + GᵀDG."""
    factor, weights = factor_barrier(data, D), D.unsqueeze(-1)
    r1, r2 = -g_z - data.G.mT @ (weights * g_lam), -g_nu
    d_z, d_nu = factor.solve(r1, r2)
    for _ in range(REFINEMENTS):
        e1 = r1 - (data.Q @ d_z + data.G.mT @ (weights * (data.G @ d_z)) + data.A.mT @ d_nu)
        dx, dy = factor.solve(e1, r2 - data.A @ d_z)
        d_z, d_nu = d_z + dx, d_nu + dy
    return d_z, d_nu, weights * (data.G @ d_z + g_lam)


def _whole(data: Data, D: Tensor, g_z: Tensor, g_nu: Tensor, g_lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By LU factors of the whole matrix."""
    n, m, p = data.n, data.m, data.p
    C, middle = D.clamp(max=1.0).sqrt().unsqueeze(-1), 1 / D.clamp(min=1.0)
    K = g_z.new_zeros(len(g_z), n + m + p, n + m + p)
    K[:, :n, :n] = data.Q
    K[:, n : n + m, :n] = C * data.G
    K[:, n + m :, :n] = data.A
    K[:, :n, n:] = K[:, n:, :n].mT
    K[:, n : n + m, n : n + m] = -torch.diag_embed(middle)
    right = -torch.cat([g_z, C * g_lam, g_nu], dim=1)
    lower, pivots, _ = torch.linalg.lu_factor_ex(K)
    x = torch.linalg.lu_solve(lower, pivots, right)
    for _ in range(REFINEMENTS):
        x = x + torch.linalg.lu_solve(lower, pivots, right - K @ x)
    return x[:, :n], x[:, n + m :], C * x[:, n : n + m]


def _residual(
    data: Data, D: Tensor, found: tuple[Tensor, Tensor, Tensor], g_z: Tensor, g_nu: Tensor, g_lam: Tensor
) -> Tensor:
    """Of the whole system, its middle rows times min(1, D)."""
    d_z, d_nu, mu = found
    weight = D.clamp(max=1.0).unsqueeze(-1)
    parts = [
        data.Q @ d_z + data.G.mT @ mu + data.A.mT @ d_nu + g_z,
        weight * (data.G @ d_z + g_lam) - mu / D.clamp(min=1.0).unsqueeze(-1),
        data.A @ d_z + g_nu,
    ]
    missed = torch.cat(parts, dim=1).abs().amax(1)
    size = torch.cat([g_z, g_nu, g_lam], dim=1).abs().amax(1)
    return (missed / torch.where(size > 0, size, torch.ones_like(size))).amax(-1)
