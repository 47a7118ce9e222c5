"""LPs whose vertex is known before they are solved, and differences of a solution map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from argrad.problems import QP, gradients
from argrad_service.engine import Backward, Forward


@dataclass(frozen=True)
class KnownLP:
    """A batch of LPs and its unique vertex, nondegenerate."""

    problem: QP
    z: Tensor
    nu: Tensor
    lam: Tensor


def draw_lp(n: int, m: int, p: int, *, batch: int = 3, shared: bool = False, seed: int = 0) -> KnownLP:
    """Choose the vertex first: n − p of the m inequalities active, with multipliers of 0.3 to 1.3."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return 0.3 + torch.rand(*shape, generator=generator, dtype=torch.float64)

    front = () if shared else (batch,)
    G, A = normal(*front, m, n), normal(*front, p, n)
    z, nu = normal(batch, n), normal(batch, p)
    active = torch.arange(m) < n - p
    lam, s = torch.where(active, uniform(batch, m), 0.0), torch.where(active, 0.0, uniform(batch, m))
    data = {"q": -(times(G.mT, lam) + times(A.mT, nu)), "G": G, "h": times(G, z) + s}
    if p:
        data |= {"A": A, "b": times(A, z)}
    return KnownLP(QP(**data), z, nu, lam)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """M x of each problem."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def form(forward: Forward, backward: Backward, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Parameter gradients of one cotangent, as a client forms them."""
    problem = forward.problem
    batched = [name for name in names if problem.is_batched(name)]
    return gradients(forward.solution, backward.adjoint, wrt=names, batched=batched)


def slope(solve: Callable[[QP], Tensor], problem: QP, directions: Mapping[str, Tensor], step: float = 1e-6) -> float:
    """Central difference of a number that depends on the problem, along the directions."""

    def moved(sign: float) -> QP:
        given = problem.parameters()
        return QP(**given | {name: given[name] + sign * step * to for name, to in directions.items()})

    return float((solve(moved(1.0)) - solve(moved(-1.0))) / (2 * step))


def directions(problem: QP, names: tuple[str, ...], seed: int = 0) -> dict[str, Tensor]:
    """Normal directions; that of Q is symmetric."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in names:
        block = torch.randn(getattr(problem, name).shape, generator=generator, dtype=torch.float64)
        found[name] = 0.5 * (block + block.mT) if name == "Q" else block
    return found


def inner(found: Mapping[str, Tensor], along: Mapping[str, Tensor]) -> float:
    """⟨gradient, direction⟩ over all parameters."""
    return float(sum((found[name] * to).sum() for name, to in along.items()))
