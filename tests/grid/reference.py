"""The solution and its derivatives, from dense KKT systems that share no code with the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from argrad.problems import QP
from tests.engine.qps import parameter, solve_refined
from tests.grid.situations import Drawn

Array = np.ndarray


@dataclass(frozen=True)
class Exact:
    """Solution of one problem on a given active set."""

    z: Array
    nu: Array
    lam: Array
    s: Array
    objective: float


@dataclass(frozen=True)
class _One:
    """The data of one problem."""

    Q: Array
    q: Array
    G: Array
    h: Array
    A: Array
    b: Array
    tau: float | None


def _one(problem: QP, i: int) -> _One:
    blocks = {name: parameter(problem, name, i) for name in ("Q", "q", "G", "h", "A", "b")}
    blocks["Q"] = 0.5 * (blocks["Q"] + blocks["Q"].T)
    tau = None if problem.entropy is None else float(problem.entropy.expand(problem.batch_size or 1)[i])
    return _One(**blocks, tau=tau)


def solve(drawn: Drawn, i: int) -> Exact:
    """The i-th problem on its active set, from the data as they were sent."""
    one, active = _one(drawn.problem, i), drawn.active[i]
    C, d = np.vstack([one.A, one.G[active]]), np.concatenate([one.b, one.h[active]])
    n, p = len(one.q), len(one.b)
    zero = np.zeros((len(C), len(C)))
    if one.tau is None:
        x = solve_refined(np.block([[one.Q, C.T], [C, zero]]), np.concatenate([-one.q, d]))
        z, y = x[:n], x[n:]
    else:
        w, y = np.log(drawn.z[i]), np.concatenate([drawn.nu[i], drawn.lam[i][active]])
        for _ in range(8):
            z = np.exp(w)
            slope = one.Q @ z + one.q + one.tau * (1 + w) + C.T @ y
            J = np.block([[one.Q * z + one.tau * np.eye(n), C.T], [C * z, zero]])
            step = np.linalg.solve(J, -np.concatenate([slope, C @ z - d]))
            w, y = w + step[:n], y + step[n:]
        z = np.exp(w)
    lam = np.zeros(len(one.h))
    lam[active] = y[p:]
    return Exact(z=z, nu=y[:p], lam=lam, s=np.where(active, 0.0, one.h - one.G @ z), objective=objective(one, z))


def objective(one: _One, z: Array) -> float:
    """½zᵀQz + qᵀz + τ Σ z log z."""
    value = 0.5 * z @ one.Q @ z + one.q @ z
    return float(value if one.tau is None else value + one.tau * np.sum(z * np.log(z)))


def adjoint(drawn: Drawn, i: int, exact: Exact, upstream: Mapping[str, Array]) -> tuple[Array, Array, Array]:
    """d_z, d_ν, μ of the i-th problem on its strongly active rows."""
    one, active = _one(drawn.problem, i), drawn.active[i]
    n, m, p = len(one.q), len(one.h), len(one.b)
    H = one.Q if one.tau is None else one.Q + np.diag(one.tau / exact.z)
    C = np.vstack([one.A, one.G[active]])
    g_z = upstream.get("z", np.zeros(n)) - one.G.T @ upstream.get("s", np.zeros(m))
    g_y = np.concatenate([upstream.get("nu", np.zeros(p)), upstream.get("lam", np.zeros(m))[active]])
    K = np.block([[H, C.T], [C, np.zeros((len(C), len(C)))]])
    x = solve_refined(K, -np.concatenate([g_z, g_y]))
    mu = np.zeros(m)
    mu[active] = x[n + p :]
    return x[:n], x[n : n + p], mu - upstream.get("s", np.zeros(m))


def gradients(exact: Exact, adjoint: tuple[Array, Array, Array]) -> dict[str, Array]:
    """Every parameter's gradient (OptNet eq. 8, ∂G corrected)."""
    dz, dnu, mu = adjoint
    z, nu, lam = exact.z, exact.nu, exact.lam
    found = {
        "Q": 0.5 * (np.outer(dz, z) + np.outer(z, dz)),
        "q": dz,
        "G": np.outer(mu, z) + np.outer(lam, dz),
        "h": -mu,
        "A": np.outer(dnu, z) + np.outer(nu, dz),
        "b": -dnu,
    }
    return found | ({"entropy": np.array(dz @ (1 + np.log(z)))} if (z > 0).all() else {})


def scaled_residual(problem: QP, i: int, z: Array, nu: Array, lam: Array) -> float:
    """Largest KKT residual of a point: each relative to one plus the largest of its terms."""
    one = _one(problem, i)
    Qz, Cty = one.Q @ z, one.A.T @ nu + one.G.T @ lam
    slope = one.q if one.tau is None else one.q + one.tau * (1 + np.log(z))
    Az, Gz = one.A @ z, one.G @ z
    largest = lambda *blocks: max([1.0, *(1 + np.abs(block).max(initial=0.0) for block in blocks)])  # noqa: E731
    primal = max(np.abs(Az - one.b).max(initial=0.0), (Gz - one.h).max(initial=0.0), 0.0)
    dual = np.abs(Qz + slope + Cty).max()
    terms = np.array([z @ Qz, slope @ z, one.b @ nu + one.h @ lam])
    negative = -min(lam.min(initial=0.0), 0.0)
    parts = (primal / largest(Az, Gz, one.b, one.h), dual / largest(Qz, slope, Cty), abs(terms.sum()) / largest(terms))
    return float(max(*parts, negative))
