"""What a forward solver hands on: a point and an active set of each problem, before the exact solution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from argrad.problems import Status
from argrad_service.engine.active_set import Rows
from argrad_service.engine.data import Data, Residuals, inf_norm, matvec, residuals
from argrad_service.engine.entropy import EntropyCandidates
from argrad_service.engine.finish import Guess, PrimalCandidates, find_active_set
from argrad_service.engine.semidefinite import cholesky_or_none

STATUSES = tuple(Status)
"""Statuses by code."""

CODE = {status: code for code, status in enumerate(STATUSES)}
"""Codes by status."""

NONCONVEX = 1e-9
"""Q is convex if it is positive semidefinite up to this, relative to its largest diagonal entry."""

NEAR = 1e-4
"""Scaled KKT residual up to which a caller's point counts as a solution."""

_ROUNDS = 3


class KKTSystem(Protocol):
    """The factored KKT system of a batch on its active sets: an `ActiveSetFactor`, or what a solver left."""

    @property
    def data(self) -> Data:
        """The problems."""
        ...

    @property
    def rows(self) -> Rows:
        """Their active rows."""
        ...

    @property
    def is_dependent(self) -> Tensor:
        """`(B,)`, whether active rows are linearly dependent."""
        ...

    @property
    def is_nonunique(self) -> Tensor:
        """`(B,)`, whether the primal solution is not unique."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held beyond the problem's own data."""
        ...

    def solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Solve for right-hand sides `(B, n, j)` and `(B, k, j)`; the third result is the relative residual `(B,)`."""
        ...


class RowsFactor(ABC):
    """A `KKTSystem` that takes right-hand sides of all rows as they are, without a gather and a scatter."""

    @abstractmethod
    def solve_rows(self, r1: Tensor, r2: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Solve for r₁ `(B, j, n)`, r₂ `(B, j, p + m)`, None for zeros; results likewise, and the relative residual."""


class FormsGradients(RowsFactor):
    """A `RowsFactor` that may form gradients too, while what it solved for is at hand."""

    @property
    @abstractmethod
    def forms_gradients(self) -> bool:
        """Whether it does, for problems of this size."""

    @abstractmethod
    def gradients(self, z: Tensor, y: Tensor, g_z: Tensor, wrt: Collection[str]) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of batched parameters, from a cotangent of z `(B, n)`, and the relative residuals `(B,)`."""


@runtime_checkable
class Divisible(Protocol):
    """A `KKTSystem` from which problems can be taken out."""

    def cut(self, start: int, stop: int) -> KKTSystem:
        """Copies of what belongs to the problems from start to stop, of more than one."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class KKTFactor:
    """What `kkt` differentiation reuses of a forward solve.

    Args:
        factor: KKT system of the strongly active rows.
        is_optimal: `(B,)`, problems that have a solution to differentiate.
        is_weak: `(B,)`, problems with weakly active rows.
        is_regular: Whether every problem is known to be optimal, without weakly active or dependent rows, and unique.
    """

    factor: KKTSystem
    is_optimal: Tensor
    is_weak: Tensor
    is_regular: bool = False

    def cut(self, start: int, stop: int) -> KKTFactor:
        """Copies of what belongs to the problems from start to stop, of more than one.

        Raises:
            TypeError: the factor cannot be divided: that of problems with an entropy.
        """
        if not isinstance(self.factor, Divisible):
            raise TypeError(f"{type(self.factor).__name__} cannot be divided")
        is_optimal, is_weak = self.is_optimal[start:stop].clone(), self.is_weak[start:stop].clone()
        factor = self.factor.cut(start, stop)
        return KKTFactor(factor=factor, is_optimal=is_optimal, is_weak=is_weak, is_regular=self.is_regular)

    @property
    def nbytes(self) -> int:
        """Bytes held, the stacked rows of the problem included."""
        data = self.factor.data
        return self.factor.nbytes + sum(t.untyped_storage().nbytes() for t in (data.Q, data.C, data.q, data.d))


@dataclass(frozen=True, kw_only=True, eq=False)
class Finished:
    """What a solver hands on that has done the exact solve itself, without weakly active rows in any problem.

    Args:
        factor: KKT system of the active sets.
        s: Slacks `(B, m)`, zero on active rows; None with entropy, where they are those of the rows as they were given.
        judged: Residuals of the point.
        worst: Largest scaled residual.
    """

    factor: KKTSystem
    s: Tensor | None
    judged: Residuals
    worst: float


@dataclass(kw_only=True, eq=False)
class Point:
    """What was found for each problem of a batch.

    Args:
        active: `(B, p + m)`, rows that hold with equality; equalities always.
        z: `(B, n)`, primal point before the exact solve.
        y: `(B, p + m)`, multipliers [ν; λ] before the exact solve.
        iterations: `(B,)`.
        status: `(B,)`, indices into `STATUSES`.
        is_exact: `(B,)`, whether the active set was confirmed by the finish.
        lower: Cholesky factors of Q, `(1 or B, n, n)`, where all are definite.
        finished: The rest, where z and y are exact already.
        is_fallback: `(B,)`, which problems another solver than the one asked for has solved; None for no problem.
        is_final: Whether z and y are the answer as they are, because the caller wants no exact solve after them.
        is_truncated: `(B,)`, problems that ended where the caller said, by a truncation, before their residuals were
            within the tolerance: z and y are their answer. None for no problem.
        measures: What else was measured, `(B,)` each.
    """

    active: Tensor
    z: Tensor
    y: Tensor
    iterations: Tensor
    status: Tensor
    is_exact: Tensor
    lower: Tensor | None = None
    finished: Finished | None = None
    is_fallback: Tensor | None = None
    is_final: bool = False
    is_truncated: Tensor | None = None
    measures: dict[str, Tensor] = field(default_factory=dict)


def unsolved(data: Data) -> Point:
    """The point before anything is known: no inequality active, `max_iterations` everywhere."""
    active = torch.zeros(data.B, data.d.shape[1], dtype=torch.bool, device=data.q.device)
    active[:, : data.p] = True
    return Point(
        active=active,
        z=data.q.new_zeros(data.B, data.n),
        y=data.q.new_zeros(data.B, data.d.shape[1]),
        iterations=torch.zeros(data.B, dtype=torch.int64, device=data.q.device),
        status=torch.full((data.B,), CODE[Status.MAX_ITERATIONS], device=data.q.device),
        is_exact=torch.zeros(data.B, dtype=torch.bool, device=data.q.device),
    )


def factor_convex(Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cholesky factors of Q `(1 or B, n, n)`; which matrices are definite, and which convex at all, `(1 or B,)`."""
    lower, is_definite = cholesky_or_none(Q)
    if bool(is_definite.all()):
        return lower, is_definite, is_definite
    diagonal = Q.diagonal(dim1=1, dim2=2)
    shift = NONCONVEX * Q.abs().amax((1, 2)).clamp(min=torch.finfo(Q.dtype).tiny).unsqueeze(-1)
    _, info = torch.linalg.cholesky_ex(Q + torch.diag_embed(shift.expand_as(diagonal)))
    return lower, is_definite, is_definite | (info == 0)


def guess_at(data: Data, z: Tensor, y: Tensor) -> Guess:
    """The active set of a point: rows whose multiplier outweighs their slack, each relative to its largest."""
    lam, s = y[:, data.p :], data.h - matvec(data.G, z)
    lam_size = lam.abs().amax(-1, keepdim=True) if data.m else lam
    s_size = 1 + data.h.abs()
    active = torch.ones_like(y, dtype=torch.bool)
    active[:, data.p :] = lam * s_size > s * torch.where(lam_size > 0, lam_size, 1.0)
    return Guess(active=active, z=z, y=y)


def point_of(data: Data, guess: Guess) -> Point:
    """The point of a caller's solution: its active set, confirmed or corrected by a few candidate solves."""
    point = confirm(data, guess)
    if data.tau is None:
        is_near = residuals(data, guess.z, guess.y).scaled <= NEAR
    else:
        # The residual of a small z is not small where the caller's rounding is not.
        is_near = point.is_exact & (inf_norm(point.z - guess.z) <= NEAR * (1 + inf_norm(guess.z)))
    code = torch.where(is_near, CODE[Status.OPTIMAL], CODE[Status.NUMERICAL_ERROR])
    point.status = torch.where(point.status == CODE[Status.NONCONVEX], point.status, code)
    return point


def confirm(data: Data, guess: Guess, *, rounds: int = _ROUNDS) -> Point:
    """Go from an approximate solution to its exact active set: what a solver does that iterates up to a tolerance.

    Args:
        data: The problems.
        guess: Of `guess_at`, or a solver's own active set.
        rounds: Candidate sets tried at most.

    Returns:
        A point with the status `optimal` where a set was confirmed, `nonconvex` where Q is not convex, and
        `max_iterations` elsewhere: that is for the solver to judge.
    """
    point = unsolved(data)
    lower, is_definite, is_convex = factor_convex(data.Q)
    point.lower = lower if bool(is_definite.all()) else None
    candidates = PrimalCandidates(data, point.lower) if data.tau is None else EntropyCandidates(data)
    active, is_found = find_active_set(guess, data.p, candidates, rounds=rounds)
    point.active = torch.where(is_found.unsqueeze(-1), active, guess.active)
    point.z, point.y, point.is_exact = guess.z, guess.y, is_found
    if isinstance(candidates, EntropyCandidates):
        is_new = is_found.unsqueeze(-1)
        point.z = torch.where(is_new, candidates.z, guess.z)
        point.y = torch.where(is_new, candidates.y, guess.y)
    point.status = torch.where(is_found, CODE[Status.OPTIMAL], point.status)
    point.status = torch.where(is_convex, point.status, CODE[Status.NONCONVEX])
    return point
