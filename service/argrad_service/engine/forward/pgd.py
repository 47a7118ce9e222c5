"""`pgd`: projected gradient for convex QPs over polyhedra, plain or accelerated, batched.

    w = z + β(z − z₋),   v = w − α(Qw + q),   z₊ = P(v),   y = y_P / α          (α = step / L, L = λ_max(Q))

Form: QPs with equalities and inequalities; P is a closed form on boxes and simplices and a QP of our own elsewhere
(`projections`). The projection's multipliers y_P, divided by α, are those of the QP: z₊ − v + Cᵀy_P = 0, so that at
z₊ = w the KKT conditions hold. β is FISTA's, set back to 0 where the momentum points uphill. With `polish` the active
set is tried at a few residuals on the way, and what it solves leaves the batch.

References: Beck & Teboulle, FISTA, SIAM J. Imaging Sci. 2, 2009; O'Donoghue & Candès, Adaptive restart for accelerated
gradient schemes, Found. Comput. Math. 15, 2015, section 3.2 (gradient scheme).
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from argrad.problems import Status
from argrad_service.engine.data import Data, dot, matvec, residuals
from argrad_service.engine.finish import Guess
from argrad_service.engine.forward.projections import Projection, projection_on
from argrad_service.engine.forward.unrolling import State, Unrolling
from argrad_service.engine.forward.verdicts import classify
from argrad_service.engine.options import OwnOptions, SolverOptions, Stopped
from argrad_service.engine.point import CODE, Point, confirm, factor_convex, guess_at, unsolved

STEPS = 50
"""Gradient steps that count as one iteration of `max_iterations`."""

STAGES = (1e-3, 1e-5, 1e-7)
"""Scaled residuals at which the active set is tried, before the tolerance itself."""

POWER_ITERATIONS = 60
"""Products with Q that estimate its largest eigenvalue."""

MARGIN = 1.02
"""The estimate is from below; it is raised by this, but not above ‖Q‖∞."""


class Options(OwnOptions):
    """Options of `pgd`; an iteration of `max_iterations` is 50 gradient steps, which the measure `steps` counts."""

    accelerated: bool = True
    """Whether FISTA's momentum with adaptive restart is used."""

    step: float = Field(default=1.0, gt=0, lt=2)
    """Step length in units of 1 / (largest eigenvalue of Q); above 1 only without acceleration does it converge."""

    polish: bool = True
    """Whether the active set is confirmed and the problem solved exactly on it; if not, z is the last iterate."""


def solve(data: Data, options: SolverOptions, warm: Guess | None) -> Point:  # noqa: ARG001 - every solver's signature
    """Solve a batch of QPs.

    Args:
        data: The problems.
        options: Tolerance, bound on iterations of 50 steps, who asks to stop; own options of this module.
        warm: Not used.

    Returns:
        A point with the measure `steps`, the gradient steps taken by each problem.

    Raises:
        Stopped: options.should_stop() was true.
    """
    own = _own(options)
    is_convex = factor_convex(data.Q)[2].expand(data.B)
    alpha, projection = _step_length(data, own), projection_on(data, options.should_stop)
    state = _start(data)
    projection(state[0], data.d)
    point = unsolved(data)
    point.is_final = not own.polish
    point.status = torch.where(is_convex, point.status, CODE[Status.NONCONVEX])
    steps = torch.zeros(data.B, dtype=torch.int64, device=data.q.device)
    index = torch.nonzero(is_convex & ~projection.is_empty()).squeeze(-1)
    for target in (*STAGES, options.tolerance) if own.polish else (options.tolerance,):
        if len(index) == 0:
            break
        part = data.select(index)
        of_part = tuple(block[index] for block in state)
        of_part, taken = _iterate(
            part, options, alpha[index], projection.select(index), of_part, steps[index], max(target, options.tolerance)
        )
        for block, values in zip(state, of_part, strict=True):
            block[index] = values
        steps[index] = taken
        index = _try(part, own, point, index, of_part)
    classify(data, point, options, otherwise=torch.full_like(point.status, CODE[Status.MAX_ITERATIONS]))
    point.iterations = (steps + STEPS - 1) // STEPS
    point.measures = {"steps": steps.to(data.q.dtype)}
    return point


def unroll(data: Data, options: SolverOptions) -> Unrolling:
    """The gradient steps for automatic differentiation, with the projection's own derivative."""
    own = _own(options)
    projection = projection_on(data, options.should_stop)
    alpha = _step_length(data, own)

    def step(data: Data, state: State) -> State:
        return _step(data, own, alpha, projection, state)

    def result(data: Data, state: State) -> tuple[Tensor, Tensor]:  # noqa: ARG001 - every solver's signature
        return state[0], state[3]

    return Unrolling(start=_start(data), step=step, result=result)


def _start(data: Data) -> State:
    """z, the z before it, FISTA's θ, and y: the origin, which need not be feasible."""
    z = torch.zeros_like(data.q)
    return z, z.clone(), torch.ones_like(z[:, 0]), torch.zeros_like(data.d)


def _step(data: Data, own: Options, alpha: Tensor, projection: Projection, state: State) -> State:
    z, before, theta, _ = state
    with torch.no_grad():
        grown = 0.5 * (1 + (1 + 4 * theta.square()).sqrt())
        beta = (theta - 1) / grown if own.accelerated else torch.zeros_like(theta)
    w = z + beta.unsqueeze(-1) * (z - before)
    v = w - alpha.unsqueeze(-1) * (matvec(data.Q, w) + data.q)
    new, y = projection(v, data.d)
    with torch.no_grad():
        restarts = dot(w - new, new - z) > 0
        theta = torch.where(restarts, 1.0, grown)
    return new, z, theta, y / alpha.unsqueeze(-1)


def _iterate(
    data: Data,
    options: SolverOptions,
    alpha: Tensor,
    projection: Projection,
    state: State,
    steps: Tensor,
    target: float,
) -> tuple[State, Tensor]:
    """Iterate until every problem has a scaled residual below the target, or no steps left; states and step counts."""
    own, most = _own(options), STEPS * options.max_iterations
    steps = steps.clone()
    over = (steps > 0) & (residuals(data, state[0], state[3]).scaled <= target) | (steps >= most)
    while not bool(over.all()):
        if options.should_stop():
            raise Stopped
        moved = _step(data, own, alpha, projection, state)
        state = tuple(
            torch.where(over.reshape(-1, *[1] * (old.ndim - 1)), old, new)
            for old, new in zip(state, moved, strict=True)
        )
        steps = steps + (~over).to(steps.dtype)
        is_near = residuals(data, state[0], state[3]).scaled <= target
        over = over | is_near | (steps >= most) | ~torch.isfinite(state[0]).all(-1)
    return state, steps


def _try(data: Data, own: Options, point: Point, index: Tensor, state: State) -> Tensor:
    """Write the iterate to the point, confirmed where `polish` can; the problems that are still open."""
    guess = guess_at(data, torch.nan_to_num(state[0]), torch.nan_to_num(state[3]))
    point.active[index], point.z[index], point.y[index] = guess.active, guess.z, guess.y
    if not own.polish:
        return index[:0]
    tried = confirm(data, guess)
    is_found = tried.is_exact
    point.active[index], point.is_exact[index] = tried.active, is_found
    point.status[index[is_found]] = CODE[Status.OPTIMAL]
    return index[~is_found]


def _step_length(data: Data, own: Options) -> Tensor:
    """α = step / L `(B,)`; 1 where Q is zero."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    v = torch.randn(data.n, 1, generator=generator, dtype=data.Q.dtype).to(data.Q.device).expand(len(data.Q), -1, -1)
    for _ in range(POWER_ITERATIONS):
        v = data.Q @ v
        v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp(min=torch.finfo(v.dtype).tiny)
    estimate = MARGIN * torch.linalg.vector_norm(data.Q @ v, dim=1).squeeze(1)
    largest = torch.minimum(estimate, data.Q.abs().sum(2).amax(1))
    return (own.step / torch.where(largest > 0, largest, torch.ones_like(largest))).expand(data.B)


def _own(options: SolverOptions) -> Options:
    if not isinstance(options.own, Options):
        raise TypeError("options.own must be an instance of pgd.Options")
    return options.own
