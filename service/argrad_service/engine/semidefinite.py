"""Factor a batch of positive semidefinite matrices; the rank-deficient ones get a pseudoinverse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SUSPECT_PIVOT = 1e-10
"""A matrix with a pivot below this fraction of its diagonal may be singular: rounding can hide a zero pivot so far."""

RANK_TOLERANCE = 1e-14
"""An eigenvalue below this fraction of the largest, times the size, is zero (diagonal scaled to one)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SemidefiniteFactor:
    """S = LLᵀ, or where some matrix of the batch is singular a factor P of a generalised inverse, S⁺ = PᵀP.

    S⁺ is the pseudoinverse of S scaled to a unit diagonal: it solves every consistent system, and the scale of the
    rows plays no part in what counts as singular.

    Args:
        lower: `(B, k, k)` Cholesky factors; None if `half` is there.
        half: `(B, k, k)` factors P of the pseudoinverses; None if `lower` is there.
        is_deficient: `(B,)`, which matrices are singular.
    """

    lower: Tensor | None
    half: Tensor | None
    is_deficient: Tensor

    def solve(self, rhs: Tensor) -> Tensor:
        """S⁺ r for right-hand sides `(B, k, j)`."""
        if self.lower is not None:
            return torch.cholesky_solve(rhs, self.lower)
        if self.half is None:
            raise RuntimeError("a factor has either `lower` or `half`")
        return self.half.transpose(-1, -2) @ (self.half @ rhs)

    def cut(self, start: int, stop: int) -> SemidefiniteFactor:
        """Copies of the factors from start to stop."""
        lower, half = (None if t is None else t[start:stop].clone() for t in (self.lower, self.half))
        return SemidefiniteFactor(lower=lower, half=half, is_deficient=self.is_deficient[start:stop].clone())

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.untyped_storage().nbytes() for t in (self.lower, self.half) if t is not None)


def cholesky_or_none(matrices: Tensor, least_pivot: float = SUSPECT_PIVOT) -> tuple[Tensor, Tensor]:
    """Cholesky factors, and which matrices have one that can be trusted.

    Args:
        matrices: `(B, k, k)`, symmetric.
        least_pivot: Fraction of its diagonal above which every pivot must be.

    Returns:
        Factors `(B, k, k)`, with the identity in place of those that failed, and `(B,)` which succeeded.
    """
    lower, info = torch.linalg.cholesky_ex(matrices)
    diagonal = lower.diagonal(dim1=-2, dim2=-1)
    if diagonal.shape[-1] == 0:
        return lower, info == 0
    # A pivot is the square of what is left of a row after those above it: compared with the row's own diagonal, the
    # test does not depend on how rows are scaled. NaN compares false.
    is_good = (info == 0) & (diagonal.square() > least_pivot * matrices.diagonal(dim1=-2, dim2=-1)).all(-1)
    if not bool(is_good.all()):
        eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        lower = torch.where(is_good[:, None, None], lower, eye)
    return lower, is_good


def factor_semidefinite(matrices: Tensor) -> SemidefiniteFactor:
    """Factor S `(B, k, k)`, by Cholesky where it is clearly definite and by its eigenvalues elsewhere.

    Synchronises with the device once, to see whether any matrix is singular.
    """
    lower, is_good = cholesky_or_none(matrices)
    if bool(is_good.all()):
        return SemidefiniteFactor(lower=lower, half=None, is_deficient=~is_good)
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    half = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    bad = torch.nonzero(~is_good).squeeze(-1)
    singular = torch.nan_to_num(matrices[bad])
    diagonal = singular.diagonal(dim1=-2, dim2=-1)
    unit = torch.where(diagonal > 0, diagonal.clamp(min=0).rsqrt(), torch.ones_like(diagonal))
    values, vectors = torch.linalg.eigh(unit.unsqueeze(-1) * singular * unit.unsqueeze(-2))
    largest = values.amax(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    keep = values > RANK_TOLERANCE * values.shape[-1] * largest
    inverse_root = torch.where(keep, values.clamp(min=0).rsqrt(), torch.zeros_like(values))
    half[bad] = inverse_root.unsqueeze(-1) * vectors.transpose(-1, -2) * unit.unsqueeze(-2)
    is_deficient = torch.zeros_like(is_good)
    is_deficient[bad] = ~keep.all(-1)
    return SemidefiniteFactor(lower=None, half=half, is_deficient=is_deficient)
