"""The matrices of a sparse QP, and what follows from them alone: it is found once where they stay."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Mask = NDArray[np.bool_]
Index = NDArray[np.intp]
Matrix = Any
"""A matrix of `scipy.sparse`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """The rows that bound variables from one side: g z_j ≤ h, that is |g| (±z_j) ≤ h.

    Args:
        rows: Their positions.
        where: The variable of each.
        size: |g| of each.
        row: `(n,)`, the row of each variable, −1 where it has none; None where some variable has several.
    """

    rows: Index
    where: Index
    size: Vector
    row: Index | None

    @cached_property
    def _span(self) -> slice | None:
        """The rows as a slice, where they bound the variables one after the other, each once."""
        n = len(self.rows)
        is_in_order = self.row is not None and n == len(self.row) and n > 0 and bool((self.where == np.arange(n)).all())
        if not is_in_order or int(self.rows[-1] - self.rows[0]) != n - 1:
            return None
        return slice(int(self.rows[0]), int(self.rows[-1]) + 1)

    def tightest(self, n: int, right: Vector) -> tuple[Vector, Index] | None:
        """The least of the bounds on each variable `(n,)`, +inf where it has none, and its row.

        None where two rows are one bound: should it be active, they are dependent.
        """
        if self._span is not None and self.row is not None:
            return right[self._span] / self.size, self.row
        bound, least = right[self.rows] / self.size, np.full(n, np.inf)
        if self.row is not None:
            least[self.where] = bound
            return least, self.row
        order = np.argsort(-bound, kind="stable")  # the last assignment to a variable stays
        row = np.full(n, -1)
        least[self.where[order]], row[self.where[order]] = bound[order], self.rows[order]
        tight = self.where[bound == least[self.where]]
        return (least, row) if len(np.unique(tight)) == len(tight) else None


def _side(n: int, rows: Index, where: Index, size: Vector) -> Side:
    """Rows of one side."""
    row = np.full(n, -1)
    row[where] = rows
    return Side(rows=rows, where=where, size=size, row=row if np.count_nonzero(row >= 0) == len(rows) else None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """What the matrices of a separable problem say, whatever its vectors are.

    Args:
        d: `(n,)`, positive.
        a: `(n,)`, the equality's row; zero where there is none.
        empty: Inequalities without an entry, which say 0 ≤ h.
        lower: Rows that bound from below.
        upper: Rows that bound from above.
    """

    d: Vector
    a: Vector
    empty: Index
    lower: Side
    upper: Side


@dataclass(frozen=True, kw_only=True, eq=False)
class Matrices:
    """The matrices of a problem, and what follows from them alone.

    Args:
        Q: CSC, symmetric; empty in a linear program.
        C: CSR, equalities first.
        p: Number of equalities.
    """

    Q: Matrix
    C: Matrix
    p: int

    @cached_property
    def Ct(self) -> Matrix:
        """Cᵀ, CSC."""
        return self.C.T

    @cached_property
    def reading(self) -> Reading | None:
        """The matrices as those of a separable problem, or None if they are none."""
        return _read(self.Q, self.C, self.p)


def _read(Q: Matrix, C: Matrix, p: int) -> Reading | None:
    n = C.shape[1]
    if p > 1 or Q.nnz != n or not (Q.indptr == np.arange(n + 1)).all() or not (Q.indices == np.arange(n)).all():
        return None
    if not (Q.data > 0).all():
        return None
    counts = np.diff(C.indptr)
    if (counts[p:] > 1).any():
        return None
    a = np.zeros(n)
    if p:
        a[C.indices[: counts[0]]] = C.data[: counts[0]]
    rows = p + np.flatnonzero(counts[p:])
    where, g = C.indices[C.indptr[rows]], C.data[C.indptr[rows]]
    lower, upper = (_side(n, rows[is_in], where[is_in], np.abs(g[is_in])) for is_in in (g < 0, g > 0))
    return Reading(d=Q.data, a=a, empty=p + np.flatnonzero(counts[p:] == 0), lower=lower, upper=upper)
