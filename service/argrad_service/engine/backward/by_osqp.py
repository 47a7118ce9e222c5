"""The backward QP by OSQP, on the residual again until that is small: one set-up a problem for all its cotangents."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from argrad_service.engine.forward.libraries import Array, on_threads, to_array
from argrad_service.engine.forward.osqp_session import Numbers, Patterns, open_osqp
from argrad_service.engine.forward.patterns import of_matrix, of_triangle

ROUNDS = 6
"""Solves of one right-hand side at most: the first, and those on what it left."""

EPS = 1e-9
"""OSQP's tolerances, on right-hand sides of size one."""


class ByOSQP:
    """A `Backend` that solves one problem after another on all cores, on the CPU.

    Args:
        P: `(1 or B, n, n)`.
        C: `(B, k, n)`, unit rows.
        valid: `(B, k)`, False on padding.
        aim: Relative residual at which a right-hand side is done.
        most: ADMM iterations of one solve at most.
    """

    def __init__(self, P: Tensor, C: Tensor, valid: Tensor, *, aim: float, most: int) -> None:
        self._P, self._C = to_array(P.cpu()), to_array(C.cpu())
        self._count: list[int] = valid.sum(-1).tolist()
        self._aim, self._most = aim, most
        self.is_singular: Tensor = torch.zeros_like(valid[:, :0].any(-1))
        self.iterations = torch.zeros(len(C), dtype=torch.int64)

    def solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        """X and y; where OSQP finds none, the best it has found, for the residual to judge."""
        first, second = to_array(r1.cpu()), to_array(r2.cpu())
        x, y = np.zeros_like(first), np.zeros_like(second)

        def work(i: int) -> int:
            k = self._count[i]
            x[i], y[i, :k], iterations = self._solve_one(i, first[i], second[i, :k])
            return iterations

        self.iterations = torch.tensor(on_threads(work, len(first)), dtype=torch.int64)
        return torch.from_numpy(x).to(r1), torch.from_numpy(y).to(r2)

    def _solve_one(self, i: int, r1: Array, r2: Array) -> tuple[Array, Array, int]:
        """The i-th problem's x `(n, j)`, y `(k, j)` and iterations."""
        C = self._C[i, : self._count[i]]
        P = self._P[0 if len(self._P) == 1 else i]
        p, a = of_triangle(P[None], len(P)), of_matrix(C[None])
        settings = {
            "eps_abs": EPS,
            "eps_rel": EPS,
            "max_iter": self._most,
            "rho": 0.1,
            "polishing": len(C) > 0,  # without rows OSQP prints that there is nothing to polish
        }
        patterns = Patterns(n=len(P), r=len(C), P=(p.indices, p.starts), A=(a.indices, a.starts), settings=settings)
        x, y = np.zeros_like(r1), np.zeros_like(r2)
        osqp, iterations, is_first = open_osqp(patterns, lambda: False), 0, True
        try:
            for j in range(r1.shape[1]):
                e1, e2 = r1[:, j], r2[:, j]
                error = whole = _size(e1, e2)
                for _ in range(ROUNDS):
                    if not error > self._aim * whole:
                        break
                    found = osqp.solve(
                        Numbers(
                            P=p.values(0) if is_first else None,
                            A=a.values(0) if is_first else None,
                            q=-e1 / error,
                            l=e2 / error,
                            u=e2 / error,
                        )
                    )
                    is_first, iterations = False, iterations + found.iterations
                    new_x, new_y = x[:, j] + error * found.x, y[:, j] + error * found.y
                    e1, e2 = r1[:, j] - (P @ new_x + C.T @ new_y), r2[:, j] - C @ new_x
                    if not _size(e1, e2) < error:
                        break
                    x[:, j], y[:, j], error = new_x, new_y, _size(e1, e2)
        finally:
            osqp.close()
        return x, y, iterations


def _size(e1: Array, e2: Array) -> float:
    return float(max(np.abs(e1).max(), np.abs(e2).max() if len(e2) else 0.0))
