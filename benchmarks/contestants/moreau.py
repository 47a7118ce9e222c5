"""moreau: conic solver in Rust with a torch layer; QPs by an active-set code or by an interior point."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.contestants.base import TorchContestant
from benchmarks.forms import Rows, as_qp
from benchmarks.workloads import Workload


class Moreau(TorchContestant):
    """`moreau.torch.Solver`: min ½xᵀPx + qᵀx, Ax + s = b, the rows of A first the equalities and then G's.

    Args:
        solver: `auto`, which is the active-set code for small QPs, or `ipm`.
        tolerance: Of the interior point.
    """

    def __init__(self, solver: str = "auto", tolerance: float = 1e-11) -> None:
        self.solver, self.tolerance = solver, tolerance

    def build(self, workload: Workload) -> None:
        import moreau
        from moreau.torch import Solver

        if workload.kind == "sparsemax":
            n = workload.grad_z.shape[-1]
            eye = torch.arange(n)
            rows = torch.cat([torch.zeros(n, dtype=torch.int64), 1 + torch.arange(2 * n)])
            columns = torch.cat([eye, eye, eye])
            P, C, p, m = _Pattern(eye, eye, n), _Pattern(rows, columns, 1 + 2 * n), 1, 2 * n
            self.fixed = (torch.full((n,), 2.0).double(), torch.cat([torch.ones(2 * n), -torch.ones(n)]).double())
        else:
            example = as_qp(workload.kind, workload.parameters)
            n, m = example.q.shape[-1], example.h.shape[-1]
            p = 0 if example.b is None else example.b.shape[-1]
            stacked = example.G if example.A is None else torch.cat([example.A, example.G], -2)
            P, C = _Pattern.of(example.Q), _Pattern.of(stacked)
        self.P, self.C = P, C
        settings = moreau.Settings(device="cpu", batch_size=len(workload.grad_z), enable_grad=True, solver=self.solver)
        if self.solver == "ipm":
            settings.ipm_settings = moreau.IPMSettings(
                tol_gap_abs=self.tolerance, tol_gap_rel=self.tolerance, tol_feas=self.tolerance
            )
        cones = moreau.Cones(num_zero_cones=p, num_nonneg_cones=m)
        self.engine = Solver(n, p + m, P.offsets, P.columns, C.offsets, C.columns, cones, settings=settings)

    def solve(self, given: Mapping[str, Tensor]) -> Float[Tensor, "batch n"]:
        if self.workload.kind == "sparsemax":
            y, u = given["y"], given["u"]
            right = torch.cat([y.new_ones(len(y), 1), u, torch.zeros_like(u)], -1)
            return self.engine.solve(*self.fixed, -2.0 * y, right).x  # type: ignore[no-any-return]
        rows: Rows = as_qp(self.workload.kind, given)
        batch = len(self.workload.grad_z)
        stacked = rows.G if rows.A is None else torch.cat([rows.A, rows.G], -2)
        right = rows.h if rows.b is None else torch.cat([rows.b, rows.h], -1)
        P, C = self.P.values(_shared(rows.Q)), self.C.values(_shared(stacked))
        found: Any = self.engine.solve(P, C, rows.q, right.expand(batch, right.shape[-1]))
        return found.x[..., : self.workload.grad_z.shape[-1]]  # type: ignore[no-any-return]


def _shared(matrix: Tensor) -> Tensor:
    """A batch of one matrix is given as one that all share."""
    return matrix[0] if matrix.dim() == 3 and len(matrix) == 1 else matrix


class _Pattern:
    """Where a matrix is not zero, in the order of its rows."""

    def __init__(self, rows: Tensor, columns: Tensor, height: int) -> None:
        counts = torch.bincount(rows, minlength=height)
        self.offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        self.rows, self.columns = rows, columns

    @classmethod
    def of(cls, matrices: Tensor) -> _Pattern:
        """Of a matrix, or of all in a batch together."""
        where = (matrices != 0).reshape(-1, *matrices.shape[-2:]).any(0)
        rows, columns = where.nonzero(as_tuple=True)
        return cls(rows, columns, len(where))

    def values(self, matrix: Tensor) -> Tensor:
        """The entries on the pattern."""
        if len(self.rows) == matrix.shape[-2] * matrix.shape[-1]:
            return matrix.flatten(-2)
        return matrix[..., self.rows, self.columns]
