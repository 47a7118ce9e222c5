"""qpth: OptNet's own solver, a batched interior point in torch."""

from __future__ import annotations

import sys
import types
from typing import Any
from unittest import mock

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.contestants.base import RowsContestant, everywhere
from benchmarks.forms import Rows


class Qpth(RowsContestant):
    """`QPFunction`; with shared matrices it fails on recent torch, so that it gets copies.

    Args:
        eps: Its tolerance; 1e-12 is its default.
    """

    def __init__(self, eps: float = 1e-12) -> None:
        # qpth imports cvxpy for a solver that is not used here: seconds for an import statement.
        with mock.patch.dict(sys.modules, {"cvxpy": sys.modules.get("cvxpy", types.ModuleType("cvxpy"))}):
            from qpth.qp import QPFunction
        self.function: Any = QPFunction(verbose=-1, eps=eps)
        self.absent = torch.empty(0, dtype=torch.float64)

    def solve_rows(self, rows: Rows) -> Float[Tensor, "batch n"]:
        rows = everywhere(rows, len(self.workload.grad_z))
        A = self.absent if rows.A is None else rows.A
        b = self.absent if rows.b is None else rows.b
        return self.function(rows.Q, rows.q, rows.G, rows.h, A, b)  # type: ignore[no-any-return]
