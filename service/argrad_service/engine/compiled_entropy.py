"""Problems with entropy and no quadratic term on the CPU, by the compiled kernels; see `compiled` for the others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from argrad_service.engine.active_set import Rows
from argrad_service.engine.data import Data, Residuals
from argrad_service.engine.entropy import tau_of
from argrad_service.engine.finish import Guess
from argrad_service.engine.kernels import entropic_batch as kernels
from argrad_service.engine.kernels.lapack import LETTERS, Lapack, load
from argrad_service.engine.kernels.pool import over_batch
from argrad_service.engine.options import SolverOptions
from argrad_service.engine.point import Finished, RowsFactor

Array = NDArray[np.float64]

STEPS = 15
"""Newton steps that a problem takes, roughly; for its work."""

MOST_WORK = 2e8
"""Floating-point operations of one Newton step above which batched torch takes the problem, for it asks `should_stop`
between two steps, and BLAS on several threads is as fast."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Solved:
    """What the kernels found.

    Args:
        active: `(B, r)`.
        z: `(B, n)`.
        y: `(B, r)`.
        iterations: `(B,)`.
        code: `(B,)`, of `kernels.active_set`.
        report: `(B, 5)`, primal residual, dual residual, gap, objective, scaled residual.
        factor: KKT systems of the problems that were solved.
    """

    active: Tensor
    z: Tensor
    y: Tensor
    iterations: Tensor
    code: Tensor
    report: Tensor
    factor: CompiledEntropyFactor

    def finished(self) -> Finished:
        """Everything that a batch needs whose every problem was solved; slacks are for the caller's own rows."""
        names = ("primal", "dual", "gap", "objective", "scaled")
        judged = Residuals(**dict(zip(names, self.report.unbind(1), strict=True)))
        return Finished(factor=self.factor, s=None, judged=judged, worst=float(judged.scaled.amax()))


def takes(data: Data) -> bool:
    """Whether the kernels are for these problems."""
    r = data.d.shape[1]
    return data.is_linear and data.q.device.type == "cpu" and r * r * (data.n + r / 3) <= MOST_WORK


def solve_batch(data: Data, options: SolverOptions, warm: Guess | None) -> Solved:
    """Solve problems with entropy and no quadratic term; what is not decided says so in its code.

    Args:
        data: The problems; `takes` was true of them.
        options: Iteration limit, and who asks to stop, between pieces of the batch.
        warm: Active set and point to begin with.

    Raises:
        Stopped: options.should_stop() was true.
    """
    batch, n, r = data.B, data.n, data.d.shape[1]
    most = min(r, n)
    q, C, d, tau = (t.contiguous().numpy() for t in (data.q, data.C, data.d, tau_of(data).squeeze(-1)))
    S, root, unit = np.empty((batch, most, most)), np.empty((batch, n)), np.empty((batch, most))
    index, count = np.zeros((batch, most), np.int64), np.zeros(batch, np.int64)
    iterations, code, report = np.zeros(batch, np.int64), np.zeros(batch, np.int64), np.zeros((batch, 5))
    active, z, y = np.zeros((batch, r), np.bool_), np.zeros((batch, n)), np.zeros((batch, r))
    if warm is not None:
        active[:], z[:], y[:] = warm.active.numpy(), warm.z.numpy(), warm.y.numpy()
    outputs = (S, root, unit, index, count, active, z, y, report, iterations, code)
    limit, has_guess = options.max_iterations, warm is not None

    def run(start: int, stop: int) -> None:
        kernels.solve_range(_lapack(), LETTERS, start, stop, q, tau, C, d, data.p, limit, has_guess, *outputs)

    step = r * n * (0.5 * r + 4.0) + r**3 / 6 + 30.0 * n
    over_batch(run, batch, work=STEPS * step, should_stop=options.should_stop)
    width = int(count.max(initial=0))
    valid = torch.arange(width) < torch.from_numpy(count).unsqueeze(-1)
    rows = Rows(index=torch.from_numpy(index[:, :width]), valid=valid)
    return Solved(
        active=torch.from_numpy(active),
        z=torch.from_numpy(z),
        y=torch.from_numpy(y),
        iterations=torch.from_numpy(iterations),
        code=torch.from_numpy(code),
        report=torch.from_numpy(report),
        factor=CompiledEntropyFactor(data=data, rows=rows, S=S, root=root, unit=unit, index=index, count=count),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class CompiledEntropyFactor(RowsFactor):
    """The KKT systems of a batch whose every problem the kernels solved; stands in for an `EntropyFactor`.

    Args:
        data: The problems.
        rows: The active rows.
        S, root, unit, index, count: What the kernels left; see `kernels.entropic_batch.solve_range`.
    """

    data: Data
    rows: Rows
    S: Array
    root: Array
    unit: Array
    index: NDArray[np.int64]
    count: NDArray[np.int64]

    @property
    def is_dependent(self) -> Tensor:
        """None is: the kernels confirm independent rows only."""
        return torch.zeros(self.data.B, dtype=torch.bool)

    @property
    def is_nonunique(self) -> Tensor:
        """None is: the objective is strictly convex."""
        return torch.zeros(self.data.B, dtype=torch.bool)

    @property
    def nbytes(self) -> int:
        """Bytes held beyond the problem's own data."""
        return sum(a.nbytes for a in (self.S, self.root, self.unit, self.index))

    def solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Solve for right-hand sides `(B, n, j)` and `(B, k, j)`; the third result is the relative residual `(B,)`."""
        full = self.rows.scatter(r2.permute(2, 0, 1), self.data.d.shape[1]).transpose(0, 1)
        x, y, error = self.solve_rows(r1.transpose(1, 2), full)
        return x.transpose(1, 2), self.rows.gather(y.transpose(0, 1)).permute(1, 2, 0), error

    def solve_rows(self, r1: Tensor, r2: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Solve for j right-hand sides a problem, on all rows at once.

        Args:
            r1: `(B, j, n)`.
            r2: `(B, j, p + m)`, of which the active rows are looked at; None for zeros.

        Returns:
            x `(B, j, n)`, y `(B, j, p + m)`, zero on rows that are not active, and the relative residuals `(B,)`.
        """
        batch, count, n = r1.shape
        most, rows = self.S.shape[1], self.data.d.shape[1]
        left, right = r1.contiguous().numpy(), np.empty((0, 0, 0)) if r2 is None else r2.contiguous().numpy()
        x, y, error = np.empty((batch, count, n)), np.zeros((batch, count, rows)), np.empty(batch)
        known = (self.data.C.contiguous().numpy(), self.S, self.root, self.unit, self.index, self.count)

        def run(start: int, stop: int) -> None:
            kernels.differentiate_range(_lapack(), LETTERS, start, stop, *known, left, right, x, y, error)

        over_batch(run, batch, work=most * n + count * 8.0 * (most * n + most * most) + 1e3)
        return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(error)


@lru_cache(maxsize=1)
def _lapack() -> Lapack:
    return load()
