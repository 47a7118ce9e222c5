"""Exact solutions and gradients of strictly convex QPs with inequalities, to judge everybody by.

Independent of the engine: plain NumPy, one problem at a time, and whatever it returns has been checked against
the optimality conditions of the original data. In the dual form of the problem, with R = GQ⁻¹Gᵀ and
c = h + GQ⁻¹q, an active set is sought such that λ ≥ 0, s = c + Rλ ≥ 0 and λᵀs = 0; on that set, z and λ come from
the KKT system itself, refined with residuals in extended precision.

References:
    Júdice & Pires, A block principal pivoting algorithm for large-scale strictly monotone linear complementarity
    problems, Computers & Operations Research 21 (1994): the exchange rule and its safeguard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from argrad.problems import QP

Array = NDArray[np.floating[Any]]

_MAX_EXCHANGES = 400
_PATIENCE = 3
_CHECKED_TO = 1e-9


@dataclass(frozen=True, kw_only=True)
class Exact:
    """Solutions of a batch, and the gradients of ⟨grad_z, z⟩ in every parameter.

    Args:
        z: `(B, n)`.
        lam: `(B, m)`.
        gradients: By the names Q q G h; Q's is symmetric.
        margin: Of each problem the smallest active multiplier or inactive slack, `(B,)`: how far it is from a point
            where the solution has no derivative.
    """

    z: Float[Tensor, "batch n"]
    lam: Float[Tensor, "batch m"]
    gradients: dict[str, Tensor]
    margin: Float[Tensor, " batch"]


def exact(problem: QP, grad_z: Float[Tensor, "batch n"]) -> Exact:
    """Solve and differentiate each problem of the batch on its active set.

    Raises:
        ArithmeticError: the optimality conditions do not hold to 1e-9 at a point that was found.
    """
    if problem.Q is None or problem.G is None or problem.h is None or problem.A is not None:
        raise ValueError("the reference takes QPs with inequalities and no equalities")
    data = [t.numpy() for t in (problem.Q, problem.q, problem.G, problem.h, grad_z)]
    rows = [_one(*(part[i] for part in data)) for i in range(len(grad_z))]
    z, lam, d_z, mu = (torch.from_numpy(np.stack([row[k] for row in rows])) for k in range(4))
    outer = d_z.unsqueeze(-1) * z.unsqueeze(-2)
    gradients = {
        "Q": 0.5 * (outer + outer.mT),
        "q": d_z,
        "G": mu.unsqueeze(-1) * z.unsqueeze(-2) + lam.unsqueeze(-1) * d_z.unsqueeze(-2),
        "h": -mu,
    }
    return Exact(z=z, lam=lam, gradients=gradients, margin=torch.tensor([row[4] for row in rows], dtype=torch.float64))


def _one(Q: Array, q: Array, G: Array, h: Array, g: Array) -> tuple[Array, Array, Array, Array, float]:
    n, m = len(q), len(h)
    active = _active_set(Q, q, G, h)
    size = int(active.sum())
    kkt = np.block([[Q, G[active].T], [G[active], np.zeros((size, size))]])
    z, lam, d_z, mu = np.zeros(n), np.zeros(m), np.zeros(n), np.zeros(m)
    for vector, rows, right in (
        (z, lam, np.concatenate([-q, h[active]])),
        (d_z, mu, np.concatenate([-g, np.zeros(size)])),
    ):
        solved = _solve_refined(kkt, right)
        vector[:], rows[active] = solved[:n], solved[n:]
    slack = h - G @ z
    stationarity = np.abs(Q @ z + q + G.T @ lam).max() / (1 + np.abs(q).max())
    scale = 1 + np.abs(h).max()
    feasibility = max(-slack.min(), np.abs(slack[active]).max(initial=0.0)) / scale
    worst = max(stationarity, feasibility, -lam.min() / (1 + np.abs(lam).max()))
    if worst > _CHECKED_TO:
        raise ArithmeticError(f"the optimality conditions hold to {worst:.1e} only")
    margin = min(lam[active].min(initial=np.inf), slack[~active].min(initial=np.inf))
    return z, lam, d_z, mu, float(margin)


def _active_set(Q: Array, q: Array, G: Array, h: Array) -> NDArray[np.bool_]:
    """Exchange every infeasible index at once; one at a time while that brings no progress."""
    R, c = G @ np.linalg.solve(Q, G.T), h + G @ np.linalg.solve(Q, q)
    active = c < 0
    fewest, patience = len(h) + 1, _PATIENCE
    for _ in range(_MAX_EXCHANGES):
        lam = np.zeros(len(h))
        lam[active] = np.linalg.solve(R[np.ix_(active, active)], -c[active])
        slack = c + R @ lam
        wrong = np.flatnonzero(np.where(active, lam < 0, slack < 0))
        if len(wrong) == 0:
            return active
        if len(wrong) < fewest:
            fewest, patience = len(wrong), _PATIENCE
        elif patience > 0:
            patience -= 1
        else:
            wrong = wrong[-1:]
        active[wrong] = ~active[wrong]
    raise ArithmeticError(f"no active set after {_MAX_EXCHANGES} exchanges")


def _solve_refined(matrix: Array, right: Array) -> Array:
    """Solve, then correct twice by residuals in extended precision."""
    exact_matrix = matrix.astype(np.longdouble)
    solved = np.linalg.solve(matrix, right)
    for _ in range(2):
        residual = (right - exact_matrix @ solved).astype(np.float64)
        solved = solved + np.linalg.solve(matrix, residual)
    return solved
