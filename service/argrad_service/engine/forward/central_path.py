"""The log barrier of a convex QP or LP, its Newton step and its central path, in operations that autograd sees through.

    minimise ½zᵀQz + qᵀz − (1/t) Σ log s,   s = h − Gz > 0,   Az = b

is the barrier problem at sharpness t. Its solution z_t has λ = 1/(t s) and a duality gap of exactly m/t. Newton's step,
with D = λ/s = 1/(t s²):

    [ Q + GᵀDG   Aᵀ ] [Δz]     [Qz + q + Gᵀλ]
    [ A          0  ] [ν ] = − [Az − b      ]

The same matrix serves the derivative of z_t (`argrad_service.engine.backward.smoothed`).

Reference: Boyd & Vandenberghe, Convex Optimization, 2004, sections 9.6 (damped Newton), 11.3 (barrier method).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from argrad_service.engine.data import Data, dot, inf_norm, matvec, matvec_t

RIDGE = 1e-14
"""Added to unit diagonals before a Cholesky factorisation: dependent rows and flat directions then do no harm."""

QUADRATIC = 0.25
"""Newton decrement below which full steps are taken: s stays positive, and the decrement is squared by each."""

CENTRED = 0.1
"""Newton decrement at the start of a step after which t may grow."""

EXACT = 1e-6
"""Newton decrement at the start of a step that ends the path: after it the decrement is about its square."""

FLOOR = 0.5
"""A decrement that was small and did not fall below this times the last one is made of rounding: the path ends too."""

FRACTIONS = (1.0, 0.9, 0.75, 0.6, 0.45, 0.3, 0.2, 0.1, 0.03, 0.01)
"""Step lengths tried beside the damped one, as fractions of the largest that counts."""

TO_BOUNDARY = 0.99
"""Fraction of the way to the nearest row that a step may go."""

FARTHEST = 1e12
"""A problem whose variables pass this, relative to where they began, has no minimiser that can be found."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BarrierFactor:
    """Factor of [Q + GᵀDG, Aᵀ; A, 0], scaled to unit diagonals.

    Args:
        lower: `(B, n, n)`, H + AᵀA = LLᵀ in the scaled variables.
        A: `(B, p, n)`, the scaled rows.
        W: `(B, n, p)`, L⁻¹Aᵀ.
        schur: `(B, p, p)`, Cholesky factor of WᵀW.
        columns: `(B, n)`, scale of the variables.
        rows: `(B, p)`, scale of the equalities.
    """

    lower: Tensor
    A: Tensor
    W: Tensor
    schur: Tensor
    columns: Tensor
    rows: Tensor

    def solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        """Solve for right-hand sides r1 `(B, n, k)`, r2 `(B, p, k)`."""
        columns, rows = self.columns.unsqueeze(-1), self.rows.unsqueeze(-1)
        r2 = rows * r2
        half = torch.linalg.solve_triangular(self.lower, columns * r1 + self.A.mT @ r2, upper=False)
        if r2.shape[1] == 0:
            return columns * torch.linalg.solve_triangular(self.lower.mT, half, upper=True), r2
        y = torch.cholesky_solve(self.W.mT @ half - r2, self.schur)
        x = torch.linalg.solve_triangular(self.lower.mT, half - self.W @ y, upper=True)
        return columns * x, rows * y


def factor_barrier(data: Data, D: Tensor) -> BarrierFactor:
    """Factor the Newton matrix for weights D > 0 of the inequalities, `(B, m)`."""
    H = data.Q + (data.G * D.unsqueeze(-1)).mT @ data.G
    diagonal = H.detach().diagonal(dim1=1, dim2=2)
    # A variable in no term is scaled like the others: at 1 beside 1e6 the ridge would be as large as its part of AᵀA.
    largest = diagonal.amax(-1, keepdim=True)
    diagonal = torch.where(diagonal > 0, diagonal, torch.where(largest > 0, largest, 1.0))
    columns = diagonal.rsqrt()
    A = data.A * columns.unsqueeze(1)
    norms = torch.linalg.vector_norm(A, dim=2)
    rows = torch.where(norms > 0, 1 / norms, torch.ones_like(norms))
    A = A * rows.unsqueeze(2)
    eye = torch.eye(data.n, dtype=H.dtype, device=H.device)
    H = columns.unsqueeze(2) * H * columns.unsqueeze(1) + A.mT @ A + RIDGE * eye
    lower, _ = torch.linalg.cholesky_ex(H)
    W = torch.linalg.solve_triangular(lower, A.mT, upper=False)
    S = W.mT @ W
    unit = S.detach().diagonal(dim1=1, dim2=2).clamp(min=1.0)
    schur, _ = torch.linalg.cholesky_ex(S + RIDGE * torch.diag_embed(unit))
    return BarrierFactor(lower=lower, A=A, W=W, schur=schur, columns=columns, rows=rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class PathPoint:
    """Where the path of each problem stands.

    Args:
        z: `(B, n)`, strictly inside.
        nu: `(B, p)`, multipliers of the equalities.
        lam: `(B, m)`, multipliers of the inequalities.
        t: `(B,)`, sharpness, in units of 1 / objective.
        decrement: `(B,)`, Newton decrement where the last step began; +inf before the first.
    """

    z: Tensor
    nu: Tensor
    lam: Tensor
    t: Tensor
    decrement: Tensor

    @classmethod
    def at(cls, data: Data, z: Tensor, t: Tensor) -> PathPoint:
        """Where a path begins."""
        nu, lam = z.new_zeros(data.B, data.p), z.new_zeros(data.B, data.m)
        return cls(z=z, nu=nu, lam=lam, t=t, decrement=torch.full_like(t, torch.inf))

    @property
    def state(self) -> tuple[Tensor, ...]:
        """Its tensors, in the order of the constructor."""
        return self.z, self.nu, self.lam, self.t, self.decrement

    @classmethod
    def of(cls, state: tuple[Tensor, ...]) -> PathPoint:
        """The point of its tensors."""
        z, nu, lam, t, decrement = state
        return cls(z=z, nu=nu, lam=lam, t=t, decrement=decrement)

    def where(self, mask: Tensor, other: PathPoint) -> PathPoint:
        """This point where mask `(B,)` is true, the other elsewhere."""
        pairs = zip(self.state, other.state, strict=True)
        return PathPoint.of(
            tuple(torch.where(mask.unsqueeze(-1) if mine.ndim == 2 else mask, mine, theirs) for mine, theirs in pairs)
        )


def newton_step(data: Data, point: PathPoint) -> PathPoint:
    """One damped Newton step at each problem's own t; autograd sees all of it but the step's length.

    λ = 1/(t s) + DGΔz, which equals 1/(t s) at the new point up to the square of the decrement, and makes the linear
    dual equation hold to rounding, where 1/(t s) loses the digits that cancel in s = h − Gz.

    The system is solved for the change of ν: what q and Aᵀν cancel of each other would be rounding error, large where
    no row is active and D small.

    The length is the best of a few for the barrier function, the one that self-concordance vouches for among them, and
    1 where the decrement is small.
    """
    t = point.t.unsqueeze(-1)
    s = data.h - matvec(data.G, point.z)
    lam = 1 / (t * s)
    slope = matvec(data.Q, point.z) + data.q
    factor = factor_barrier(data, lam / s)
    right = -(slope + matvec_t(data.G, lam) + matvec_t(data.A, point.nu))
    dz, dnu = factor.solve(right.unsqueeze(-1), (data.b - matvec(data.A, point.z)).unsqueeze(-1))
    dz, nu = dz.squeeze(-1), point.nu + dnu.squeeze(-1)
    change = matvec(data.G, dz) / s
    with torch.no_grad():
        approach, curvature = change, dot(dz, matvec(data.Q, dz))
        decrement = (point.t * curvature + approach.square().sum(-1)).clamp(min=0).sqrt()
        length = _length(point.t * dot(slope, dz), point.t * curvature, approach, decrement)
    z = point.z + length.unsqueeze(-1) * dz
    return PathPoint(z=z, nu=nu, lam=lam * (1 + change), t=point.t, decrement=decrement)


def _length(slope: Tensor, curvature: Tensor, approach: Tensor, decrement: Tensor) -> Tensor:
    """Step lengths `(B,)`: of those tried, the least of slope·α + ½curvature·α² − Σ log(1 − α·approach)."""
    longest = TO_BOUNDARY / (approach.amax(-1) if approach.shape[1] else torch.zeros_like(decrement)).clamp(
        min=TO_BOUNDARY
    )
    alpha = longest.unsqueeze(-1) * longest.new_tensor(FRACTIONS)
    alpha = torch.cat([alpha, (1 / (1 + decrement)).unsqueeze(-1)], dim=1)
    value = slope.unsqueeze(-1) * alpha + 0.5 * curvature.unsqueeze(-1) * alpha.square()
    value = value - torch.log1p(-alpha.unsqueeze(1) * approach.unsqueeze(2)).sum(1)
    best = torch.nan_to_num(value, nan=torch.inf).argmin(-1, keepdim=True)
    return torch.where(decrement <= QUADRATIC, torch.ones_like(decrement), alpha.gather(1, best).squeeze(1))


def sharpen(point: PathPoint, *, mu: float, last_t: Tensor) -> PathPoint:
    """T grows by the factor mu where the point is centred and t is below `last_t` `(B,)`, the first sharp enough."""
    grows = (point.decrement <= CENTRED) & (point.t < last_t)
    t = torch.where(grows, mu * point.t, point.t)
    return replace(point, t=t, decrement=torch.where(grows, torch.inf, point.decrement))


def is_at_end(point: PathPoint, before: PathPoint, last_t: Tensor) -> Tensor:
    """Problems whose last step, from `before`, ended the path, `(B,)`."""
    is_rounding = (point.decrement <= CENTRED) & (point.decrement >= FLOOR * before.decrement)
    return (point.t >= last_t) & ((point.decrement <= EXACT) | is_rounding)


def is_stuck(point: PathPoint, start: PathPoint) -> Tensor:
    """Problems whose step failed or whose variables grow without limit, `(B,)`."""
    return ~(inf_norm(point.z) <= FARTHEST * (1 + inf_norm(start.z))) | ~torch.isfinite(point.decrement)


def multipliers(data: Data, point: PathPoint) -> Tensor:
    """[ν; λ] `(B, p + m)`, λ ≥ 0; a row that is zero constrains nothing, and has none."""
    lam = torch.where((data.G != 0).any(-1), point.lam.clamp(min=0), 0.0)
    return torch.cat([point.nu, lam], dim=1)
