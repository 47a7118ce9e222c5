"""Problems with entropy: a batched primal–dual interior point method in log z, finished on the exact active set.

    Qz + q + τ(1 + log z) + Aᵀν + Gᵀλ = 0,   Az = b,   Gz + s = h,   λ∘s = μ,   λ, s > 0

Newton's method on these equations with z = e^w (`engine.entropy` has the scaling and why), Mehrotra's predictor and
corrector for λ and s. z ≥ 0 needs no multiplier and no step to its boundary: w may move by any amount. Stationarity is
linear in w and ν, λ where Q is absent, so small entries of z are right as soon as the multipliers are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from argrad_service.engine.data import Data, dot, inf_norm, matvec
from argrad_service.engine.entropy import EntropyCandidates, move, stationarity, tau_of, underflow
from argrad_service.engine.finish import Guess, find_active_set
from argrad_service.engine.forward.entropic_system import EntropicSystem, Iterate
from argrad_service.engine.forward.mehrotra import SHORTEST_STEP, STEP_TO_BOUNDARY
from argrad_service.engine.options import SolverOptions, Stopped
from argrad_service.engine.point import Finished
from argrad_service.engine.registry import is_there

COMPILED_BY = ("numba", "scipy", "threadpoolctl")
"""Packages that the compiled kernels need."""

STAGES = (1e-1, 1e-3, 1e-6, 1e-10)
"""Values of μ and of the scaled residual at which the finish is tried."""

FINISH_ROUNDS = 6
"""Candidate sets that the finish tries at one stage."""

FIRST_TAU = 0.15
"""τ begins at this fraction of the spread of q, if the problem's is smaller."""

FALL = 0.25
"""Factor by which τ falls once the residual is below `NEAR_PATH`."""

NEAR_PATH = 0.1
"""Scaled residual below which τ falls."""

MOST_AHEAD = 10.0
"""Violation of the rows, as a multiple of μ, above which μ does not fall."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the method found, `(B, ·)`: active rows, z, y, iterations, and whether the active set was confirmed."""

    active: Tensor
    z: Tensor
    y: Tensor
    iterations: Tensor
    is_exact: Tensor


def solve(data: Data, options: SolverOptions, warm: Guess | None) -> tuple[Found, Finished | None]:
    """Solve a batch of problems with entropy.

    On the CPU, without a quadratic term, compiled kernels do it problem by problem (`kernels.entropic`); those that
    they leave open, such as problems with dependent rows, are solved in torch.

    Args:
        data: The problems.
        options: Iteration limit, and who asks to stop.
        warm: Active set and point to try first.

    Returns:
        What was found, and the rest if the kernels solved every problem.

    Raises:
        Stopped: options.should_stop() was true.
    """
    if not (data.is_linear and data.q.device.type == "cpu" and all(is_there(name) for name in COMPILED_BY)):
        return _solve_batched(data, options, warm), None
    # Imported when first needed: compiled kernels take a second to load, and a GPU needs none.
    from argrad_service.engine import compiled_entropy
    from argrad_service.engine.kernels.active_set import SOLVED, UNDECIDED

    if not compiled_entropy.takes(data):
        return _solve_batched(data, options, warm), None
    solved = compiled_entropy.solve_batch(data, options, warm)
    found = Found(
        active=solved.active,
        z=solved.z,
        y=solved.y,
        iterations=solved.iterations,
        is_exact=solved.code != UNDECIDED,
    )
    if bool((solved.code == SOLVED).all()):
        return found, solved.finished()
    rest = torch.nonzero(~found.is_exact).squeeze(-1)
    if len(rest):
        other = _solve_batched(data.select(rest), options, None if warm is None else warm.select(rest))
        for name, values in vars(found).items():
            values[rest] = getattr(other, name)
    return found, None


def _solve_batched(data: Data, options: SolverOptions, warm: Guess | None) -> Found:
    part, kept = _without_idle_rows(data)
    candidates = EntropyCandidates(part)
    found = Found(
        active=torch.arange(part.d.shape[1], device=data.q.device).expand(data.B, -1) < part.p,
        z=data.q.new_zeros(data.B, data.n),
        y=data.q.new_zeros(part.d.shape),
        iterations=torch.zeros(data.B, dtype=torch.int64, device=data.q.device),
        is_exact=torch.zeros(data.B, dtype=torch.bool, device=data.q.device),
    )
    found = Found(**{name: value.clone() for name, value in vars(found).items()})
    remaining = torch.arange(data.B, device=data.q.device)
    if warm is not None:
        guess = Guess(active=warm.active[:, kept], z=warm.z, y=warm.y[:, kept])
        remaining = _finish(candidates, guess, remaining, found, part.p)
    now = _start(part.select(remaining)) if len(remaining) else None
    for target in STAGES:
        if now is None or len(remaining) == 0:
            break
        now, active, taken = _advance(part.select(remaining), now, target, options, found.iterations[remaining])
        found.iterations[remaining] += taken
        left = _finish(candidates, Guess(active=active, z=underflow(now.w), y=now.y), remaining, found, part.p)
        now = now.select(torch.nonzero(torch.isin(remaining, left)).squeeze(-1))
        remaining = left
    return _in_all_rows(found, data, kept)


def _without_idle_rows(data: Data) -> tuple[Data, Tensor]:
    """The problems without the inequalities that bind in none of them, and the rows that are kept."""
    is_live = (data.C != 0).any(-1).any(0) | (data.d < 0).any(0)
    is_live[: data.p] = True
    kept = torch.nonzero(is_live).squeeze(-1)
    if len(kept) == data.d.shape[1]:
        return data, kept
    return replace(data, C=data.C[:, kept], d=data.d[:, kept]), kept


def _in_all_rows(found: Found, data: Data, kept: Tensor) -> Found:
    active = torch.zeros(data.d.shape, dtype=torch.bool, device=data.d.device)
    active[:, kept] = found.active
    y = torch.zeros_like(data.d)
    y[:, kept] = found.y
    return replace(found, active=active, y=y)


def _finish(candidates: EntropyCandidates, guess: Guess, remaining: Tensor, found: Found, p: int) -> Tensor:
    """Try the finish on the problems still open, note what it found, and return what is left of them."""

    def of_remaining(guess: Guess, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return candidates(guess, remaining[index])

    active, is_found = find_active_set(guess, p, of_remaining, rounds=FINISH_ROUNDS)
    found.active[remaining] = torch.where(is_found.unsqueeze(-1), active, guess.active)
    is_new = is_found.unsqueeze(-1)
    found.z[remaining] = torch.nan_to_num(torch.where(is_new, candidates.z[remaining], guess.z))
    found.y[remaining] = torch.nan_to_num(torch.where(is_new, candidates.y[remaining], guess.y))
    found.is_exact[remaining] = is_found
    return remaining[~is_found]


def _start(data: Data) -> Iterate:
    """All z alike, as large as the equalities ask; λ and s with a product in the problem's own units."""
    tau = tau_of(data)
    ones = torch.ones_like(data.q)
    along = matvec(data.A, ones)
    fit = dot(along, data.b) / dot(along, along).clamp(min=1e-300)
    level = torch.where(fit > 0, fit, torch.ones_like(fit)).clamp(1e-6, 1e6).unsqueeze(-1)
    if data.p == 0:
        level = torch.ones_like(level)
    w = level.log().expand_as(data.q).clone()
    room = data.h - matvec(data.G, level * ones)
    s = torch.maximum(room, 0.1 * (level + data.h.abs()))
    force = tau + data.q.std(dim=-1, keepdim=True, correction=0)
    lam = (force / torch.linalg.vector_norm(data.G, dim=2).clamp(min=1e-3)).expand_as(s)
    y = torch.cat([data.q.new_zeros(data.B, data.p), lam], dim=1)
    spread = data.q.amax(-1) - data.q.amin(-1)
    return Iterate(w=w, y=y, s=s, tau=torch.maximum(tau.squeeze(-1), FIRST_TAU * spread))


def _advance(
    data: Data, now: Iterate, target: float, options: SolverOptions, taken: Tensor
) -> tuple[Iterate, Tensor, Tensor]:
    """Iterate until each problem's residual and relative μ are below the target.

    Args:
        data: The problems still open.
        now: Where they are.
        target: Bound on both.
        options: Iteration limit, and who asks to stop.
        taken: Iterations that each has had.

    Returns:
        The new iterates, the rows that tend to be active `(B, p + m)`, and the iterations taken.
    """
    p, m = data.p, data.m
    count = torch.zeros_like(taken)
    is_stuck = torch.zeros(data.B, dtype=torch.bool, device=data.q.device)
    active = torch.arange(p + m, device=data.q.device).expand(data.B, -1) < p
    full, goal = data, tau_of(data).squeeze(-1)
    while True:
        data = replace(full, tau=now.tau)
        z = now.w.exp()
        lam = now.y[:, p:]
        slope = stationarity(data, z, now.w, now.y)
        Cz = matvec(data.C, z)
        away = Cz - data.d
        away = torch.cat([away[:, :p], away[:, p:] + now.s], dim=1)
        mu = dot(lam, now.s) / max(m, 1)
        size = 1 + torch.maximum(inf_norm(data.d), inf_norm(Cz))
        force = data.q.abs().amax(-1) + tau_of(data).squeeze(-1) + inf_norm(lam)
        scaled = torch.maximum(inf_norm(away) / size, inf_norm(slope * (z > 0)) / force)
        scaled = torch.maximum(scaled, mu / (size * force))
        is_on_way = now.tau > goal
        done = ((scaled <= target) & ~is_on_way) | is_stuck | (taken + count >= options.max_iterations)
        if bool(done.all()):
            return now, active, count
        if options.should_stop():
            raise Stopped
        falls = is_on_way & (scaled <= NEAR_PATH)
        if bool(falls.any()):
            now.tau = torch.where(falls, torch.maximum(goal, FALL * now.tau), now.tau)
            data = replace(full, tau=now.tau)
            slope = stationarity(data, z, now.w, now.y)
        system = EntropicSystem(data, z, now)
        product = lam * now.s
        affine = system.direction(slope, away, product)
        if m:
            likely = affine.y[:, p:] / lam > affine.s / now.s
            active = torch.where(done.unsqueeze(-1), active, torch.cat([active[:, :p], likely], dim=1))
            alpha = _step_length(now, affine, p, 1.0)
            ahead = dot(lam + alpha * affine.y[:, p:], now.s + alpha * affine.s) / m
            sigma = (ahead / mu).clamp(0, 1) ** 3
            # λ∘s must not fall ahead of the rest: rows that it closes too early are slow to open again.
            centres = inf_norm(away) * force > MOST_AHEAD * mu
            second = torch.where(centres.unsqueeze(-1), 0.0, affine.y[:, p:] * affine.s)
            corrected = product + second - (torch.where(centres, 1.0, sigma) * mu).unsqueeze(-1)
            step = system.direction(slope, away, corrected)
        else:
            step = affine
        alpha = _step_length(now, step, p, STEP_TO_BOUNDARY)
        size = inf_norm(step.w) + inf_norm(step.y) + inf_norm(step.s)
        moves = torch.isfinite(size) & (alpha.squeeze(-1) > SHORTEST_STEP) & ~done
        is_stuck = is_stuck | (~moves & ~done)
        alpha, keep = torch.where(moves.unsqueeze(-1), alpha, 0.0), moves.unsqueeze(-1)
        now = Iterate(
            w=torch.where(keep, move(now.w, alpha * step.w), now.w),
            y=torch.where(keep, now.y + alpha * step.y, now.y),
            s=torch.where(keep, now.s + alpha * step.s, now.s),
            tau=now.tau,
        )
        count = count + (~done).to(count.dtype)


def _step_length(now: Iterate, step: Iterate, p: int, fraction: float) -> Tensor:
    """Largest α ≤ 1 that keeps λ and s within `fraction` of their bounds, `(B, 1)`."""
    if now.s.shape[1] == 0:
        return now.w.new_ones(len(now.w), 1)
    ratio = torch.maximum((-step.y[:, p:] / now.y[:, p:]).amax(-1), (-step.s / now.s).amax(-1))
    return (fraction / ratio.clamp(min=fraction)).nan_to_num(nan=0.0).unsqueeze(-1)
