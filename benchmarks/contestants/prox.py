"""proxsuite: its torch layer, and its C++ batch called without the layer's loops in Python."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.contestants.base import RowsContestant, everywhere
from benchmarks.forms import Rows

_NO_BOUND = -1e20


class Proxsuite(RowsContestant):
    """`QPFunction` with its parallel solver, on all cores."""

    def __init__(self) -> None:
        from proxsuite.torch.qplayer import QPFunction

        self.function: Any = QPFunction(
            eps=1e-10, eps_backward=1e-9, rho_backward=1e-8, mu_backward=1e-8, omp_parallel=True
        )
        self.absent = torch.empty(0, dtype=torch.float64)

    def solve_rows(self, rows: Rows) -> Float[Tensor, "batch n"]:
        A = self.absent if rows.A is None else rows.A
        b = self.absent if rows.b is None else rows.b
        with _as_proxsuite_needs():
            found = self.function(rows.Q, rows.q, A, b, rows.G, torch.full_like(rows.h, _NO_BOUND), rows.h)
        return found[0]  # type: ignore[no-any-return]

    def backward(self) -> None:
        with _as_proxsuite_needs():
            super().backward()


@contextmanager
def _as_proxsuite_needs() -> Iterator[None]:
    """Its gradients have torch's default dtype, and its threads are half of os.cpu_count()."""
    before, cores = torch.get_default_dtype(), len(os.sched_getaffinity(0))
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch("os.cpu_count", return_value=2 * cores), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)


class ProxqpBatch(RowsContestant):
    """`solve_in_parallel` and `solve_backward_in_parallel` of the dense batch, as an autograd function."""

    def solve_rows(self, rows: Rows) -> Float[Tensor, "batch n"]:
        rows = everywhere(rows, len(self.workload.grad_z))
        return _Batch.apply(rows.Q, rows.q, rows.G, rows.h, rows.A, rows.b)  # type: ignore[no-any-return, no-untyped-call]


class _Batch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, Q: Tensor, q: Tensor, G: Tensor, h: Tensor, A: Tensor | None, b: Tensor | None
    ) -> Float[Tensor, "batch n"]:
        import proxsuite

        dense = proxsuite.proxqp.dense
        arrays = [None if part is None else part.detach().numpy() for part in (Q, q, G, h, A, b)]
        batch, n, p, m = len(q), q.shape[-1], 0 if b is None else b.shape[-1], h.shape[-1]
        problems, low = dense.BatchQP(), np.full(m, _NO_BOUND)
        for k in range(batch):
            H, g, C, u, equal, right = (None if part is None else part[k] for part in arrays)
            problem = problems.init_qp_in_place(n, p, m)
            problem.settings.eps_abs = 1e-10
            problem.settings.primal_infeasibility_solving = False
            problem.init(H=H, g=g, A=equal, b=right, C=C, l=low, u=u)
        threads = len(os.sched_getaffinity(0))
        dense.solve_in_parallel(num_threads=threads, qps=problems)
        ctx.problems, ctx.sizes, ctx.threads = problems, (batch, n, p, m), threads
        return torch.from_numpy(np.stack([problems.get(k).results.x for k in range(batch)]))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        import proxsuite

        dense = proxsuite.proxqp.dense
        batch, _, p, m = ctx.sizes
        losses = dense.VectorLossDerivatives()
        for g in grad_outputs[0].numpy():
            losses.append(np.concatenate([g, np.zeros(p + m)]))
        dense.solve_backward_in_parallel(
            num_threads=ctx.threads,
            qps=ctx.problems,
            loss_derivatives=losses,
            eps=1e-9,
            rho_backward=1e-8,
            mu_backward=1e-8,
        )
        data = [ctx.problems.get(k).model.backward_data for k in range(batch)]
        names = ("dL_dH", "dL_dg", "dL_dC", "dL_du", "dL_dA", "dL_db")
        return tuple(
            torch.from_numpy(np.stack([getattr(one, name) for one in data])) if needed else None
            for name, needed in zip(names, ctx.needs_input_grad, strict=True)
        )
