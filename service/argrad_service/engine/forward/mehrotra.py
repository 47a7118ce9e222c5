"""The batched Mehrotra predictor–corrector loop, over any Newton system with λ > 0 and s > 0.

One loop for every elimination: the system supplies residual, factor and direction; the loop owns the step lengths (one
a problem), the centring parameter (Mehrotra, SIAM J. Optim. 2, 1992: σ = (μ_aff/μ)³), termination, and what happens to
problems that are finished: masks at every iteration freeze them, and the loop test drops them from the batch once half
of it is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from argrad_service.engine.data import dot, inf_norm
from argrad_service.engine.options import ShouldStop, Stopped

STEP_TO_BOUNDARY = 0.995
"""Fraction of the way to the nearest bound that a step may go."""

SHORTEST_STEP = 1e-9
"""A problem whose step is shorter is stuck."""

LARGEST_MULTIPLIER = 1e14
"""A problem whose multipliers or variables (in the system's own scale) pass this has no solution that can be found."""


@dataclass(kw_only=True)
class Iterate:
    """A point of the interior, `(B, ·)` each.

    Args:
        free: Variables without a sign: [z; ν], or none where they are eliminated.
        lam: Multipliers λ > 0.
        s: Slacks s > 0.
    """

    free: Tensor
    lam: Tensor
    s: Tensor

    def select(self, index: Tensor) -> Iterate:
        """The sub-batch of the problems named by index."""
        return Iterate(free=self.free[index], lam=self.lam[index], s=self.s[index])

    def store(self, index: Tensor, other: Iterate) -> None:
        """Write the iterates of a sub-batch back."""
        self.free[index], self.lam[index], self.s[index] = other.free, other.lam, other.s


class NewtonSystem(Protocol):
    """One way to write and eliminate the Newton equations of a batch of QPs."""

    def start(self) -> Iterate:
        """A point of the interior to begin with."""
        ...

    def multipliers(self, point: Iterate) -> Tensor:
        """Multipliers [ν; λ] of a point in the system's own scale, `(B, p + m)`."""
        ...

    def residual(self, point: Iterate) -> Tensor:
        """Evaluate the linear residuals at the point, keep them, and return their scaled norm `(B,)`."""
        ...

    def factor(self, point: Iterate) -> None:
        """Factor the Newton matrix at the point."""
        ...

    def direction(self, point: Iterate, complementarity: Tensor) -> Iterate:
        """Newton direction with λ∘Δs + s∘Δλ = −complementarity; `residual` and `factor` were called at the point."""
        ...

    def has_no_solution(self, point: Iterate) -> Tensor:
        """Whether the point looks like a certificate of infeasibility or unboundedness, `(B,)`."""
        ...

    def select(self, index: Tensor) -> Self:
        """The system of a sub-batch."""
        ...


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What the loop says of each problem, `(B,)` each.

    Args:
        iterations: Iterations taken.
        is_converged: Whether μ and the residual reached their targets.
        is_stuck: Whether the problem stopped on its way: no step, or numbers that grow without bound.
    """

    iterations: Tensor
    is_converged: Tensor
    is_stuck: Tensor


def advance(
    system: NewtonSystem,
    point: Iterate,
    *,
    target: float,
    residual_target: float,
    max_iterations: Tensor,
    should_stop: ShouldStop,
) -> Progress:
    """Iterate until every problem has complementarity μ and scaled residual below their targets; `point` moves.

    Args:
        system: Newton equations of the whole batch.
        point: Where to begin; holds the last iterates afterwards.
        target: Bound on μ = λᵀs/m, in the system's scale.
        residual_target: Bound on the scaled residual.
        max_iterations: Iterations that each problem may still take, `(B,)`.
        should_stop: Asked before each iteration.

    Raises:
        Stopped: should_stop() was true.
    """
    batch, m = point.lam.shape
    device = point.lam.device
    progress = Progress(
        iterations=torch.zeros(batch, dtype=torch.int64, device=device),
        is_converged=torch.zeros(batch, dtype=torch.bool, device=device),
        is_stuck=torch.zeros(batch, dtype=torch.bool, device=device),
    )
    index = torch.arange(batch, device=device)
    now, stuck = point, progress.is_stuck.clone()
    count = progress.iterations.clone()
    while True:
        residual = system.residual(now)
        mu = dot(now.lam, now.s) / max(m, 1)
        converged = (mu <= target) & (residual <= residual_target)
        stuck = (stuck | system.has_no_solution(now)) & ~converged
        done = converged | stuck | (count >= max_iterations[index])
        progress.is_converged[index], progress.is_stuck[index], progress.iterations[index] = converged, stuck, count
        alive = torch.nonzero(~done).squeeze(-1)
        if len(alive) == 0 or 2 * len(alive) <= len(index):
            if now is not point:
                point.store(index, now)
            if len(alive) == 0:
                return progress
            index, system = index[alive], system.select(alive)
            now, stuck, count, done, mu = now.select(alive), stuck[alive], count[alive], done[alive], mu[alive]
            system.residual(now)
        if should_stop():
            raise Stopped
        now, moved = _step(system, now, mu, done)
        stuck = stuck | (~moved & ~done)
        count = count + (~done).to(count.dtype)


def predict_active(system: NewtonSystem, point: Iterate) -> Tensor:
    """Rows that the affine direction drives towards their bound, `(B, m)`.

    Along the affine direction Δs/s tends to −1 and Δλ/λ to 0 on active rows, and the other way round on the rest, long
    before λ and s themselves differ by much (El-Bakry, Tapia & Zhang, SIAM Review 36, 1994).
    """
    system.residual(point)
    system.factor(point)
    affine = system.direction(point, point.lam * point.s)
    return affine.lam / point.lam > affine.s / point.s


def _step(system: NewtonSystem, now: Iterate, mu: Tensor, done: Tensor) -> tuple[Iterate, Tensor]:
    """One predictor–corrector step of the problems that are not done; which of them could move, `(B,)`."""
    m = now.lam.shape[1]
    system.factor(now)
    product = now.lam * now.s
    affine = system.direction(now, product)
    alpha = _step_length(now, affine, 1.0).unsqueeze(-1)
    mu_affine = dot(now.lam + alpha * affine.lam, now.s + alpha * affine.s) / max(m, 1)
    sigma = (mu_affine / mu).clamp(0, 1) ** 3
    step = system.direction(now, product + affine.lam * affine.s - (sigma * mu).unsqueeze(-1))
    alpha = _step_length(now, step, STEP_TO_BOUNDARY)
    size = inf_norm(step.free) + inf_norm(step.lam) + inf_norm(step.s)
    moves = torch.isfinite(size) & (alpha > SHORTEST_STEP) & ~done
    scaled = torch.where(moves, alpha, torch.zeros_like(alpha)).unsqueeze(-1)
    keep = moves.unsqueeze(-1)
    return (
        Iterate(
            free=torch.where(keep, now.free + scaled * step.free, now.free),
            lam=torch.where(keep, now.lam + scaled * step.lam, now.lam),
            s=torch.where(keep, now.s + scaled * step.s, now.s),
        ),
        moves,
    )


def _step_length(point: Iterate, step: Iterate, fraction: float) -> Tensor:
    """Largest α ≤ 1 that keeps λ + αΔλ and s + αΔs within `fraction` of their bounds, `(B,)`."""
    ratio = torch.maximum((-step.lam / point.lam).amax(-1), (-step.s / point.s).amax(-1))
    return (fraction / ratio.clamp(min=fraction)).nan_to_num(nan=0.0)
