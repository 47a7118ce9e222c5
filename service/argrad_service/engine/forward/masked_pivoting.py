"""Block principal pivoting for a whole batch at once, in plain torch: `pivoting` where there is a GPU.

The rounds are those of `finish.find_active_set`; a candidate set is a mask, and its system a matrix of fixed size with
the identity outside the mask, so that a round is one batched Cholesky factorisation without gathers and synchronises
once, at the loop test.
"""

from __future__ import annotations

import torch
from torch import Tensor

from argrad.problems import Status
from argrad_service.engine.data import Data, inf_norm, matvec, take
from argrad_service.engine.finish import CONSISTENT, Guess, find_active_set
from argrad_service.engine.forward.systems import DualForm, dual_form
from argrad_service.engine.options import SolverOptions, Stopped
from argrad_service.engine.point import CODE, Point, factor_convex, unsolved

ROUNDS = 30
"""Candidate sets tried at most; what is left goes to another solver."""

LEAST_PIVOT = 1e-10
"""A candidate set with a squared pivot below this has nearly dependent rows (which have unit length)."""


def solve_masked(data: Data, options: SolverOptions) -> tuple[Point, Tensor]:
    """Find the active sets of strictly convex problems with at most as many inequalities as free variables.

    Args:
        data: The problems, on any device.
        options: Who asks to stop, between rounds.

    Returns:
        The point, and the problems that are left for another solver.

    Raises:
        Stopped: options.should_stop() was true.
    """
    point = unsolved(data)
    lower, is_definite, is_convex = factor_convex(data.Q)
    is_definite, is_convex = is_definite.expand(data.B), is_convex.expand(data.B)
    point.status[~is_convex] = CODE[Status.NONCONVEX]
    point.lower = lower if bool(is_definite.all()) else None
    if data.m > data.n - data.p:
        return point, torch.nonzero(is_convex).squeeze(-1)
    form = dual_form(data, lower)
    candidates = MaskedCandidates(form, options)
    active = form.c < 0
    active[:, : data.p] = True
    guess = Guess(active=active, z=point.z, y=point.y)
    active, is_found = find_active_set(guess, data.p, candidates, rounds=ROUNDS)
    is_found = is_found & is_definite
    point.active = torch.where(is_found.unsqueeze(-1), active, point.active)
    point.is_exact, point.iterations = is_found, candidates.rounds
    point.status = torch.where(is_found, CODE[Status.OPTIMAL], point.status)
    return point, torch.nonzero(~is_found & is_convex).squeeze(-1)


class MaskedCandidates:
    """Candidates of strictly convex problems, by one Cholesky factorisation of a masked matrix a round.

    Args:
        form: The dual form.
        options: Who asks to stop.
    """

    def __init__(self, form: DualForm, options: SolverOptions) -> None:
        self._form, self._options = form, options
        self.rounds = torch.zeros(form.c.shape[0], dtype=torch.int64, device=form.c.device)

    def __call__(self, guess: Guess, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Solve T_aa y_a = −c_a; slacks c + Ty."""
        if self._options.should_stop():
            raise Stopped
        self.rounds[index] += 1
        form, mask = self._form, guess.active
        gram, c = take(form.gram, index), form.c[index]
        inside = mask.unsqueeze(-1) & mask.unsqueeze(-2)
        matrix = torch.where(inside, gram, 0.0)
        matrix.diagonal(dim1=1, dim2=2).add_((~mask).to(c.dtype))
        lower, info = torch.linalg.cholesky_ex(matrix)
        pivots = lower.diagonal(dim1=1, dim2=2)
        is_independent = (info == 0) & (pivots.square() > LEAST_PIVOT).all(-1)
        right = torch.where(mask, -c, 0.0).unsqueeze(-1)
        y = torch.where(mask, torch.cholesky_solve(right, lower).squeeze(-1), 0.0)
        s = c + matvec(gram, y)
        size = 1e-3 + inf_norm(s)
        is_on_rows = inf_norm(torch.where(mask, s, 0.0)) <= CONSISTENT * size
        return y, s, is_on_rows & is_independent
