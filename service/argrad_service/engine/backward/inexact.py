"""Adjoints that are not the exact solution's own: of iterates, and of smoothed problems.

The reasons for which `adjoints` refuses a gradient, a solution that is not unique or dependent rows, do not hold for
them: an iterate and the solution of a smoothed problem are unique. What they miss is measured instead, and flagged.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from argrad.problems import Adjoint, Flag
from argrad_service.engine.backward.adjoints import Cotangents
from argrad_service.engine.data import inf_norm, matvec, matvec_t
from argrad_service.engine.outcome import Backward, Forward
from argrad_service.engine.solution import name_flags


def conclude_inexact(
    forward: Forward,
    cotangents: Cotangents,
    d_z: Tensor,
    d_y: Tensor,
    *,
    status: Mapping[str, Tensor],
    flags: dict[Flag, Tensor],
    method: str,
    measures: Mapping[str, Tensor],
) -> Backward:
    """Verdicts and blocks of an adjoint.

    Args:
        forward: What was differentiated.
        cotangents: Of the call.
        d_z: `(k, B, n)`.
        d_y: `(k, B, p + m)`, [d_ν; μ].
        status: Masks `(B,)` of optimal problems that have no gradient, by reason; not finite is one more.
        flags: Masks `(B,)`.
        method: Its name.
        measures: What it measured, `(B,)` each.
    """
    p, is_optimal = forward.data.p, forward.factor.is_optimal
    mu = d_y[..., p:] if cotangents.g_s is None else d_y[..., p:] - cotangents.g_s
    is_finite = torch.isfinite(d_z).all(-1).all(0) & torch.isfinite(d_y).all(-1).all(0)
    reasons = {**status, "inaccurate": ~is_finite}
    words = [str(word) if not good else "ok" for word, good in zip(forward.status, is_optimal.tolist(), strict=True)]
    is_refused = ~is_optimal
    for reason, mask in reasons.items():
        is_refused = is_refused | mask
        words = [reason if word == "ok" and bad else word for word, bad in zip(words, mask.tolist(), strict=True)]
    blocks = {"z": d_z, "nu": d_y[..., :p], "mu": mu}
    blocks = {name: torch.where(is_refused.unsqueeze(-1), torch.nan, block) for name, block in blocks.items()}
    if not cotangents.has_k:
        blocks = {name: block.squeeze(0) for name, block in blocks.items()}
    return Backward(
        adjoint=Adjoint(**blocks),
        gradient_status=tuple(words),
        flags=name_flags({flag: mask & ~is_refused for flag, mask in flags.items()}, len(words)),
        method=method,
        measures={name: values.cpu() for name, values in measures.items()},
    )


def adjoint_residual(forward: Forward, cotangents: Cotangents, d_z: Tensor, d_y: Tensor) -> Tensor:
    """By how much an adjoint misses the KKT system of the exact active set, relative to the cotangents, `(B,)`.

    The largest of k cotangents; with entropy d_z where z is 0 counts too.
    """
    active = _active(forward)
    slope, on_rows = missed(forward, cotangents, d_z, d_y)
    if forward.data.tau is not None:
        slope = torch.where(_is_there(forward), slope, d_z)
    worst = d_z.new_zeros(forward.data.B)
    for x, y, g_z, g_y in zip(slope, on_rows, cotangents.g_z, cotangents.g_y, strict=True):
        size = torch.maximum(inf_norm(g_z), inf_norm(torch.where(active, g_y, 0.0)))
        worst = torch.maximum(
            worst, torch.maximum(inf_norm(x), inf_norm(y)) / torch.where(size > 0, size, torch.ones_like(size))
        )
    return worst


def missed(forward: Forward, cotangents: Cotangents, d_z: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
    """The residual of the adjoint's KKT system, `(k, B, n)` and `(k, B, p + m)`: the cotangents of its correction.

    Qd_z + Cᵀd_y + g_z (with entropy Q + τD(1/z), and 0 where z is 0),   C_a d_z + g_y,a,   and d_y on inactive rows
    """
    data, active = forward.data, _active(forward)
    slopes, on_rows = [], []
    for x, y, g_z, g_y in zip(d_z, d_y, cotangents.g_z, cotangents.g_y, strict=True):
        on_rows.append(torch.where(active, matvec(data.C, x) + g_y, y))
        slope = matvec(data.Q, x) + matvec_t(data.C, y) + g_z
        if data.tau is not None:
            is_there = _is_there(forward)
            z = torch.where(is_there, forward.solution.z, 1.0)
            slope = torch.where(is_there, slope + data.tau.unsqueeze(-1) * x / z, 0.0)
        slopes.append(slope)
    return torch.stack(slopes), torch.stack(on_rows)


def _active(forward: Forward) -> Tensor:
    rows = forward.factor.factor.rows
    return rows.scatter(rows.valid.to(forward.data.q), forward.data.d.shape[1]) > 0


def _is_there(forward: Forward) -> Tensor:
    """Entries of z that did not underflow, `(B, n)`."""
    z = forward.solution.z
    return z > torch.finfo(z.dtype).tiny


def distance(forward: Forward, z: Tensor) -> Tensor:
    """‖z − z*‖₂ of each problem, `(B,)`, in the units of z."""
    length: Tensor = torch.linalg.vector_norm(z - forward.solution.z, dim=1)
    return length
