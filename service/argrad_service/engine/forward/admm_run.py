"""The iteration of `admm` on the problems of a batch that are not finished: steps, restarts, penalties."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from argrad_service.engine.finish import Guess
from argrad_service.engine.forward.splitting import Judgement, Splitting, judge
from argrad_service.engine.inverses import Inverse

ADAPTS_FROM = 2.0
"""ρ is changed if the balance asks for a factor of at least this, or at most its inverse."""

RHO_RANGE = (1e-6, 1e6)
"""Bounds of ρ, relative to the weights of the rows."""

RESTARTS_AT = 0.2
"""The window of the average ends when the residual has fallen by this factor since it began,"""

LONGEST_WINDOW = 0.36
"""or when it holds this part of all steps: both as in PDLP (Applegate et al., 2021, section 3.3)."""

SUSPICIOUS = 1e-2
"""Relative accuracy at which the last step counts as nearly a certificate."""


@dataclass(kw_only=True, eq=False)
class Run:
    """Problems still iterating.

    Args:
        index: `(b,)`, their places in the batch.
        problem: Their data.
        x, w: Iterates.
        rho: `(b, 1)`, relative to the unit of its problem.
        inverse: H⁻¹ at ρ.
        steps: `(b,)`, steps taken.
        next_try: `(b,)`, scaled residual at which the active set is tried next.
        is_truncated: `(b,)`, whether ‖x⁺ − x‖/‖x‖ fell below the truncation.
        moved: `(b, n)` and `(b, r)`, the last step of x and of the multipliers.
        sums: `(b, n)` and `(b, r)`, x and w summed over the window, which begins at the last restart.
        window: `(b,)`, steps in it.
        at_restart: `(b,)`, scaled residual at the last restart.
    """

    index: Tensor
    problem: Splitting
    x: Tensor
    w: Tensor
    rho: Tensor
    inverse: Inverse
    steps: Tensor
    next_try: Tensor
    is_truncated: Tensor
    moved: tuple[Tensor, Tensor]
    sums: tuple[Tensor, Tensor]
    window: Tensor
    at_restart: Tensor

    @property
    def penalties(self) -> Tensor:
        """P, `(b, r)`."""
        return self.rho * self.problem.unit * self.problem.weights

    @property
    def y(self) -> Tensor:
        """Multipliers, `(b, r)`."""
        return self.penalties * self.problem.split(self.w)[0]

    def select(self, keep: Tensor) -> Run:
        """Those named by keep."""
        return Run(
            index=self.index[keep],
            problem=self.problem.select(keep),
            x=self.x[keep],
            w=self.w[keep],
            rho=self.rho[keep],
            inverse=self.inverse.select(keep),
            steps=self.steps[keep],
            next_try=self.next_try[keep],
            is_truncated=self.is_truncated[keep],
            moved=(self.moved[0][keep], self.moved[1][keep]),
            sums=(self.sums[0][keep], self.sums[1][keep]),
            window=self.window[keep],
            at_restart=self.at_restart[keep],
        )


def start(problem: Splitting, index: Tensor, warm: Guess | None, *, first_try: float) -> Run:
    """The problems named by index, at a warm start (of the whole batch) or at zero."""
    x, w = torch.zeros_like(problem.q), torch.zeros_like(problem.d)
    if problem.tau is not None:
        x = torch.ones_like(x)
    if warm is not None:
        x = warm.z
        s = problem.d - problem.times(x)
        force = warm.y / (problem.unit * problem.weights)
        w = torch.where(problem.is_equality | (force > s), force, -s)
    if len(index) < len(x):
        problem, x, w = problem.select(index), x[index], w[index]
    rho = x.new_ones(len(x), 1)
    return Run(
        index=index,
        problem=problem,
        x=x,
        w=w,
        rho=rho,
        inverse=problem.hessians.inverse(problem.unit),
        steps=torch.zeros_like(index),
        next_try=x.new_full((len(x),), first_try),
        is_truncated=torch.zeros_like(index, dtype=torch.bool),
        moved=(torch.zeros_like(x), torch.zeros_like(w)),
        sums=(torch.zeros_like(x), torch.zeros_like(w)),
        window=torch.zeros_like(index),
        at_restart=x.new_full((len(x),), torch.inf),
    )


def advance(run: Run, *, steps: int, relaxation: float, truncation: float | None) -> None:
    """Take steps; problems stop moving where the truncation says so."""
    problem, penalties, x, w = run.problem, run.penalties, run.x, run.w
    x_before, w_before = x, w
    (x_sum, w_sum) = run.sums
    for _ in range(steps):
        x_last, w_last = x, w
        x = problem.primal(x, w, run.inverse, penalties)
        w = problem.dual(x, w, relaxation)
        if truncation is None:
            x_sum, w_sum = x_sum + x, w_sum + w
            x_before, w_before = x_last, w_last
            continue
        frozen = run.is_truncated.unsqueeze(-1)
        x, w = torch.where(frozen, x_last, x), torch.where(frozen, w_last, w)
        x_before, w_before = torch.where(frozen, x_before, x_last), torch.where(frozen, w_before, w_last)
        run.steps = run.steps + (~run.is_truncated).to(run.steps)
        change = torch.linalg.vector_norm(x - x_before, dim=-1)
        run.is_truncated = run.is_truncated | (change <= truncation * torch.linalg.vector_norm(x_before, dim=-1))
    if truncation is None:
        run.steps = run.steps + steps
    force, force_before = problem.split(w)[0], problem.split(w_before)[0]
    run.sums, run.window = (x_sum, w_sum), run.window + steps
    run.x, run.w, run.moved = x, w, (x - x_before, penalties * (force - force_before))


def restart(run: Run, judged: Judgement) -> Judgement:
    """Go to the average of the window where that is nearer to a solution; the residuals of what is taken.

    Near a vertex the iterates circle around the solution and their average does not.
    """
    count = run.window.unsqueeze(-1)
    x, w = run.sums[0] / count, run.sums[1] / count
    average = judge(run.problem, x, w, run.penalties)
    is_better = average.scaled < judged.scaled
    best = torch.minimum(average.scaled, judged.scaled)
    restarts = (best <= RESTARTS_AT * run.at_restart) | (run.window >= LONGEST_WINDOW * run.steps)
    takes, resets = (restarts & is_better).unsqueeze(-1), restarts.unsqueeze(-1)
    run.x, run.w = torch.where(takes, x, run.x), torch.where(takes, w, run.w)
    run.sums = (torch.where(resets, 0.0, run.sums[0]), torch.where(resets, 0.0, run.sums[1]))
    run.window = torch.where(restarts, 0, run.window)
    run.at_restart = torch.where(restarts, best, run.at_restart)
    takes = takes.squeeze(-1)
    return Judgement(
        scaled=torch.where(takes, average.scaled, judged.scaled), ratio=torch.where(takes, average.ratio, judged.ratio)
    )


def adapt(run: Run, ratio: Tensor) -> None:
    """Balance the residuals: ρ grows where the primal one is the larger; H is factored again if some ρ changes."""
    factor = ratio.sqrt().unsqueeze(-1)
    factor = torch.where((factor >= ADAPTS_FROM) | (factor <= 1 / ADAPTS_FROM), factor, 1.0)
    rho = (run.rho * factor).clamp(*RHO_RANGE)
    if not bool((rho != run.rho).any()):
        return
    plus, minus = run.problem.split(run.w)
    run.w = plus * (run.rho / rho) - minus
    same = rho == run.rho
    run.sums = (torch.where(same, run.sums[0], 0.0), torch.where(same, run.sums[1], 0.0))
    run.window = torch.where(same.squeeze(-1), run.window, 0)
    run.rho = rho
    run.inverse = run.problem.hessians.inverse(rho * run.problem.unit)


def looks_unsolvable(run: Run) -> Tensor:
    """Whether the last step is nearly a certificate: ADMM's steps tend to one where there is no solution.

    Reference: Banjac et al., Infeasibility detection in the alternating direction method of multipliers, 2019.
    """
    problem, (dx, dy) = run.problem, run.moved
    norm = torch.linalg.vector_norm
    force = problem.weights.rsqrt() * dy
    column = problem.hessians.diagonal.clamp(min=torch.finfo(dx.dtype).tiny).rsqrt()
    is_balanced = norm(column * problem.transposed(dy), dim=-1) <= SUSPICIOUS * norm(force, dim=-1)
    is_farkas = is_balanced & ((problem.d * dy).sum(-1) < 0)
    unit = problem.weights.sqrt()
    step = unit * problem.times(dx)
    step = torch.where(problem.is_equality, step, step.clamp(min=0))
    size = norm(dx / column, dim=-1)
    curved = column * problem.Q.times(dx.unsqueeze(1)).squeeze(1)
    is_flat = norm(torch.cat([step, curved], dim=-1), dim=-1) <= SUSPICIOUS * size
    is_ray: Tensor = (problem.tau is None) & is_flat & ((problem.q * dx).sum(-1) < 0)
    is_certificate: Tensor = is_farkas | is_ray
    return is_certificate
