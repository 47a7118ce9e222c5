"""The active-set finish: from a good guess of the active set to the exact solution.

A candidate set is tried by solving its equality-constrained QP. Rows with a negative multiplier leave, rows with a
negative slack enter, all at once; when the number of wrong rows has not fallen below its best for three rounds, only
the last wrong one moves, until it does (block principal pivoting: Júdice & Pires, 1994; Kim & Park, 2011). A set
without wrong rows is the active set, and the solution of its KKT system is exact up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from argrad_service.engine.active_set import (
    ActiveSetFactor,
    factor_active_set,
    gather_active,
    padded_gram,
)
from argrad_service.engine.data import Data, inf_norm, matvec, matvec_t, take
from argrad_service.engine.forward.systems import DualForm
from argrad_service.engine.semidefinite import factor_semidefinite

SIGN_TOLERANCE = 1e-10
"""A multiplier or slack is negative if it is below minus this, times the largest of its kind."""

CONSISTENT = 1e-6
"""Relative residual up to which the equations of a candidate set count as solved."""

MOST_ROWS = 3
"""Rows of a candidate set, in units of n: no solution needs more than n, a few times as many hold where rows repeat one
another, and where constraints contradict each other sets would grow to thousands and cost their cube."""

SPARE_ROWS = 16
"""Added to that, for small n."""

PATIENCE = 3
"""Rounds without a new best number of wrong rows before rows move one at a time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Guess:
    """Where the finish begins.

    Args:
        active: `(B, p + m)`, rows taken to hold with equality; equalities always.
        z: `(B, n)`, primal point; matters where the solution is not unique.
        y: `(B, p + m)`, multipliers [ν; λ]; matter where active rows are dependent.
    """

    active: Tensor
    z: Tensor
    y: Tensor

    def select(self, index: Tensor) -> Guess:
        """The sub-batch of the problems named by index."""
        return Guess(active=self.active[index], z=self.z[index], y=self.y[index])


class Candidates(Protocol):
    """Solves the equality-constrained QP of a candidate active set."""

    def __call__(self, guess: Guess, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Solve the candidates of the problems named by index.

        Returns:
            Multipliers and slacks d − Cz, `(b, p + m)` each, scaled alike; whether the equations hold, `(b,)`.
        """
        ...


class DualCandidates:
    """Candidates of strictly convex problems, from the Gram matrix alone: nothing of size n is touched."""

    def __init__(self, form: DualForm) -> None:
        self._form = form

    def __call__(self, guess: Guess, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Solve T_aa y_a = −c_a; slacks c + Ty."""
        form = self._form
        rows = gather_active(guess.active)
        S = factor_semidefinite(padded_gram(form.gram, rows, index))
        c = form.c[index]
        gram = take(form.gram, index) if len(index) < len(form.c) else form.gram
        y, right = torch.zeros_like(c), c
        if bool(S.is_deficient.any()):
            near = guess.active & S.is_deficient.unsqueeze(-1)
            y = torch.where(near, guess.y / take(form.scale, index), 0.0)
            right = c + matvec(gram, y)
        y = y - rows.scatter(S.solve(rows.gather(right).unsqueeze(-1)).squeeze(-1), c.shape[1])
        s = c + matvec(gram, y)
        return y, s, _is_on_rows(guess.active, s)


class PrimalCandidates:
    """Candidates of any convex problem: the KKT system is factored for each."""

    def __init__(self, data: Data, lower: Tensor | None = None) -> None:
        self._data, self._lower = data, lower

    def __call__(self, guess: Guess, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Solve the KKT system of the candidate set."""
        data = self._data.select(index)
        lower = None if self._lower is None else take(self._lower, index)
        factor = factor_active_set(data, guess.active, lower=lower)
        z, y, error = solve_on_active_set(factor, guess)
        s = data.d - matvec(data.C, z)
        # Far from the origin, as where the problem is unbounded, a solution relative to its own size is none.
        Qz, Cty = matvec(data.Q, z), matvec_t(data.C, y)
        size = 1e-3 + inf_norm(data.q) + inf_norm(Qz) + inf_norm(Cty)
        is_stationary = inf_norm(data.q + Qz + Cty) <= CONSISTENT * size
        return y, s, _is_on_rows(guess.active, s) & (error <= CONSISTENT) & is_stationary


def solve_on_active_set(factor: ActiveSetFactor, guess: Guess) -> tuple[Tensor, Tensor, Tensor]:
    """Solution of the equality-constrained QP: z `(B, n)`, y `(B, p + m)`, relative residual `(B,)`.

    Where the solution or its multipliers are not unique, the one nearest to the guess.
    """
    data, rows = factor.data, factor.rows
    near = (factor.is_dependent | factor.is_nonunique).unsqueeze(-1)
    if not bool(near.any()):
        dz, dy, error = factor.solve(-data.q.unsqueeze(-1), rows.gather(data.d).unsqueeze(-1))
        return dz.squeeze(-1), rows.scatter(dy.squeeze(-1), data.d.shape[1]), error
    z0 = torch.where(near, guess.z, 0.0)
    y0 = torch.where(near, rows.scatter(rows.gather(guess.y), data.d.shape[1]), 0.0)
    r1 = -(data.q + matvec(data.Q, z0) + matvec_t(data.C, y0))
    r2 = rows.gather(data.d - matvec(data.C, z0))
    dz, dy, error = factor.solve(r1.unsqueeze(-1), r2.unsqueeze(-1))
    return z0 + dz.squeeze(-1), y0 + rows.scatter(dy.squeeze(-1), data.d.shape[1]), error


def find_active_set(guess: Guess, p: int, candidates: Candidates, *, rounds: int) -> tuple[Tensor, Tensor]:
    """Exchange wrong rows until none is left.

    Args:
        guess: Where to begin.
        p: Number of equalities, which are never exchanged.
        candidates: Solves a candidate set.
        rounds: Candidates tried at most; none with more than MOST_ROWS rows.

    Returns:
        The last set tried `(B, p + m)`, and which problems' sets have no wrong row `(B,)`. Synchronises once a round.
    """
    active = guess.active.clone()
    batch, size = active.shape
    device = active.device
    is_found = torch.zeros(batch, dtype=torch.bool, device=device)
    index = torch.arange(batch, device=device)
    if size == 0:
        return active, candidates(guess, index)[2]
    best = torch.full((batch,), size + 1, device=device)
    patience = torch.full((batch,), PATIENCE, device=device)
    position = torch.arange(size, device=device)
    most = p + MOST_ROWS * guess.z.shape[1] + SPARE_ROWS
    if size > most:
        index = index[active.sum(-1) <= most]
    for _ in range(rounds if len(index) else 0):
        trial = Guess(active=active[index], z=guess.z[index], y=guess.y[index])
        y, s, is_consistent = candidates(trial, index)
        wrong = _wrong_rows(trial.active, p, y, s)
        count = wrong.sum(-1)
        is_found[index] = (count == 0) & is_consistent
        is_best = count < best[index]
        patience[index] = torch.where(is_best, PATIENCE, patience[index] - 1)
        best[index] = torch.minimum(best[index], count)
        last = position == torch.where(wrong, position, -1).amax(-1, keepdim=True)
        swap = torch.where((patience[index] > 0).unsqueeze(-1), wrong, wrong & last)
        active[index] = trial.active ^ swap
        index = index[(count > 0) & (active[index].sum(-1) <= most)]
        if len(index) == 0:
            break
    return active, is_found


def _wrong_rows(active: Tensor, p: int, y: Tensor, s: Tensor) -> Tensor:
    """Rows whose sign contradicts their membership, `(b, p + m)`."""
    y_size = inf_norm(y).unsqueeze(-1)
    leaves = active & ~(y >= -SIGN_TOLERANCE * y_size)
    enters = ~active & ~(s >= -SIGN_TOLERANCE * _size(s))
    wrong = leaves | enters
    wrong[:, :p] = False
    return wrong


def _is_on_rows(active: Tensor, s: Tensor) -> Tensor:
    """Whether the active rows hold with equality: with a singular system signs can look right while they do not."""
    return inf_norm(torch.where(active, s, 0.0)) <= CONSISTENT * _size(s).squeeze(-1)


def _size(s: Tensor) -> Tensor:
    return 1e-3 + inf_norm(s).unsqueeze(-1)
