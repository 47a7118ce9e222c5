"""From a solver's point to the outcome that the engine returns: exact solution, factor, flags, residuals."""

from __future__ import annotations

import torch
from torch import Tensor

from argrad.problems import QP, Flag, Solution, Status
from argrad_service.engine.active_set import factor_active_set
from argrad_service.engine.data import Data, Residuals, inf_norm, matvec, residuals
from argrad_service.engine.entropy import factor_entropy, solve_on_rows
from argrad_service.engine.finish import Guess, solve_on_active_set
from argrad_service.engine.forward.vertices import is_unique_vertex
from argrad_service.engine.options import SolverOptions
from argrad_service.engine.outcome import Forward
from argrad_service.engine.point import CODE, STATUSES, KKTFactor, KKTSystem, Point

WEAK = 1e-10
"""τ: a row with λ ≤ τ‖λ‖∞ and s ≤ τ(1 + |h|) is weakly active (math: the map is not differentiable there)."""


def conclude(problem: QP, data: Data, point: Point, options: SolverOptions, *, solver: str) -> Forward:
    """Solve the KKT system of the active set that the solver found, and judge the result.

    Args:
        problem: The problem as the caller stated it, float64, on the engine's device.
        data: The same in stacked rows.
        point: What the solver found.
        options: Tolerance that an optimal problem meets.
        solver: Name of the solver that ran.
    """
    done = point.finished
    if done is not None and done.worst <= options.tolerance:
        s = _finished_slacks(problem, data, point, done.s)
        is_optimal = torch.ones(data.B, dtype=torch.bool, device=data.q.device)
        kkt = KKTFactor(factor=done.factor, is_optimal=is_optimal, is_weak=~is_optimal, is_regular=True)
        return _outcome(problem, point, kkt, (point.z, point.y, s), done.judged, None, {}, solver, options)
    is_optimal = point.status == CODE[Status.OPTIMAL]
    active = point.active & (is_optimal.unsqueeze(-1) | _equalities(data))
    guess = Guess(active=active, z=point.z, y=point.y)
    factor: KKTSystem
    if data.tau is None:
        factor = kkt_system = factor_active_set(data, active, lower=point.lower)
        z, y, _ = solve_on_active_set(kkt_system, guess)
    else:
        z, y, _ = solve_on_rows(data, guess)
        factor = factor_entropy(data, z, active)
    y[:, data.p :].clamp_(min=0)
    if data.is_linear and data.tau is None:
        # Without costs every multiplier is zero; what is left is rounding, large beside itself only.
        y = torch.where((data.q == 0).all(-1, keepdim=True), 0.0, y)
    judged = residuals(data, z, y)
    is_regularised = takes_point = torch.zeros_like(is_optimal)
    is_truncated = takes_point if point.is_truncated is None else point.is_truncated
    status = point.status
    if point.is_final or not bool((is_optimal & (judged.scaled <= options.tolerance)).all()):
        # Where the active set was not confirmed, the solver's own point may be the better of the two.
        is_worse = ~(judged.scaled <= residuals(data, point.z, point.y).scaled)
        takes_point = (is_worse & ~point.is_exact) | ~is_optimal | point.is_final | is_truncated
        is_regularised = takes_point & is_optimal & ~is_truncated & (not point.is_final)
        z, y = (torch.where(takes_point.unsqueeze(-1), a, b) for a, b in ((point.z, z), (point.y, y)))
        z, y = torch.nan_to_num(z), torch.nan_to_num(y)
        judged = residuals(data, z, y)
        fails = is_optimal & ~is_truncated & ~(judged.scaled <= options.tolerance)
        status = torch.where(fails, CODE[Status.NUMERICAL_ERROR], status)
        is_optimal = is_optimal & ~fails

    lam, h = y[:, data.p :], _inequality_bounds(problem, data.B)
    s = _slacks(data.G, z, data.h, h, active)
    strong, weak_rows = _strength(data, lam, s, h, active)
    weak = weak_rows.any(-1)
    if data.is_linear and data.tau is None and bool((weak & is_optimal).any()):
        is_vertex = is_unique_vertex(data, strong, weak_rows, is_optimal, options.should_stop)
        strong[:, data.p :] |= weak_rows & is_vertex.unsqueeze(-1)
        weak = weak & ~is_vertex
    if data.tau is not None:
        s = _slacks(data.given_G, z, h, h, active)
        if bool(takes_point.any()) or bool((strong != active).any()):
            factor = factor_entropy(data, z.clamp(min=0), strong)
    elif bool((strong != active).any()):
        factor = factor_active_set(data, strong, lower=point.lower)
    kkt = KKTFactor(factor=factor, is_optimal=is_optimal, is_weak=weak & is_optimal)
    flags = {
        Flag.DEGENERATE: kkt.is_weak,
        Flag.DEPENDENT: factor.is_dependent & is_optimal,
        Flag.NONUNIQUE: factor.is_nonunique & is_optimal,
        Flag.TRUNCATED: is_truncated & is_optimal,
        Flag.REGULARISED: is_regularised & is_optimal,
    }
    if point.is_fallback is not None:
        flags[Flag.FALLBACK] = point.is_fallback
    return _outcome(problem, point, kkt, (z, y, s), judged, status, flags, solver, options)


def _outcome(
    problem: QP,
    point: Point,
    kkt: KKTFactor,
    solution: tuple[Tensor, Tensor, Tensor],
    judged: Residuals,
    status: Tensor | None,
    flags: dict[Flag, Tensor],
    solver: str,
    options: SolverOptions,
) -> Forward:
    z, y, s = solution
    p = problem.p
    return Forward(
        problem=problem,
        data=kkt.factor.data,
        solution=Solution(z=z, nu=y[:, :p], lam=y[:, p:], s=s),
        status=(Status.OPTIMAL,) * len(z) if status is None else tuple(STATUSES[code] for code in status.tolist()),
        flags=name_flags(flags, len(z)),
        iterations=point.iterations.cpu(),
        primal_residual=judged.primal.cpu(),
        dual_residual=judged.dual.cpu(),
        gap=judged.gap.cpu(),
        objective=judged.objective.cpu(),
        solver=solver,
        options=options,
        factor=kkt,
        measures={name: values.cpu() for name, values in point.measures.items()},
    )


def name_flags(flags: dict[Flag, Tensor], batch: int) -> tuple[tuple[Flag, ...], ...]:
    """The flags of each problem, from one `(B,)` mask a flag."""
    raised = [(flag, mask.tolist()) for flag, mask in flags.items() if bool(mask.any())]
    if not raised:
        return ((),) * batch
    return tuple(tuple(flag for flag, mask in raised if mask[i]) for i in range(batch))


def _equalities(data: Data) -> Tensor:
    mask = torch.zeros(1, data.d.shape[1], dtype=torch.bool, device=data.d.device)
    mask[:, : data.p] = True
    return mask


def _inequality_bounds(problem: QP, batch: int) -> Tensor:
    """H as the caller gave it, `(B, m)`: +inf on rows that do not bind."""
    if problem.h is None:
        return problem.q.new_zeros(batch, 0)
    return problem.h.expand(batch, -1) if problem.h.ndim == 1 else problem.h


def _finished_slacks(problem: QP, data: Data, point: Point, s: Tensor | None) -> Tensor:
    """Slacks of a finished point: those of the kernels, +inf where h is, or of the rows as they were given."""
    if s is not None and not data.has_free:
        return s
    h = _inequality_bounds(problem, data.B)
    return _slacks(data.given_G, point.z, h, h, point.active) if s is None else torch.where(torch.isinf(h), h, s)


def _slacks(G: Tensor, z: Tensor, finite: Tensor, h: Tensor, active: Tensor) -> Tensor:
    """H − Gz, not below zero; exactly zero on active rows, +inf where h is and `finite` is not."""
    s = (finite - matvec(G, z)).clamp(min=0)
    s = torch.where(active[:, active.shape[1] - s.shape[1] :], torch.zeros_like(s), s)
    return torch.where(torch.isinf(h), h, s)


def _strength(data: Data, lam: Tensor, s: Tensor, h: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Strongly active rows `(B, p + m)`, and weakly active inequalities `(B, m)`."""
    no_force = lam <= WEAK * inf_norm(lam).unsqueeze(-1)
    no_room = s <= WEAK * (1 + data.h.abs())
    weak_rows = no_force & no_room & ~torch.isinf(h)
    strong = active.clone()
    strong[:, data.p :] &= ~weak_rows
    return strong, weak_rows
