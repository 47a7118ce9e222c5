"""The KKT system of a QP on a given active set, factored once for forward, backward and tangent solves.

    [ Q    C_aᵀ ] [x]   [r₁]        C_a: the equalities and the active inequalities
    [ C_a   0   ] [y] = [r₂]

With H = Q + ρ C_aᵀC_a = LLᵀ (ρ = 0 where Q itself is definite: the solution does not depend on ρ once r₁ gains
ρ C_aᵀr₂), W = L⁻¹C_aᵀ and S = WᵀW:

    u = L⁻¹(r₁ + ρ C_aᵀr₂),   y = S⁻¹(Wᵀu − r₂),   x = L⁻ᵀ(u − Wy).

Active sets of a batch differ in size: rows are gathered to the largest and padded with zero rows, whose S is the
identity. Dependent rows make S singular: its pseudoinverse takes the minimum norm across those rows only. H singular
means that the primal solution is not unique.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from argrad_service.engine.data import Data, cut
from argrad_service.engine.semidefinite import SemidefiniteFactor, cholesky_or_none, factor_semidefinite

PROXIMAL = 1e-8
"""Added to the unit-scaled diagonal of an H that is singular; refinement removes its effect on the residual."""

ROUNDING = 2e-14
"""Residual, relative to the right-hand side, below which one refinement was enough."""

UNIQUE = 1e-12
"""H is singular, and the primal solution not unique, if one of its pivots is below this fraction of its diagonal."""

REFINEMENTS = 3
"""Steps of iterative refinement at most; a step that does not lower a problem's residual is not taken."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """The active rows of each problem, gathered and padded to a common number k.

    Args:
        index: `(B, k)`, positions among the p + m rows; the p equalities come first.
        valid: `(B, k)`, False on padding.
    """

    index: Tensor
    valid: Tensor

    def gather(self, vector: Tensor) -> Tensor:
        """Entries of a `(…, B, p + m)` vector on the active rows, 0 on padding."""
        index = self.index.expand(*vector.shape[:-1], -1)
        return torch.where(self.valid, vector.gather(-1, index), vector.new_zeros(()))

    def scatter(self, values: Tensor, size: int) -> Tensor:
        """The inverse of `gather`: `(…, B, k)` to `(…, B, size)`, 0 on rows that are not active."""
        full = values.new_zeros(*values.shape[:-1], size)
        masked = torch.where(self.valid, values, values.new_zeros(()))
        return full.scatter_add(-1, self.index.expand_as(masked), masked)

    def cut(self, start: int, stop: int) -> Rows:
        """Copies of the rows of the problems from start to stop."""
        return Rows(index=self.index[start:stop].clone(), valid=self.valid[start:stop].clone())


def gather_active(active: Tensor) -> Rows:
    """Positions of the True entries of `(B, r)`, padded to the largest count; synchronises once."""
    width = int(active.sum(-1).amax()) if active.numel() else 0
    order = torch.argsort((~active).to(torch.uint8), dim=-1, stable=True)[:, :width]
    return Rows(index=order, valid=active.gather(-1, order))


def padded_gram(gram: Tensor, rows: Rows, batch: Tensor | None = None) -> Tensor:
    """S `(B, k, k)` from the Gram matrix of all rows `(B, r, r)`: the active block, identity on padding.

    Args:
        gram: Inner products of all rows.
        rows: Active rows of the problems taken.
        batch: Which problems of `gram` are taken; None for all.
    """
    if batch is None:
        batch = torch.arange(rows.index.shape[0], device=gram.device)
    if gram.shape[0] == 1:
        batch = torch.zeros_like(batch)
    block = gram[batch[:, None, None], rows.index[:, :, None], rows.index[:, None, :]]
    return _pad(block, rows.valid)


def _pad(block: Tensor, valid: Tensor) -> Tensor:
    both = valid.unsqueeze(-1) & valid.unsqueeze(-2)
    return torch.where(both, block, block.new_zeros(())) + torch.diag_embed((~valid).to(block.dtype))


@dataclass(frozen=True, kw_only=True, eq=False)
class ActiveSetFactor:
    """Factor of the KKT system on an active set.

    Args:
        data: The problems.
        rows: Their active rows.
        lower: `(1 or B, n, n)`, H = LLᵀ; None where Q is the identity, and H with it.
        rho: `(B,)`, weight ρ of C_aᵀC_a in H.
        scale: `(B, k)`, factor by which each active row is scaled.
        C: `(B, k, n)`, active rows, scaled.
        W: `(B, n, k)`, L⁻¹Cᵀ.
        S: Factor of WᵀW.
        is_nonunique: `(B,)`, where H was singular and is regularised.
    """

    data: Data
    rows: Rows
    lower: Tensor | None
    rho: Tensor
    scale: Tensor
    C: Tensor
    W: Tensor
    S: SemidefiniteFactor
    is_nonunique: Tensor

    @property
    def is_dependent(self) -> Tensor:
        """`(B,)`, whether active rows are linearly dependent."""
        return self.S.is_deficient

    @property
    def nbytes(self) -> int:
        """Bytes held beyond the problem's own data."""
        return self.S.nbytes + sum(t.untyped_storage().nbytes() for t in (self.lower, self.C, self.W) if t is not None)

    def cut(self, start: int, stop: int) -> ActiveSetFactor:
        """Copies of what belongs to the problems from start to stop, of more than one."""
        return ActiveSetFactor(
            data=self.data.cut(start, stop),
            rows=self.rows.cut(start, stop),
            lower=None if self.lower is None else cut(self.lower, start, stop),
            rho=cut(self.rho, start, stop),
            scale=cut(self.scale, start, stop),
            C=cut(self.C, start, stop),
            W=cut(self.W, start, stop),
            S=self.S.cut(start, stop),
            is_nonunique=cut(self.is_nonunique, start, stop),
        )

    def solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Solve the KKT system, with iterative refinement against the problem's own Q and rows.

        Args:
            r1: `(B, n, j)` for j right-hand sides.
            r2: `(B, k, j)` on the active rows, 0 on padding.

        Returns:
            x `(B, n, j)`, y `(B, k, j)`, and the residual of each problem relative to its right-hand sides `(B,)`.
        """
        r2 = r2 * self.scale.unsqueeze(-1)
        x, y = self._solve_once(r1, r2)
        size = torch.maximum(_largest(r1), _largest(r2))
        size = torch.where(size > 0, size, torch.ones_like(size))
        e1, e2 = self._residual(r1, r2, x, y)
        error = torch.maximum(_largest(e1), _largest(e2))
        for _ in range(REFINEMENTS):
            dx, dy = self._solve_once(e1, e2)
            new_x, new_y = x + dx, y + dy
            f1, f2 = self._residual(r1, r2, new_x, new_y)
            new_error = torch.maximum(_largest(f1), _largest(f2))
            is_better = (new_error < error)[:, None, None]
            x, y = torch.where(is_better, new_x, x), torch.where(is_better, new_y, y)
            e1, e2 = torch.where(is_better, f1, e1), torch.where(is_better, f2, e2)
            halved = new_error < 0.5 * error
            error = torch.minimum(error, torch.nan_to_num(new_error, nan=torch.inf))
            if not bool((halved & (error > ROUNDING * size)).any()):
                break
        if self.data.is_linear:
            # A unique vertex does not move unless its rows do: x is zero exactly, not up to rounding.
            stays = (r2 == 0).all(1, keepdim=True) & ~self.is_nonunique[:, None, None]
            x = torch.where(stays, 0.0, x)
        return x, y * self.scale.unsqueeze(-1), error / size

    def _solve_once(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        if self.lower is None:
            y = self.S.solve(self.C @ r1 - r2)
            return r1 - self.W @ y, y
        right = r1 + self.rho[:, None, None] * (self.C.transpose(1, 2) @ r2)
        u = torch.linalg.solve_triangular(self.lower, right, upper=False)
        y = self.S.solve(self.W.transpose(1, 2) @ u - r2)
        x = torch.linalg.solve_triangular(self.lower.transpose(1, 2), u - self.W @ y, upper=True)
        return x, y

    def _residual(self, r1: Tensor, r2: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        Qx = x if self.lower is None else self.data.Q @ x
        return r1 - (Qx + self.C.transpose(1, 2) @ y), r2 - self.C @ x


def _largest(block: Tensor) -> Tensor:
    """Largest absolute entry of `(B, r, j)`, `(B,)`; NaN stays NaN."""
    return block.abs().flatten(1).amax(-1) if block.shape[1] else block.new_zeros(block.shape[0])


def factor_active_set(
    data: Data,
    active: Tensor,
    *,
    lower: Tensor | None = None,
    columns: Tensor | None = None,
    is_identity: bool = False,
) -> ActiveSetFactor:
    """Factor the KKT system of the rows marked in `active`.

    Args:
        data: The problems.
        active: `(B, p + m)`, True on the rows that hold with equality; equalities always.
        lower: Cholesky factor of a definite Q, if the caller has it.
        columns: `(B, n)`, factors by which the columns of the rows are scaled, or None; those of Q are already.
        is_identity: Whether Q is the identity; `data.Q` is not looked at then.
    """
    rows = gather_active(active)
    every = torch.arange(data.B, device=active.device)
    source = torch.zeros_like(every) if data.C.shape[0] == 1 else every
    C = data.C[source[:, None], rows.index] * rows.valid.unsqueeze(-1)
    if columns is not None:
        C = C * columns.unsqueeze(1)
    norms = torch.linalg.vector_norm(C, dim=2)
    scale = torch.where(norms > 0, 1 / norms, torch.ones_like(norms))
    C = C * scale.unsqueeze(2)
    rho = data.q.new_zeros(data.B)
    is_nonunique = torch.zeros(data.B, dtype=torch.bool, device=active.device)
    if is_identity:
        S = factor_semidefinite(_pad(C @ C.transpose(1, 2), rows.valid))
        return ActiveSetFactor(
            data=data, rows=rows, lower=None, rho=rho, scale=scale, C=C, W=C.mT, S=S, is_nonunique=is_nonunique
        )
    if lower is None:
        lower, rho, is_nonunique = _factor_hessian(data.Q, C)
    W = torch.linalg.solve_triangular(lower, C.transpose(1, 2), upper=False)
    S = factor_semidefinite(_pad(W.transpose(1, 2) @ W, rows.valid))
    return ActiveSetFactor(
        data=data, rows=rows, lower=lower, rho=rho, scale=scale, C=C, W=W, S=S, is_nonunique=is_nonunique
    )


def _factor_hessian(Q: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L of H, ρ, and where H stays singular and is regularised.

    Args:
        Q: `(1 or B, n, n)`.
        C: `(B, k, n)`, active rows of unit length, zero on padding.
    """
    batch = C.shape[0]
    lower, is_good = cholesky_or_none(Q)
    rho = C.new_zeros(batch)
    is_nonunique = torch.zeros_like(rho, dtype=torch.bool)
    if bool(is_good.all()):
        return lower, rho, is_nonunique
    diagonal = Q.diagonal(dim1=1, dim2=2).amax(-1)
    weight = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal))
    rho = torch.where(is_good, torch.zeros_like(weight), weight).expand(batch)
    H = Q + rho[:, None, None] * (C.transpose(1, 2) @ C)
    lower, is_good = cholesky_or_none(H, UNIQUE)
    if bool(is_good.all()):
        return lower, rho, is_nonunique
    diagonal = H.diagonal(dim1=1, dim2=2)
    proximal = PROXIMAL * torch.where(is_good, 0.0, diagonal.amax(-1).clamp(min=torch.finfo(H.dtype).tiny))
    lower, is_definite = cholesky_or_none(H + torch.diag_embed(proximal.unsqueeze(-1).expand_as(diagonal)))
    return lower, rho, ~is_good | ~is_definite
