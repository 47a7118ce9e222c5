"""Why a problem has no solution, decided by two problems that always have one.

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
from argrad_service.engine.options import ShouldStop, Stopped

CERTAINTY = 1e-6
"""Relative accuracy with which a certificate must hold."""

SMALLEST_VIOLATION = 1e-7
"""A violation below this, relative to the right-hand side, is not infeasibility."""

MOST_STEPS = 100
"""Newton steps on the violation; what takes more is not called infeasible."""

HALVINGS = 40
"""Of the line search."""

STATIONARY = 1e-10
"""The violation is least where its gradient is below this, relative to it."""

RIDGE = 1e-13
"""Added to the Newton matrix, relative to its trace."""

CHUNK = 2**20
"""Pairs of rows of the projections that are solved at a time: they take more memory than the problems did."""

SolveFeasible = Callable[[Data], Tensor]
"""Solves QPs that are feasible and bounded by construction; returns z `(B, n)`."""


def find_certificates(data: Data, solve: SolveFeasible, should_stop: ShouldStop) -> tuple[Tensor, Tensor]:
    """Which problems are infeasible and which are unbounded, `(B,)` each; of the infeasible the second is not asked.

    Raises:
        Stopped: should_stop() was true.
    """
    infeasible = is_infeasible(data, should_stop)
    unbounded = torch.zeros_like(infeasible)
    left = torch.nonzero(~infeasible).squeeze(-1)
    size = max(1, CHUNK // (data.n + data.C.shape[1]) ** 2)
    for part in torch.split(left, size) if len(left) else ():
        unbounded[part] = is_unbounded(data.select(part), solve)
    return infeasible, unbounded


def is_infeasible(data: Data, should_stop: ShouldStop) -> Tensor:
    """Whether no point satisfies the constraints, `(B,)`.

    Raises:
        Stopped: should_stop() was true.
    """
    if data.d.shape[1] == 0:
        return torch.zeros(data.B, dtype=torch.bool, device=data.q.device)
    norms = torch.linalg.vector_norm(data.C, dim=2)
    scale = torch.where(norms > 0, 1 / norms, torch.ones_like(norms))
    C, d = data.C * scale.unsqueeze(2), data.d * scale
    size = torch.clamp(inf_norm(d), min=1e-300).unsqueeze(-1)
    d = d / size
    z = _least_violation(C, d, data.p, should_stop)
    v = _violation(matvec(C, z) - d, data.p)
    length = torch.linalg.vector_norm(v, dim=1)
    is_balanced = inf_norm(matvec_t(C, v)) <= CERTAINTY * length
    is_certificate: Tensor = (length > SMALLEST_VIOLATION) & is_balanced & (dot(d, v) < -0.5 * length.square())
    return is_certificate


def _least_violation(C: Tensor, d: Tensor, p: int, should_stop: ShouldStop) -> Tensor:
    """Z that minimises f = ½‖Az − b‖² + ½‖(Gz − h)₊‖², `(B, n)`; C = [A; G] with rows of unit length, d = [b; h].

    Newton's method with an exact line search on a convex, piecewise quadratic function: in n variables, whatever the
    number of rows. The gradient lies in the span of the rows that count, so that a ridge does no harm where they
    leave directions free.
    """
    z = d.new_zeros(len(d), C.shape[2])
    r = -d
    for _ in range(MOST_STEPS):
        v = _violation(r, p)
        gradient = matvec_t(C, v)
        length = torch.linalg.vector_norm(v, dim=1)
        is_done = (inf_norm(gradient) <= STATIONARY * length) | (length <= 0.1 * SMALLEST_VIOLATION)
        if bool(is_done.all()):
            break
        if should_stop():
            raise Stopped
        counts = v != 0
        counts[:, :p] = True
        hessian = (C.transpose(1, 2) * counts.unsqueeze(1)) @ C
        ridge = RIDGE * (1 + counts.sum(1, dtype=d.dtype))
        hessian.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
        factor, _ = torch.linalg.cholesky_ex(hessian)
        step = torch.nan_to_num(-torch.cholesky_solve(gradient.unsqueeze(2), factor).squeeze(2))
        change = matvec(C, step)
        t = _exact_step(r, change, p).masked_fill(is_done, 0.0).unsqueeze(1)
        z, r = z + t * step, r + t * change
    return z


def _violation(r: Tensor, p: int) -> Tensor:
    """What is violated of the residual Cz − d: all of an equality, the positive part of an inequality."""
    return torch.cat([r[:, :p], r[:, p:].clamp(min=0)], dim=1)


def _exact_step(r: Tensor, change: Tensor, p: int) -> Tensor:
    """T in [0, 1] that minimises f along a direction of descent, by bisection of its increasing derivative, `(B,)`."""
    low, high = torch.zeros_like(r[:, 0]), torch.ones_like(r[:, 0])
    takes_all = dot(_violation(r + change, p), change) <= 0
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        is_past = dot(_violation(r + middle.unsqueeze(1) * change, p), change) > 0
        low, high = torch.where(is_past, low, middle), torch.where(is_past, middle, high)
    return torch.where(takes_all, torch.ones_like(low), 0.5 * (low + high))


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
