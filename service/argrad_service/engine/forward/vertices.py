"""Whether the optimal vertex of a linear program is its only solution, where some active rows have no multiplier.

At a solution of an LP a row with λ_i = 0 and s_i = 0 has one of two reasons: the solution is not unique and can leave
the row, or it is a vertex in which too many rows meet, whose multipliers are not unique. Directions along which the
solution can move are those of the cone

    K = {d : Ad = 0, qᵀd = 0, Gᵢd ≤ 0 on every active row}.

Projecting −Σ Gᵢ (over the rows without a multiplier) on K tells: if the result is not zero the solution can move along
it. If it is zero, every d of K has Gᵢd = 0 on these rows, and then the vertex is unique if the active rows have rank n.
"""

from __future__ import annotations

import torch
from torch import Tensor

from argrad_service.engine.data import Data, inf_norm, matvec_t
from argrad_service.engine.forward.certificates import CERTAINTY
from argrad_service.engine.forward.pdipm import solve_feasible
from argrad_service.engine.options import ShouldStop, SolverOptions


def is_unique_vertex(data: Data, strong: Tensor, weak: Tensor, is_optimal: Tensor, should_stop: ShouldStop) -> Tensor:
    """Problems with weakly active rows whose solution cannot leave them, `(B,)`.

    Args:
        data: Linear programs.
        strong: `(B, p + m)`, active rows with a multiplier; equalities always.
        weak: `(B, m)`, active inequalities without one.
        is_optimal: `(B,)`, problems that have a solution.
        should_stop: Asked between iterations.
    """
    found = torch.zeros_like(is_optimal)
    index = torch.nonzero(weak.any(-1) & is_optimal).squeeze(-1)
    part, strong, weak = data.select(index), strong[index], weak[index]
    active = strong.clone()
    active[:, data.p :] |= weak
    norms = torch.linalg.vector_norm(part.C, dim=2)
    C = part.C * torch.where(norms > 0, 1 / norms, torch.ones_like(norms)).unsqueeze(2) * active.unsqueeze(2)
    cost = part.q.unsqueeze(1)
    size = torch.linalg.vector_norm(cost, dim=2, keepdim=True)
    cost = cost / torch.where(size > 0, size, torch.ones_like(size))
    rows = torch.cat([C[:, : data.p], cost, C[:, data.p :]], dim=1)
    push = matvec_t(C[:, data.p :], weak.to(C.dtype))
    # A row that is not active is 0·d ≤ 1.
    room = torch.cat([C.new_zeros(len(index), data.p + 1), (~active[:, data.p :]).to(C.dtype)], dim=1)
    eye = torch.eye(data.n, dtype=C.dtype, device=C.device).unsqueeze(0)
    d = solve_feasible(Data(Q=eye, q=push, C=rows, d=room, p=data.p + 1), SolverOptions(should_stop=should_stop))
    found[index] = inf_norm(d) <= CERTAINTY
    return found
