"""`barrier`: the log-barrier Newton method, batched.

Form: LPs and convex QPs with equalities and inequalities, dense, with a strictly feasible point. Method: phase I
(`interior`) unless there are no inequalities, then the central path (`central_path`): damped Newton at each t, t ← μt
when centred, until m/t < ε. With `polish` the active set that the end of the path shows is confirmed and the problem
solved exactly on it, and where that set is not right yet the path goes on; without, the barrier point itself is the
answer: z is the minimiser of the barrier problem at the last t, λ = 1/(t s), and the duality gap is m/t.

Reference: Tan, Delong & Terekhov, Deep Inverse Optimization, CPAIOR 2019, section 4, with t⁽⁰⁾, μ and ε as there.
Deviations: equalities, phase I, and QPs.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from argrad.errors import ProblemError
from argrad.problems import Status
from argrad_service.engine.data import Data, matvec
from argrad_service.engine.finish import Guess
from argrad_service.engine.forward.central_path import PathPoint, is_at_end, is_stuck, multipliers, newton_step, sharpen
from argrad_service.engine.forward.interior import find_interior
from argrad_service.engine.forward.unrolling import State, Unrolling
from argrad_service.engine.forward.verdicts import classify
from argrad_service.engine.options import OwnOptions, SolverOptions, Stopped
from argrad_service.engine.point import CODE, Point, confirm, factor_convex, guess_at, unsolved

SHARPER = 1e3
"""Factor by which the end of the path moves where it has not told the active set: ε may be more than the objective."""

ROUNDING = 1e-11
"""Gap, relative to the terms of the objective, below which a path that is to be finished exactly need not go at first:
Newton's steps are rounding error there."""

SHARPENINGS = 4
"""Times that it moves at most."""


class Options(OwnOptions):
    """Options of `barrier`. `max_iterations` bounds the Newton steps of phase I, and again those of the path."""

    t0: float = Field(default=1.0, gt=0, le=1e12)
    """First sharpness t of the barrier, in units of 1 / objective."""

    mu: float = Field(default=10.0, gt=1, le=1e6)
    """Factor by which t grows from one centring to the next."""

    epsilon: float = Field(default=1e-5, ge=1e-12, le=0.1)
    """Bound on the duality gap m/t at which the path ends; without polish no larger than the tolerance, with it where
    the active set is looked for first."""

    polish: bool = True
    """Whether the active set is confirmed and the problem solved exactly on it; if not, z is the barrier point."""


def solve(data: Data, options: SolverOptions, warm: Guess | None) -> Point:  # noqa: ARG001 - every solver's signature
    """Solve a batch of LPs or QPs.

    Args:
        data: The problems.
        options: Tolerance, bound on Newton steps, who asks to stop; own options of this module.
        warm: Not used: a solution of a similar problem lies on the boundary, and a path begins inside.

    Returns:
        A point with the measures `t`, the last sharpness, `interior_radius`, the least slack of phase I's point over
        rows of unit length, and `phase_one_iterations`.

    Raises:
        ProblemError: without polish the path would end at a gap above the tolerance.
        Stopped: options.should_stop() was true.
    """
    own = _own(options)
    if not own.polish and own.epsilon > options.tolerance:
        wanted = f"at most the tolerance {options.tolerance:g} where polish is off"
        raise ProblemError("solver.options.epsilon", f"{own.epsilon:g}", wanted)
    interior = find_interior(data, max_iterations=options.max_iterations, should_stop=options.should_stop)
    is_convex = factor_convex(data.Q)[2].expand(data.B)
    is_inside, last_t = interior.is_found & is_convex, _last_t(data, own)
    if own.polish:
        last_t = torch.minimum(last_t, data.m / (ROUNDING * _size(data, interior.z)))
    path, iterations, is_done = follow(data, _start(data, own, interior.z), is_inside, last_t, options, mu=own.mu)
    point = _judge(data, own, interior.is_found, path)
    for _ in range(SHARPENINGS if own.polish else 0):
        is_left = is_done & ~point.is_exact
        if not bool(is_left.any()):
            break
        last_t = torch.where(is_left, SHARPER * last_t, last_t)
        path, more, is_done = follow(data, path, is_left, last_t, options, mu=own.mu, spent=iterations)
        iterations = iterations + more
        point = _judge(data, own, interior.is_found, path)
    point.status = torch.where(interior.is_found, point.status, _LIMIT)
    point.status = torch.where(is_convex, point.status, CODE[Status.NONCONVEX])
    stopped = torch.where(iterations >= options.max_iterations, _LIMIT, CODE[Status.NUMERICAL_ERROR])
    no_interior = torch.where(interior.iterations >= options.max_iterations, _LIMIT, CODE[Status.NO_INTERIOR])
    no_interior = torch.where(interior.is_found, stopped, no_interior)
    classify(data, point, options, otherwise=no_interior)
    point.iterations = iterations
    point.measures = {
        "t": path.t,
        "interior_radius": interior.radius,
        "phase_one_iterations": interior.iterations.to(path.t.dtype),
    }
    return point


def _judge(data: Data, own: Options, begun: Tensor, path: PathPoint) -> Point:
    """The point that the end of the path shows: the exact one with polish, the barrier point itself without."""
    y = torch.where(begun.unsqueeze(-1), multipliers(data, path), 0.0)
    guess = guess_at(data, path.z, torch.nan_to_num(y))
    return _confirm(data, guess) if own.polish else _final(data, guess)


def _confirm(data: Data, guess: Guess) -> Point:
    """The exact active set; where the guess has none, that of the rows whose multiplier outweighs their slack as it is.

    The guess compares multipliers with the largest of them, which says nothing where no row is active.
    """
    point = confirm(data, guess)
    index = torch.nonzero(~point.is_exact).squeeze(-1)
    if len(index) == 0 or data.m == 0:
        return point
    part, z, y = data.select(index), guess.z[index], guess.y[index]
    active = guess.active[index]
    active[:, data.p :] &= y[:, data.p :] > part.h - matvec(part.G, z)
    again = confirm(part, Guess(active=active, z=z, y=y))
    found = index[again.is_exact]
    for name in ("active", "z", "y", "status", "is_exact"):
        getattr(point, name)[found] = getattr(again, name)[again.is_exact]
    return point


def _final(data: Data, guess: Guess) -> Point:
    """The barrier point itself, still to be judged."""
    point = unsolved(data)
    point.active, point.z, point.y, point.is_final = guess.active, guess.z, guess.y, True
    return point


def unroll(data: Data, options: SolverOptions) -> Unrolling:
    """The path's Newton steps for automatic differentiation; phase I is not differentiated."""
    own = _own(options)
    interior = find_interior(data, max_iterations=options.max_iterations, should_stop=options.should_stop)
    start, last_t = _start(data, own, interior.z), _last_t(data, own)

    def step(data: Data, state: State) -> State:
        return sharpen(newton_step(data, PathPoint.of(state)), mu=own.mu, last_t=last_t).state

    def result(data: Data, state: State) -> tuple[Tensor, Tensor]:
        point = PathPoint.of(state)
        return point.z, multipliers(data, point)

    return Unrolling(start=start.state, step=step, result=result)


def follow(
    data: Data,
    start: PathPoint,
    is_inside: Tensor,
    last_t: Tensor,
    options: SolverOptions,
    *,
    mu: float,
    spent: Tensor | None = None,
) -> tuple[PathPoint, Tensor, Tensor]:
    """Follow the central path until t reaches `last_t` and the point is centred there.

    Args:
        data: The problems.
        start: Strictly feasible where `is_inside`.
        is_inside: `(B,)`, problems that can begin.
        last_t: `(B,)`.
        options: Bound on Newton steps, and who asks to stop.
        mu: Factor by which t grows.
        spent: `(B,)`, Newton steps that count towards the bound already.

    Returns:
        Where the paths ended, Newton steps of each problem, and which reached their end, `(B,)`.
    """
    point = start
    iterations = torch.zeros(data.B, dtype=torch.int64, device=is_inside.device)
    spent = iterations if spent is None else spent
    is_done, is_over = torch.zeros_like(is_inside), ~is_inside | (spent >= options.max_iterations)
    while not bool(is_over.all()):
        if options.should_stop():
            raise Stopped
        moved = newton_step(data, point)
        stuck = is_stuck(moved, start)
        is_done = is_done | (~is_over & ~stuck & is_at_end(moved, point, last_t))
        point = point.where(is_over | stuck, sharpen(moved, mu=mu, last_t=last_t))
        iterations = iterations + (~is_over).to(iterations.dtype)
        is_over = is_over | stuck | is_done | (spent + iterations >= options.max_iterations)
    return point, iterations, is_done


def _start(data: Data, own: Options, z: Tensor) -> PathPoint:
    return PathPoint.at(data, z, z.new_full((data.B,), own.t0))


def _size(data: Data, z: Tensor) -> Tensor:
    """Size of the objective's terms, `(B,)`."""
    return (z.abs() * (data.q.abs() + matvec(data.Q, z).abs())).sum(-1).clamp(min=torch.finfo(z.dtype).tiny)


def _last_t(data: Data, own: Options) -> Tensor:
    return data.q.new_full((data.B,), data.m / own.epsilon)


def _own(options: SolverOptions) -> Options:
    if not isinstance(options.own, Options):
        raise TypeError("options.own must be an instance of barrier.Options")
    return options.own


_LIMIT = CODE[Status.MAX_ITERATIONS]
