"""Parameter gradients from an adjoint in the caller's own blocks: what a client does with an `adjoint` reply.

`Form.gradients` starts from the canonical problem, whose rows depend on values; here only shapes are looked at, so that
autograd, and torch.func's vmap, see through it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from argrad.problems.qp import Adjoint, Solution, gradients
from argrad.problems.residuals import presses_up
from argrad.problems.rows import BOUNDED, TWO_SIDED
from argrad.problems.sparse import SPARSE

DIMENSIONS_BY_KIND = {"qp": BOUNDED, "qp_two_sided": TWO_SIDED, "sparse_qp": SPARSE}
"""Dimensions of each parameter, without the batch, for every kind of problem."""


def form_gradients(
    kind: str,
    solution: Mapping[str, Tensor],
    adjoint: Mapping[str, Tensor],
    *,
    wrt: Collection[str],
    batched: Collection[str],
) -> dict[str, Tensor]:
    """Form gradients of the caller's parameters by outer products.

    Args:
        kind: `qp` or `qp_two_sided`.
        solution: The caller's blocks, `(B, ·)`, or `(·)` where nothing is batched.
        adjoint: The caller's blocks of the adjoint, the same behind `(k,)` if there are k cotangents.
        wrt: Parameters whose gradients are wanted.
        batched: Parameters of the problem that have a batch dimension; with none, no block has one.

    Returns:
        Gradients by name, shaped like the parameter, behind `(k,)` if the adjoint has k cotangents.
    """
    if not batched:
        solution, adjoint = ({name: t.unsqueeze(-2) for name, t in blocks.items()} for blocks in (solution, adjoint))
    formed = _of_two_sided(solution, adjoint, wrt, batched) if kind == "qp_two_sided" else {}
    if kind == "qp":
        formed = _of_bounded(solution, adjoint, wrt, batched)
    return {name: formed[name] for name in wrt}


def _of_bounded(
    solution: Mapping[str, Tensor], adjoint: Mapping[str, Tensor], wrt: Collection[str], batched: Collection[str]
) -> dict[str, Tensor]:
    point = Solution(**{name: solution[name] for name in ("z", "nu", "lam", "s")})
    blocks = Adjoint(**{name: adjoint[name] for name in ("z", "nu", "mu")})
    formed = gradients(point, blocks, wrt=[name for name in wrt if name not in ("lb", "ub")], batched=batched)
    if "lb" in wrt:
        formed["lb"] = _summed(adjoint["mu_lb"], "lb" in batched)
    if "ub" in wrt:
        formed["ub"] = _summed(-adjoint["mu_ub"], "ub" in batched)
    return formed


def _of_two_sided(
    solution: Mapping[str, Tensor], adjoint: Mapping[str, Tensor], wrt: Collection[str], batched: Collection[str]
) -> dict[str, Tensor]:
    """P, q and A are Q, q and A of a QP whose equalities are all rows: y stands for ν, also where it is 0."""
    x, y, d_x, d_y = solution["x"], solution["y"], adjoint["x"], adjoint["y"]
    canonical = {"P": "Q", "q": "q", "A": "A"}
    formed = gradients(
        Solution(z=x, nu=y, lam=y[..., :0], s=y[..., :0]),
        Adjoint(z=d_x, nu=d_y, mu=d_y[..., :0]),
        wrt=[canonical[name] for name in wrt if name in canonical],
        batched=[canonical[name] for name in batched if name in canonical],
    )
    named = {name: formed[to] for name, to in canonical.items() if to in formed}
    # The side that presses moves the row; ½ at an equality row that neither does, as in `rows.py`.
    up = presses_up(y)
    sides = {"l": -(1 - up) * d_y, "u": -up * d_y}
    return named | {name: _summed(side, name in batched) for name, side in sides.items() if name in wrt}


def _summed(vector: Tensor, is_batched: bool) -> Tensor:
    return vector if is_batched else vector.sum(dim=-2)
