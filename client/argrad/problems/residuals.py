"""How the KKT residual of a problem moves with its data: the transpose of how an adjoint becomes parameter gradients.

    r = [Qz + q + Aᵀν + Gᵀλ;  Az − b;  Gz − h],    ṙ = [Q̇z + q̇ + Ȧᵀν + Ġᵀλ;  Ȧz − ḃ;  Ġz − ḣ]   at fixed z, ν, λ

Linear in the tangents and, with tangents of matrices only, in the point: then it is K̇ times that point, which may be an
adjoint as well. For every adjoint w, ⟨w, ṙ⟩ = Σ ⟨gradient of w, tangent⟩ over the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

OBJECTIVE = {"qp": ("Q", "z"), "qp_two_sided": ("P", "x")}
"""Of each kind the matrix of the objective and the primal block."""

ROWS = {"qp": {"A": "nu", "G": "lam"}, "qp_two_sided": {"A": "y"}}
"""Of each kind the matrices of the constraints, and the multipliers that belong to their rows."""

_SIDES = {"b": ("nu", -1.0), "h": ("lam", -1.0), "lb": ("lam_lb", 1.0), "ub": ("lam_ub", -1.0)}


def matrices_of(kind: str) -> frozenset[str]:
    """Names of the parameters that are matrices: those on which the KKT matrix depends."""
    return frozenset({OBJECTIVE[kind][0], *ROWS[kind]})


def residual_tangents(kind: str, tangents: Mapping[str, Tensor | None], at: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tangents of the KKT residual, by the names of the blocks to which its parts belong.

    Args:
        kind: `qp` or `qp_two_sided`.
        tangents: Of the caller's parameters, each shaped like its parameter; None and absent mean zero.
        at: Blocks of a point, `(B, ·)`, or `(·)` where nothing is batched; or of adjoints, by the names of the
            solution's blocks, with k in front or not.

    Returns:
        The parts that some tangent moves, shaped like the blocks.
    """
    given = {name: tensor for name, tensor in tangents.items() if tensor is not None}
    objective, primal = OBJECTIVE[kind]
    z = at[primal]
    moved: dict[str, Tensor] = {}

    def add(block: str, part: Tensor) -> None:
        moved[block] = moved[block] + part if block in moved else part.expand_as(at[block])

    if objective in given:
        matrix = given[objective]
        add(primal, 0.5 * (times(matrix, z) + times(matrix.mT, z)))
    for name, block in ROWS[kind].items():
        if name in given:
            add(primal, times(given[name].mT, at[block]))
            add(block, times(given[name], z))
    if "q" in given:
        add(primal, given["q"])
    for name in given.keys() & _SIDES.keys():
        block, sign = _SIDES[name]
        add(block, sign * given[name])
    if given.keys() & {"l", "u"}:
        up = presses_up(at["y"])
        for name, share in (("l", 1 - up), ("u", up)):
            if name in given:
                add("y", -share * given[name])
    return moved


def presses_up(y: Tensor) -> Tensor:
    """1 for a row that its upper bound holds (y > 0), 0 for the lower, ½ for y = 0; it has no derivative."""
    y = y.detach()
    return torch.heaviside(y, torch.full_like(y, 0.5))


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrix `(r, c)` or `(B, r, c)` times vectors `(…, c)` or `(…, B, c)`."""
    if matrix.ndim == 2:
        return vector @ matrix.mT
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
