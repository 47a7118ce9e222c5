"""`pdipm`: a batched primal–dual interior point method that stops early and finishes on the exact active set.

Form: QPs with equalities and inequalities, Q positive semidefinite, dense. Method: Mehrotra's predictor–corrector
(`mehrotra`) on the dual form where Q is definite and the rows are not many more than the variables, on the normal
equations of the Ruiz-scaled problem otherwise (`systems`); at a few values of μ the active-set finish (`finish`) is
tried, and what it solves leaves the batch. Warm start: yes, its active set is tried before the first iteration.

Reference: Amos & Kolter, OptNet, ICML 2017, section 3, for a batched interior point method; the finish is ours.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from argrad.problems import Status
from argrad_service.engine.active_set import factor_active_set
from argrad_service.engine.data import Data, residuals, take
from argrad_service.engine.finish import (
    Candidates,
    DualCandidates,
    Guess,
    PrimalCandidates,
    find_active_set,
    solve_on_active_set,
)
from argrad_service.engine.forward import entropic
from argrad_service.engine.forward.certificates import find_certificates, is_infeasible
from argrad_service.engine.forward.mehrotra import Iterate, NewtonSystem, advance, predict_active
from argrad_service.engine.forward.scaling import Scaling, ruiz
from argrad_service.engine.forward.systems import DualForm, DualSystem, PrimalSystem, dual_form
from argrad_service.engine.options import OwnOptions, SolverOptions
from argrad_service.engine.point import CODE, Point, factor_convex, unsolved

Options = OwnOptions

DUAL_ROWS_PER_VARIABLE = 2
"""The dual form is taken up to this many rows a variable: beyond it, its m × m factors cost more than n × n ones."""

STAGES = (1e-2, 1e-4, 1e-7, 1e-11)
"""Values of μ, in the system's scale, at which the finish is tried."""

STAGES_MANY_ROWS = (1e-3, 1e-5, 1e-8, 1e-11)
"""The same where there are more rows than free variables: an early guess would have too many rows to be solvable."""

ACTIVE_ROWS_PER_VARIABLE = 4
"""A guess of the active set has at most this many inequalities a variable."""

FINISH_ROUNDS = 8
"""Candidate sets that the finish tries at one stage."""


def solve(data: Data, options: SolverOptions, warm: Guess | None) -> Point:
    """Solve a batch of QPs up to the finish of `argrad_service.engine.solution`.

    Args:
        data: The problems.
        options: Tolerance, iteration limit, and who asks to stop.
        warm: Active set and point to try first.
    """
    if data.tau is not None:
        return _solve_with_entropy(data, options, warm)
    point, undecided = _solve_all(data, options, warm)
    if len(undecided):
        _classify(data, undecided, point, options)
    return point


def _solve_all(data: Data, options: SolverOptions, warm: Guess | None) -> tuple[Point, Tensor]:
    """The solver without its verdicts on failures: the point, and the problems it could not finish."""
    point = unsolved(data)
    undecided = []
    lower, is_definite, is_convex = factor_convex(data.Q)
    point.lower = lower if bool(is_definite.all()) else None
    is_definite, is_convex = is_definite.expand(data.B), is_convex.expand(data.B)
    point.status[~is_convex] = CODE[Status.NONCONVEX]
    takes_dual = is_definite & (data.d.shape[1] <= DUAL_ROWS_PER_VARIABLE * data.n)
    for chosen, is_dual in ((takes_dual, True), (is_convex & ~takes_dual, False)):
        index = torch.nonzero(chosen).squeeze(-1)
        if len(index) == 0:
            continue
        everything = len(index) == data.B
        part = data if everything else data.select(index)
        part_lower = lower if everything else take(lower, index)
        run: _Run = _DualRun(part, part_lower) if is_dual else _PrimalRun(part)
        left = _solve_part(part, run, point, index, options, None if warm is None else warm.select(index))
        undecided.append(index[left])
    return point, torch.cat(undecided) if undecided else torch.zeros(0, dtype=torch.int64, device=data.q.device)


class _Run(Protocol):
    """What one elimination needs: its Newton system, its candidates, and when to try them."""

    candidates: Candidates
    stages: tuple[float, ...]

    def system(self, index: Tensor) -> NewtonSystem:
        """Newton system of the problems named by index."""
        ...

    def guess(self, system: NewtonSystem, iterate: Iterate, index: Tensor) -> Guess:
        """The rows that tend to be active, and the iterate in the problem's own units."""
        ...


class _DualRun:
    """The dual form, its Newton system and its candidates."""

    def __init__(self, data: Data, lower: Tensor) -> None:
        self._data = data
        self._form: DualForm = dual_form(data, lower)
        self.candidates: Candidates = DualCandidates(self._form)
        self.stages: tuple[float, ...] = STAGES if data.m <= data.n - data.p else STAGES_MANY_ROWS

    def system(self, index: Tensor) -> DualSystem:
        """Newton system of the problems named by index."""
        everything = len(index) == self._data.B
        return DualSystem(self._form if everything else self._form.select(index))

    def guess(self, system: NewtonSystem, iterate: Iterate, index: Tensor) -> Guess:
        """The rows that tend to be active, and the iterate in the problem's own units."""
        form = self._form if len(index) == self._data.B else self._form.select(index)
        y = system.multipliers(iterate)
        return Guess(active=_likely_active(system, iterate, self._data, index), z=form.primal(y), y=y * form.scale)


class _PrimalRun:
    """The Ruiz-scaled problem, its Newton system and the candidates of the unscaled one."""

    def __init__(self, data: Data) -> None:
        self._data = data
        self._scaling: Scaling = ruiz(data)
        self.candidates: Candidates = PrimalCandidates(data)
        self.stages: tuple[float, ...] = STAGES_MANY_ROWS

    def system(self, index: Tensor) -> PrimalSystem:
        """Newton system of the problems named by index."""
        return PrimalSystem(self._scaling.data.select(index))

    def guess(self, system: NewtonSystem, iterate: Iterate, index: Tensor) -> Guess:
        """The rows that tend to be active, and the iterate in the problem's own units."""
        z = iterate.free[:, : self._data.n]
        z, y = self._scaling.unscale(z, system.multipliers(iterate), index)
        return Guess(active=_likely_active(system, iterate, self._data, index), z=z, y=y)


def _likely_active(system: NewtonSystem, iterate: Iterate, data: Data, index: Tensor) -> Tensor:
    """Equalities, and the inequalities that tend to be active, `(B, p + m)`.

    No more than a few times n of them, those with the largest λ/s: an early guess of a problem with thousands of rows
    is too large to be factored, and its rows are dependent anyway.
    """
    active = predict_active(system, iterate)
    most = ACTIVE_ROWS_PER_VARIABLE * data.n
    if data.m > most:
        # A row of zeros with h = 0 would take the place of one that matters.
        active = active & (take(data.G, index) != 0).any(-1)
        ratio = torch.where(active, iterate.lam / iterate.s, 0.0)
        least = ratio.topk(most, dim=1).values[:, -1:]
        active = active & (ratio >= least)
    return torch.cat([active.new_ones(len(active), data.p), active], dim=1)


def _solve_part(
    data: Data,
    run: _Run,
    point: Point,
    index: Tensor,
    options: SolverOptions,
    warm: Guess | None,
) -> Tensor:
    """Solve the problems of one elimination; write what was found to `point` at `index`, return what is left."""
    remaining = torch.arange(data.B, device=index.device)
    if warm is not None or data.m == 0:
        first = warm or Guess(active=point.active[index], z=point.z[index], y=point.y[index])
        remaining = _finish(data, run.candidates, first, remaining, point, index)
    if len(remaining) == 0 or data.m == 0:
        return remaining
    system = run.system(remaining)
    iterate = system.start()
    for target in run.stages:
        progress = advance(
            system,
            iterate,
            target=target,
            residual_target=max(1e-1 * target, 1e-10),
            max_iterations=options.max_iterations - point.iterations[index[remaining]],
            should_stop=options.should_stop,
        )
        point.iterations[index[remaining]] += progress.iterations
        left = _finish(data, run.candidates, run.guess(system, iterate, remaining), remaining, point, index)
        is_left = torch.isin(remaining, left)
        keep = torch.nonzero(is_left).squeeze(-1)
        remaining = left
        if len(remaining) == 0:
            break
        system, iterate = system.select(keep), iterate.select(keep)
    return remaining


def _finish(data: Data, candidates: Candidates, guess: Guess, remaining: Tensor, point: Point, index: Tensor) -> Tensor:
    """Try the finish on the problems still open; store what it found, return what is left of them."""

    def of_remaining(guess: Guess, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return candidates(guess, remaining[index])

    active, is_found = find_active_set(guess, data.p, of_remaining, rounds=FINISH_ROUNDS)
    where = index[remaining]
    finite = torch.isfinite(guess.z).all(-1, keepdim=True) & torch.isfinite(guess.y).all(-1, keepdim=True)
    point.active[where] = torch.where(is_found.unsqueeze(-1), active, guess.active)
    point.z[where] = torch.where(finite, guess.z, point.z[where])
    point.y[where] = torch.where(finite, guess.y, point.y[where])
    point.is_exact[where] = is_found
    point.status[where[is_found]] = CODE[Status.OPTIMAL]
    return remaining[~is_found]


def _classify(data: Data, undecided: Tensor, point: Point, options: SolverOptions) -> None:
    """Say of the problems that were not finished whether their point is good enough, or why there is none."""
    part = data.select(undecided)
    is_good = residuals(part, point.z[undecided], point.y[undecided]).scaled <= options.tolerance
    point.status[undecided[is_good]] = CODE[Status.OPTIMAL]
    left = torch.nonzero(~is_good).squeeze(-1)
    if len(left) == 0:
        return
    _classify_as(part.select(left), undecided[left], point, options, may_be_unbounded=True)


def _classify_as(part: Data, where: Tensor, point: Point, options: SolverOptions, *, may_be_unbounded: bool) -> None:
    """Say why the problems at `where` have no solution, judged by the linear and quadratic terms in `part`."""

    def project(projection: Data) -> Tensor:
        return solve_feasible(projection, SolverOptions(should_stop=options.should_stop))

    if may_be_unbounded:
        infeasible, unbounded = find_certificates(part, project, options.should_stop)
    else:
        infeasible = is_infeasible(part, options.should_stop)
        unbounded = torch.zeros_like(infeasible)
    is_out_of_time = point.iterations[where] >= options.max_iterations
    code = torch.where(is_out_of_time, CODE[Status.MAX_ITERATIONS], CODE[Status.NUMERICAL_ERROR])
    code = torch.where(unbounded, CODE[Status.UNBOUNDED], code)
    point.status[where] = torch.where(infeasible, CODE[Status.INFEASIBLE], code)


def _solve_with_entropy(data: Data, options: SolverOptions, warm: Guess | None) -> Point:
    """Solve problems with entropy; they are never unbounded, and infeasible if their rows and z ≥ 0 are."""
    point = unsolved(data)
    found, point.finished = entropic.solve(data, options, warm)
    point.active, point.z, point.y = found.active, found.z, found.y
    point.iterations, point.is_exact = found.iterations, found.is_exact
    if point.finished is not None:
        point.status[:] = CODE[Status.OPTIMAL]
        return point
    is_convex = torch.ones_like(found.is_exact) if data.is_linear else factor_convex(data.Q)[2].expand(data.B)
    is_good = found.is_exact | (residuals(data, point.z, point.y).scaled <= options.tolerance)
    point.status[is_good] = CODE[Status.OPTIMAL]
    point.status[~is_convex] = CODE[Status.NONCONVEX]
    left = torch.nonzero(~is_good & is_convex).squeeze(-1)
    if len(left):
        part = data.select(left)
        nonnegative = -torch.eye(data.n, dtype=data.q.dtype, device=data.q.device).expand(len(part.C), -1, -1)
        C, d = torch.cat([part.C, nonnegative], dim=1), torch.cat([part.d, torch.zeros_like(part.q)], dim=1)
        _classify_as(Data(Q=part.Q, q=part.q, C=C, d=d, p=data.p), left, point, options, may_be_unbounded=False)
    return point


def solve_feasible(data: Data, options: SolverOptions) -> Tensor:
    """Z of QPs that have a solution: exact where the finish found the active set, the last iterate elsewhere."""
    point, _ = _solve_all(data, options, None)
    factor = factor_active_set(data, point.active, lower=point.lower)
    z, y, _ = solve_on_active_set(factor, Guess(active=point.active, z=point.z, y=point.y))
    is_better = residuals(data, z, y).scaled <= residuals(data, point.z, point.y).scaled
    return torch.nan_to_num(torch.where(is_better.unsqueeze(-1), z, point.z))
