"""Inverses of ADMM's matrix H = Q + D(σ) + CᵀPC, one for each kind of data.

`Hessians` holds what does not depend on the penalties P = ρD(weights) and makes an inverse for given ρ:

- dense: the explicit inverse, from one Cholesky factor; made anew where ρ changes;
- dense and shared by a batch of more than one: one eigendecomposition serves every ρ,
  H(ρ) = L(I + (ρ − 1)ΘL)Lᵀ in the eigenbasis of L⁻¹SL⁻ᵀ, with S = CᵀD(weights)C and H(1) = LLᵀ;
- a diagonal plus a few rows: Woodbury's formula (Sherman–Morrison for one row).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from argrad_service.engine.data import take
from argrad_service.engine.operators import Dense
from argrad_service.engine.semidefinite import cholesky_or_none
from argrad_service.engine.structure import Structure

SINGULAR = 1e-11
"""H is singular if one of its pivots is below this fraction of its diagonal."""

PROXIMAL = 1e-6
"""σ, relative to the diagonal of H, where H is singular; ADMM's fixed points do not depend on it."""


class Inverse(Protocol):
    """H⁻¹ of each problem."""

    def apply(self, v: Tensor) -> Tensor:
        """H⁻¹ v, `(B, c, n)`."""
        ...

    def select(self, index: Tensor) -> Self:
        """The inverses of the problems named by index."""
        ...


class Hessians(Protocol):
    """What H is made of, and its inverse for given penalties."""

    @property
    def sigma(self) -> Tensor:
        """Proximal weights σ, `(1 or B, n)`; 0 where H is definite."""
        ...

    @property
    def diagonal(self) -> Tensor:
        """Diagonal of H at ρ = 1, `(1 or B, n)`."""
        ...

    def inverse(self, rho: Tensor) -> Inverse:
        """H⁻¹ for ρ `(B, 1)`."""
        ...

    def select(self, index: Tensor) -> Self:
        """Those of the problems named by index."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Explicit:
    """H⁻¹ itself, `(1 or B, n, n)`, symmetric."""

    matrix: Tensor

    def apply(self, v: Tensor) -> Tensor:
        """One matrix product."""
        return Dense(matrix=self.matrix).times(v)

    def select(self, index: Tensor) -> Explicit:
        """The inverses of the problems named by index."""
        return Explicit(matrix=take(self.matrix, index))


@dataclass(frozen=True, kw_only=True, eq=False)
class Factored:
    """H = LLᵀ, L `(1 or B, n, n)`: two triangular solves instead of an explicit inverse, for few applications."""

    lower: Tensor

    def apply(self, v: Tensor) -> Tensor:
        """Two triangular solves."""
        if self.lower.shape[0] == 1:
            return torch.cholesky_solve(v.flatten(0, 1).mT, self.lower[0]).mT.reshape(v.shape)
        return torch.cholesky_solve(v.mT, self.lower).mT

    def select(self, index: Tensor) -> Factored:
        """The factors of the problems named by index."""
        return Factored(lower=take(self.lower, index))


@dataclass(frozen=True, kw_only=True, eq=False)
class Spectral:
    """H⁻¹ = T D(values) Tᵀ with T shared by the batch.

    Args:
        basis: T, `(1, n, n)`.
        values: `(B, n)`.
    """

    basis: Tensor
    values: Tensor

    def apply(self, v: Tensor) -> Tensor:
        """Two matrix products."""
        return ((v @ self.basis[0]) * self.values.unsqueeze(1)) @ self.basis[0].mT

    def select(self, index: Tensor) -> Spectral:
        """The inverses of the problems named by index."""
        return replace(self, values=self.values[index])


@dataclass(frozen=True, kw_only=True, eq=False)
class Woodbury:
    """(D(a) + EᵀD(e)E)⁻¹ = D(1/a) − FᵀS⁻¹F,  F = D(√e)E D(1/a),  S = I + D(√e)E D(1/a) EᵀD(√e).

    Args:
        a: `(1 or B, n)`.
        F: `(1 or B, k, n)`.
        S: Cholesky factors of S, `(1 or B, k, k)`.
    """

    a: Tensor
    F: Tensor
    S: Tensor

    def apply(self, v: Tensor) -> Tensor:
        """O(n k)."""
        rows = Dense(matrix=self.F)
        return v / self.a.unsqueeze(1) - rows.transposed(Factored(lower=self.S).apply(rows.times(v)))

    def select(self, index: Tensor) -> Woodbury:
        """The inverses of the problems named by index."""
        return Woodbury(a=take(self.a, index), F=take(self.F, index), S=take(self.S, index))


def woodbury(a: Tensor, E: Tensor, e: Tensor) -> Woodbury:
    """The inverse of D(a) + EᵀD(e)E for a > 0 `(1 or B, n)`, E `(1 or B, k, n)`, e ≥ 0 `(1 or B, k)`."""
    scaled = e.sqrt().unsqueeze(-1) * E
    F = scaled / a.unsqueeze(1)
    eye = torch.eye(E.shape[1], dtype=E.dtype, device=E.device)
    return Woodbury(a=a, F=F, S=torch.linalg.cholesky_ex(eye + F @ scaled.mT)[0])


@dataclass(frozen=True, kw_only=True, eq=False)
class DenseHessians:
    """H(ρ) = base + ρ S.

    Args:
        base: Q + D(σ), `(1 or B, n, n)`.
        gram: S = CᵀD(weights)C, `(1 or B, n, n)`.
        sigma: `(1 or B, n)`.
    """

    base: Tensor
    gram: Tensor
    sigma: Tensor

    @property
    def diagonal(self) -> Tensor:
        """Diagonal of H at ρ = 1."""
        return (self.base + self.gram).diagonal(dim1=1, dim2=2)

    def inverse(self, rho: Tensor) -> Explicit:
        """One Cholesky factor a problem, and its inverse."""
        return Explicit(matrix=torch.cholesky_inverse(self.factor(rho).lower))

    def factor(self, rho: Tensor) -> Factored:
        """One Cholesky factor a problem: what a few applications are cheaper by, where n is large."""
        return Factored(lower=torch.linalg.cholesky_ex(self.base + rho.unsqueeze(-1) * self.gram)[0])

    def select(self, index: Tensor) -> DenseHessians:
        """Those of the problems named by index."""
        return DenseHessians(base=take(self.base, index), gram=take(self.gram, index), sigma=take(self.sigma, index))


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedHessians:
    """H(ρ) = (L U) (I + (ρ − 1)Θ) (L U)ᵀ for every ρ.

    Args:
        basis: T = L⁻ᵀU, `(1, n, n)`.
        theta: Θ, eigenvalues of L⁻¹SL⁻ᵀ in [0, 1], `(n,)`.
        sigma: `(1, n)`.
        diagonal: Of H at ρ = 1, `(1, n)`.
    """

    basis: Tensor
    theta: Tensor
    sigma: Tensor
    diagonal: Tensor

    def inverse(self, rho: Tensor) -> Spectral:
        """No factorisation: only the eigenvalues depend on ρ."""
        return Spectral(basis=self.basis, values=1 / ((1 - self.theta) + rho * self.theta))

    def select(self, index: Tensor) -> SharedHessians:  # noqa: ARG002 - every problem's are the same
        """Those of the problems named by index: the same."""
        return self


@dataclass(frozen=True, kw_only=True, eq=False)
class StructuredHessians:
    """D(a₀ + ρ a₁) + ρ EᵀD(e)E.

    Args:
        constant: a₀, the diagonal of Q, `(1 or B, n)`.
        slope: a₁, from the rows of one entry, `(1 or B, n)`.
        rows: E, `(1 or B, k, n)`.
        weights: e, `(1 or B, k)`.
    """

    constant: Tensor
    slope: Tensor
    rows: Tensor
    weights: Tensor

    @property
    def sigma(self) -> Tensor:
        """Zero: Q is definite."""
        return torch.zeros_like(self.constant)

    @property
    def diagonal(self) -> Tensor:
        """Diagonal of H at ρ = 1."""
        return self.constant + self.slope + (self.weights.unsqueeze(-1) * self.rows.square()).sum(1)

    def inverse(self, rho: Tensor) -> Woodbury:
        """O(n k²)."""
        return woodbury(self.constant + rho * self.slope, self.rows, rho * self.weights)

    def select(self, index: Tensor) -> StructuredHessians:
        """Those of the problems named by index."""
        parts = (take(t, index) for t in (self.constant, self.slope, self.rows, self.weights))
        constant, slope, rows, weights = parts
        return StructuredHessians(constant=constant, slope=slope, rows=rows, weights=weights)


def dense_hessians(Q: Tensor, C: Tensor, weights: Tensor, *, batch: int) -> DenseHessians | SharedHessians:
    """What H is made of for dense data.

    Args:
        Q: `(1 or B, n, n)`.
        C: `(1 or B, r, n)`.
        weights: `(1 or B, r)`, penalties at ρ = 1.
        batch: B.
    """
    gram = C.mT @ (weights.unsqueeze(-1) * C)
    H = Q + gram
    lower, is_definite = cholesky_or_none(H, SINGULAR)
    diagonal = H.diagonal(dim1=1, dim2=2)
    size = torch.where(diagonal > 0, diagonal, diagonal.amax(-1, keepdim=True))
    size = torch.where(size > 0, size, torch.ones_like(size))
    sigma = torch.where(is_definite.unsqueeze(-1), 0.0, PROXIMAL * size)
    if H.shape[0] > 1 or batch == 1:
        return DenseHessians(base=Q + torch.diag_embed(sigma), gram=gram, sigma=sigma)
    if not bool(is_definite.all()):
        lower, _ = torch.linalg.cholesky_ex(H + torch.diag_embed(sigma))
    half = torch.linalg.solve_triangular(lower, gram, upper=False)
    inner = torch.linalg.solve_triangular(lower, half.mT, upper=False)
    theta, vectors = torch.linalg.eigh(0.5 * (inner + inner.mT)[0])
    basis = torch.linalg.solve_triangular(lower.mT, vectors.unsqueeze(0), upper=True)
    return SharedHessians(basis=basis, theta=theta.clamp(0, 1), sigma=sigma, diagonal=diagonal + sigma)


def structured_hessians(structure: Structure, weights: Tensor) -> StructuredHessians:
    """The same for data with structure; nothing of size n × n is formed."""
    C = structure.C
    scaled = weights * C.entry.square()
    column = C.column.expand_as(scaled)
    slope = scaled.new_zeros(scaled.shape[0], C.rows.shape[-1]).scatter_add(-1, column, scaled)
    dense = weights.index_select(-1, C.where)
    return StructuredHessians(constant=structure.Q.diagonal, slope=slope, rows=C.rows, weights=dense)
