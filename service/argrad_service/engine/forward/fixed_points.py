r"""Maps whose fixed point is a solution, linearised there: what fixed-point folding solves its linear system with.

A map w⁺ = U(w, θ) with the solution x, y = X(w, θ), Y(w, θ) at its fixed point has, for a cotangent g of (x, y),

    v = Φᵀv + (∂X, ∂Y/∂w)ᵀg,    Φ = ∂U/∂w        then    ∂ℓ/∂θ = Ψᵀv + (∂X, ∂Y/∂θ)ᵀg,    Ψ = ∂U/∂θ

and with θ = q, d the adjoint is d_z = ∂ℓ/∂q, d_y = −∂ℓ/∂d. Vectors are `(B, c, ·)`: c cotangents a problem.

Reference: Kotary, Dinh & Fioretto, Backpropagation of Unrolled Solvers with Folded Optimization, IJCAI 2023, theorem 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from argrad_service.engine.active_set import Rows
from argrad_service.engine.data import Data, take
from argrad_service.engine.forward.entropic_step import EntropicStep
from argrad_service.engine.inverses import Factored, Inverse, woodbury
from argrad_service.engine.operators import Dense, LinearMap
from argrad_service.engine.outcome import Forward
from argrad_service.engine.semidefinite import SemidefiniteFactor, factor_semidefinite
from argrad_service.engine.structured_finish import StructuredFactor

PENALTY = 1e4
"""Penalty of an active row, relative to what makes its part of the dual's Hessian one."""

ROUNDINGS = 8
"""Bound on the rounding of a scalar product, in units of ε times the lengths of its vectors."""

POWER_ITERATIONS = 30
"""Products with Q that estimate its largest eigenvalue."""

MARGIN = 1.2
"""Factor on that estimate, which is from below; steps up to twice as long as its inverse converge."""


class FixedPointMap(Protocol):
    """A map of a batch, linearised at its fixed points."""

    def start(self, g_z: Tensor, g_y: Tensor) -> Tensor:
        """(∂X, ∂Y/∂w)ᵀ(g_z, g_y), from `(B, c, n)` and `(B, c, p + m)` to `(B, c, ·)`."""
        ...

    def vjp(self, v: Tensor) -> Tensor:
        """Φᵀv."""
        ...

    def pull(self, v: Tensor, g_z: Tensor, g_y: Tensor) -> tuple[Tensor, Tensor]:
        """d_z `(B, c, n)` and d_y `(B, c, p + m)` of the fixed point v."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class AdmmMap:
    r"""ADMM's map in w (`splitting`, α = 1, σ = 0), at a fixed point with the active rows a.

        ∂x⁺ = H⁻¹[−∂q + CᵀP(∂d − Σ∂w)],    ∂w⁺ = C∂x⁺ − ∂d + D∂w,    ∂y = PD∂w

    with D one on active rows and zero elsewhere, Σ = 2D − I, and H = Q + CᵀPC. With d_z(v) = −H⁻¹(g_z + Cᵀv) its
    adjoint recursion reads

        v⁺ = Dv + ΣPC d_z(v) + DP g_y        d_y = v + PC d_z(v), which is zero where D is.

    Weakly active rows count as not active: a one-sided derivative.

    Args:
        C: The rows of the map.
        inverse: H⁻¹.
        penalties: P, `(1 or B, k)`.
        active: D, `(B, k)`.
        rows: The rows' places among all, where they are the active ones alone; None where they are all.
        size: p + m.
    """

    C: LinearMap
    inverse: Inverse
    penalties: Tensor
    active: Tensor
    rows: Rows | None
    size: int

    def start(self, g_z: Tensor, g_y: Tensor) -> Tensor:
        """−ΣPC H⁻¹g_z + DP g_y."""
        D, P = self.active.unsqueeze(1), self.penalties.unsqueeze(1)
        return D * P * self._gather(g_y) - (2 * D - 1) * P * self.C.times(self.inverse.apply(g_z))

    def vjp(self, v: Tensor) -> Tensor:
        """Dv − ΣPC H⁻¹Cᵀv."""
        D, P = self.active.unsqueeze(1), self.penalties.unsqueeze(1)
        return D * v - (2 * D - 1) * P * self.C.times(self.inverse.apply(self.C.transposed(v)))

    def primal(self, v: Tensor, g_z: Tensor) -> Tensor:
        """d_z(v)."""
        return -self.inverse.apply(g_z + self.C.transposed(v))

    def next(self, v: Tensor, d_z: Tensor, g_y: Tensor) -> Tensor:
        """v⁺, from v and d_z(v)."""
        D, P = self.active.unsqueeze(1), self.penalties.unsqueeze(1)
        return D * v + (2 * D - 1) * P * self.C.times(d_z) + D * P * self._gather(g_y)

    def rounding(self) -> Tensor:
        """What v moves by for ever, relative to ‖d_z‖: the rounding of PC d_z, `(1 or B, 1)`.

        Where Q is nearly singular d_z is large, and nothing but this is left of PC d_z, which is zero in the limit.
        """
        size = torch.linalg.vector_norm(self.penalties * self.C.lengths(), dim=-1, keepdim=True)
        of_sums: Tensor = ROUNDINGS * torch.finfo(size.dtype).eps * size
        return of_sums

    def pull(self, v: Tensor, g_z: Tensor, g_y: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - the protocol's signature
        """d_z(v) and D(v + PC d_z)."""
        d_z = self.primal(v, g_z)
        d_y = self.active.unsqueeze(1) * (v + self.penalties.unsqueeze(1) * self.C.times(d_z))
        if self.rows is None:
            return d_z, d_y
        return d_z, self.rows.scatter(d_y.transpose(0, 1), self.size).transpose(0, 1)

    def select(self, index: Tensor) -> AdmmMap:
        """The maps of the problems named by index."""
        rows = self.rows
        return replace(
            self,
            C=self.C.select(index),
            inverse=self.inverse.select(index),
            penalties=take(self.penalties, index),
            active=self.active[index],
            rows=None if rows is None else Rows(index=rows.index[index], valid=rows.valid[index]),
        )

    def _gather(self, g_y: Tensor) -> Tensor:
        return g_y if self.rows is None else self.rows.gather(g_y.transpose(0, 1)).transpose(0, 1)


def admm_map(forward: Forward, *, rho: float | None) -> AdmmMap:
    """ADMM's map at the solutions of a batch.

    Args:
        forward: With the strongly active rows.
        rho: The penalty of every row. None for a penalty for each: large on active rows, and so small on the others
            that they drop out (the fixed point is the same for all penalties; ADMM converges the faster the better
            they agree with the active set, which is known by now).
    """
    data, factor = forward.data, forward.factor.factor
    rows = factor.rows
    mask = rows.scatter(rows.valid.to(data.q), data.d.shape[1])
    size = data.d.shape[1]
    if isinstance(factor, StructuredFactor):
        structure = factor.structure
        C, q = structure.C, structure.Q.diagonal
        weight = structure.dual_diagonal()
        penalties = mask * PENALTY * torch.where(weight > 0, 1 / weight, torch.zeros_like(weight))
        penalties = penalties if rho is None else torch.full_like(data.d[:1], rho)
        weighted = penalties * C.entry.square()
        diagonal = q + torch.zeros(len(weighted), data.n).to(q).scatter_add(-1, C.column.expand_as(weighted), weighted)
        inverse: Inverse = woodbury(diagonal, C.rows, penalties.index_select(-1, C.where))
        return AdmmMap(C=C, inverse=inverse, penalties=penalties, active=mask, rows=None, size=size)
    if rho is not None:
        penalties = torch.full_like(data.d[:1], rho)
        inverse = _inverse(forward, data.Q + rho * data.C.mT @ data.C)
        return AdmmMap(C=Dense(matrix=data.C), inverse=inverse, penalties=penalties, active=mask, rows=None, size=size)
    matrix = _active_rows(data, rows)
    weight = (matrix.square() * _flexibility(forward).unsqueeze(1)).sum(-1)
    penalties = PENALTY * torch.where(weight > 0, 1 / weight, torch.zeros_like(weight))
    inverse = _inverse(forward, data.Q + matrix.mT @ (penalties.unsqueeze(-1) * matrix))
    active = rows.valid.to(data.q)
    return AdmmMap(C=Dense(matrix=matrix), inverse=inverse, penalties=penalties, active=active, rows=rows, size=size)


def _flexibility(forward: Forward) -> Tensor:
    """One over the diagonal of the objective's Hessian, `(1 or B, n)`; something of that size where it is zero."""
    data = forward.data
    diagonal = data.Q.diagonal(dim1=1, dim2=2)
    if data.tau is not None:
        z = forward.solution.z.clamp(min=0)
        return z / (diagonal * z + data.tau.unsqueeze(-1))
    largest = diagonal.amax(-1, keepdim=True)
    return 1 / torch.where(diagonal > 0, diagonal, torch.where(largest > 0, largest, torch.ones_like(largest)))


def _inverse(forward: Forward, H: Tensor) -> Inverse:
    """H⁻¹, with entropy (H + τD(1/z))⁻¹."""
    tau = forward.data.tau
    if tau is None:
        return Factored(lower=_factor(H))
    return EntropicStep(H=H, tau=tau.unsqueeze(-1)).at(forward.solution.z.clamp(min=0))


def _active_rows(data: Data, rows: Rows) -> Tensor:
    """The active rows themselves, zero on padding, `(B, k, n)`."""
    index = rows.index.unsqueeze(-1).expand(-1, -1, data.n)
    return data.C.expand(data.B, -1, -1).gather(1, index) * rows.valid.unsqueeze(-1)


def _factor(H: Tensor) -> Tensor:
    """Cholesky factors; NaN where H is singular, which it is only where the solution is not unique."""
    lower, info = torch.linalg.cholesky_ex(H)
    return torch.where((info == 0)[:, None, None], lower, torch.nan)


@dataclass(frozen=True, kw_only=True, eq=False)
class PgdMap:
    r"""Projected gradient, U(x) = P_C(x − α(Qx + q)), at a fixed point with the active rows a.

    The projection is a QP with the identity for Q: its adjoint of (v, γ) is

        [ I    C_aᵀ ] [e]      [v]
        [ C_a   0   ] [δ] = −  [γ]         Φᵀv = −(I − αQ) e(v, 0),   start = g_z − (I − αQ) e(0, g_y/α)

    for its multipliers are α times the QP's; and d_z = α e(v, g_y/α), d_y = δ(v, g_y/α).

    Args:
        Q: As a map.
        C: Active rows of unit length, zero on padding, `(B, k, n)`.
        scale: What they were multiplied by, `(B, k)`.
        gram: Factor of C_aC_aᵀ; the identity on padding.
        rows: Their places among all.
        alpha: Step length, `(B, 1, 1)`.
        size: p + m.
    """

    Q: LinearMap
    C: Tensor
    scale: Tensor
    gram: SemidefiniteFactor
    rows: Rows
    alpha: Tensor
    size: int

    def start(self, g_z: Tensor, g_y: Tensor) -> Tensor:
        """G_z − (I − αQ) e(0, g_y/α)."""
        e, _ = self._project(torch.zeros_like(g_z), g_y / self.alpha)
        return g_z - self._through(e)

    def vjp(self, v: Tensor) -> Tensor:
        """−(I − αQ) e(v, 0)."""
        e, _ = self._project(v, None)
        return -self._through(e)

    def pull(self, v: Tensor, g_z: Tensor, g_y: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - the protocol's signature
        """αe and δ."""
        e, delta = self._project(v, g_y / self.alpha)
        delta = delta * self.scale.unsqueeze(1)
        return self.alpha * e, self.rows.scatter(delta.transpose(0, 1), self.size).transpose(0, 1)

    def _through(self, e: Tensor) -> Tensor:
        return e - self.alpha * self.Q.times(e)

    def _project(self, v: Tensor, gamma: Tensor | None) -> tuple[Tensor, Tensor]:
        right = -(v @ self.C.mT)
        if gamma is not None:
            right = right + self.rows.gather(gamma.transpose(0, 1)).transpose(0, 1) * self.scale.unsqueeze(1)
        delta = self.gram.solve(right.mT).mT
        return -v - delta @ self.C, delta


def pgd_map(forward: Forward) -> PgdMap:
    """Projected gradient's map at the solutions of a batch, its step 1 / (1.2 λ_max(Q))."""
    data, rows = forward.data, forward.factor.factor.rows
    matrix = _active_rows(data, rows)
    length = torch.linalg.vector_norm(matrix, dim=2)
    scale = torch.where(length > 0, 1 / length, torch.ones_like(length))
    C = matrix * scale.unsqueeze(-1)
    gram = C @ C.mT + torch.diag_embed((length == 0).to(C))
    v = _anything(data.q).unsqueeze(1)
    Q = Dense(matrix=data.Q)
    largest = torch.zeros_like(v[..., :1])
    for _ in range(POWER_ITERATIONS):
        v = Q.times(v)
        largest = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        v = v / torch.where(largest > 0, largest, torch.ones_like(largest))
    alpha = torch.where(largest > 0, 1 / (MARGIN * largest), torch.ones_like(largest))
    factor = factor_semidefinite(gram)
    return PgdMap(Q=Q, C=C, scale=scale, gram=factor, rows=rows, alpha=alpha, size=data.d.shape[1])


def spectral_radius(of: FixedPointMap, like: Tensor, iterations: int) -> Tensor:
    """ρ(Φ) of each problem, `(B,)`: mean growth over the second half of a power iteration.

    A mean, because the dominant eigenvalues may be a complex pair, under which the growth of single steps oscillates.

    Args:
        of: The map.
        like: A state `(B, c, ·)`.
        iterations: Products with Φᵀ, at least 2.
    """
    v = _anything(like[:, 0]).unsqueeze(1)
    growth, half = v.new_zeros(len(v)), iterations // 2
    for k in range(iterations):
        v = of.vjp(v)
        length = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        v = v / torch.where(length > 0, length, torch.ones_like(length))
        if k >= half:
            growth = growth + length.flatten(0).log()
    return (growth / (iterations - half)).exp()


def _anything(like: Tensor) -> Tensor:
    """A unit vector without structure, the same in every run and for every problem, `(B, ·)`."""
    steps = torch.arange(1, like.shape[-1] + 1, dtype=like.dtype, device=like.device)
    v = torch.sin(steps.square() * 0.7390851332151607) + 0.1
    unit: Tensor = v / torch.linalg.vector_norm(v).clamp(min=torch.finfo(v.dtype).tiny)
    return unit.expand(like.shape)
