"""Three ways to solve the equality-constrained QP of a backward pass, each once factored for all cotangents.

    minimise ½xᵀPx − r₁ᵀx  subject to  Cx = r₂:      Px + Cᵀy = r₁,  Cx = r₂

C: the active rows of `Data`, here of unit length. Each is a `KKTSystem`: what `kkt` does with the forward's factor can
be done with any of them.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from argrad_service.engine.active_set import Rows
from argrad_service.engine.data import Data
from argrad_service.engine.point import KKTSystem

RANK = 1e-7
"""A singular value of the unit rows below this fraction of the largest is zero."""

REFINEMENTS = 2
"""Steps of iterative refinement; one that does not lower a problem's residual is not taken."""

ENOUGH = 1e-14
"""Relative residual at which an iteration ends, even if less is asked of it."""


class Backend(Protocol):
    """Solves the QP for right-hand sides `(B, n, j)` and `(B, k, j)`, unit rows; y is zero on padding."""

    is_singular: Tensor
    """`(B,)`, where P is not definite on the null space of C."""

    iterations: Tensor
    """`(B,)`, what the last call took."""

    def solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        """X `(B, n, j)` and y `(B, k, j)`."""
        ...


class EqualityQP:
    """The KKT system of the backward QP, by one of the backends.

    Args:
        system: KKT system of the forward outcome; its active rows and what is known of them are taken, not its factor.
        tolerance: Relative residual above which an answer counts as none.
    """

    backend: Backend
    """To be set before the first call."""

    def __init__(self, system: KKTSystem, tolerance: float) -> None:
        self._tolerance = tolerance
        self.residual: Tensor = system.data.q.new_zeros(system.data.B)
        self.data: Data = system.data
        width = int(system.rows.valid.sum(-1).amax()) if system.rows.valid.numel() else 0
        self.rows = Rows(index=system.rows.index[:, :width], valid=system.rows.valid[:, :width])
        self.is_dependent = system.is_dependent
        self._is_nonunique = system.is_nonunique
        every = torch.arange(self.data.B, device=self.data.q.device)
        source = torch.zeros_like(every) if self.data.C.shape[0] == 1 else every
        C = self.data.C[source[:, None], self.rows.index] * self.rows.valid.unsqueeze(-1)
        norms = torch.linalg.vector_norm(C, dim=2)
        self.scale = torch.where(norms > 0, 1 / norms, torch.ones_like(norms))
        self.C = C * self.scale.unsqueeze(-1)

    @property
    def is_nonunique(self) -> Tensor:
        """`(B,)`, whether the primal solution is not unique."""
        return self._is_nonunique | self.backend.is_singular

    @property
    def nbytes(self) -> int:
        """Bytes of the rows; the factor lives for one call."""
        return self.C.untyped_storage().nbytes()

    def solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Solve for right-hand sides `(B, n, j)` and `(B, k, j)`.

        The third result is the relative residual `(B,)`, +inf above the tolerance; `residual` is it as it is.
        """
        r2 = r2 * self.scale.unsqueeze(-1)
        x, y = self.backend.solve(r1, r2)
        size = torch.maximum(largest(r1), largest(r2))
        e1, e2 = residual(self.data.Q, self.C, x, y, r1, r2)
        self.residual = torch.maximum(largest(e1), largest(e2)) / torch.where(size > 0, size, torch.ones_like(size))
        error = torch.where(self.residual <= self._tolerance, self.residual, torch.inf)
        return x, y * self.scale.unsqueeze(-1), error


def residual(P: Tensor, C: Tensor, x: Tensor, y: Tensor, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
    """R₁ − Px − Cᵀy and r₂ − Cx."""
    return r1 - (P @ x + C.transpose(1, 2) @ y), r2 - C @ x


def largest(block: Tensor) -> Tensor:
    """Largest absolute entry of `(B, r, j)`, `(B,)`; NaN stays NaN."""
    return block.abs().flatten(1).amax(-1) if block.shape[1] else block.new_zeros(block.shape[0])


class Direct:
    """The null-space method: x = C⁺r₂ + Zw, where the columns of Z are an orthonormal basis of the null space of C.

        ZᵀPZ w = Zᵀ(r₁ − PC⁺r₂),    y = (C⁺)ᵀ(r₁ − Px)

    Z and C⁺ come from a QR factorisation of Cᵀ, of dependent rows from its singular values. At a vertex Z is empty.
    Problems with fewer null directions than others have columns of zeros in Z, and ones on the diagonal of ZᵀPZ.
    """

    def __init__(self, P: Tensor, C: Tensor, valid: Tensor, is_dependent: Tensor) -> None:
        self._P, self._C = P, C
        batch, k, n = C.shape
        V, rank = C.new_zeros(batch, n, n), valid.sum(-1)
        self._pinv = C.new_zeros(batch, n, k)
        for chosen, factor in ((~is_dependent, _by_qr), (is_dependent, _by_svd)):
            index = torch.nonzero(chosen).squeeze(-1)
            if len(index):
                V[index], self._pinv[index], rank[index] = factor(C[index], valid[index])
        first = int(rank.amin())
        is_null = torch.arange(first, n, device=C.device) >= rank.unsqueeze(-1)
        self._Z = V[:, :, first:] * is_null.unsqueeze(1)
        reduced = self._Z.transpose(1, 2) @ (P @ self._Z)
        reduced = 0.5 * (reduced + reduced.transpose(1, 2))
        reduced = reduced + torch.diag_embed((~is_null).to(C.dtype))
        self._lower, info = torch.linalg.cholesky_ex(reduced)
        self.is_singular: Tensor = info > 0
        eye = torch.eye(n - first, dtype=C.dtype, device=C.device)
        self._lower = torch.where(self.is_singular[:, None, None], eye, self._lower)
        self.iterations = torch.zeros(batch, dtype=torch.int64)

    def solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        """Two triangular solves, and as many for each step of refinement."""
        x, y = self._solve_once(r1, r2)
        e1, e2 = residual(self._P, self._C, x, y, r1, r2)
        error = torch.maximum(largest(e1), largest(e2))
        for _ in range(REFINEMENTS):
            dx, dy = self._solve_once(e1, e2)
            f1, f2 = residual(self._P, self._C, x + dx, y + dy, r1, r2)
            new_error = torch.maximum(largest(f1), largest(f2))
            is_better = (new_error < error)[:, None, None]
            x, y = torch.where(is_better, x + dx, x), torch.where(is_better, y + dy, y)
            e1, e2 = torch.where(is_better, f1, e1), torch.where(is_better, f2, e2)
            error = torch.minimum(error, torch.nan_to_num(new_error, nan=torch.inf))
        return x, y

    def _solve_once(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        x = self._pinv @ r2
        w = self._Z.transpose(1, 2) @ (r1 - self._P @ x)
        x = x + self._Z @ torch.cholesky_solve(w, self._lower)
        return x, self._pinv.transpose(1, 2) @ (r1 - self._P @ x)


def _by_qr(C: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal V `(b, n, n)`, whose first columns span the rows, C⁺ `(b, n, k)` and the rank `(b,)`."""
    rank = valid.sum(-1)
    k, width = C.shape[1], int(rank.amax())
    V, R = torch.linalg.qr(C[:, :width].transpose(1, 2), mode="complete")
    T = R[:, :width] + torch.diag_embed((~valid[:, :width]).to(C.dtype))
    # C⁺ = V T⁻ᵀ: its transpose solves T y = Vᵀ.
    pinv = torch.linalg.solve_triangular(T, V[:, :, :width].transpose(1, 2), upper=True).transpose(1, 2)
    pinv = pinv * valid[:, None, :width]
    return V, torch.nn.functional.pad(pinv, (0, k - width)), rank


def _by_svd(C: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same where rows depend on each other: the minimum norm across them."""
    U, sigma, Vt = torch.linalg.svd(C, full_matrices=True)
    small = sigma.shape[1]
    is_large = sigma > RANK * sigma.amax(-1, keepdim=True)
    inverse = torch.where(is_large, 1 / torch.where(is_large, sigma, torch.ones_like(sigma)), 0.0)
    pinv = (Vt[:, :small].transpose(1, 2) * inverse.unsqueeze(1)) @ U[:, :, :small].transpose(1, 2)
    return Vt.transpose(1, 2), pinv * valid.unsqueeze(1), is_large.sum(-1)


class Multipliers:
    """The method of multipliers: H = P + ρCᵀC factored once, then x ← H⁻¹(r₁ − Cᵀy + ρCᵀr₂), y ← y + ρ(Cx − r₂).

    After each step Px + Cᵀy = r₁ holds; what is left of Cx = r₂ shrinks the faster the larger ρ is, in units of P's
    largest diagonal entry.
    """

    def __init__(self, P: Tensor, C: Tensor, *, rho: float, tolerance: float, most: int) -> None:
        self._P, self._C, self._tolerance, self._most = P, C, max(tolerance, ENOUGH), most
        diagonal = P.diagonal(dim1=1, dim2=2).amax(-1)
        self._rho = (rho * torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)))[:, None, None]
        H = P + self._rho * (C.transpose(1, 2) @ C)
        self._lower, info = torch.linalg.cholesky_ex(H)
        self.is_singular: Tensor = info > 0
        eye = torch.eye(H.shape[-1], dtype=C.dtype, device=C.device)
        self._lower = torch.where(self.is_singular[:, None, None], eye, self._lower)
        self.iterations = torch.zeros(len(C), dtype=torch.int64, device=C.device)

    def solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        """Iterate until the residual is small or no longer falls; a problem that is done does not move."""
        C, Ct = self._C, self._C.transpose(1, 2)
        x, y = torch.zeros_like(r1), torch.zeros_like(r2)
        e1, e2 = r1, r2
        size = torch.maximum(largest(r1), largest(r2))
        error = torch.maximum(largest(e1), largest(e2))
        is_open = (error > self._tolerance * size) & ~self.is_singular
        self.iterations = torch.zeros_like(self.iterations)
        for _ in range(self._most):
            if not bool(is_open.any()):
                break
            # A step on the residual: the same iteration, without the cancellation.
            dx = torch.cholesky_solve(e1 + self._rho * (Ct @ e2), self._lower)
            dy = self._rho * (C @ dx - e2)
            moves = is_open[:, None, None]
            new_x, new_y = torch.where(moves, x + dx, x), torch.where(moves, y + dy, y)
            f1, f2 = residual(self._P, C, new_x, new_y, r1, r2)
            new_error = torch.maximum(largest(f1), largest(f2))
            is_better = (new_error < error)[:, None, None]
            x, y = torch.where(is_better, new_x, x), torch.where(is_better, new_y, y)
            e1, e2 = torch.where(is_better, f1, e1), torch.where(is_better, f2, e2)
            self.iterations += is_open
            is_open = is_open & (new_error < error) & (new_error > self._tolerance * size)
            error = torch.minimum(error, torch.nan_to_num(new_error, nan=torch.inf))
        return x, y
