"""Two eliminations of the Newton equations of a QP: the dual form, and the normal equations in z.

DualSystem: Q = LLᵀ definite. With V = L⁻¹[Aᵀ Gᵀ] (columns scaled to unit length), T = VᵀV, c = d + Vᵀ(L⁻¹q):

    equalities   c_e + T_ee ν + T_ei λ = 0         (eliminated once: R = T_ii − T_ie T_ee⁺ T_ei)
    inequalities s = c_i + T_ii λ + T_ie ν ≥ 0,    λ ≥ 0,   λᵀs = 0;       z = −L⁻ᵀ(L⁻¹q + V[ν; λ])

an m × m complementarity problem whose Newton matrix is R + D(s/λ): nothing of size n is touched in an iteration.

PrimalSystem: any convex Q. [Q + GᵀD(λ/s)G, Aᵀ; A, 0] by Cholesky of H = Q + GᵀD(λ/s)G + ρAᵀA + δI and of the Schur
complement A H⁻¹Aᵀ, refined once against the system without ρ and δ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from argrad_service.engine.data import Data, dot, inf_norm, matvec, matvec_t, take
from argrad_service.engine.forward.mehrotra import LARGEST_MULTIPLIER, Iterate
from argrad_service.engine.semidefinite import SUSPECT_PIVOT, factor_semidefinite

CERTIFICATE = 1e-9
"""λᵀRλ below this times (cᵀλ)² with cᵀλ < 0 looks like a Farkas certificate."""

REGULARISATION = 1e-10
"""δ of the normal equations, times the largest diagonal entry of H."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DualForm:
    """The dual form of strictly convex QPs, rows scaled by `scale` to unit length in the metric of Q⁻¹.

    Args:
        lower: `(1 or B, n, n)`, Q = LLᵀ.
        V: `(1 or B, n, p + m)`.
        gram: `(1 or B, p + m, p + m)`, T = VᵀV.
        scale: `(1 or B, p + m)`.
        c: `(B, p + m)`.
        half_q: `(B, n)`, L⁻¹q.
        p: Number of equalities.
    """

    lower: Tensor
    V: Tensor
    gram: Tensor
    scale: Tensor
    c: Tensor
    half_q: Tensor
    p: int

    def select(self, index: Tensor) -> DualForm:
        """The sub-batch of the problems named by index."""
        return DualForm(
            lower=take(self.lower, index),
            V=take(self.V, index),
            gram=take(self.gram, index),
            scale=take(self.scale, index),
            c=self.c[index],
            half_q=self.half_q[index],
            p=self.p,
        )

    def primal(self, y: Tensor) -> Tensor:
        """Z of the scaled multipliers y `(B, p + m)`."""
        half = (self.half_q + matvec(self.V, y)).unsqueeze(-1)
        z: Tensor = -torch.linalg.solve_triangular(self.lower.transpose(1, 2), half, upper=True).squeeze(-1)
        return z


def dual_form(data: Data, lower: Tensor) -> DualForm:
    """Write strictly convex problems in dual form; `lower` is the Cholesky factor of Q, `(1 or B, n, n)`."""
    V = torch.linalg.solve_triangular(lower, data.C.transpose(1, 2), upper=False)
    norms = torch.linalg.vector_norm(V, dim=1)
    scale = torch.where(norms > 0, 1 / norms, torch.ones_like(norms))
    V = V * scale.unsqueeze(1)
    half_q = torch.linalg.solve_triangular(lower, data.q.unsqueeze(-1), upper=False).squeeze(-1)
    c = scale * data.d + matvec_t(V, half_q)
    return DualForm(lower=lower, V=V, gram=V.transpose(1, 2) @ V, scale=scale, c=c, half_q=half_q, p=data.p)


class DualSystem:
    """Newton system of the complementarity problem s = c + Rλ, scaled so that ‖c‖∞ = 1 and diag(R) = 1."""

    def __init__(self, form: DualForm) -> None:
        p, T = form.p, form.gram
        if p:
            equalities = factor_semidefinite(T[:, :p, :p])
            coupling = equalities.solve(T[:, :p, p:])
            R = T[:, p:, p:] - T[:, p:, :p] @ coupling
            c = form.c[:, p:] - matvec_t(coupling, form.c[:, :p])
            self._nu_constant = matvec(equalities.solve(torch.eye(p, dtype=T.dtype, device=T.device)), form.c[:, :p])
            self._nu_slope = coupling
        else:
            R, c = T, form.c
            self._nu_constant = form.c.new_zeros(form.c.shape[0], 0)
            self._nu_slope = T.new_zeros(1, 0, T.shape[1])
        diagonal = R.diagonal(dim1=1, dim2=2)
        # A row that lies in the span of the equalities has nothing left: it is kept as it is.
        self._row = torch.where(diagonal > SUSPECT_PIVOT, diagonal.clamp(min=0).rsqrt(), torch.ones_like(diagonal))
        self._R = self._row.unsqueeze(2) * R * self._row.unsqueeze(1) if p else R
        c = self._row * c
        size = inf_norm(c)
        self._size = torch.where(size > 0, size, torch.ones_like(size))
        self._c = c / self._size.unsqueeze(-1)

    def start(self) -> Iterate:
        """Mehrotra's starting point: the solution with unit weights, moved into the interior."""
        R = self._R.clone()
        R.diagonal(dim1=1, dim2=2).add_(1.0)
        lower, _ = torch.linalg.cholesky_ex(R)
        lam = -torch.cholesky_solve(self._c.unsqueeze(-1), lower).squeeze(-1)
        lam, s = interior(lam), interior(-lam)
        return Iterate(free=self._c.new_zeros(len(lam), 0), lam=lam, s=s)

    def multipliers(self, point: Iterate) -> Tensor:
        """Scaled multipliers [ν; λ] of the dual form, `(B, p + m)`."""
        lam = point.lam * self._row * self._size.unsqueeze(-1)
        return torch.cat([-(self._nu_constant + matvec(self._nu_slope, lam)), lam], dim=1)

    def residual(self, point: Iterate) -> Tensor:
        """‖c + Rλ − s‖∞, relative to the largest term."""
        self._curvature = matvec(self._R, point.lam)
        self._rest = self._c + self._curvature - point.s
        return inf_norm(self._rest) / (1 + torch.maximum(inf_norm(self._curvature), inf_norm(point.s)))

    def factor(self, point: Iterate) -> None:
        """Cholesky factor of R + D(s/λ)."""
        matrix = self._R.expand(len(point.lam), -1, -1).clone()
        matrix.diagonal(dim1=1, dim2=2).add_(point.s / point.lam)
        self._lower, _ = torch.linalg.cholesky_ex(matrix)

    def direction(self, point: Iterate, complementarity: Tensor) -> Iterate:
        """(R + D(s/λ))Δλ = −r − complementarity/λ,  Δs = r + RΔλ."""
        right = -(self._rest + complementarity / point.lam).unsqueeze(-1)
        step = torch.cholesky_solve(right, self._lower).squeeze(-1)
        return Iterate(free=point.free, lam=step, s=-(complementarity + point.s * step) / point.lam)

    def has_no_solution(self, point: Iterate) -> Tensor:
        """λ with cᵀλ < 0 and hardly any curvature is nearly a Farkas certificate."""
        drop, curvature = dot(self._c, point.lam), dot(point.lam, self._curvature)
        is_certificate = (drop < 0) & (curvature <= CERTIFICATE * drop.square()) & (inf_norm(point.lam) > 1e4)
        return is_certificate | ~(inf_norm(point.lam) < LARGEST_MULTIPLIER)

    def select(self, index: Tensor) -> DualSystem:
        """The system of a sub-batch."""
        part = object.__new__(DualSystem)
        for name in ("_nu_constant", "_nu_slope", "_row", "_R", "_size", "_c"):
            value = getattr(self, name)
            setattr(part, name, take(value, index))
        return part


class PrimalSystem:
    """Newton system in z and ν, for any convex Q; the data should be scaled (see `scaling`)."""

    def __init__(self, data: Data) -> None:
        self.data = data
        A = data.A
        self._AtA = A.transpose(1, 2) @ A if data.p else None

    def start(self) -> Iterate:
        """Mehrotra's starting point: the solution with unit weights, moved into the interior."""
        data = self.data
        self._weights = data.q.new_ones(data.B, data.m)
        self._factor_weights()
        dz, dnu = self._reduced(-data.q + matvec_t(data.G, data.h), data.b)
        gap = matvec(data.G, dz) - data.h
        return Iterate(free=torch.cat([dz, dnu], dim=1), lam=interior(gap), s=interior(-gap))

    def multipliers(self, point: Iterate) -> Tensor:
        """Multipliers [ν; λ], `(B, p + m)`."""
        return torch.cat([point.free[:, self.data.n :], point.lam], dim=1)

    def residual(self, point: Iterate) -> Tensor:
        """Largest of the stationarity and feasibility residuals, each relative to its largest term."""
        data = self.data
        z, nu = point.free[:, : data.n], point.free[:, data.n :]
        Qz, Aty, Gty = matvec(data.Q, z), matvec_t(data.A, nu), matvec_t(data.G, point.lam)
        Gz = matvec(data.G, z)
        self._dual = Qz + data.q + Aty + Gty
        self._equality = matvec(data.A, z) - data.b
        self._inequality = Gz + point.s - data.h
        self._objective_slope = dot(data.b, nu) + dot(data.h, point.lam)
        self._combination = inf_norm(Aty + Gty)
        dual_scale = 1 + torch.maximum(torch.maximum(inf_norm(Qz), inf_norm(data.q)), inf_norm(Gty))
        primal_scale = 1 + torch.maximum(inf_norm(data.d), inf_norm(Gz))
        primal = torch.maximum(inf_norm(self._equality), inf_norm(self._inequality))
        return torch.maximum(inf_norm(self._dual) / dual_scale, primal / primal_scale)

    def factor(self, point: Iterate) -> None:
        """Factor H and its Schur complement at the weights λ/s."""
        self._weights = point.lam / point.s
        self._factor_weights()

    def _factor_weights(self) -> None:
        data = self.data
        H = data.Q + data.G.transpose(1, 2) @ (self._weights.unsqueeze(-1) * data.G)
        largest = H.diagonal(dim1=1, dim2=2).amax(-1, keepdim=True).clamp(min=1e-8)
        if self._AtA is not None:
            self._rho = data.Q.diagonal(dim1=1, dim2=2).amax(-1, keepdim=True).clamp(min=1.0)
            H = H + self._rho.unsqueeze(-1) * self._AtA
        H.diagonal(dim1=1, dim2=2).add_(REGULARISATION * largest)
        self._lower, _ = torch.linalg.cholesky_ex(H)
        if data.p:
            self._W = torch.linalg.solve_triangular(self._lower, data.A.transpose(1, 2), upper=False)
            self._schur = factor_semidefinite(self._W.transpose(1, 2) @ self._W)

    def _reduced_once(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        data = self.data
        if not data.p:
            return torch.cholesky_solve(r1.unsqueeze(-1), self._lower).squeeze(-1), r2
        right = (r1 + self._rho * matvec_t(data.A, r2)).unsqueeze(-1)
        u = torch.linalg.solve_triangular(self._lower, right, upper=False)
        y = self._schur.solve(self._W.transpose(1, 2) @ u - r2.unsqueeze(-1))
        x = torch.linalg.solve_triangular(self._lower.transpose(1, 2), u - self._W @ y, upper=True)
        return x.squeeze(-1), y.squeeze(-1)

    def _reduced(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        """[Q + GᵀWG, Aᵀ; A, 0][x; y] = [r1; r2], refined once."""
        data = self.data
        x, y = self._reduced_once(r1, r2)
        Hx = matvec(data.Q, x) + matvec_t(data.G, self._weights * matvec(data.G, x))
        dx, dy = self._reduced_once(r1 - Hx - matvec_t(data.A, y), r2 - matvec(data.A, x))
        return x + dx, y + dy

    def direction(self, point: Iterate, complementarity: Tensor) -> Iterate:
        """Δz and Δν from the reduced system; Δs = −r_i − GΔz, Δλ from the complementarity."""
        data = self.data
        push = (complementarity - point.lam * self._inequality) / point.s
        dz, dnu = self._reduced(-self._dual + matvec_t(data.G, push), -self._equality)
        ds = -self._inequality - matvec(data.G, dz)
        dlam = -(complementarity + point.lam * ds) / point.s
        return Iterate(free=torch.cat([dz, dnu], dim=1), lam=dlam, s=ds)

    def has_no_solution(self, point: Iterate) -> Tensor:
        """Multipliers that combine the rows to nothing while bᵀν + hᵀλ < 0; or numbers without bound."""
        drop = self._objective_slope
        is_certificate = (drop < 0) & (self._combination <= CERTIFICATE * drop.abs()) & (inf_norm(point.lam) > 1e4)
        size = torch.maximum(inf_norm(point.free), inf_norm(point.lam))
        return is_certificate | ~(size < LARGEST_MULTIPLIER)

    def select(self, index: Tensor) -> PrimalSystem:
        """The system of a sub-batch."""
        part = object.__new__(PrimalSystem)
        part.data = self.data.select(index)
        part._AtA = None if self._AtA is None else take(self._AtA, index)
        return part


def interior(vector: Tensor) -> Tensor:
    """Shift each problem's vector until it is positive, as Mehrotra does; unchanged where it is clearly positive."""
    if vector.shape[-1] == 0:
        return vector
    least = vector.amin(-1, keepdim=True)
    shift = torch.where(least > 1e-3, torch.zeros_like(least), 1 - least)
    return vector + shift
