r"""`altdiff`: alternating differentiation, the derivative of ADMM's iteration, truncated.

`mode = "transposed"` runs the recursion of the adjoint (`fixed_points.AdmmMap`) at the sign pattern [s > 0] of the
solution, until d_z moves by less than the truncation: the same limit, at a cost that does not depend on the number of
parameters. `mode = "forward"` is the paper's algorithm 1: ADMM from zero at a constant penalty and without
over-relaxation, and with each step the Jacobians with respect to q, b and h (`alternation`), truncated where
‖x⁺ − x‖/‖x‖ < ε. The adjoint is d_z = J_qᵀg, d_y = −J_dᵀg. Gradients of Q, A and G follow from the adjoint as for
every method. The error is of the order of ε.

Reference: Sun et al., Alternating Differentiation for Optimization Layers, ICLR 2023, eqs. (5a)–(5g), algorithm 1,
theorem 4.1. Deviations: the transposed recursion; s and ν of the paper in one vector w; penalties for each row unless
`rho` is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from argrad.problems import Flag
from argrad_service.engine.backward.adjoints import INACCURATE, Cotangents, conclude_adjoint, read_cotangents
from argrad_service.engine.backward.alternation import Found, recur
from argrad_service.engine.backward.inexact import adjoint_residual
from argrad_service.engine.forward.fixed_points import AdmmMap, admm_map
from argrad_service.engine.forward.splitting import split
from argrad_service.engine.options import OwnOptions, Stopped
from argrad_service.engine.outcome import Backward, Forward
from argrad_service.engine.structure import detect

NAME = "altdiff"

JACOBIAN_BYTES = 2**28
"""Bound on the Jacobians held at a time: a larger batch goes in parts."""

WORTHLESS = 1.0
"""Where the adjoint misses the KKT system by more than this there is none, for zero would miss it by less; but where a
coarse ε asked for an approximation, with `INACCURATE` the finest that does, it is given and flagged."""

BLOCKS_HELD = 6
"""Arrays of the Jacobians' size that a step holds."""

ROUNDING = 1e-13
"""Part of its first value below which a vector of the transposed recursion is rounding."""


class Options(OwnOptions):
    """Options of `altdiff`."""

    mode: Literal["transposed", "forward"] = "transposed"
    """The adjoint's recursion at the solution's sign pattern, or the paper's, of Jacobians beside ADMM's iterates."""

    truncation: float = Field(default=1e-10, gt=0, le=1)
    """ε: stop where ‖x⁺ − x‖/‖x‖ (transposed: of d_z) is below it."""

    max_iterations: int = Field(default=10_000, ge=1, le=1_000_000)
    """Steps; a problem that is not truncated by then has no gradient (`inaccurate`)."""

    rho: float | None = Field(default=None, ge=1e-8, le=1e8)
    """Penalty ρ of every row, in the problem's own units; null: chosen for each row, from the data and the solve in
    forward mode and from the active set in transposed mode."""


def vjp(forward: Forward, upstream: Mapping[str, Tensor], options: Options) -> Backward:
    """Pull cotangents of the solution back to an adjoint.

    Args:
        forward: Outcome of `admm`.
        upstream: Cotangents of `z`, `nu`, `lam`, `s`, each `(B, ·)` or `(k, B, ·)` with one k; absent means zero.
        options: Mode, truncation, penalty.

    Returns:
        Adjoint, with the measures `altdiff_iterations` and `adjoint_residual`, by how much the adjoint misses the KKT
        system of the exact solution; above 1e-6 with the flag `truncated`. NaN in rows without a gradient.

    Raises:
        Stopped: the solve's `should_stop()` was true.
    """
    given = read_cotangents(forward.data, upstream)
    found = _forward(forward, given, options) if options.mode == "forward" else _transposed(forward, given, options)
    residual = adjoint_residual(forward, given, found.d_z, found.d_y)
    is_wanted = residual.isfinite() if options.truncation > INACCURATE else residual <= WORTHLESS
    backward = conclude_adjoint(
        forward,
        given,
        found.d_z,
        found.d_y,
        error=torch.where(found.is_truncated & is_wanted, 0.0, torch.inf),
        method=NAME,
        measures={"altdiff_iterations": found.iterations, "adjoint_residual": residual},
    )
    misses = (residual > INACCURATE).tolist()
    flags = tuple(
        (*flags, Flag.TRUNCATED) if missed and status == "ok" else flags
        for flags, missed, status in zip(backward.flags, misses, backward.gradient_status, strict=True)
    )
    return replace(backward, flags=flags)


def _transposed(forward: Forward, given: Cotangents, options: Options) -> Found:
    """The recursion v⁺ = Dv + ΣPC d_z(v) + DP g_y from v = 0, until neither d_z nor v moves."""
    whole: AdmmMap = admm_map(forward, rho=options.rho)
    g_z, g_y = given.g_z.transpose(0, 1), given.g_y.transpose(0, 1)
    v = torch.zeros_like(whole.start(g_z, g_y))
    is_truncated = torch.zeros(len(v), dtype=torch.bool, device=v.device)
    iterations = torch.zeros(len(v), dtype=torch.int64, device=v.device)
    index = torch.arange(len(v), device=v.device)
    left = options.max_iterations
    of, now = whole, v
    while left > 0 and len(index):
        now, done, lost, taken = _iterate(of, now, (g_z[index], g_y[index]), left, forward, options)
        v[index], is_truncated[index] = now, done
        iterations[index] += taken
        left -= int(taken.amax())
        keep = torch.nonzero(~done & ~lost).squeeze(-1)
        index, now, of = index[keep], now[keep], of.select(keep)
    d_z, d_y = whole.pull(v, g_z, g_y)
    return Found(d_z=d_z.transpose(0, 1), d_y=d_y.transpose(0, 1), iterations=iterations, is_truncated=is_truncated)


def _iterate(
    of: AdmmMap, v: Tensor, given: tuple[Tensor, Tensor], most: int, forward: Forward, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Steps until half of the problems have settled: v, which have, which are lost, and the steps of each."""
    g_z, g_y = given
    d_z = of.primal(v, g_z)
    # What is zero in the limit, such as d_z at a vertex, is rounding of what the recursion begins with.
    zero = torch.zeros_like(v)
    first = of.primal(zero, g_z)
    x_noise, v_noise = ROUNDING * _norm(first), ROUNDING * _norm(of.next(zero, first, g_y))
    rounding = of.rounding()
    done = torch.zeros(v.shape[:2], dtype=torch.bool, device=v.device)
    lost = torch.zeros(len(v), dtype=torch.bool, device=v.device)
    taken = torch.zeros(len(v), dtype=torch.int64, device=v.device)
    for _ in range(most):
        if forward.options.should_stop():
            raise Stopped
        taken = taken + (~done).any(-1).to(taken)
        after = torch.where(done.unsqueeze(-1), v, of.next(v, d_z, g_y))
        moved = of.primal(after, g_z)
        settled = _is_settled(moved, d_z, options.truncation, x_noise)
        noise = torch.maximum(v_noise, rounding * _norm(moved))
        done = done | (settled & _is_settled(after, v, options.truncation, noise))
        lost = ~torch.isfinite(moved).all(-1).all(-1)
        v, d_z = after, moved
        if 2 * int((done.all(-1) | lost).sum()) >= len(v):
            break
    return v, done.all(-1), lost, taken


def _norm(vector: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(vector, dim=-1)
    return length


def _is_settled(after: Tensor, before: Tensor, truncation: float, noise: Tensor) -> Tensor:
    """Whether ‖after − before‖ ≤ ε‖after‖, or is noise."""
    return _norm(after - before) <= torch.maximum(truncation * _norm(after), noise)


def _forward(forward: Forward, given: Cotangents, options: Options) -> Found:
    """The paper's recursion, for as many problems at a time as their Jacobians fit."""
    data = forward.data
    columns = data.n + data.d.shape[1]
    size = max(1, JACOBIAN_BYTES // (8 * columns * columns * BLOCKS_HELD))
    rows = forward.factor.factor.rows
    strong = rows.scatter(rows.valid.to(data.q), data.d.shape[1])
    is_dropped = forward.factor.is_weak.unsqueeze(-1) & (strong == 0)
    parts = []
    for begin in range(0, data.B, size):
        index = torch.arange(begin, min(begin + size, data.B), device=data.q.device)
        g_z, g_y = given.g_z[:, index].transpose(0, 1), given.g_y[:, index].transpose(0, 1)
        rho = _penalty(forward, options)[index]
        part = data.select(index)
        problem = split(part, detect(part), rho=options.rho)
        found = recur(
            problem,
            rho * problem.unit,
            (g_z, g_y),
            is_dropped[index],
            truncation=options.truncation,
            max_iterations=options.max_iterations,
            should_stop=forward.options.should_stop,
        )
        parts.append(found)
    return Found(
        d_z=torch.cat([part.d_z for part in parts]).transpose(0, 1),
        d_y=torch.cat([part.d_y for part in parts]).transpose(0, 1),
        iterations=torch.cat([part.iterations for part in parts]),
        is_truncated=torch.cat([part.is_truncated for part in parts]),
    )


def _penalty(forward: Forward, options: Options) -> Tensor:
    """ρ relative to the weights of the rows, `(B, 1)`: what the solve adapted it to, if it is not given."""
    rho = forward.measures.get("rho") if options.rho is None else None
    if rho is None:
        return forward.data.q.new_ones(forward.data.B, 1)
    return rho.to(forward.data.q).nan_to_num(nan=1.0).unsqueeze(-1)
