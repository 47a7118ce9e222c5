"""`admm`: batched alternating direction method of multipliers, in Alt-Diff's splitting.

Form: QPs and LPs, with or without entropy, Q positive semidefinite, dense; closed-form inverses where Q is diagonal and
all but a few rows are bounds; with entropy the x-update is Newton's method in log x (`entropic_step`). Method:
`splitting`; H is factored once and again only where ρ adapts. Where H = Q + CᵀPC is singular (the minimiser of the
augmented Lagrangian is not unique: an LP with fewer independent rows than variables, say) a proximal term
½σ‖x − xₖ‖² is added; it moves no fixed point. Warm start: yes, primal point and multipliers.

Residuals, ρ, infeasibility and the active set are looked at between blocks of `block` steps: a block is what
`max_iterations` counts.

Reference: Sun et al., Alternating Differentiation for Optimization Layers, ICLR 2023, section 4.1, algorithm 1.
Deviations: penalties for each row, adapted; over-relaxation; the exact active set at the end unless `polish` is off.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from argrad.problems import Status
from argrad_service.engine.data import Data
from argrad_service.engine.finish import Guess
from argrad_service.engine.forward.admm_run import Run, adapt, advance, looks_unsolvable, restart, start
from argrad_service.engine.forward.certificates import find_certificates, is_infeasible
from argrad_service.engine.forward.pdipm import solve_feasible
from argrad_service.engine.forward.splitting import Judgement, judge, split
from argrad_service.engine.forward.unrolling import State, Unrolling
from argrad_service.engine.options import OwnOptions, SolverOptions, Stopped
from argrad_service.engine.point import CODE, Point, confirm, factor_convex, unsolved
from argrad_service.engine.structure import Structure, detect
from argrad_service.engine.structured_finish import confirm_structured, finish_structured

FIRST_TRY = 1e-2
"""Scaled residual at which the active set is tried first."""

NEXT_TRY = 1e-1
"""After a try that failed the next comes when the residual has fallen by this factor."""

TRY_ROUNDS = 8
"""Candidate sets of one try,"""

STRUCTURED_ROUNDS = 60
"""and where a candidate costs no more than a step."""

FIRST_VERDICT = 4
"""Blocks after which a problem is first examined for having no solution; then after twice as many, and so on."""

_OPTIMAL, _UNDECIDED = CODE[Status.OPTIMAL], CODE[Status.MAX_ITERATIONS]


class Options(OwnOptions):
    """Options of `admm`."""

    rho: float | None = Field(default=None, ge=1e-8, le=1e8)
    """Penalty ρ of every row, in the problem's own units; null: one for each row, chosen from the data."""

    adaptive: bool = True
    """Whether ρ is adapted, for each problem, by balancing its residuals."""

    relaxation: float = Field(default=1.6, ge=1.0, le=1.9)
    """Over-relaxation α; 1 is none."""

    restarts: bool = True
    """Whether an average of iterates takes the place of the last where it is nearer to a solution; never with a
    truncation, for the paper's iteration has none."""

    truncation: float | None = Field(default=None, gt=0, le=1)
    """Stop a problem where ‖x⁺ − x‖/‖x‖ is below this, flagged `truncated` unless its residuals are within the
    tolerance all the same; null: by the tolerance or the active set."""

    polish: bool = True
    """Whether the iterate is taken to the exact solution on its active set; otherwise it is returned as it is, and
    optimal only if its own residuals are within the tolerance or the truncation stopped it."""

    block: int = Field(default=40, ge=1, le=1000)
    """Steps between two looks at the residuals; `max_iterations` counts blocks of so many steps."""


def solve(data: Data, options: SolverOptions, warm: Guess | None) -> Point:
    """Solve a batch of QPs, LPs or problems with entropy.

    Args:
        data: The problems.
        options: `tolerance`, `should_stop`; `max_iterations` bounds the blocks of a problem.
        warm: Where to begin.

    Raises:
        Stopped: options.should_stop() was true between two blocks.
    """
    own = _own(options)
    point, structure = unsolved(data), detect(data)
    if structure is None and not data.is_linear:
        lower, is_definite, is_convex = factor_convex(data.Q)
        point.lower = lower if bool(is_definite.all()) else None
        point.status[~is_convex.expand(data.B)] = CODE[Status.NONCONVEX]
    point.measures = {"rho": data.q.new_full((data.B,), torch.nan), "steps": torch.zeros_like(point.iterations)}
    point.is_final = not own.polish
    point.is_truncated = None if own.truncation is None else torch.zeros_like(point.is_exact)
    index = torch.nonzero(point.status == _UNDECIDED).squeeze(-1)
    if len(index) == 0:
        return point
    problem = split(data, structure, rho=own.rho)
    run = start(problem, index, warm, first_try=FIRST_TRY if structure is None else torch.inf)
    for block in range(1, options.max_iterations + 1):
        if options.should_stop():
            raise Stopped
        advance(run, steps=own.block, relaxation=own.relaxation, truncation=own.truncation)
        leaves, ratio = _look(data, structure, run, point, options, block)
        keep = torch.nonzero(~leaves).squeeze(-1)
        if len(keep) == 0:
            break
        if len(keep) < len(run.index):
            run, ratio = run.select(keep), ratio[keep]
        if own.adaptive and _is_power(block):
            adapt(run, ratio)
    _examine(data, point, index, options, point.status[index] == _UNDECIDED)
    if structure is not None and own.polish:
        finish_structured(data, structure, point)
    return point


def _look(
    data: Data, structure: Structure | None, run: Run, point: Point, options: SolverOptions, block: int
) -> tuple[Tensor, Tensor]:
    """Judge the iterates after a block: which problems are done, `(b,)`, and the balance of their residuals."""
    own = _own(options)
    judged = judge(run.problem, run.x, run.w, run.penalties)
    if own.restarts and own.truncation is None:
        judged = restart(run, judged)
    is_good = judged.scaled <= options.tolerance
    _store(run, point, block, is_good)
    leaves = run.is_truncated | (own.truncation is None) & is_good | (block == options.max_iterations)
    if own.polish:
        leaves = leaves | _polish(data, structure, run, point, judged, leaves)
    if point.is_truncated is not None:
        _accept_truncated(data, run, point, options)
    if _is_power(block) and block >= FIRST_VERDICT:
        leaves = leaves | _examine(data, point, run.index, options, ~leaves & looks_unsolvable(run))
    return leaves, judged.ratio


def _accept_truncated(data: Data, run: Run, point: Point, options: SolverOptions) -> None:
    """Take the iterates that the truncation stopped as the answer, but of problems without a solution."""
    stopped = run.is_truncated & (point.status[run.index] == _UNDECIDED)
    if point.is_truncated is None or not bool(stopped.any()):
        return
    accepted = run.index[stopped & ~_examine(data, point, run.index, options, stopped & looks_unsolvable(run))]
    point.status[accepted] = _OPTIMAL
    point.is_truncated[accepted] = True


def _is_power(block: int) -> bool:
    return block & (block - 1) == 0


def _own(options: SolverOptions) -> Options:
    if not isinstance(options.own, Options):
        raise TypeError("these are the options of another solver")
    return options.own


def _store(run: Run, point: Point, block: int, is_good: Tensor) -> None:
    """Write the iterates, where they are numbers, and what is known of them."""
    y = run.y
    finite = (torch.isfinite(run.x).all(-1) & torch.isfinite(y).all(-1)).unsqueeze(-1)
    where = run.index
    point.z[where] = torch.where(finite, run.x, point.z[where])
    point.y[where] = torch.where(finite, y, point.y[where])
    point.active[where] = run.problem.is_equality | (run.w > 0)
    point.status[where] = torch.where(is_good, _OPTIMAL, _UNDECIDED)
    point.iterations[where] = block
    point.measures["rho"][where] = run.rho.squeeze(-1)
    point.measures["steps"][where] = run.steps


def _polish(
    data: Data, structure: Structure | None, run: Run, point: Point, judged: Judgement, wanted: Tensor
) -> Tensor:
    """Try the active sets of the problems wanted, and of those whose residual is low enough; which were right."""
    tries = torch.nonzero(wanted | (judged.scaled <= run.next_try)).squeeze(-1)
    found = torch.zeros_like(wanted)
    if len(tries) == 0:
        return found
    run.next_try[tries] = NEXT_TRY * judged.scaled[tries]
    where = run.index[tries]
    everything = len(where) == data.B
    part = data if everything else data.select(where)
    guess = Guess(active=point.active[where], z=point.z[where], y=point.y[where])
    if structure is None:
        tried = confirm(part, guess, rounds=TRY_ROUNDS)
        active, found[tries] = tried.active, tried.is_exact
    else:
        active, found[tries] = confirm_structured(part, structure.select(where), guess, rounds=STRUCTURED_ROUNDS)
    is_exact = found[tries]
    point.active[where] = torch.where(is_exact.unsqueeze(-1), active, point.active[where])
    point.is_exact[where] = is_exact
    point.status[where[is_exact]] = _OPTIMAL
    return found


def _examine(data: Data, point: Point, index: Tensor, options: SolverOptions, suspects: Tensor) -> Tensor:
    """Give a verdict on the suspects among the problems named by index, where a certificate proves it."""
    decided = torch.zeros_like(suspects)
    places = torch.nonzero(suspects).squeeze(-1)
    if len(places) == 0:
        return decided
    where = index[places]
    part = data.select(where)

    def project(projection: Data) -> Tensor:
        return solve_feasible(projection, SolverOptions(should_stop=options.should_stop))

    if data.tau is None:
        infeasible, unbounded = find_certificates(part, project, options.should_stop)
    else:
        infeasible = is_infeasible(_with_signs(part), options.should_stop)
        unbounded = torch.zeros_like(infeasible)
    code = torch.where(unbounded, CODE[Status.UNBOUNDED], point.status[where])
    point.status[where] = torch.where(infeasible, CODE[Status.INFEASIBLE], code)
    decided[places] = infeasible | unbounded
    return decided


def _with_signs(data: Data) -> Data:
    """The rows of problems with entropy, and z ≥ 0 that it implies, without the entropy."""
    signs = -torch.eye(data.n, dtype=data.q.dtype, device=data.q.device).expand(len(data.C), -1, -1)
    C, d = torch.cat([data.C, signs], dim=1), torch.cat([data.d, torch.zeros_like(data.q)], dim=1)
    return Data(Q=data.Q, q=data.q, C=C, d=d, p=data.p)


def unroll(data: Data, options: SolverOptions) -> Unrolling:
    """The steps for automatic differentiation: with constant penalties, without restarts and without the finish."""
    own = _own(options)
    problem = split(data, detect(data), rho=own.rho)
    inverse, penalties = problem.hessians.inverse(problem.unit), problem.unit * problem.weights

    def step(data: Data, state: State) -> State:
        here = replace(problem, q=data.q, d=data.d)
        x = here.primal(state[0], state[1], inverse, penalties)
        return x, here.dual(x, state[1], own.relaxation)

    def result(data: Data, state: State) -> tuple[Tensor, Tensor]:  # noqa: ARG001 - every solver's signature
        return state[0], penalties * problem.split(state[1])[0]

    return Unrolling(start=(torch.zeros_like(data.q), torch.zeros_like(data.d)), step=step, result=result)
