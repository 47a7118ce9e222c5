r"""ADMM's map for a QP with slack, in one vector a row.

    minimise ½xᵀQx + qᵀx  subject to  Cx + s = d,  s = 0 on equalities, s ≥ 0 on inequalities;  penalties P = D(ρ_i)

    x⁺ = argmin L(x, s, y)      H x⁺ = σ∘x − q + CᵀP(d − s − P⁻¹y),     H = Q + D(σ) + CᵀPC
    v  = αCx⁺ + (1 − α)(d − s)                                           over-relaxation, α = 1: v = Cx⁺
    s⁺ = relu(d − v − P⁻¹y)     y⁺ = y + P(v + s⁺ − d)

On an inequality s and y are never both positive: w = y/ρ − s holds both, y = ρw₊ and s = w₋, and the three lines are

    H x⁺ = σ∘x − q + CᵀP(d − |w|),     w⁺ = α(Cx⁺ − d) + w₊ − (1 − α)w₋

with w in place of |w| and of w₊, and w₋ = 0, on equalities.

Reference: Sun et al., Alternating Differentiation for Optimization Layers, ICLR 2023, eqs. (5a)–(5d); there one penalty
ρ for all rows, α = 1 and σ = 0. Over-relaxation and σ as in OSQP (Stellato et al., 2020).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from argrad_service.engine.data import Data, dot, entropy_slope, inf_norm
from argrad_service.engine.forward.entropic_step import EntropicHessians, EntropicStep
from argrad_service.engine.forward.scaling import ruiz
from argrad_service.engine.inverses import Hessians, Inverse, dense_hessians, structured_hessians
from argrad_service.engine.operators import Dense, LinearMap
from argrad_service.engine.semidefinite import cholesky_or_none
from argrad_service.engine.structure import Structure

EQUALITY = 10.0
"""Penalty of an equality beside that of an inequality: its sign is never in question."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Splitting:
    """The data of a batch as ADMM uses them.

    Args:
        Q: As a map.
        C: As a map.
        q: `(B, n)`.
        d: `(B, r)`.
        is_equality: `(1, r)`.
        weights: `(1 or B, r)`, P = D(ρ · unit · weights).
        unit: `(B, 1)`; that it stands apart keeps what is shared by the batch shared.
        hessians: What H is made of.
        tau: `(B,)`, of the entropy; None without. H is that of x = ∞ then, and the x-update Newton's method.
    """

    Q: LinearMap
    C: LinearMap
    q: Tensor
    d: Tensor
    is_equality: Tensor
    weights: Tensor
    unit: Tensor
    hessians: Hessians
    tau: Tensor | None = None

    def select(self, index: Tensor) -> Splitting:
        """The sub-batch of the problems named by index."""
        weights = self.weights if self.weights.shape[0] == 1 else self.weights[index]
        return replace(
            self,
            Q=self.Q.select(index),
            C=self.C.select(index),
            q=self.q[index],
            d=self.d[index],
            weights=weights,
            unit=self.unit[index],
            hessians=self.hessians.select(index),
            tau=None if self.tau is None else self.tau[index],
        )

    def times(self, x: Tensor) -> Tensor:
        """C x, `(B, r)`."""
        return self.C.times(x.unsqueeze(1)).squeeze(1)

    def transposed(self, v: Tensor) -> Tensor:
        """Cᵀ v, `(B, n)`."""
        return self.C.transposed(v.unsqueeze(1)).squeeze(1)

    def split(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """w₊ and w₋ (not below zero), `(B, r)`: multipliers over ρ_i, and slacks."""
        plus = torch.where(self.is_equality, w, w.clamp(min=0))
        return plus, plus - w

    def primal(self, x: Tensor, w: Tensor, inverse: Inverse, penalties: Tensor) -> Tensor:
        """x⁺, `(B, n)`."""
        plus, minus = self.split(w)
        right = self.hessians.sigma * x - self.q + self.transposed(penalties * (self.d - plus - minus))
        if isinstance(inverse, EntropicStep):
            return inverse.minimise(right, x)
        return inverse.apply(right.unsqueeze(1)).squeeze(1)

    def dual(self, x: Tensor, w: Tensor, relaxation: float) -> Tensor:
        """w⁺ of x⁺, `(B, r)`."""
        plus, minus = self.split(w)
        return relaxation * (self.times(x) - self.d) + plus - (1 - relaxation) * minus


@dataclass(frozen=True, kw_only=True, eq=False)
class Judgement:
    """How far a point of ADMM is from the KKT conditions, `(B,)` each.

    Args:
        scaled: As `data.residuals` has it, in the problem's own units.
        ratio: Primal residual over dual residual, each relative to its terms and in units of ADMM's own: what ρ is
            balanced by.
    """

    scaled: Tensor
    ratio: Tensor

    def select(self, index: Tensor) -> Judgement:
        """Those of the problems named by index."""
        return Judgement(scaled=self.scaled[index], ratio=self.ratio[index])


def judge(problem: Splitting, x: Tensor, w: Tensor, penalties: Tensor) -> Judgement:
    """Residuals of x `(B, n)` with the multipliers and slacks of w `(B, r)`."""
    plus, minus = problem.split(w)
    y = penalties * plus
    Qx, Cx, Cty = problem.Q.times(x.unsqueeze(1)).squeeze(1), problem.times(x), problem.transposed(y)
    excess = Cx - problem.d
    violation = torch.where(problem.is_equality, excess.abs(), excess.clamp(min=0))
    q = problem.q
    dual = Qx + q + Cty
    if problem.tau is not None:
        # An x that underflowed is right if it wants to be smaller still: see `data.residuals`.
        slope, is_small = entropy_slope(problem.tau, x)
        dual = torch.where(is_small, (dual + slope).clamp(max=0), dual + slope)
        q = torch.where(is_small, q, q + slope)
    xQx, qx, dy = dot(x, Qx), dot(q, x), dot(problem.d, y)

    def largest(*terms: Tensor) -> Tensor:
        return torch.stack([inf_norm(t) for t in terms]).amax(0)

    primal_error = inf_norm(violation) / (1 + largest(Cx, problem.d))
    dual_error = inf_norm(dual) / (1 + largest(Qx, q, Cty))
    gap_error = (xQx + qx + dy).abs() / (1 + torch.stack([xQx.abs(), qx.abs(), dy.abs()]).amax(0))
    scaled = torch.maximum(torch.maximum(primal_error, dual_error), gap_error).nan_to_num(nan=torch.inf)

    tiny = torch.finfo(x.dtype).tiny
    unit = problem.weights.sqrt()
    primal = inf_norm(unit * (excess + minus)) / largest(unit * Cx, unit * minus, unit * problem.d).clamp(min=tiny)
    column = problem.hessians.diagonal.clamp(min=tiny)
    if problem.tau is not None:
        # Where x is small stationarity is stiff, and its residual says little.
        column = column + problem.tau.unsqueeze(-1) / x.clamp(min=tiny)
    column = column.rsqrt()
    dual_part = inf_norm(column * dual) / largest(column * Qx, column * q, column * Cty).clamp(min=tiny)
    ratio = primal.clamp(min=1e-16) / dual_part.clamp(min=1e-16)
    return Judgement(scaled=scaled, ratio=ratio.nan_to_num(nan=1.0, posinf=1.0))


def split(data: Data, structure: Structure | None, *, rho: float | None = None) -> Splitting:
    """Prepare a batch: penalties, and what H is made of.

    The weights make ρ = 1 a good penalty whatever the units. Where Q is definite a row c has the weight 1/cᵀQ⁻¹c: the
    Hessian of the dual then has a unit diagonal, and scaling variables, rows or the objective changes nothing.
    Elsewhere they come from Ruiz' equilibration.

    Args:
        data: The problems.
        structure: Of their matrices, if they have some.
        rho: The penalty of every row, in the problem's own units; None for the weights above.
    """
    is_equality = (torch.arange(data.d.shape[1], device=data.d.device) < data.p).unsqueeze(0)
    unit = data.q.new_ones(data.B, 1)
    if rho is not None:
        weights = torch.full_like(data.d[:1], rho)
    else:
        weights, unit = _weights(data, structure)
        weights = torch.where(is_equality, EQUALITY * weights, weights)
    Q: LinearMap
    C: LinearMap
    hessians: Hessians
    if structure is None:
        Q, C = Dense(matrix=data.Q), Dense(matrix=data.C)
        if data.tau is None:
            hessians = dense_hessians(data.Q, data.C, weights, batch=data.B)
        else:
            gram = data.C.mT @ (weights.unsqueeze(-1) * data.C)
            hessians = EntropicHessians(Q=data.Q, gram=gram, tau=data.tau.unsqueeze(-1))
    else:
        Q, C, hessians = structure.Q, structure.C, structured_hessians(structure, weights)
    return Splitting(
        Q=Q,
        C=C,
        q=data.q,
        d=data.d,
        is_equality=is_equality,
        weights=weights,
        unit=unit,
        hessians=hessians,
        tau=data.tau,
    )


def _weights(data: Data, structure: Structure | None) -> tuple[Tensor, Tensor]:
    """Weights of the rows, `(1 or B, r)`, 1 on rows without an entry; and units, `(B, 1)`."""
    unit = data.q.new_ones(data.B, 1)
    if structure is not None:
        return _inverse(structure.dual_diagonal()), unit
    lower, is_definite = cholesky_or_none(data.Q)
    weights = _inverse(torch.linalg.solve_triangular(lower, data.C.mT, upper=False).square().sum(1))
    if bool(is_definite.all()):
        return weights, unit
    scaling = ruiz(data)
    weights = torch.where(is_definite.unsqueeze(-1), weights, scaling.rows.square())
    return weights, torch.where(is_definite.unsqueeze(-1), unit, 1 / scaling.cost)


def _inverse(size: Tensor) -> Tensor:
    return torch.where(size > 0, 1 / size, torch.ones_like(size))
