"""The KKT system of a sparse QP on a given active set, factored once for forward, backward and tangent solves.

    K = [ Q    C_aᵀ ]        K_δ = S K S + [ δI   0  ]        S diagonal: the largest entry of each row of SKS is near 1
        [ C_a   0   ]                      [ 0   −δI ]

K_δ is quasi-definite: it has a factorisation LDLᵀ in every symmetric order (Vanderbei, 1995), so the order may be
chosen for little fill alone, and SuperLU in its symmetric mode keeps to the diagonal. Refinement against K removes δ.

K is singular exactly where the primal solution is not unique (Qv = 0, C_a v = 0) or active rows are dependent
(C_aᵀw = 0); there K_δ has the eigenvalue δ with v alone, −δ with w alone. A few steps of inverse iteration in either
block find it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import splu

from argrad_service.sparse.matrices import Matrix, Vector
from argrad_service.sparse.problem import Problem

DELTA = 1e-9
"""δ, relative to the equilibrated matrix."""

SINGULAR = 3.0
"""K counts as singular if its scaled K_δ has an eigenvalue below this many δ in size."""

REFINEMENTS = 12
"""Steps of iterative refinement at most; a step that does not lower the residual is not taken."""

ROUNDING = 1e-14
"""Relative residual below which no further step is needed."""

_EQUILIBRATIONS = 4
_INVERSE_ITERATIONS = 4
_ENTRY_BYTES = 12  # a float64 and an int32

Order = NDArray[np.intp]


class Solved(NamedTuple):
    """A solution `(n + k, j)` of j systems, and the largest of their relative residuals."""

    x: Vector
    error: float


class System:
    """K, factored.

    Args:
        problem: Has Q and the rows.
        rows: Positions of the active rows, ascending, equalities first; k of them.
        order: Order of elimination, from an earlier `System` with the same rows; found anew by default.

    Raises:
        MemoryError: the factor does not fit.
    """

    def __init__(self, problem: Problem, rows: NDArray[np.intp], order: Order | None = None) -> None:
        self.n, self.rows = problem.n, rows
        C = problem.C[rows]
        self._K = sparse.bmat([[problem.Q, C.T], [C, None]], format="csr")
        self._scale = _equilibrate(self._K)
        scaled = (sparse.diags(self._scale) @ self._K @ sparse.diags(self._scale)).tocsc()
        signs = np.repeat([DELTA, -DELTA], [self.n, len(rows)])
        scaled = (scaled + sparse.diags(signs)).tocsc()
        self.order = order
        if order is not None:
            scaled = scaled[order][:, order].tocsc()
        self._factor = _factor(scaled, has_order=order is not None)
        if order is None:
            self.order = np.argsort(self._factor.perm_c)
        self._given = order

    @property
    def nbytes(self) -> int:
        """Bytes of the factor."""
        return int(self._factor.nnz) * _ENTRY_BYTES

    def solve(self, right: Vector) -> Solved:
        """Solve K x = right, `(n + k,)` or `(n + k, j)`, with iterative refinement."""
        columns = right.reshape(len(right), -1)
        x = np.zeros_like(columns)
        left = columns
        norms = np.maximum(np.abs(columns).max(axis=0, initial=0.0), np.finfo(float).tiny)
        error = np.ones(columns.shape[1])
        for _ in range(REFINEMENTS):
            trial = x + self._solve_regularised(left)
            trial_left = columns - self._K @ trial
            trial_error = np.abs(trial_left).max(axis=0, initial=0.0) / norms
            is_better = trial_error < error
            if not is_better.any():
                break
            x = np.where(is_better, trial, x)
            left = np.where(is_better, trial_left, left)
            gain = np.where(is_better, trial_error / error, 1.0)
            error = np.where(is_better, trial_error, error)
            if (error <= ROUNDING).all() or (gain > 0.5).all():
                break
        return Solved(x.reshape(right.shape), float(error.max(initial=0.0)))

    def is_singular(self) -> tuple[bool, bool]:
        """Whether the primal solution is not unique, and whether rows are dependent."""
        primal = slice(0, self.n)
        dual = slice(self.n, self.n + len(self.rows))
        return self._has_null_vector(primal), self._has_null_vector(dual)

    def _has_null_vector(self, block: slice) -> bool:
        width = block.stop - block.start
        if width == 0:
            return False
        vector = np.random.default_rng(0).standard_normal(width)
        size = 0.0
        for _ in range(_INVERSE_ITERATIONS):
            vector = vector / np.linalg.norm(vector)
            full = np.zeros((self.n + len(self.rows), 1))
            full[block, 0] = vector
            vector = self._back(full)[block, 0]
            size = float(np.linalg.norm(vector))
            if not np.isfinite(size):
                return True
        return size * DELTA * SINGULAR > 1.0

    def _solve_regularised(self, right: Vector) -> Vector:
        return self._scale[:, None] * self._back(self._scale[:, None] * right)

    def _back(self, right: Vector) -> Vector:
        """Solve with K_δ."""
        if self._given is None:
            return np.asarray(self._factor.solve(np.ascontiguousarray(right)))
        x = np.empty_like(right)
        x[self._given] = self._factor.solve(np.ascontiguousarray(right[self._given]))
        return x


def is_convex(Q: Matrix, tolerance: float) -> bool:
    """Whether Q is positive semidefinite, up to that part of its largest entry.

    A dominant diagonal settles it; else the pivots of Q + shift, whose signs are those of its eigenvalues.
    """
    if Q.nnz == 0:
        return True
    shift = tolerance * max(float(np.abs(Q.data).max()), np.finfo(float).tiny)
    diagonal = Q.diagonal()
    off = np.asarray(abs(Q).sum(axis=1)).ravel() - np.abs(diagonal)
    if (diagonal + shift >= off).all():
        return True
    if (diagonal < -shift).any():
        return False
    try:
        factor = _factor((Q + sparse.diags(np.full(Q.shape[0], shift))).tocsc(), has_order=False)
    except RuntimeError:  # exactly singular: a pivot of zero, which the shift excludes for a semidefinite Q
        return False
    return bool((factor.perm_r == factor.perm_c).all() and (factor.U.diagonal() > 0).all())


def _factor(matrix: Matrix, *, has_order: bool) -> Matrix:
    return splu(
        matrix,
        permc_spec="NATURAL" if has_order else "MMD_AT_PLUS_A",
        diag_pivot_thresh=0.0,
        options={"SymmetricMode": True},
    )


def _equilibrate(K: Matrix) -> Vector:
    """Diagonal of S (Ruiz, 2001)."""
    scale = np.ones(K.shape[0])
    magnitudes = abs(K)
    for _ in range(_EQUILIBRATIONS):
        scaled = sparse.diags(scale) @ magnitudes @ sparse.diags(scale)
        largest = np.asarray(scaled.max(axis=1).todense()).ravel()
        scale /= np.sqrt(np.where(largest > 0, largest, 1.0))
    return scale
