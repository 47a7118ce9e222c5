"""What a reference says of a workload, and the linear algebra that all references share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.linalg import lu_factor, lu_solve
from torch import Tensor

Array = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]

CHECKED_TO = 1e-9
"""Scaled residual of the optimality conditions beyond which a reference raises."""

_ROWS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Solutions of a batch, and the gradients of ⟨grad_z, z⟩.

    Args:
        z: `(B, n)`.
        gradients: By the names of the parameters that were asked for, each of its parameter's shape; Q's is symmetric,
            a shared parameter's is the sum over the batch.
        margin: Of each problem the smallest active multiplier or inactive slack, `(B,)`: how far it is from a point
            where the solution has no derivative.
        active: Of each problem the number of active inequalities, `(B,)`.
    """

    z: Float[Tensor, "batch n"]
    gradients: dict[str, Tensor]
    margin: Float[Tensor, " batch"]
    active: Float[Tensor, " batch"]


class Refined:
    """A factored matrix whose solutions are corrected twice by residuals in extended precision."""

    def __init__(self, matrix: Array) -> None:
        self._matrix = matrix
        self._factor = lu_factor(matrix, check_finite=False)

    def solve(self, right: Array) -> Array:
        """Solve for one right-hand side `(k,)`."""
        solved = np.asarray(lu_solve(self._factor, right, check_finite=False))
        for _ in range(2):
            solved = solved + lu_solve(self._factor, self._residual(solved, right), check_finite=False)
        return solved

    def _residual(self, solved: Array, right: Array) -> Array:
        extended, found = solved.astype(np.longdouble), np.empty_like(right)
        for start in range(0, len(right), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            found[rows] = right[rows] - self._matrix[rows].astype(np.longdouble) @ extended
        return found


def saddle(H: Array, C: Array) -> Array:
    """[H Cᵀ; C 0]."""
    return np.block([[H, C.T], [C, np.zeros((len(C), len(C)))]])
