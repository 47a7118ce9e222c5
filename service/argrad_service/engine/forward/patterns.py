"""Dense blocks of a batch as compressed columns: one pattern for the whole batch, found once, and values a problem."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Index = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Pattern:
    """Where a batch of matrices has entries: the union over the batch, column by column, rows ascending.

    Args:
        shape: Of one matrix.
        indices: `(nnz,)`, rows of the entries.
        starts: `(columns + 1,)`, where each column begins.
        columns: `(nnz,)`, columns of the entries.
        blocks: `(1 or B, *shape)`.
    """

    shape: tuple[int, int]
    indices: Index
    starts: Index
    columns: Index
    blocks: Array

    @property
    def is_shared(self) -> bool:
        """Whether all problems have the same values."""
        return len(self.blocks) == 1

    def values(self, i: int) -> Array:
        """Entries of the i-th problem's matrix, `(nnz,)`, zeros of the union included."""
        values: Array = self.blocks[0 if self.is_shared else i][self.indices, self.columns]
        return values


def of_matrix(blocks: Array) -> Pattern:
    """The pattern of `(1 or B, r, c)`."""
    return _pattern((blocks != 0).any(0), blocks)


def of_triangle(blocks: Array | None, n: int) -> Pattern:
    """The pattern of the upper triangle of symmetric `(1 or B, n, n)`; empty where there is no matrix."""
    if blocks is None:
        return _pattern(np.zeros((n, n), dtype=bool), np.zeros((1, n, n)))
    return _pattern(np.triu((blocks != 0).any(0)), blocks)


def _pattern(mask: NDArray[np.bool_], blocks: Array) -> Pattern:
    columns, indices = np.nonzero(mask.T)
    starts = np.zeros(mask.shape[1] + 1, dtype=np.int32)
    np.cumsum(mask.sum(0), out=starts[1:])
    return Pattern(
        shape=(mask.shape[0], mask.shape[1]),
        indices=indices.astype(np.int32),
        starts=starts,
        columns=columns.astype(np.int32),
        blocks=blocks,
    )
