"""The outcomes of several solves by compiled kernels as one, to be differentiated together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from argrad.problems import QP, Solution
from argrad_service.engine.data import Data
from argrad_service.engine.outcome import Forward
from argrad_service.engine.point import KKTFactor


def is_joinable(forward: Forward) -> bool:
    """Whether every problem is a QP that the kernels solved, without a row that is weakly active."""
    return forward.factor.is_regular and forward.data.tau is None


def join(forwards: Sequence[Forward]) -> Forward:
    """One outcome of all problems, in order; copies, but for matrices that all of them share.

    Args:
        forwards: Joinable, of one solver and one shape.

    Returns:
        What `kkt` differentiates. Its problem is the stacked rows': one that cannot bind is 0·z ≤ 1 there.
    """
    from argrad_service.engine import compiled

    first, counts = forwards[0], [forward.data.B for forward in forwards]
    factors = []
    for forward in forwards:
        factor = forward.factor.factor
        if not isinstance(factor, compiled.CompiledFactor):
            raise TypeError(f"{type(factor).__name__} cannot be joined")
        factors.append(factor.factors)
    p = first.data.p
    data = Data(
        Q=_shared_or_all([f.data.Q for f in forwards], counts),
        q=torch.cat([f.data.q for f in forwards]),
        C=_shared_or_all([f.data.C for f in forwards], counts),
        d=torch.cat([f.data.d for f in forwards]),
        p=p,
    )
    blocks = [forward.solution.blocks() for forward in forwards]
    is_optimal = torch.cat([forward.factor.is_optimal for forward in forwards])
    parameters = {"Q": data.Q, "q": data.q, "G": data.G, "h": data.h, "A": data.A, "b": data.b}
    names = ("iterations", "primal_residual", "dual_residual", "gap", "objective")
    numbers: dict[str, Any] = {name: torch.cat([getattr(forward, name) for forward in forwards]) for name in names}
    return replace(
        first,
        problem=QP.of_checked({name: t for name, t in parameters.items() if t.shape[1]}),
        data=data,
        solution=Solution(**{name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}),
        status=tuple(status for forward in forwards for status in forward.status),
        flags=tuple(flags for forward in forwards for flags in forward.flags),
        measures={},
        factor=KKTFactor(
            factor=compiled.factor_of(data, compiled.join_factors(factors, counts)),
            is_optimal=is_optimal,
            is_weak=torch.zeros_like(is_optimal),
            is_regular=True,
        ),
        **numbers,
    )


def _shared_or_all(matrices: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Matrices `(1 or b, r, c)` of each part as those of all; the only one where it is the same for all."""
    if len(matrices[0]) == 1 and all(matrix is matrices[0] for matrix in matrices):
        return matrices[0]
    return torch.cat([m.expand(count, -1, -1) for m, count in zip(matrices, counts, strict=True)])
