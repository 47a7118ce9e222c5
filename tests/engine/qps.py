"""QPs whose solution is known before they are solved, and an oracle for their gradients of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from argrad.problems import QP

Array = np.ndarray


@dataclass(frozen=True)
class Case:
    """A kind of QP to draw.

    Args:
        name: What the test report calls it.
        n, m, p: Sizes.
        batch: Number of problems.
        rank: Rank of Q; n where it is definite.
        shared: Parameters that the whole batch shares, of Q, G and A: the rest follow from the solution.
        size: Factor by which rows and variables are scaled, geometrically spread between 1/size and size.
    """

    name: str
    n: int
    m: int
    p: int
    batch: int = 3
    rank: int | None = None
    shared: frozenset[str] = field(default_factory=frozenset)
    size: float = 1.0


@dataclass(frozen=True)
class Known:
    """A batch of strictly complementary QPs and its solution."""

    problem: QP
    z: Array
    nu: Array
    lam: Array
    s: Array


def draw(case: Case, seed: int) -> Known:
    """Choose the solution first, then data for which it satisfies the KKT conditions with a margin."""
    rng = np.random.default_rng([seed, case.n, case.m, case.p, case.batch])
    n, m, p, batch = case.n, case.m, case.p, case.batch

    def spread(k: int) -> Array:
        return np.geomspace(1 / case.size, case.size, k) if k > 1 else np.ones(k)

    def one(name: str, *shape: int) -> Array:
        return rng.normal(size=shape if name in case.shared else (batch, *shape))

    root = one("Q", case.rank or n, n) * spread(n)
    Q = np.swapaxes(root, -1, -2) @ root
    if case.rank is None:
        Q = Q + 0.1 * np.diag(spread(n) ** 2)
    G = one("G", m, n) * spread(m)[::-1, None] * spread(n)
    A = one("A", p, n) * spread(n)
    # At most n − p active rows, enough of them to make the solution unique where Q is singular.
    most = min(m, n - p)
    least = min(most, n - (case.rank or n) - p) if case.rank is not None else 0
    is_active = np.zeros((batch, m), dtype=bool)
    for row in is_active:
        row[rng.permutation(m)[: rng.integers(max(least, most // 2), most + 1)]] = True
    lam = np.where(is_active, rng.uniform(0.2, 2, (batch, m)), 0.0)
    s = np.where(is_active, 0.0, rng.uniform(0.2, 2, (batch, m)))
    z, nu = rng.normal(size=(batch, n)) / spread(n), rng.normal(size=(batch, p))
    mv = lambda M, x: np.einsum("...ij,bj->bi" if M.ndim == 2 else "bij,bj->bi", M, x)  # noqa: E731
    mtv = lambda M, y: np.einsum("...ij,bi->bj" if M.ndim == 2 else "bij,bi->bj", M, y)  # noqa: E731
    q = -(mv(Q, z) + mtv(G, lam) + mtv(A, nu))
    data = {"Q": Q, "q": q}
    if m:
        data |= {"G": G, "h": mv(G, z) + s}
    if p:
        data |= {"A": A, "b": mv(A, z)}
    problem = QP(**{k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in data.items()})
    return Known(problem=problem, z=z, nu=nu, lam=lam, s=s)


def parameter(problem: QP, name: str, i: int) -> Array:
    """A parameter of the i-th problem as an array."""
    tensor = getattr(problem, name)
    sizes = {"Q": (problem.n,) * 2, "q": (problem.n,), "G": (0, problem.n), "h": (0,), "A": (0, problem.n), "b": (0,)}
    if tensor is None:
        return np.zeros(sizes[name])
    return (tensor[i] if problem.is_batched(name) else tensor).double().numpy()


def oracle_adjoint(problem: QP, i: int, is_active: Array, upstream: Mapping[str, Array]) -> tuple[Array, Array, Array]:
    """d_z, d_ν, μ of the i-th problem from the KKT matrix written out densely, equilibrated and refined."""
    Q, G, A = (parameter(problem, name, i) for name in "QGA")
    Q = 0.5 * (Q + Q.T)
    n, m, p = problem.n, problem.m, problem.p
    C = np.vstack([A, G[is_active]])
    K = np.block([[Q, C.T], [C, np.zeros((len(C), len(C)))]])
    g_z = upstream.get("z", np.zeros(n)) - G.T @ upstream.get("s", np.zeros(m))
    g_y = np.concatenate([upstream.get("nu", np.zeros(p)), upstream.get("lam", np.zeros(m))[is_active]])
    x = solve_refined(K, -np.concatenate([g_z, g_y]))
    mu = np.zeros(m)
    mu[is_active] = x[n + p :]
    return x[:n], x[n : n + p], mu - upstream.get("s", np.zeros(m))


def solve_refined(K: Array, rhs: Array) -> Array:
    """Solve a regular symmetric system of any scale; residuals in extended precision."""
    scale = np.ones(len(K))
    for _ in range(20):
        scale /= np.sqrt(np.abs(scale[:, None] * K * scale).max(axis=0))
    scaled = scale[:, None] * K * scale
    right, x = (scale * rhs).astype(np.longdouble), np.zeros(len(K), dtype=np.longdouble)
    for _ in range(5):
        x = x + np.linalg.solve(scaled, (right - scaled.astype(np.longdouble) @ x).astype(float))
    return (scale * x).astype(float)


def oracle_gradients(problem: QP, known: Known, upstream: Mapping[str, Array]) -> list[dict[str, Array]]:
    """Gradients of each problem with respect to its own copy of every parameter (OptNet eq. 8, ∂G corrected)."""
    formed = []
    for i in range(len(known.z)):
        g = {name: block[i] for name, block in upstream.items()}
        dz, dnu, mu = oracle_adjoint(problem, i, known.lam[i] > 0, g)
        z, nu, lam = known.z[i], known.nu[i], known.lam[i]
        formed.append(
            {
                "Q": 0.5 * (np.outer(dz, z) + np.outer(z, dz)),
                "q": dz,
                "G": np.outer(mu, z) + np.outer(lam, dz),
                "h": -mu,
                "A": np.outer(dnu, z) + np.outer(nu, dz),
                "b": -dnu,
            }
        )
    return formed


def relative_error(found: list[dict[str, Array]], reference: list[dict[str, Array]]) -> float:
    """Largest over the batch of ‖Δ‖ / √Σ‖ref‖², all parameter gradients of a problem together."""
    worst = 0.0
    for mine, theirs in zip(found, reference, strict=True):
        difference = np.sqrt(sum(np.sum((mine[k] - theirs[k]) ** 2) for k in theirs))
        size = np.sqrt(sum(np.sum(theirs[k] ** 2) for k in theirs))
        worst = max(worst, float(difference / size if size > 0 else difference))
    return worst
