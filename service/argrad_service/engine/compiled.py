"""Strictly convex QPs on the CPU, by the compiled kernels: arrays in, and a factor that serves the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from argrad_service.engine.active_set import Rows
from argrad_service.engine.data import Data, Residuals
from argrad_service.engine.kernels import batch as kernels
from argrad_service.engine.kernels.active_set import NOT_DEFINITE, SOLVED, UNDECIDED
from argrad_service.engine.kernels.lapack import LETTERS, Lapack, load
from argrad_service.engine.kernels.pool import blas_for, over_batch
from argrad_service.engine.options import ShouldStop, never_stop
from argrad_service.engine.point import Finished

Array = NDArray[np.float64]

_WHITENED = "whitened"


@dataclass(frozen=True, kw_only=True, eq=False)
class Factors:
    """What the kernels know of a batch (see `kernels.batch.solve_range`).

    Args:
        L: `(1 or B, n, n)`.
        X: `(1 or B, r, n)`.
        scale: `(1 or B, r)`.
        S: `(B, K, K)`.
        index: `(B, K)`.
        count: `(B,)`.
    """

    L: Array
    X: Array
    scale: Array
    S: Array
    index: NDArray[np.int64]
    count: NDArray[np.int64]

    def cut(self, start: int, stop: int) -> Factors:
        """Copies of what belongs to the problems from start to stop, of more than one."""
        L, X, scale = (a if len(a) == 1 else a[start:stop].copy() for a in (self.L, self.X, self.scale))
        S, index, count = self.S[start:stop].copy(), self.index[start:stop].copy(), self.count[start:stop].copy()
        return Factors(L=L, X=X, scale=scale, S=S, index=index, count=count)


@dataclass(frozen=True, kw_only=True, eq=False)
class Solved:
    """What the kernels found.

    Args:
        active: `(B, r)`.
        z: `(B, n)`.
        y: `(B, r)`.
        s: `(B, r − p)`.
        report: `(B, 5)`, primal residual, dual residual, gap, objective, scaled residual.
        steps: `(B,)`, rounds of pivoting and steps of the dual active set.
        code: `(B,)`, of `kernels.active_set`.
        factors: Of the problems that were solved.
    """

    active: Tensor
    z: Tensor
    y: Tensor
    s: Tensor
    report: Tensor
    steps: Tensor
    code: Tensor
    factors: Factors


def solve_batch(data: Data, should_stop: ShouldStop = never_stop) -> Solved:
    """Solve strictly convex QPs; what is not strictly convex or not decided says so in its code.

    Args:
        data: The problems.
        should_stop: Asked between pieces of the batch.

    Raises:
        Stopped: should_stop() was true.
    """
    Q, q, C, d = (_array(t) for t in (data.Q, data.q, data.C, data.d))
    batch, n, r = data.B, data.n, d.shape[1]
    most = min(r, n)
    lapack, work = _lapack(), (np.zeros(4, np.int32), LETTERS, np.zeros(2))
    shares_q, shares_both = len(Q) == 1, len(Q) == len(C) == 1
    prepared, sources = data.prepared, (data.Q, data.C)
    ready = None if prepared is None else prepared.find(_WHITENED, sources)
    if ready is None:
        count = 1 if shares_both else batch
        is_kept = prepared is not None and prepared.knows(sources)
        L, X, scale = np.empty((1 if shares_q else batch, n, n)), np.empty((count, r, n)), np.empty((count, r))
        gram = np.empty((count, r, r) if r <= n and (shares_both or is_kept) else (0, 0, 0))
    else:
        L, X, scale, gram = ready
    factors = Factors(
        L=L,
        X=X,
        scale=scale,
        S=np.empty((batch, most, most)),
        index=np.zeros((batch, most), np.int64),
        count=np.zeros(batch, np.int64),
    )
    code = np.full(batch, NOT_DEFINITE)
    active, steps = np.zeros((batch, r), np.bool_), np.zeros(batch, np.int64)
    z, y, s = np.zeros((batch, n)), np.zeros((batch, r)), np.zeros((batch, r - data.p))
    report = np.zeros((batch, 5))
    with blas_for(n**3 / 3 + (r * n * n + r * r * n if shares_both else 0)):
        is_definite = ready is not None or not shares_q or kernels.factor_hessian(lapack, Q[0], L[0], work)
        if is_definite and shares_both and ready is None:
            kernels.whiten(lapack, L[0], C[0], X[0], scale[0], work)
            if r <= n:
                kernels.full_gram(lapack, X[0], gram[0], work)
    if is_definite:
        f = factors
        outputs = (f.L, f.X, f.scale, gram, f.S, f.index, f.count, active, z, y, s, report, steps, code)

        def run(start: int, stop: int) -> None:
            kernels.solve_range(lapack, LETTERS, start, stop, Q, q, C, d, data.p, ready is not None, *outputs)

        whitening = 0.0 if ready is not None else r * n * n + r * r * n
        over_batch(run, batch, work=n**3 / 3 + whitening + 1e3, should_stop=should_stop)
        # Every comparison with NaN is false: what overflowed would pass as solved.
        if not (np.isfinite(report).all() and np.isfinite(z).all()):
            overflowed = ~(np.isfinite(report).all(axis=1) & np.isfinite(z).all(axis=1))
            code[overflowed & (code == SOLVED)] = UNDECIDED
        if ready is None and prepared is not None and not (code == NOT_DEFINITE).any():
            prepared.keep(_WHITENED, sources, (L, X, scale, gram))
    return Solved(
        active=torch.from_numpy(active),
        z=torch.from_numpy(z),
        y=torch.from_numpy(y),
        s=torch.from_numpy(s),
        report=torch.from_numpy(report),
        steps=torch.from_numpy(steps),
        code=torch.from_numpy(code),
        factors=factors,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class CompiledFactor:
    """The KKT systems of a batch whose every problem the kernels solved; stands in for an `ActiveSetFactor`.

    Args:
        data: The problems.
        factors: What the kernels left.
        rows: The active rows.
    """

    data: Data
    factors: Factors
    rows: Rows

    @property
    def is_dependent(self) -> Tensor:
        """None is: the kernels keep independent rows only."""
        return torch.zeros(self.data.B, dtype=torch.bool)

    @property
    def is_nonunique(self) -> Tensor:
        """None is: the kernels take strictly convex problems only."""
        return torch.zeros(self.data.B, dtype=torch.bool)

    @property
    def nbytes(self) -> int:
        """Bytes held beyond the problem's own data."""
        f = self.factors
        return sum(a.nbytes for a in (f.L, f.X, f.scale, f.S, f.index))

    def cut(self, start: int, stop: int) -> CompiledFactor:
        """Copies of what belongs to the problems from start to stop, of more than one."""
        data, factors, rows = self.data.cut(start, stop), self.factors.cut(start, stop), self.rows.cut(start, stop)
        return CompiledFactor(data=data, factors=factors, rows=rows)

    def solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Solve for j right-hand sides a problem.

        Args:
            r1: `(B, n, j)`.
            r2: `(B, k, j)` on the active rows, 0 on padding.

        Returns:
            x `(B, n, j)`, y `(B, k, j)`, and the relative residual of each problem `(B,)`.
        """
        data, f = self.data, self.factors
        batch, n, count = r1.shape
        k, most = r2.shape[1], f.S.shape[1]
        right = np.zeros((batch, count, most))
        right[:, :, :k] = r2.transpose(1, 2).numpy()
        x, y, error = np.empty((batch, count, n)), np.empty((batch, count, most)), np.empty(batch)
        Q, C, left = _array(data.Q), _array(data.C), _array(r1.transpose(1, 2))
        lapack = _lapack()

        def run(start: int, stop: int) -> None:
            kernels.differentiate_range(
                lapack, LETTERS, start, stop, Q, C, f.L, f.X, f.scale, f.S, f.index, f.count, left, right, x, y, error
            )

        over_batch(run, batch, work=count * (6.0 * n * n + 1e3))
        out = torch.from_numpy(x).transpose(1, 2), torch.from_numpy(y)[:, :, :k].transpose(1, 2)
        return *out, torch.from_numpy(error)


def finish(data: Data, solved: Solved) -> Finished:
    """Everything that a batch needs whose every problem was solved: nothing is left to compute."""
    names = ("primal", "dual", "gap", "objective", "scaled")
    judged = Residuals(**dict(zip(names, solved.report.unbind(1), strict=True)))
    return Finished(factor=factor_of(data, solved.factors), s=solved.s, judged=judged)


def factor_of(data: Data, factors: Factors) -> CompiledFactor:
    """The KKT systems of problems that the kernels solved."""
    count, index = torch.from_numpy(factors.count), torch.from_numpy(factors.index)
    width = int(count.amax())
    rows = Rows(index=index[:, :width], valid=torch.arange(width) < count.unsqueeze(-1))
    return CompiledFactor(data=data, factors=factors, rows=rows)


def join_factors(parts: Sequence[Factors], counts: Sequence[int]) -> Factors:
    """What the kernels know of several batches of one shape, as of one; copies, but for what all of them share."""

    def shared_or_all(arrays: Sequence[Array]) -> Array:
        if len(arrays[0]) == 1 and all(array is arrays[0] for array in arrays):
            return arrays[0]
        repeated = [np.broadcast_to(a, (n, *a.shape[1:])) for a, n in zip(arrays, counts, strict=True)]
        return np.concatenate(repeated)

    return Factors(
        L=shared_or_all([part.L for part in parts]),
        X=shared_or_all([part.X for part in parts]),
        scale=shared_or_all([part.scale for part in parts]),
        S=np.concatenate([part.S for part in parts]),
        index=np.concatenate([part.index for part in parts]),
        count=np.concatenate([part.count for part in parts]),
    )


@lru_cache(maxsize=1)
def _lapack() -> Lapack:
    return load()


def _array(tensor: Tensor) -> Array:
    return tensor.contiguous().numpy()
