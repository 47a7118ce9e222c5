"""A sparse QP in stacked rows, and how far a point is from its KKT conditions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from argrad_service.sparse.matrices import Mask, Matrices, Matrix, Vector


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """½zᵀQz + qᵀz subject to C₁z = d₁ (the first p rows), C₂z ≤ d₂ (the other m).

    Args:
        matrices: Q, and C = [C₁; C₂].
        q: `(n,)`.
        d: `(p + m,)`, finite: a row that cannot bind (h = +inf) is empty, and says 0 ≤ 1.
    """

    matrices: Matrices
    q: Vector
    d: Vector

    @property
    def Q(self) -> Matrix:
        """CSC, symmetric; empty in a linear program."""
        return self.matrices.Q

    @property
    def C(self) -> Matrix:
        """CSR, equalities first."""
        return self.matrices.C

    @property
    def p(self) -> int:
        """Number of equalities."""
        return self.matrices.p

    @property
    def n(self) -> int:
        """Number of variables."""
        return len(self.q)

    @property
    def m(self) -> int:
        """Number of inequalities."""
        return len(self.d) - self.p

    @property
    def nbytes(self) -> int:
        """Bytes of matrices and vectors."""
        parts = (self.Q.data, self.Q.indices, self.Q.indptr, self.C.data, self.C.indices, self.C.indptr, self.q, self.d)
        return int(sum(part.nbytes for part in parts))


@dataclass(frozen=True, kw_only=True)
class Request:
    """How a problem is to be solved.

    Args:
        name: `clarabel` or `osqp`.
        tolerance: That the caller's residuals must meet.
        max_iterations: Interior point iterations of `clarabel`.
        max_steps: Splitting steps of `osqp`.
    """

    name: str
    tolerance: float
    max_iterations: int
    max_steps: int = 20_000


class Residuals(NamedTuple):
    """How far a point is from the KKT conditions, in the problem's own units.

    Args:
        primal: max(‖C₁z − d₁‖∞, ‖(C₂z − d₂)₊‖∞).
        dual: ‖Qz + q + Cᵀy‖∞.
        gap: |zᵀQz + qᵀz + dᵀy|.
        objective: ½zᵀQz + qᵀz.
        scaled: Largest of the first three, each divided by 1 + the largest of its terms.
    """

    primal: float
    dual: float
    gap: float
    objective: float
    scaled: float


def residuals(problem: Problem, z: Vector, y: Vector, Cz: Vector | None = None) -> Residuals:
    """Judge a point z with multipliers y = [ν; λ], λ ≥ 0; Cz, should it be known already."""
    Cz = problem.C @ z if Cz is None else Cz
    Qz, Cty = problem.Q @ z, problem.matrices.Ct @ y
    violation = Cz - problem.d
    violation[: problem.p] = np.abs(violation[: problem.p])
    primal, dual = max(0.0, _largest(violation)), size(Qz + problem.q + Cty)
    zQz, qz, dy = float(z @ Qz), float(problem.q @ z), float(problem.d @ y)
    gap = abs(zQz + qz + dy)
    scaled = max(
        primal / (1 + max(size(Cz), size(problem.d))),
        dual / (1 + max(size(Qz), size(problem.q), size(Cty))),
        gap / (1 + max(abs(zQz), abs(qz), abs(dy))),
    )
    return Residuals(primal, dual, gap, 0.5 * zQz + qz, scaled if np.isfinite(scaled) else np.inf)


def size(vector: Vector) -> float:
    """Largest absolute entry; 0 of an empty vector."""
    return float(np.maximum(vector.max(), -vector.min())) if vector.size else 0.0


def _largest(vector: Vector) -> float:
    return float(vector.max()) if vector.size else 0.0


def active_at(problem: Problem, z: Vector, y: Vector) -> Mask:
    """The active rows of a point: those whose multiplier outweighs their slack, each relative to its largest."""
    lam, s = y[problem.p :], (problem.d - problem.C @ z)[problem.p :]
    lam_size = size(lam) or 1.0
    active = np.ones(len(y), dtype=bool)
    active[problem.p :] = lam * (1 + np.abs(problem.d[problem.p :])) > s * lam_size
    return active
