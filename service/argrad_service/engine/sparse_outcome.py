"""A sparse problem in SciPy's terms, and the outcome of a worker's task on it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from argrad.problems import Flag, Solution, Status
from argrad.problems.sparse import Constants, SparseMatrix, SparseQP
from argrad_service.engine.options import ShouldStop, SolverOptions, never_stop
from argrad_service.engine.outcome import Outcome
from argrad_service.engine.solution import WEAK
from argrad_service.sparse.matrices import Mask, Matrices, Matrix, Vector
from argrad_service.sparse.problem import Problem, residuals, size
from argrad_service.sparse.separable import Separable, SeparableSystem
from argrad_service.sparse.system import Order, System
from argrad_service.sparse.tasks import Found


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseForward(Outcome):
    """Outcome of a sparse problem.

    Args:
        data: The problem in stacked rows.
        active: `(p + m,)`, strongly active rows.
        is_optimal: Whether there is a solution to differentiate.
        is_weak: Whether rows were left out because they are weakly active.
        order: Of elimination, for the system of `active`.
        factor_nbytes: Bytes of its factor, as the worker's had.
        separable: The problem in separable form, if it was solved in it; its KKT system needs no factor then.
    """

    data: Problem
    active: Mask
    is_optimal: bool
    is_weak: bool
    order: Order | None
    factor_nbytes: int
    separable: Separable | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def nbytes(self) -> int:
        """Bytes that keeping this outcome costs, with the factor that its first derivative forms."""
        tensors = [*self.problem.parameters().values(), *self.solution.blocks().values()]
        return sum(t.untyped_storage().nbytes() for t in tensors) + self.data.nbytes + self.factor_nbytes

    def stopped_by(self, should_stop: ShouldStop) -> Self:  # noqa: ARG002 - as of every outcome
        """This very outcome: one factorisation, which all its derivatives share, is not interrupted."""
        return self

    @functools.cached_property
    def _formed(self) -> tuple[System | SeparableSystem, bool, bool]:
        if self.separable is not None:
            simple = SeparableSystem(self.data, self.separable, np.flatnonzero(self.active))
            if simple.is_regular:
                return simple, False, False
        system = System(self.data, np.flatnonzero(self.active), self.order)
        return (system, *system.is_singular())

    def system(self) -> tuple[System | SeparableSystem, bool, bool]:
        """The factored system; whether the primal solution is not unique; whether active rows are dependent."""
        with self.lock:
            return self._formed


def stack(problem: SparseQP) -> Problem:
    """Symmetrise Q, stack the rows and empty those with h = +inf."""
    h = np.zeros(0) if problem.h is None else as_array(problem.h)
    b = np.zeros(0) if problem.b is None else as_array(problem.b)
    is_bound = np.isfinite(h)
    if problem.constants is not None and is_bound.all():
        return Problem(matrices=_constant(problem.constants), q=as_array(problem.q), d=np.concatenate([b, h]))
    C = _rows([problem.matrices[name] for name in ("A", "G") if name in problem.matrices], problem.n)
    if not is_bound.all():
        C = sparse.diags(np.concatenate([np.ones(len(b)), is_bound])) @ C
        h = np.where(is_bound, h, 1.0)
    if not C.data.all():
        C.eliminate_zeros()
    matrices = Matrices(Q=_hessian(problem.matrices.get("Q"), problem.n), C=C, p=len(b))
    return Problem(matrices=matrices, q=as_array(problem.q), d=np.concatenate([b, h]))


@functools.lru_cache(maxsize=16)
def _constant(constants: Constants) -> Matrices:
    """The stacked matrices of problems whose rows all can bind."""
    matrices = constants.matrices
    blocks = [matrices[name] for name in ("A", "G") if name in matrices]
    n = next(iter(matrices.values())).columns
    C = _rows(blocks, n)
    if not C.data.all():
        C.eliminate_zeros()
    return Matrices(Q=_hessian(matrices.get("Q"), n), C=C, p=len(blocks[0].indptr) - 1 if "A" in matrices else 0)


def _rows(matrices: Sequence[SparseMatrix], n: int) -> Matrix:
    """Matrices one above the other; SciPy's way of doing so takes longer than a search over breakpoints."""
    ends, indptr = 0, [np.zeros(1, np.int64)]
    for matrix in matrices:
        indptr.append(matrix.indptr[1:].cpu().numpy() + ends)
        ends += len(matrix.indices)
    indices = [np.zeros(0, np.int64), *(matrix.indices.cpu().numpy() for matrix in matrices)]
    values = [np.zeros(0), *(as_array(matrix.values) for matrix in matrices)]
    starts = np.concatenate(indptr)
    parts = (np.concatenate(values), np.concatenate(indices), starts)
    return sparse.csr_matrix(parts, shape=(len(starts) - 1, n))


def _hessian(matrix: SparseMatrix | None, n: int) -> Matrix:
    """The symmetric part of Q, CSC."""
    if matrix is None:
        return sparse.csc_matrix((n, n))
    values, indices, indptr = as_array(matrix.values), matrix.indices.cpu().numpy(), matrix.indptr.cpu().numpy()
    diagonal = np.arange(n + 1)
    if np.array_equal(indptr, diagonal) and np.array_equal(indices, diagonal[:n]) and values.all():
        return sparse.csc_matrix((values, indices, indptr), shape=(n, n))
    Q = csr(matrix, values)
    return (0.5 * (Q + Q.T)).tocsc()


def csr(matrix: SparseMatrix, values: Vector, rows: int | None = None) -> Matrix:
    """A matrix with other values on its pattern; with so many rows, should it be a block that is not there."""
    shape = (len(matrix.indptr) - 1 if rows is None else rows, matrix.columns)
    return sparse.csr_matrix((values, matrix.indices.cpu().numpy(), matrix.indptr.cpu().numpy()), shape=shape)


def as_array(tensor: Tensor) -> Vector:
    """A tensor as float64 in the host's memory."""
    return tensor.detach().cpu().to(torch.float64).numpy()


def conclude(
    problem: SparseQP,
    data: Problem,
    found: Found,
    options: SolverOptions,
    *,
    solver: str,
    separable: Separable | None = None,
) -> SparseForward:
    """Slacks, residuals, weakly active rows and flags of what a worker found."""
    active, z, y = found.guess
    y = y.copy()
    y[data.p :] = np.maximum(y[data.p :], 0.0)
    Cz = data.C @ z
    judged = residuals(data, z, y, Cz)
    status = Status(found.status)
    if status == Status.OPTIMAL and not judged.scaled <= options.tolerance:
        status = Status.NUMERICAL_ERROR
    is_optimal = status == Status.OPTIMAL
    h = data.d[data.p :] if problem.h is None else as_array(problem.h)
    lam, s = y[data.p :], np.maximum((data.d - Cz)[data.p :], 0.0)
    s[active[data.p :]] = 0.0
    cannot_bind = np.isinf(h)
    weak = (lam <= WEAK * size(lam)) & (s <= WEAK * (1 + np.abs(data.d[data.p :]))) & ~cannot_bind
    s[cannot_bind] = np.inf
    is_weak, strong = bool(weak.any()), active
    if is_weak:
        strong = active.copy()
        strong[data.p :] &= ~weak
    is_weak = is_weak and is_optimal
    order = None if found.order is None else _restricted(found.order, data.n, strong[active])
    flags = [Flag.DEGENERATE] if is_weak else []
    if is_optimal and not found.is_exact:
        flags.append(Flag.REGULARISED)
    blocks = {"z": z, "nu": y[: data.p], "lam": lam, "s": s}
    numbers = torch.tensor([[judged.primal], [judged.dual], [judged.gap], [judged.objective]], dtype=torch.float64)
    primal, dual, gap, objective = numbers.unbind()
    return SparseForward(
        problem=problem,
        solution=Solution(**{name: torch.from_numpy(block).unsqueeze(0) for name, block in blocks.items()}),
        status=(status,),
        flags=(tuple(flags),),
        iterations=torch.tensor([found.iterations]),
        primal_residual=primal,
        dual_residual=dual,
        gap=gap,
        objective=objective,
        solver=solver,
        options=replace(options, should_stop=never_stop),
        data=data,
        active=strong,
        is_optimal=is_optimal,
        is_weak=is_weak,
        order=order,
        factor_nbytes=found.factor_nbytes,
        separable=separable,
    )


def _restricted(order: Order, n: int, is_kept: Mask) -> Order:
    """An order of elimination without the rows that are left out."""
    if is_kept.all():
        return order
    position = np.concatenate([np.arange(n), np.where(is_kept, n - 1 + np.cumsum(is_kept), -1)])
    moved = position[order]
    return np.asarray(moved[moved >= 0])
