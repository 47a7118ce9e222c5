"""Exact solutions and adjoints of small strictly convex QPs, one problem at a time; shares no code with the engine."""

from __future__ import annotations

from collections.abc import Mapping

import daqp
import numpy as np
import torch
from torch import Tensor

from argrad.problems import QP, Adjoint, Solution

ACTIVE = 1e-9
_EQUALITY = 5
_INFINITE = 1e30


def _data(problem: QP, i: int) -> dict[str, np.ndarray]:
    """Parameters of the i-th problem, the absent ones without rows."""
    n = problem.n
    absent = {"G": np.zeros((0, n)), "h": np.zeros(0), "A": np.zeros((0, n)), "b": np.zeros(0)}
    given = problem.parameters()
    return absent | {k: (t[i] if problem.is_batched(k) else t).detach().numpy() for k, t in given.items()}


def solve(problem: QP) -> Solution:
    """The active set of daqp, and the point from the KKT system that it determines."""
    rows: list[tuple[np.ndarray, ...]] = []
    for i in range(problem.batch_size or 1):
        d = _data(problem, i)
        Q = 0.5 * (d["Q"] + d["Q"].T)
        C = np.ascontiguousarray(np.vstack([d["A"], d["G"]]))
        upper = np.concatenate([d["b"], np.where(np.isinf(d["h"]), _INFINITE, d["h"])])
        lower = np.concatenate([d["b"], np.full(problem.m, -_INFINITE)])
        sense = np.array([_EQUALITY] * problem.p + [0] * problem.m, dtype=np.int32)
        _, _, flag, info = daqp.solve(Q, d["q"].copy(), C, upper, lower, sense)
        assert flag == 1
        active = np.flatnonzero(np.asarray(info["lam"])[problem.p :] > ACTIVE)
        z, nu, lam_active = _kkt(Q, d["A"], d["G"][active], -d["q"], d["b"], d["h"][active])
        lam = np.zeros(problem.m)
        lam[active] = lam_active
        s = d["h"] - d["G"] @ z
        s[active] = 0.0
        assert (lam >= 0).all()
        assert (s >= -1e-12).all()
        rows.append((z, nu, lam, s))
    z, nu, lam, s = (torch.from_numpy(np.stack(block)) for block in zip(*rows, strict=True))
    return Solution(z=z, nu=nu, lam=lam, s=s)


def differentiate(problem: QP, solution: Solution, upstream: Mapping[str, Tensor]) -> Adjoint:
    """The adjoint of canonical cotangents `(B, ·)` on the strongly active rows."""
    rows: list[tuple[np.ndarray, ...]] = []
    for i in range(problem.batch_size or 1):
        d = _data(problem, i)
        g = {
            k: upstream[k][i].numpy() if k in upstream else np.zeros(t.shape[-1]) for k, t in solution.blocks().items()
        }
        active = np.flatnonzero(solution.lam[i].numpy() > ACTIVE)
        g_z = g["z"] - d["G"].T @ g["s"]
        Q = 0.5 * (d["Q"] + d["Q"].T)
        d_z, d_nu, mu_active = _kkt(Q, d["A"], d["G"][active], -g_z, -g["nu"], -g["lam"][active])
        mu = np.zeros(problem.m)
        mu[active] = mu_active
        rows.append((d_z, d_nu, mu - g["s"]))
    z, nu, mu = (torch.from_numpy(np.stack(block)) for block in zip(*rows, strict=True))
    return Adjoint(z=z, nu=nu, mu=mu)


def _kkt(
    Q: np.ndarray, A: np.ndarray, G: np.ndarray, r_z: np.ndarray, r_nu: np.ndarray, r_lam: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    C = np.vstack([A, G])
    K = np.block([[Q, C.T], [C, np.zeros((len(C), len(C)))]])
    x = np.linalg.solve(K, np.concatenate([r_z, r_nu, r_lam]))
    n, p = len(Q), len(A)
    return x[:n], x[n : n + p], x[n + p :]
