"""The Newton system of problems with entropy, for `entropic`: two eliminations of the scaled equations.

The Newton matrix is that of the rows, C R²Cᵀ + D(0, s/λ), where Q is absent and the rows are no more than the
variables, and I + RQR + R GᵀD(λ/s)G R with a Schur complement for A elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from argrad_service.engine.data import Data, matvec, matvec_t
from argrad_service.engine.entropy import curvature, tau_of

REGULARISATION = 1e-13
"""Added to the unit-scaled diagonal of the rows' matrix: equalities may be dependent."""


@dataclass(kw_only=True)
class Iterate:
    """w = log z `(B, n)`, y = [ν; λ] `(B, p + m)`, s `(B, m)`; τ of the problem that it is on its way to `(B,)`."""

    w: Tensor
    y: Tensor
    s: Tensor
    tau: Tensor

    def select(self, index: Tensor) -> Iterate:
        """The sub-batch of the problems named by index."""
        return Iterate(w=self.w[index], y=self.y[index], s=self.s[index], tau=self.tau[index])


class EntropicSystem:
    """The Newton matrix at a point, factored; w = log z `(B, n)`."""

    def __init__(self, data: Data, z: Tensor, now: Iterate) -> None:
        self._data, self._p = data, data.p
        self._lam, self._s = now.y[:, data.p :], now.s
        self._root = (z / tau_of(data)).sqrt()
        self._C = data.C * self._root.unsqueeze(1)
        slack = self._s / self._lam
        self._by_rows = data.is_linear and data.d.shape[1] <= data.n
        if self._by_rows:
            S = self._C @ self._C.mT
            S.diagonal(dim1=1, dim2=2)[:, data.p :] += slack
            self._lower_S = _factor(S)
            return
        A, G = self._C[:, : data.p], self._C[:, data.p :]
        H = G.mT @ (G / slack.unsqueeze(-1))
        if not data.is_linear:
            H = H + self._root.unsqueeze(2) * data.Q * self._root.unsqueeze(1)
        H.diagonal(dim1=1, dim2=2).add_(1.0)
        self._lower, _ = torch.linalg.cholesky_ex(H)
        self._W = torch.linalg.solve_triangular(self._lower, A.mT, upper=False)
        self._lower_S = _factor(self._W.mT @ self._W)

    def direction(self, slope: Tensor, away: Tensor, complementarity: Tensor) -> Iterate:
        """Step that brings the linearised residuals to zero, with λ∘Δs + s∘Δλ = −complementarity."""
        data, p = self._data, self._p
        r1 = -self._root * slope
        r2 = torch.cat([-away[:, :p], complementarity / self._lam - away[:, p:]], dim=1)
        u, y = self._solve(r1, r2)
        e1, e2 = self._residual(r1, r2, u, y)
        du, dy = self._solve(e1, e2)
        u, y = u + du, y + dy
        dz = self._root * u
        dw = -(slope + curvature(data, dz) + matvec_t(data.C, y)) / tau_of(data)
        return Iterate(w=dw, y=y, tau=data.q.new_zeros(0), s=-(complementarity + self._s * y[:, p:]) / self._lam)

    def _solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        if self._by_rows:
            right = (self._C @ r1.unsqueeze(-1)).squeeze(-1) - r2
            y = torch.cholesky_solve(right.unsqueeze(-1), self._lower_S).squeeze(-1)
            return r1 - matvec_t(self._C, y), y
        p = self._p
        G = self._C[:, p:]
        weight = self._lam / self._s
        right = (r1 + matvec_t(G, weight * r2[:, p:])).unsqueeze(-1)
        half = torch.linalg.solve_triangular(self._lower, right, upper=False)
        nu = torch.cholesky_solve(self._W.mT @ half - r2[:, :p].unsqueeze(-1), self._lower_S)
        u = torch.linalg.solve_triangular(self._lower.mT, half - self._W @ nu, upper=True).squeeze(-1)
        lam = weight * (matvec(G, u) - r2[:, p:])
        return u, torch.cat([nu.squeeze(-1), lam], dim=1)

    def _residual(self, r1: Tensor, r2: Tensor, u: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        data, p = self._data, self._p
        Hu = u if data.is_linear else u + self._root * matvec(data.Q, self._root * u)
        rows = matvec(self._C, u)
        slack = self._s / self._lam * y[:, p:]
        return r1 - Hu - matvec_t(self._C, y), r2 - torch.cat([rows[:, :p], rows[:, p:] - slack], dim=1)


def _factor(S: Tensor) -> Tensor:
    """Cholesky factor of S `(B, k, k)`, its diagonal raised a little."""
    diagonal = S.diagonal(dim1=1, dim2=2)
    raised = diagonal * REGULARISATION + torch.finfo(S.dtype).tiny
    lower: Tensor = torch.linalg.cholesky_ex(S + torch.diag_embed(raised))[0]
    return lower
