"""Large shares, one problem at a time, as sparse problems: a dense identity would be n² numbers."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from argrad.functional import QPSolution, solve_qp
from argrad.nn.layer import ProblemLayer

LARGE = 256
"""Variables from which a problem without a batch travels as a sparse one. It is solved by a search over breakpoints."""


def share(layer: ProblemLayer, y: Tensor, total: Tensor, upper: Tensor | None) -> Tensor:
    """Argmin ½‖x − y‖² subject to 1ᵀx = total, 0 ≤ x ≤ upper.

    Args:
        layer: Who solves, and how.
        y: `(n,)`.
        total: `(1,)`.
        upper: `(n,)`, or None for no bound.
    """
    n = len(y)
    i, ones, zeros = torch.arange(n, device=y.device), y.new_ones(n), y.new_zeros(n)
    identity = _sparse(torch.stack([i, i]), ones, (n, n))
    if upper is None:
        G, h = _sparse(torch.stack([i, i]), -ones, (n, n)), zeros
    else:
        both = torch.stack([torch.arange(2 * n, device=y.device), torch.cat([i, i])])
        G, h = _sparse(both, torch.cat([ones, -ones]), (2 * n, n)), torch.cat([upper, zeros])
    A = _sparse(torch.stack([torch.zeros_like(i), i]), ones, (1, n))
    solution = solve_qp(
        layer.client,
        identity,
        -y,
        G,
        h,
        A,
        total,
        options=layer.options,
        on_failure=layer.on_failure,
        gradients=layer.gradients,
        timeout_s=layer.timeout_s,
    )
    return cast("QPSolution", solution).z


def _sparse(where: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_coo_tensor(where, values, shape, is_coalesced=True, check_invariants=False)
