"""What every differentiation method does before and after its own work: cotangents in, an adjoint with verdicts out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from argrad.problems import Adjoint, Flag
from argrad_service.engine.data import Data
from argrad_service.engine.outcome import Backward, Forward
from argrad_service.engine.solution import name_flags

INACCURATE = 1e-6
"""An adjoint whose relative residual stays above this is refused."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Cotangents:
    """The cotangents of a call, k in front; that of the slack s = h − Gz is contained in g_z.

    Args:
        g_z: `(k, B, n)`, the caller's less Gᵀg_s.
        g_s: `(k, B, m)`, or None; `conclude_adjoint` subtracts it from μ.
        has_k: Whether the caller gave k.
        on_rows: Of [ν; λ], `(k, B, p + m)`, or the number of these where they have none.
    """

    g_z: Tensor
    g_s: Tensor | None
    has_k: bool
    on_rows: Tensor | int

    @cached_property
    def g_y(self) -> Tensor:
        """Of [ν; λ], `(k, B, p + m)`."""
        return (
            self.on_rows if isinstance(self.on_rows, Tensor) else self.g_z.new_zeros(*self.g_z.shape[:2], self.on_rows)
        )

    @property
    def count(self) -> int:
        """K."""
        return self.g_z.shape[0]


def read_cotangents(data: Data, upstream: Mapping[str, Tensor]) -> Cotangents:
    """Cotangents of `z`, `nu`, `lam`, `s`, each `(B, ·)` or `(k, B, ·)` with one k; absent means zero."""
    given = {name: block.to(data.q) for name, block in upstream.items()}
    first = next(iter(given.values()))
    has_k = first.ndim == 3
    count = first.shape[0] if has_k else 1
    sizes = {"z": data.n, "nu": data.p, "lam": data.m, "s": data.m}

    def cotangent(name: str) -> Tensor:
        block = given.get(name)
        if block is None:
            return data.q.new_zeros(count, data.B, sizes[name])
        return block if has_k else block.unsqueeze(0)

    g_z, on_rows = cotangent("z"), data.p + data.m
    g_s = cotangent("s") if "s" in given else None
    if g_s is not None:
        g_z = g_z - (g_s.transpose(0, 1) @ data.given_G).transpose(0, 1)
    if "nu" not in given and "lam" not in given:
        return Cotangents(g_z=g_z, g_s=g_s, has_k=has_k, on_rows=on_rows)
    g_y = torch.cat([cotangent("nu"), cotangent("lam")], dim=-1)
    return Cotangents(g_z=g_z, g_s=g_s, has_k=has_k, on_rows=g_y)


def conclude_adjoint(
    forward: Forward,
    cotangents: Cotangents,
    d_z: Tensor,
    d_y: Tensor,
    *,
    error: Tensor,
    method: str,
    measures: Mapping[str, Tensor] | None = None,
) -> Backward:
    """Judge what a method computed.

    Args:
        forward: What was differentiated.
        cotangents: Of the call.
        d_z: `(k, B, n)`.
        d_y: `(k, B, p + m)`: d_ν, and μ, which is zero on inactive rows.
        error: `(B,)`, relative residual, or what the method has in its place; above `INACCURATE` there is no gradient.
        method: Its name.
        measures: What else it measured, `(B,)` each.
    """
    data, kkt = forward.data, forward.factor
    mu = d_y[..., data.p :]
    if cotangents.g_s is not None:
        mu = mu - cotangents.g_s

    def on_dependent() -> Tensor:
        return kkt.factor.is_dependent & (kkt.factor.rows.gather(cotangents.g_y) != 0).any(-1).any(0)

    status, is_refused = verdicts(forward, error, on_dependent)
    blocks = {"z": d_z, "nu": d_y[..., : data.p], "mu": mu}
    if is_refused is not None:
        refused = is_refused.unsqueeze(-1)
        blocks = {name: torch.where(refused, torch.nan, block) for name, block in blocks.items()}
    if not cotangents.has_k:
        blocks = {name: block.squeeze(0) for name, block in blocks.items()}
    return Backward(
        adjoint=Adjoint(**blocks),
        gradient_status=status,
        flags=gradient_flags(forward),
        method=method,
        measures={name: values.cpu() for name, values in (measures or {}).items()},
    )


def verdicts(
    forward: Forward, error: Tensor, on_dependent: Callable[[], Tensor]
) -> tuple[tuple[str, ...], Tensor | None]:
    """Of each problem `ok` or why it has no gradient, and the mask of those that have none, or None if all have one.

    Args:
        forward: What was differentiated.
        error: `(B,)`, relative residual of the answer.
        on_dependent: Finds the problems, `(B,)`, in which multipliers that are not unique were asked about.
    """
    kkt = forward.factor
    is_accurate = error <= INACCURATE
    if kkt.is_regular and bool(is_accurate.all()):
        return ("ok",) * len(forward.status), None
    reasons = {
        "nonunique": kkt.factor.is_nonunique,
        "dependent": on_dependent(),
        "inaccurate": ~is_accurate,
    }
    is_refused = ~kkt.is_optimal
    for mask in reasons.values():
        is_refused = is_refused | mask
    if not bool(is_refused.any()):
        return ("ok",) * len(forward.status), None
    status = [str(s) if not good else "ok" for s, good in zip(forward.status, kkt.is_optimal.tolist(), strict=True)]
    for reason, mask in reasons.items():
        for i in torch.nonzero(mask).flatten().tolist():
            if status[i] == "ok":
                status[i] = reason
    return tuple(status), is_refused


def gradient_flags(forward: Forward) -> tuple[tuple[Flag, ...], ...]:
    """What is to be known of each problem's derivative."""
    kkt = forward.factor
    if kkt.is_regular:
        return ((),) * len(forward.status)
    return name_flags(
        {
            Flag.DEGENERATE: kkt.is_weak,
            Flag.DEPENDENT: kkt.factor.is_dependent & kkt.is_optimal,
            Flag.NONUNIQUE: kkt.factor.is_nonunique & kkt.is_optimal,
        },
        len(forward.status),
    )
