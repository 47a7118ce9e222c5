"""OSQP, one problem after the other, with the adjoint derivative that it has itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy import sparse
from torch import Tensor

from benchmarks.contestants.base import RowsContestant, everywhere
from benchmarks.forms import Rows


class Osqp(RowsContestant):
    """Set-up, solve and `adjoint_derivative_compute` of each problem, as an autograd function."""

    def solve_rows(self, rows: Rows) -> Float[Tensor, "batch n"]:
        rows = everywhere(rows, len(self.workload.grad_z))
        return _Solve.apply(rows.Q, rows.q, rows.G, rows.h, rows.A, rows.b)  # type: ignore[no-any-return, no-untyped-call]


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, Q: Tensor, q: Tensor, G: Tensor, h: Tensor, A: Tensor | None, b: Tensor | None
    ) -> Float[Tensor, "batch n"]:
        import osqp

        n, m = q.shape[-1], h.shape[-1]
        A = q.new_zeros(len(q), 0, n) if A is None else A
        b = q.new_zeros(len(q), 0) if b is None else b
        rows, upper = torch.cat([A, G], -2).detach().numpy(), torch.cat([b, h], -1).detach().numpy()
        lower = torch.cat([b.detach(), torch.full((len(q), m), -torch.inf)], -1).numpy()
        hessians, linear = Q.detach().numpy(), q.detach().numpy()
        ctx.solvers, ctx.equalities, found = [], b.shape[-1], np.full((len(q), n), np.nan)
        for k in range(len(q)):
            solver = osqp.OSQP()
            solver.setup(
                sparse.csc_matrix(np.triu(hessians[k])),
                linear[k],
                sparse.csc_matrix(rows[k]),
                lower[k],
                upper[k],
                verbose=False,
                eps_abs=1e-9,
                eps_rel=1e-9,
                max_iter=100_000,
                polishing=True,
            )
            answer = solver.solve(raise_error=False)
            if answer.info.status == "solved":
                found[k] = answer.x
            ctx.solvers.append(solver if answer.info.status == "solved" else None)
        return torch.from_numpy(found)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        needs, p = ctx.needs_input_grad, ctx.equalities
        batches: list[list[Any]] = [[] for _ in needs]
        for solver, g in zip(ctx.solvers, grad_outputs[0].numpy(), strict=True):
            found = [np.nan] * len(needs) if solver is None else _gradients(solver, g, p, needs)
            for batch, one in zip(batches, found, strict=True):
                batch.append(one)
        return tuple(
            torch.from_numpy(np.stack(np.broadcast_arrays(*batch))) if needed else None
            for batch, needed in zip(batches, needs, strict=True)
        )


def _gradients(solver: Any, g: Any, p: int, needs: tuple[bool, ...]) -> list[Any]:
    """Of Q, q, G, h, A, b."""
    solver.adjoint_derivative_compute(dx=g)
    of_q, of_lower, of_upper = solver.adjoint_derivative_get_vec()
    of_Q = of_rows = None
    if needs[0]:
        of_Q, of_rows = solver.adjoint_derivative_get_mat(as_dense=True, dP_as_triu=False)
    elif needs[2] or needs[4]:
        _, entries = solver.adjoint_derivative_get_mat(as_dense=False)  # dense, it fails on a Q without entries
        of_rows = sparse.csc_matrix((entries.x, entries.i, entries.p), shape=(len(of_upper), len(of_q))).toarray()
    of_G, of_A = (None, None) if of_rows is None else (of_rows[p:], of_rows[:p])
    return [of_Q, of_q, of_G, of_upper[p:], of_A, of_upper[:p] + of_lower[:p]]
