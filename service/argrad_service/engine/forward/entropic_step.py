r"""ADMM's x-update with a separable entropy: Newton's method in log x.

    minimise φ(x) = ½xᵀHx − rᵀx + τ Σ xᵢ log xᵢ,    F = Hx − r + τ(1 + log x) = 0

With R = D(√(x/τ)) the Newton step is dx = R u, (I + RHR)u = −RF, and it moves w = log x by −(F + H dx)/τ: no entry of
x can leave x > 0, however small. dx is a direction of descent of φ along e^w, so halving it always helps in the end.

Reference: Sun et al., Alternating Differentiation for Optimization Layers, ICLR 2023, appendix B, eqs. (5aj), (5av).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from argrad_service.engine.data import dot, inf_norm, matvec, take
from argrad_service.engine.entropy import LARGEST_LOG, SMALLEST_LOG

NEWTON_STEPS = 30
"""Newton steps of one update at most; from the last iterate it takes one to three."""

HALVINGS = 30
"""Halvings of a step at most."""

DESCENT = 1e-4
"""Part of the predicted descent that a step must bring."""

CONVERGED = 1e-11
"""Step of log x, relative to its size, at which the update is exact."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditioned:
    """(H + τD(1/x))⁻¹ = R (I + RHR)⁻¹ R.

    Args:
        root: R, `(B, n)`.
        lower: Cholesky factors of I + RHR, `(B, n, n)`.
    """

    root: Tensor
    lower: Tensor

    def apply(self, v: Tensor) -> Tensor:
        """The inverse times v, `(B, c, n)`."""
        root = self.root.unsqueeze(1)
        return root * torch.cholesky_solve((root * v).mT, self.lower).mT

    def select(self, index: Tensor) -> Conditioned:
        """Those of the problems named by index."""
        return Conditioned(root=self.root[index], lower=self.lower[index])


@dataclass(frozen=True, kw_only=True, eq=False)
class EntropicStep:
    """The x-update for given penalties.

    Args:
        H: Q + CᵀPC, `(1 or B, n, n)`.
        tau: `(B, 1)`.
    """

    H: Tensor
    tau: Tensor

    def at(self, x: Tensor) -> Conditioned:
        """The inverse of φ's Hessian at x `(B, n)`."""
        root = (x / self.tau).sqrt()
        scaled = root.unsqueeze(2) * self.H * root.unsqueeze(1)
        scaled.diagonal(dim1=1, dim2=2).add_(1.0)
        return Conditioned(root=root, lower=torch.linalg.cholesky_ex(scaled)[0])

    def apply(self, v: Tensor) -> Tensor:
        """There is no inverse but at a point."""
        raise NotImplementedError

    def minimise(self, right: Tensor, x: Tensor) -> Tensor:
        """The minimiser for r = right `(B, n)`, from x > 0."""
        w = x.clamp(min=torch.finfo(x.dtype).tiny).log().clamp(min=SMALLEST_LOG)
        for _ in range(NEWTON_STEPS):
            x = w.exp()
            slope = matvec(self.H, x) - right + self.tau * (1 + w)
            dx = -self.at(x).apply(slope.unsqueeze(1)).squeeze(1)
            dw = -(slope + matvec(self.H, dx)) / self.tau
            dw = torch.where((w <= SMALLEST_LOG) & (dw < 0), 0.0, dw)
            is_near = inf_norm(dw) <= CONVERGED * (1 + inf_norm(w))
            w = torch.where(is_near.unsqueeze(-1), w, self._descend(w, dw, right, dot(slope, dx)))
            if bool((is_near | ~torch.isfinite(inf_norm(dw))).all()):
                break
        return torch.where(w > SMALLEST_LOG, w.exp(), 0.0)

    def select(self, index: Tensor) -> EntropicStep:
        """Those of the problems named by index."""
        return EntropicStep(H=take(self.H, index), tau=self.tau[index])

    def _descend(self, w: Tensor, dw: Tensor, right: Tensor, slope: Tensor) -> Tensor:
        """W + αdw, α = 1, ½, ¼, … the first that brings φ down enough; where none does, rounding is all there is."""
        before, alpha = self._value(w, right), torch.ones_like(slope)
        noise = 1e-14 * (1 + before.abs())
        for _ in range(HALVINGS):
            moved = (w + alpha.unsqueeze(-1) * dw).clamp(SMALLEST_LOG, LARGEST_LOG)
            falls = self._value(moved, right) <= before + DESCENT * alpha * slope + noise
            if bool(falls.all()):
                break
            alpha = torch.where(falls, alpha, 0.5 * alpha)
        return moved

    def _value(self, w: Tensor, right: Tensor) -> Tensor:
        x = w.exp()
        value = dot(x, 0.5 * matvec(self.H, x) - right + self.tau * w)
        return value.nan_to_num(nan=torch.inf)


@dataclass(frozen=True, kw_only=True, eq=False)
class EntropicHessians:
    """H(ρ) = Q + ρ S without the entropy's part.

    Args:
        Q: `(1 or B, n, n)`.
        gram: S = CᵀD(weights)C, `(1 or B, n, n)`.
        tau: `(B, 1)`.
    """

    Q: Tensor
    gram: Tensor
    tau: Tensor

    @property
    def sigma(self) -> Tensor:
        """Zero: the entropy makes the objective strictly convex."""
        return self.tau.new_zeros(1, self.Q.shape[-1])

    @property
    def diagonal(self) -> Tensor:
        """Diagonal of H at ρ = 1 and x = 1."""
        return (self.Q + self.gram).diagonal(dim1=1, dim2=2) + self.tau

    def inverse(self, rho: Tensor) -> EntropicStep:
        """The update at ρ `(B, 1)`."""
        return EntropicStep(H=self.Q + rho.unsqueeze(-1) * self.gram, tau=self.tau)

    def select(self, index: Tensor) -> EntropicHessians:
        """Those of the problems named by index."""
        return EntropicHessians(Q=take(self.Q, index), gram=take(self.gram, index), tau=self.tau[index])
