"""Strictly convex QPs on the CPU, by the compiled kernels: arrays in, and a factor that serves the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from argrad_service.engine.active_set import Rows
from argrad_service.engine.data import Data, Residuals
from argrad_service.engine.kernels import batch as kernels
from argrad_service.engine.kernels import outer, shared_rows, small
from argrad_service.engine.kernels.active_set import NOT_DEFINITE
from argrad_service.engine.kernels.lapack import LETTERS, Lapack, load
from argrad_service.engine.kernels.pool import blas_for, over_batch
from argrad_service.engine.options import ShouldStop, never_stop
from argrad_service.engine.point import Finished, FormsGradients
from argrad_service.engine.sizes import is_small

Array = NDArray[np.float64]

_NOTHING = np.empty((0, 0, 0))
_WHITENED = "whitened"
_INVERSE = "inverse"


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
        is_whole: Whether every problem was solved; what follows is known then.
        width: Most active rows of a problem.
        worst: Largest scaled residual.
    """

    active: Tensor
    z: Tensor
    y: Tensor
    s: Tensor
    report: Tensor
    steps: Tensor
    code: Tensor
    factors: Factors
    is_whole: bool
    width: int
    worst: float


def solve_batch(data: Data, should_stop: ShouldStop = never_stop, given_Q: Tensor | None = None) -> Solved:
    """Solve strictly convex QPs; what is not strictly convex or not decided says so in its code.

    Args:
        data: The problems.
        should_stop: Asked between pieces of the batch.
        given_Q: Of a batch of small problems whose symmetric parts data.Q has room for, and gets.

    Raises:
        Stopped: should_stop() was true.
    """
    Q, q, C, d = (_array(t) for t in (data.Q, data.q, data.C, data.d))
    batch, n, r = data.B, data.n, d.shape[1]
    most, takes_loops = min(r, n), is_small(n, r)
    takes_gram = takes_loops or r <= n
    lapack, work = _lapack(), (np.zeros(4, np.int32), LETTERS, np.zeros(2))
    shares_q, shares_both = len(Q) == 1, len(Q) == len(C) == 1
    # The kernel for small problems writes to all of it; the others write to what they solve, and a Q that all of them
    # share and that is not definite keeps any kernel from running.
    room: Callable[..., Any] = np.empty if takes_loops and not shares_q else np.zeros
    prepared, sources = data.prepared, (data.Q, data.C)
    ready = None if prepared is None else prepared.find(_WHITENED, sources)
    if ready is None:
        count = 1 if shares_both else batch
        is_kept = prepared is not None and prepared.knows(sources)
        L, X, scale = np.empty((1 if shares_q else batch, n, n)), np.empty((count, r, n)), np.empty((count, r))
        gram = np.empty((count, r, r) if takes_gram and (shares_both or is_kept) else (0, 0, 0))
    else:
        L, X, scale, gram = ready
    factors = Factors(
        L=L,
        X=X,
        scale=scale,
        S=np.empty((batch, most, most)),
        index=room((batch, most), np.int64),
        count=np.zeros(batch, np.int64),
    )
    code = np.full(batch, NOT_DEFINITE)
    active, steps = room((batch, r), np.bool_), np.zeros(batch, np.int64)
    z, y, s, report = room((batch, n)), room((batch, r)), room((batch, r - data.p)), room((batch, 5))
    asymmetric = _NOTHING if given_Q is None else _array(given_Q)
    with blas_for(n**3 / 3 + (r * n * n + r * r * n if shares_both else 0)):
        is_definite = ready is not None or not shares_q or kernels.factor_hessian(lapack, Q[0], L[0], work)
        if is_definite and shares_both and ready is None:
            kernels.whiten(lapack, L[0], C[0], X[0], scale[0], work)
            if takes_gram:
                kernels.full_gram(lapack, X[0], gram[0], work)
    if is_definite:
        f = factors
        arrays = (f.L, f.X, f.scale, gram, f.S, f.index, f.count, active, z, y, s, report, steps, code)
        given = (Q, q, C, d, data.p, ready is not None, *arrays)
        inverse = _inverse(data, gram) if shares_both and not takes_loops and r <= n else None

        def run(start: int, stop: int) -> None:
            if takes_loops:
                small.solve_small_range(start, stop, asymmetric, *given)
            elif inverse is not None:
                shared = (f.L, f.X, f.scale, gram, inverse, *arrays[4:])
                shared_rows.solve_shared_range(lapack, LETTERS, start, stop, Q, q, C, d, data.p, *shared)
            else:
                kernels.solve_range(lapack, LETTERS, start, stop, *given)

        whitening = 0.0 if ready is not None else r * n * n + r * r * n
        over_batch(run, batch, work=n**3 / 3 + whitening + 1e3, should_stop=should_stop, uses_blas=not takes_loops)
        if ready is None and prepared is not None and not (code == NOT_DEFINITE).any():
            prepared.keep(_WHITENED, sources, (L, X, scale, gram))
    is_whole, width, worst = kernels.summarise(code, factors.count, report)
    return Solved(
        active=torch.from_numpy(active),
        z=torch.from_numpy(z),
        y=torch.from_numpy(y),
        s=torch.from_numpy(s),
        report=torch.from_numpy(report),
        steps=torch.from_numpy(steps),
        code=torch.from_numpy(code),
        factors=factors,
        is_whole=is_whole,
        width=width,
        worst=worst,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class CompiledFactor(FormsGradients):
    """The KKT systems of a batch whose every problem the kernels solved; stands in for an `ActiveSetFactor`.

    Args:
        data: The problems.
        factors: What the kernels left.
        width: Most active rows of a problem.
    """

    data: Data
    factors: Factors
    width: int

    @cached_property
    def rows(self) -> Rows:
        """The active rows."""
        count, index = torch.from_numpy(self.factors.count), torch.from_numpy(self.factors.index)
        return Rows(index=index[:, : self.width], valid=torch.arange(self.width) < count.unsqueeze(-1))

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
        return CompiledFactor(data=self.data.cut(start, stop), factors=self.factors.cut(start, stop), width=self.width)

    def solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Solve for j right-hand sides a problem.

        Args:
            r1: `(B, n, j)`.
            r2: `(B, k, j)` on the active rows, 0 on padding.

        Returns:
            x `(B, n, j)`, y `(B, k, j)`, and the relative residual of each problem `(B,)`.
        """
        full = self.rows.scatter(r2.transpose(1, 2).transpose(0, 1), self.data.d.shape[1]).transpose(0, 1)
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
        return tuple(torch.from_numpy(a) for a in self._solve_rows(r1, r2, None))  # type: ignore[return-value]

    @property
    def forms_gradients(self) -> bool:
        """Whether `gradients` works: for problems so small that passing over them once more is what takes the time."""
        return is_small(self.data.n, self.data.d.shape[1])

    def gradients(self, z: Tensor, y: Tensor, g_z: Tensor, wrt: Collection[str]) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of batched parameters from a cotangent of z, formed by whoever solves for the adjoint.

        Args:
            z: `(B, n)`, the solution.
            y: `(B, p + m)`, its multipliers.
            g_z: `(B, n)`.
            wrt: Names of parameters, all of which have a batch dimension.

        Returns:
            By name `(B, …)`, and the relative residuals `(B,)`.
        """
        batch, n = g_z.shape
        p, m = self.data.p, self.data.d.shape[1] - self.data.p
        shapes = {"Q": (n, n), "G": (m, n), "A": (p, n)}
        found = {name: np.empty((batch if name in wrt else 0, *shape)) for name, shape in shapes.items()}
        point = _array(z), _array(y)

        def form(start: int, stop: int, x: Array, d_y: Array) -> None:
            outer.form_range(start, stop, p, *point, x, d_y, found["Q"], found["G"], found["A"])

        x, d_y, error = self._solve_rows(-g_z.unsqueeze(1), None, form)
        if not np.isfinite(x.sum()):
            error[:] = np.nan  # nobody has looked at the cotangent
        vectors = {"q": x[:, 0], "b": -d_y[:, 0, :p], "h": -d_y[:, 0, p:]}
        gradients = {name: torch.from_numpy(vectors[name] if name in vectors else found[name]) for name in wrt}
        return gradients, torch.from_numpy(error)

    def _solve_rows(
        self, r1: Tensor, r2: Tensor | None, then: Callable[[int, int, Array, Array], None] | None
    ) -> tuple[Array, Array, Array]:
        """`solve_rows` on arrays; `then` is called in the same thread when a range is solved."""
        data, f = self.data, self.factors
        batch, count, n = r1.shape
        rows = data.d.shape[1]
        right = _NOTHING if r2 is None else _array(r2)
        x, y, error = np.empty((batch, count, n)), np.zeros((batch, count, rows)), np.empty(batch)
        lapack, takes_loops = _lapack(), is_small(n, rows)
        given = (
            _array(data.Q),
            _array(data.C),
            f.L,
            f.X,
            f.scale,
            f.S,
            f.index,
            f.count,
            _array(r1),
            right,
            x,
            y,
            error,
        )

        def run(start: int, stop: int) -> None:
            if takes_loops:
                small.differentiate_small_range(start, stop, *given)
            else:
                kernels.differentiate_range(lapack, LETTERS, start, stop, *given)
            if then is not None:
                then(start, stop, x, y)

        over_batch(run, batch, work=count * (6.0 * n * n + 1e3), uses_blas=not takes_loops)
        return x, y, error


def finish(data: Data, solved: Solved) -> Finished:
    """Everything that a batch needs whose every problem was solved: nothing is left to compute."""
    names = ("primal", "dual", "gap", "objective", "scaled")
    judged = Residuals(**dict(zip(names, solved.report.unbind(1), strict=True)))
    factor = CompiledFactor(data=data, factors=solved.factors, width=solved.width)
    return Finished(factor=factor, s=solved.s, judged=judged, worst=solved.worst)


def factor_of(data: Data, factors: Factors) -> CompiledFactor:
    """The KKT systems of problems that the kernels solved."""
    return CompiledFactor(data=data, factors=factors, width=int(factors.count.max()))


def join_factors(parts: Sequence[Factors], counts: Sequence[int]) -> Factors:
    """What the kernels know of several batches of one shape, as of one; copies, but for what all of them share."""

    def shared_or_all(arrays: Sequence[Array]) -> Array:
        if len(arrays[0]) == 1 and all(array is arrays[0] for array in arrays):
            return arrays[0]
        repeated = [np.broadcast_to(a, (n, *a.shape[1:])) for a, n in zip(arrays, counts, strict=True)]
        # Into a place of its own: what is repeated has no stride, and its order would be that of the result, which
        # LAPACK reads by its address.
        return np.concatenate(repeated, out=np.empty((sum(counts), *arrays[0].shape[1:])))

    return Factors(
        L=shared_or_all([part.L for part in parts]),
        X=shared_or_all([part.X for part in parts]),
        scale=shared_or_all([part.scale for part in parts]),
        S=np.concatenate([part.S for part in parts]),
        index=np.concatenate([part.index for part in parts]),
        count=np.concatenate([part.count for part in parts]),
    )


def _inverse(data: Data, gram: Array) -> Array | None:
    """The inverse of the Gram matrix that a batch shares, where it pays and the rows are independent."""
    if data.B < shared_rows.LEAST_BATCH or gram.shape[1] < shared_rows.LEAST_ROWS:
        return None
    sources, prepared = (data.Q, data.C), data.prepared
    inverse: Array | None = None if prepared is None else prepared.find(_INVERSE, sources)
    if inverse is None:
        inverse, work = np.empty(gram.shape[1:]), (np.zeros(4, np.int32), LETTERS, np.zeros(2))
        with blas_for(float(gram.shape[1]) ** 3):
            if not shared_rows.invert(_lapack(), gram[0], inverse, work):
                return None
        if prepared is not None:
            prepared.keep(_INVERSE, sources, inverse)
    return inverse


@lru_cache(maxsize=1)
def _lapack() -> Lapack:
    return load()


def _array(tensor: Tensor) -> Array:
    return tensor.contiguous().numpy()
