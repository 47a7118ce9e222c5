"""Finding structure in dense data: a diagonal Q, and rows that are bounds but for a few.

That is sparsemax and everything like it (projections on a simplex, a capped simplex, a box with a budget). There the
matrices of ADMM and of the KKT system are a diagonal plus a few dense rows, with inverses in closed form: beyond the
data nothing is formed that is larger than n times the number of dense rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from argrad_service.engine.data import Data
from argrad_service.engine.operators import Diagonal, MostlyUnit

LEAST_VARIABLES = 64
"""Below this many variables the dense products cost no more."""

MOST_DENSE_ROWS = 16
"""With more dense rows the closed form loses its point."""

_CHUNK = 256
"""Rows looked at together, so that what looking costs is no second copy of the data."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Structure:
    """The matrices of a batch with structure.

    Args:
        Q: Positive everywhere.
        C: Rows of one entry, and the dense ones.
    """

    Q: Diagonal
    C: MostlyUnit

    def dual_diagonal(self) -> Tensor:
        """cᵀQ⁻¹c of each row, `(1 or B, r)`."""
        C, q = self.C, self.Q.diagonal
        batch = max(len(C.column), len(q))
        size = C.entry.square() / q.expand(batch, -1).gather(-1, C.column.expand(batch, -1))
        dense = (C.rows.square() / q.unsqueeze(1)).sum(-1)
        return size.index_copy(-1, C.where, dense.expand(batch, -1))

    def select(self, index: Tensor) -> Structure:
        """The structure of the problems named by index."""
        return Structure(Q=self.Q.select(index), C=self.C.select(index))


def detect(data: Data) -> Structure | None:
    """The structure of a batch, or None where its matrices have none; synchronises a few times.

    Args:
        data: The problems; every one of the batch must have the structure, with the dense rows in the same places.
    """
    if data.n < LEAST_VARIABLES or data.kind != "qp" or bool((data.Q[0, 0, 1:] != 0).any()):
        return None
    diagonal = data.Q.diagonal(dim1=1, dim2=2)
    per_row = _count(data.Q)
    if not bool(((per_row == 1) & (diagonal > 0)).all()):
        return None
    dense = (_count(data.C) > 1).any(0)
    where = torch.nonzero(dense).squeeze(-1)
    if len(where) > MOST_DENSE_ROWS:
        return None
    column = _largest(data.C)
    entry = data.C.gather(-1, column.unsqueeze(-1)).squeeze(-1)
    entry = torch.where(dense, torch.zeros_like(entry), entry)
    rows = data.C.index_select(1, where)
    C = MostlyUnit(column=column, entry=entry, where=where, rows=rows)
    return Structure(Q=Diagonal(diagonal=diagonal), C=C)


def _count(matrix: Tensor) -> Tensor:
    """Non-zeros of each row, `(1 or B, r)`."""
    parts = [torch.count_nonzero(part, dim=2) for part in torch.split(matrix, _CHUNK, dim=1)]
    return torch.cat(parts, dim=1)


def _largest(matrix: Tensor) -> Tensor:
    """Position of the largest entry of each row, `(1 or B, r)`."""
    return torch.cat([part.abs().argmax(-1) for part in torch.split(matrix, _CHUNK, dim=1)], dim=1)
