"""Why a problem has no solution, decided by two projections that always have one.

Infeasible: the least-squares violation, minimise ½‖Az − b‖² + ½‖(Gz − h)₊‖² (rows of unit length). Where
it is positive, its residuals (v_A, v_G ≥ 0) are a Farkas certificate: Aᵀv_A + Gᵀv_G = 0 and bᵀv_A + hᵀv_G = −‖v‖² < 0.

Unbounded: the projection of −q on the recession cone {d : Qd = 0, Ad = 0, Gd ≤ 0}. Where it is not zero,
qᵀd = −‖d‖² < 0.

A verdict is given only where the certificate holds to CERTAINTY; without one the problem is not called infeasible.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from argrad_service.engine.data import Data, dot, inf_norm, matvec, matvec_t

CERTAINTY = 1e-6
"""Relative accuracy with which a certificate must hold."""

SMALLEST_VIOLATION = 1e-7
"""A violation below this, relative to the right-hand side, is not infeasibility."""

SolveFeasible = Callable[[Data], Tensor]
"""Solves QPs that are feasible and bounded by construction; returns z `(B, n)`."""


def is_infeasible(data: Data, solve: SolveFeasible) -> Tensor:
    """Whether no point satisfies the constraints, `(B,)`."""
    if data.d.shape[1] == 0:
        return torch.zeros(data.B, dtype=torch.bool, device=data.q.device)
    norms = torch.linalg.vector_norm(data.C, dim=2)
    scale = torch.where(norms > 0, 1 / norms, torch.ones_like(norms))
    C, d = data.C * scale.unsqueeze(2), data.d * scale
    size = torch.clamp(inf_norm(d), min=1e-300).unsqueeze(-1)
    A, G = C[:, : data.p], C[:, data.p :]
    d = d / size
    z = _least_violation(A, G, d[:, : data.p], d[:, data.p :], solve)
    residual = matvec(C, z) - d
    v = torch.cat([residual[:, : data.p], residual[:, data.p :].clamp(min=0)], dim=1)
    length = torch.linalg.vector_norm(v, dim=1)
    is_balanced = inf_norm(matvec_t(C, v)) <= CERTAINTY * length
    is_certificate: Tensor = (length > SMALLEST_VIOLATION) & is_balanced & (dot(d, v) < -0.5 * length.square())
    return is_certificate


def _least_violation(A: Tensor, G: Tensor, b: Tensor, h: Tensor, solve: SolveFeasible) -> Tensor:
    """Z that minimises ½‖Az − b‖² + ½‖(Gz − h)₊‖², `(B, n)`, as a QP in (z, t) with Gz − t ≤ h."""
    batch, m = h.shape
    rows, n = max(A.shape[0], G.shape[0]), A.shape[2]
    eye = torch.eye(m, dtype=h.dtype, device=h.device).expand(rows, -1, -1)
    Q = h.new_zeros(rows, n + m, n + m)
    Q[:, :n, :n] = A.transpose(1, 2) @ A
    Q[:, n:, n:] = eye
    q = torch.cat([-matvec_t(A, b), h.new_zeros(batch, m)], dim=1)
    C = torch.cat([G.expand(rows, -1, -1), -eye], dim=2)
    return solve(Data(Q=Q, q=q, C=C, d=h, p=0))[:, :n]


def is_unbounded(data: Data, solve: SolveFeasible) -> Tensor:
    """Whether a direction exists along which a feasible problem's objective falls for ever, `(B,)`."""
    rows = max(data.Q.shape[0], data.C.shape[0])
    flat = torch.cat([data.Q.expand(rows, -1, -1), data.C.expand(rows, -1, -1)], dim=1)
    norms = torch.linalg.vector_norm(flat, dim=2)
    scale = torch.where(norms > 0, 1 / norms, torch.ones_like(norms))
    flat = flat * scale.unsqueeze(2)
    size = inf_norm(data.q).unsqueeze(-1)
    q = data.q / torch.where(size > 0, size, torch.ones_like(size))
    eye = torch.eye(data.n, dtype=q.dtype, device=q.device).unsqueeze(0)
    p = data.n + data.p
    projection = Data(Q=eye, q=q, C=flat, d=q.new_zeros(data.B, flat.shape[1]), p=p)
    d = solve(projection)
    step = matvec(flat, d)
    leaves = torch.maximum(inf_norm(step[:, :p]), inf_norm(step[:, p:].clamp(min=0)))
    length = torch.linalg.vector_norm(d, dim=1)
    is_direction: Tensor = (length > CERTAINTY) & (leaves <= CERTAINTY * length) & (dot(q, d) < -0.5 * length.square())
    return is_direction
