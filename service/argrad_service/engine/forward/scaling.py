"""Ruiz equilibration of a batch of QPs: rows and columns of the KKT matrix brought to unit length.

Reference: Ruiz, A scaling algorithm to equilibrate both rows and columns norms in matrices, RAL-TR-2001-034; with the
cost normalised as in OSQP (Stellato et al., 2020, section 5.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from argrad_service.engine.data import Data, take

ROUNDS = 6
"""Rounds of equilibration; each takes the square root of what is left."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scaling:
    """A scaled problem Q̂ = cDQD, q̂ = cDq, Ĉ = ECD, d̂ = Ed and the way back: z = Dẑ, y = Eŷ/c.

    Args:
        data: The scaled problems.
        columns: D, `(1 or B, n)`.
        rows: E, `(1 or B, p + m)`.
        cost: c, `(B, 1)`.
    """

    data: Data
    columns: Tensor
    rows: Tensor
    cost: Tensor

    def unscale(self, z: Tensor, y: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """A point of the scaled problems named by index, in the original units."""
        return z * take(self.columns, index), y * take(self.rows, index) / take(self.cost, index)


def ruiz(data: Data) -> Scaling:
    """Equilibrate; zero rows and columns keep their length."""
    shared = max(data.Q.shape[0], data.C.shape[0])
    Q, C = data.Q.expand(shared, -1, -1), data.C.expand(shared, -1, -1)
    columns, rows = Q.new_ones(shared, data.n), Q.new_ones(shared, data.d.shape[1])
    for _ in range(ROUNDS):
        column = Q.abs().amax(1)
        if C.shape[1]:
            column = torch.maximum(column, C.abs().amax(1))
        row = C.abs().amax(2)
        dc, dr = _inverse_root(column), _inverse_root(row)
        Q = dc.unsqueeze(2) * Q * dc.unsqueeze(1)
        C = dr.unsqueeze(2) * C * dc.unsqueeze(1)
        columns, rows = columns * dc, rows * dr
    q = columns * data.q
    size = torch.maximum(Q.abs().amax(1).mean(-1, keepdim=True).expand(data.B, 1), q.abs().amax(-1, keepdim=True))
    cost = torch.where(size > 0, 1 / size, torch.ones_like(size))
    scaled = Data(Q=cost.unsqueeze(2) * Q, q=cost * q, C=C, d=rows * data.d, p=data.p)
    return Scaling(data=scaled, columns=columns, rows=rows, cost=cost)


def _inverse_root(length: Tensor) -> Tensor:
    return torch.where(length > 0, length.rsqrt(), torch.ones_like(length))
