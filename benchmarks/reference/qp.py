"""Strictly convex QPs, with and without equalities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import lu_factor, lu_solve
from torch import Tensor

from benchmarks.forms import Rows, as_qp
from benchmarks.reference.active_sets import active_rows
from benchmarks.reference.truth import CHECKED_TO, Array, Mask, Refined, Truth, saddle
from benchmarks.workloads import Workload

_ROUNDS = 20


@dataclass(frozen=True, kw_only=True)
class _Point:
    """Solution and adjoint of one problem: z, d_z `(n,)`, y = [ν; λ] and δ = [d_ν; μ] `(p + m,)`."""

    z: Array
    y: Array
    d_z: Array
    delta: Array
    margin: float
    active: int


def exact(workload: Workload) -> Truth:
    """Gradients of whichever of Q q G h A b the workload asks for, each batched."""
    points, p = _points(as_qp("qp", workload.parameters), workload.grad_z)
    z, y, d_z, delta = (torch.from_numpy(np.stack([getattr(k, name) for k in points])) for name in _BLOCKS)
    outer, rows = _outer(d_z, z), _outer(delta, z) + _outer(y, d_z)
    found = {
        "Q": lambda: 0.5 * (outer + outer.mT),
        "q": lambda: d_z,
        "G": lambda: rows[:, p:],
        "h": lambda: -delta[:, p:],
        "A": lambda: rows[:, :p],
        "b": lambda: -delta[:, :p],
    }
    return _truth(points, z, {name: found[name]() for name in workload.wrt})


def exact_total_variation(workload: Workload) -> Truth:
    """The gradient of D, which stands in G = [D −I; −D −I], summed over the batch."""
    D, points_each = workload.parameters["D"], workload.grad_z.shape[-1]
    grad_z = torch.cat([workload.grad_z, workload.grad_z.new_zeros(len(workload.grad_z), len(D))], -1)
    points, _ = _points(as_qp("tv", workload.parameters), grad_z)
    z, lam, d_z, mu = (torch.from_numpy(np.stack([getattr(k, name) for k in points])) for name in _BLOCKS)
    of_G = (_outer(mu, z) + _outer(lam, d_z)).sum(0)
    found = of_G[: len(D), :points_each] - of_G[len(D) :, :points_each]
    return _truth(points, z[:, :points_each], {"D": found})


_BLOCKS = ("z", "y", "d_z", "delta")


def _truth(points: list[_Point], z: Tensor, gradients: dict[str, Tensor]) -> Truth:
    return Truth(
        z=z,
        gradients=gradients,
        margin=torch.tensor([point.margin for point in points], dtype=torch.float64),
        active=torch.tensor([float(point.active) for point in points], dtype=torch.float64),
    )


def _points(rows: Rows, grad_z: Tensor) -> tuple[list[_Point], int]:
    """Each problem of the batch, and the number of equalities."""
    batch, n = grad_z.shape
    A = grad_z.new_zeros(0, n) if rows.A is None else rows.A
    b = grad_z.new_zeros(0) if rows.b is None else rows.b
    matrices = [part.expand(batch, *part.shape[-2:]).numpy() for part in (rows.Q, rows.G, A)]
    vectors = [part.expand(batch, part.shape[-1]).numpy() for part in (rows.q, rows.h, b, grad_z)]
    return [_one(*(part[k] for part in (*matrices, *vectors))) for k in range(batch)], A.shape[-2]


def _one(Q: Array, G: Array, A: Array, q: Array, h: Array, b: Array, g: Array) -> _Point:
    """With x₀ the solution without inequalities and X = ∂z/∂(−λ): s = c + Rλ, c = h − Gx₀, R = GX."""
    n, p = len(q), len(b)
    factor = lu_factor(saddle(Q, A), check_finite=False)
    x0 = lu_solve(factor, np.concatenate([-q, b]), check_finite=False)[:n]
    X = lu_solve(factor, np.concatenate([G.T, np.zeros((p, len(h)))]), check_finite=False)[:n]
    R = G @ X
    active = active_rows(0.5 * (R + R.T), h - G @ x0, rank=n - p)
    del X, R, factor
    for _ in range(_ROUNDS):
        C = np.concatenate([A, G[active]])
        system = Refined(saddle(Q, C))
        solved = system.solve(np.concatenate([-q, b, h[active]]))
        z, lam = solved[:n], np.zeros(len(h))
        lam[active] = solved[n + p :]
        slack = h - G @ z
        wrong = _wrong(active, lam, slack, h)
        if not wrong.any():
            break
        active = active ^ wrong
    y = np.concatenate([solved[n : n + p], lam])
    adjoint = system.solve(np.concatenate([-g, np.zeros(len(C))]))
    delta = np.zeros(p + len(h))
    delta[:p], delta[p:][active] = adjoint[n : n + p], adjoint[n + p :]
    _check(Q @ z + q + A.T @ y[:p] + G.T @ lam, q, A @ z - b, lam, slack, active, h)
    margin = min(lam[active].min(initial=np.inf), slack[~active].min(initial=np.inf))
    return _Point(z=z, y=y, d_z=adjoint[:n], delta=delta, margin=float(margin), active=int(active.sum()))


def _wrong(active: Mask, lam: Array, slack: Array, h: Array) -> Mask:
    """Rows with the wrong sign, beyond what rounding explains."""
    negative = lam < -1e-11 * (1 + np.abs(lam).max(initial=0.0))
    violated = slack < -1e-11 * (1 + np.abs(h).max(initial=0.0))
    return np.asarray(np.where(active, negative, violated))


def _check(stationarity: Array, q: Array, equality: Array, lam: Array, slack: Array, active: Mask, h: Array) -> None:
    scale = 1 + np.abs(h).max(initial=0.0)
    worst = max(
        np.abs(stationarity).max() / (1 + np.abs(q).max() + np.abs(lam).max(initial=0.0)),
        np.abs(equality).max(initial=0.0) / scale,
        -slack.min(initial=0.0) / scale,
        np.abs(slack[active]).max(initial=0.0) / scale,
        -lam.min(initial=0.0) / (1 + np.abs(lam).max(initial=0.0)),
    )
    if not worst <= CHECKED_TO:
        raise ArithmeticError(f"the optimality conditions hold to {worst:.1e} only")


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left.unsqueeze(-1) * right.unsqueeze(-2)
