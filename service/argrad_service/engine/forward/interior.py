"""Phase I: a strictly feasible point to begin a barrier method with, or the finding that there is none.

    minimise σ   subject to   Az = b,   Gz − σ1 ≤ h,   σ ≥ −R        (rows of G of unit length, R the largest |h|)

by the barrier method itself, which begins at the least-norm solution z₀ of Az = b with σ large. σ at its end, with the
sign turned, is close to the radius of the largest ball inside the inequalities. Where z can grow without limit inside
the inequalities the barrier alone has no minimum: ½w‖z − z₀‖² is added to it, w small, which means less as t grows.

Reference: Boyd & Vandenberghe, Convex Optimization, 2004, section 11.4.1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from argrad_service.engine.data import Data, inf_norm, matvec, matvec_t
from argrad_service.engine.forward.central_path import PathPoint, is_stuck, newton_step, sharpen
from argrad_service.engine.options import ShouldStop, Stopped
from argrad_service.engine.semidefinite import factor_semidefinite

GROWTH = 10.0
"""Factor by which the sharpness of phase I grows."""

LEAST_RADIUS = 1e-10
"""An interior of a smaller radius, relative to R, is none."""

WEIGHT = 1e-8
"""W in units of 1 / (R + ‖z₀‖)²: it counts where z is ten thousand times as far away as anything in the problem."""

CONSISTENT = 1e-9
"""Relative residual up to which Az = b holds at the start."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Interior:
    """What phase I found, `(B, ·)` each.

    Args:
        z: Points with Az = b; Gz < h where `is_found`.
        radius: `(B,)`, least slack of the rows scaled to unit length; the largest possible up to a small factor.
        is_found: `(B,)`.
        iterations: `(B,)`, Newton steps.
    """

    z: Tensor
    radius: Tensor
    is_found: Tensor
    iterations: Tensor


def find_interior(data: Data, *, max_iterations: int, should_stop: ShouldStop) -> Interior:
    """Find a strictly feasible point of each problem; synchronises once a step.

    Args:
        data: The problems.
        max_iterations: Newton steps of one problem at most.
        should_stop: Asked before each step.

    Raises:
        Stopped: should_stop() was true.
    """
    z, is_consistent = _least_norm(data)
    if data.m == 0:
        return Interior(
            z=z,
            radius=z.new_full((data.B,), torch.inf),
            is_found=is_consistent,
            iterations=torch.zeros(data.B, dtype=torch.int64, device=z.device),
        )
    phase_one, G, h, R = _phase_one(data)
    least = (matvec(G, z) - h).amax(-1)
    sigma = least.clamp(min=0) + R
    rows = data.m + 1
    point = PathPoint.at(phase_one, torch.cat([z, sigma.unsqueeze(-1)], dim=1), rows / (sigma + R))
    start, last_t = point, rows / (LEAST_RADIUS * R)
    weight = WEIGHT / (R + torch.linalg.vector_norm(z, dim=1)).square()
    iterations = torch.zeros(data.B, dtype=torch.int64, device=z.device)
    done = ~is_consistent
    while not bool((done | (iterations >= max_iterations)).all()):
        if should_stop():
            raise Stopped
        moved = newton_step(_weighted(phase_one, start, weight / point.t), point)
        stuck = is_stuck(moved, start)
        gap, worst = rows / moved.t, (matvec(G, moved.z[:, :-1]) - h).amax(-1)
        is_decided = (worst <= -0.5 * gap) | (moved.z[:, -1] > gap) & (moved.decrement <= 0.1) | (moved.t >= last_t)
        frozen = done | stuck | (iterations >= max_iterations)
        point = point.where(frozen, sharpen(moved, mu=GROWTH, last_t=last_t))
        iterations = iterations + (~frozen).to(iterations.dtype)
        done = done | stuck | is_decided
    z = point.z[:, :-1]
    radius = -(matvec(G, z) - h).amax(-1)
    return Interior(z=z, radius=radius, is_found=is_consistent & (radius > LEAST_RADIUS * R), iterations=iterations)


def _phase_one(data: Data) -> tuple[Data, Tensor, Tensor, Tensor]:
    """The problem in (z, σ), the inequalities with rows of unit length, and R `(B,)`."""
    norms = torch.linalg.vector_norm(data.G, dim=2)
    scale = torch.where(norms > 0, 1 / norms, torch.ones_like(norms))
    G, h = data.G * scale.unsqueeze(2), data.h * scale
    R = inf_norm(h)
    R = torch.where(R > 0, R, torch.ones_like(R))
    n, count = data.n, data.C.shape[0]
    C = data.q.new_zeros(count, data.p + data.m + 1, n + 1)
    C[:, : data.p, :n] = data.A
    C[:, data.p : -1, :n] = G
    C[:, data.p :, n] = -1.0
    q = torch.zeros_like(C[0, 0]).index_fill(0, torch.tensor([n], device=C.device), 1.0)
    return (
        Data(
            Q=data.Q.new_zeros(1, n + 1, n + 1),
            q=q.expand(data.B, -1),
            C=C,
            d=torch.cat([data.b, h, R.unsqueeze(-1)], dim=1),
            p=data.p,
            is_linear=True,
        ),
        G,
        h,
        R,
    )


def _weighted(phase_one: Data, start: PathPoint, weight: Tensor) -> Data:
    """The problem in (z, σ) with ½ weight ‖z − z₀‖² in its objective, `(B,)`."""
    diagonal = weight.unsqueeze(-1).repeat(1, phase_one.n)
    diagonal[:, -1] = 0.0
    return replace(phase_one, Q=torch.diag_embed(diagonal), q=phase_one.q - diagonal * start.z)


def _least_norm(data: Data) -> tuple[Tensor, Tensor]:
    """The least-norm solution of Az = b `(B, n)`, and where there is one `(B,)`."""
    if data.p == 0:
        return torch.zeros_like(data.q), torch.ones(data.B, dtype=torch.bool, device=data.q.device)
    gram = data.A @ data.A.mT
    factor = factor_semidefinite(gram)

    def solve(right: Tensor) -> Tensor:
        if gram.shape[0] == 1:
            return matvec_t(data.A, factor.solve(right.mT.unsqueeze(0)).squeeze(0).mT)
        return matvec_t(data.A, factor.solve(right.unsqueeze(-1)).squeeze(-1))

    z = solve(data.b)
    z = z + solve(data.b - matvec(data.A, z))
    residual = inf_norm(data.b - matvec(data.A, z))
    return z, residual <= CONSISTENT * (1 + inf_norm(data.b) + inf_norm(z))
