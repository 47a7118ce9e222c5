"""Alt-Diff's two special layers: constrained sparsemax by its breakpoints, constrained softmax by Newton's method."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.reference.truth import CHECKED_TO, Array, Mask, Refined, Truth, saddle
from benchmarks.workloads import Workload


def exact_sparsemax(workload: Workload) -> Truth:
    """With x = min(max(y − t, 0), u), Σx falls piecewise linearly in t, and the piece that meets 1 gives t."""
    y, u, g = (v[0].numpy() for v in (workload.parameters["y"], workload.parameters["u"], workload.grad_z))
    breaks = np.sort(np.concatenate([y, y - u]))
    totals = np.array([_clipped(y, u, t).sum() for t in (breaks[0], breaks[-1])])
    if not totals[0] >= 1.0 >= totals[1]:
        raise ArithmeticError("the bounds leave no point with sum one")
    low, high = 0, len(breaks) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _clipped(y, u, breaks[middle]).sum() >= 1.0 else (low, middle)
    inside = 0.5 * (breaks[low] + breaks[high])
    free, full = (y - inside > 0) & (y - inside < u), y - inside >= u
    t = (y[free].sum() + u[full].sum() - 1.0) / free.sum()
    x = _clipped(y, u, t)
    if not abs(x.sum() - 1.0) <= CHECKED_TO:
        raise ArithmeticError("the sum is not one")
    shift = g[free].mean()
    gradients = {"y": np.where(free, g - shift, 0.0), "u": np.where(full, g - shift, 0.0)}
    margin = np.minimum(np.abs(y - t), np.abs(y - t - u)).min()
    return Truth(
        z=torch.from_numpy(x)[None],
        gradients={name: torch.from_numpy(gradients[name])[None] for name in workload.wrt},
        margin=torch.tensor([margin], dtype=torch.float64),
        active=torch.tensor([float((~free).sum())], dtype=torch.float64),
    )


def _clipped(y: Array, u: Array, t: float) -> Array:
    return np.asarray(np.minimum(np.maximum(y - t, 0.0), u))


def exact_softmax(workload: Workload) -> Truth:
    """An interior point finds the active rows; Newton's method on these rows finds x; log x + 1 − y + Cᵀν = 0."""
    y, A, b, G, h = (workload.parameters[name][0].numpy() for name in ("y", "A", "b", "G", "h"))
    g, n, p = workload.grad_z[0].numpy(), len(y), len(b)
    x, active = _interior(y, A, b, G, h)
    for _ in range(30):
        C, d = np.concatenate([A, G[active]]), np.concatenate([b, h[active]])
        x, nu = _newton(y, C, d, x)
        lam, slack = nu[p:], h - G @ x
        if lam.min(initial=0.0) < -1e-11:
            active[np.flatnonzero(active)[np.argmin(lam)]] = False
        elif slack[~active].min(initial=0.0) < -1e-11:
            active[np.flatnonzero(~active)[np.argmin(slack[~active])]] = True
        else:
            break
    worst = max(np.abs(np.log(x) + 1 - y + C.T @ nu).max(), np.abs(C @ x - d).max(), -slack.min(), -lam.min(initial=0))
    if not worst <= CHECKED_TO:
        raise ArithmeticError(f"the optimality conditions hold to {worst:.1e} only")
    adjoint = Refined(saddle(np.diag(1 / x), C)).solve(np.concatenate([-g, np.zeros(len(d))]))
    of_h = np.zeros(len(h))
    of_h[active] = -adjoint[n + p :]
    gradients = {"y": -adjoint[:n], "b": -adjoint[n : n + p], "h": of_h}
    margin = min(lam.min(initial=np.inf), slack[~active].min(initial=np.inf))
    return Truth(
        z=torch.from_numpy(x)[None],
        gradients={name: torch.from_numpy(gradients[name])[None] for name in workload.wrt},
        margin=torch.tensor([margin], dtype=torch.float64),
        active=torch.tensor([float(active.sum())], dtype=torch.float64),
    )


def _interior(y: Array, A: Array, b: Array, G: Array, h: Array) -> tuple[Array, Mask]:
    """Of an interior point method that is as plain as can be, x and the rows with λ > s."""
    n, p, m = len(y), len(b), len(h)
    x, nu, s, lam = np.exp(y - 1), np.zeros(p), np.ones(m), np.ones(m)
    for _ in range(200):
        dual, primal, rows = np.log(x) + 1 - y + A.T @ nu + G.T @ lam, A @ x - b, G @ x + s - h
        gap = s @ lam / m
        if gap < 1e-10 and max(np.abs(dual).max(), np.abs(primal).max(), np.abs(rows).max()) < 1e-8:
            break
        target, weight = 0.1 * gap, lam / s
        right = -dual - G.T @ (weight * rows + target / s - lam)
        H = np.diag(1 / x) + (G.T * weight) @ G
        solved = np.linalg.solve(saddle(H, A), np.concatenate([right, -primal]))
        dx = solved[:n]
        ds = -rows - G @ dx
        dlam = target / s - lam - weight * ds
        step = min(1.0, *(0.95 * _reach(v, dv) for v, dv in ((x, dx), (s, ds), (lam, dlam))))
        x, nu, s, lam = x + step * dx, nu + step * solved[n:], s + step * ds, lam + step * dlam
    return x, lam > s


def _newton(y: Array, C: Array, d: Array, x: Array) -> tuple[Array, Array]:
    nu, n = np.zeros(len(d)), len(y)
    for _ in range(100):
        residual = np.concatenate([np.log(x) + 1 - y + C.T @ nu, C @ x - d])
        if np.abs(residual).max() < 1e-13:
            break
        change = np.linalg.solve(saddle(np.diag(1 / x), C), -residual)
        step = min(1.0, 0.9 * _reach(x, change[:n]))
        x, nu = x + step * change[:n], nu + step * change[n:]
    return x, nu


def _reach(v: Array, dv: Array) -> float:
    """The largest step that keeps v nonnegative."""
    falling = dv < 0
    return float((-v[falling] / dv[falling]).min(initial=np.inf))
