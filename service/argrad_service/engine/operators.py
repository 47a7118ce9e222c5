"""The matrices of a batch of QPs as linear maps, dense or with the structure that `structure.detect` finds.

Vectors are `(B, c, ·)`: c right-hand sides a problem. A matrix that the batch shares has the leading dimension 1, and
its products are one matrix product over all right-hand sides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from argrad_service.engine.data import take


class LinearMap(Protocol):
    """A matrix M `(1 or B, r, c)` that may never be formed."""

    def times(self, x: Tensor) -> Tensor:
        """M x, `(B, c, columns)` to `(B, c, rows)`."""
        ...

    def transposed(self, v: Tensor) -> Tensor:
        """Mᵀ v, `(B, c, rows)` to `(B, c, columns)`."""
        ...

    def lengths(self) -> Tensor:
        """‖M_i‖₂ of each row, `(1 or B, rows)`."""
        ...

    def select(self, index: Tensor) -> Self:
        """The maps of the problems named by index."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Dense:
    """A matrix as it is, `(1 or B, r, c)`."""

    matrix: Tensor

    def times(self, x: Tensor) -> Tensor:
        """M x."""
        return _product(x, self.matrix.mT)

    def transposed(self, v: Tensor) -> Tensor:
        """Mᵀ v."""
        return _product(v, self.matrix)

    def lengths(self) -> Tensor:
        """‖M_i‖₂."""
        found: Tensor = torch.linalg.vector_norm(self.matrix, dim=-1)
        return found

    def select(self, index: Tensor) -> Dense:
        """The matrices of the problems named by index."""
        return Dense(matrix=take(self.matrix, index))


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    return rows @ matrix[0] if matrix.shape[0] == 1 else torch.bmm(rows, matrix)


@dataclass(frozen=True, kw_only=True, eq=False)
class Diagonal:
    """D(a), a `(1 or B, n)`."""

    diagonal: Tensor

    def times(self, x: Tensor) -> Tensor:
        """a∘x."""
        return self.diagonal.unsqueeze(1) * x

    def transposed(self, v: Tensor) -> Tensor:
        """a∘v."""
        return self.times(v)

    def lengths(self) -> Tensor:
        """|a|."""
        return self.diagonal.abs()

    def select(self, index: Tensor) -> Diagonal:
        """The matrices of the problems named by index."""
        return Diagonal(diagonal=take(self.diagonal, index))


@dataclass(frozen=True, kw_only=True, eq=False)
class MostlyUnit:
    """Rows with at most one entry each, and a few that are dense.

    Args:
        column: `(1 or B, r)`, where the entry of each row stands.
        entry: `(1 or B, r)`, the entry; 0 on dense rows.
        where: `(k,)`, positions of the dense rows.
        rows: `(1 or B, k, n)`, the dense rows.
    """

    column: Tensor
    entry: Tensor
    where: Tensor
    rows: Tensor

    def times(self, x: Tensor) -> Tensor:
        """One gather, and a product with the dense rows."""
        column = self.column.unsqueeze(1).expand(*x.shape[:2], -1)
        product = x.gather(-1, column) * self.entry.unsqueeze(1)
        return product.index_copy(-1, self.where, _product(x, self.rows.mT))

    def transposed(self, v: Tensor) -> Tensor:
        """One scatter, and a product with the dense rows."""
        column = self.column.unsqueeze(1).expand_as(v)
        onto = v.new_zeros(*v.shape[:2], self.rows.shape[-1]).scatter_add(-1, column, v * self.entry.unsqueeze(1))
        return onto + _product(v.index_select(-1, self.where), self.rows)

    def lengths(self) -> Tensor:
        """Entries without their signs, and ‖·‖₂ of the dense rows."""
        return self.entry.abs().index_copy(-1, self.where, torch.linalg.vector_norm(self.rows, dim=-1))

    def select(self, index: Tensor) -> MostlyUnit:
        """The rows of the problems named by index."""
        return replace(
            self, column=take(self.column, index), entry=take(self.entry, index), rows=take(self.rows, index)
        )
