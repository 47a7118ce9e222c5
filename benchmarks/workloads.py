"""Random QPs on which libraries of differentiable optimisation have been timed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from argrad.problems import QP


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A batch of QPs and the cotangent of its solution.

    Args:
        name: What a table calls it.
        problem: B problems of n variables, every parameter batched, float64.
        grad_z: ∂loss/∂z, `(B, n)`.
    """

    name: str
    problem: QP
    grad_z: Float[Tensor, "batch n"]


def optnet(n: int, batch: int, *, seed: int) -> Workload:
    """Draw OptNet's random QPs with as many inequalities as variables, and no equalities.

    Q = UᵀU + 1e-3 I with U uniform on (0, 1), G and z₀ normal, h = Gz₀ + s₀ with s₀ uniform, so that z₀ is feasible.

    Args:
        n: Variables and inequalities.
        batch: Problems.
        seed: Of the generator; results name it.

    References:
        Amos & Kolter, OptNet, ICML 2017, footnote 4.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    factor = uniform(batch, n, n)
    G = normal(batch, n, n)
    problem = QP(
        Q=factor.mT @ factor + 1e-3 * torch.eye(n, dtype=torch.float64),
        q=normal(batch, n),
        G=G,
        h=(G @ normal(batch, n, 1)).squeeze(-1) + uniform(batch, n),
    )
    return Workload(name=f"n = m = {n}, batch {batch}", problem=problem, grad_z=normal(batch, n))


def two_variables() -> Workload:
    """One problem of two variables: its solve costs next to nothing, so that a call shows what surrounds it."""
    problem = QP(
        Q=torch.tensor([[4.0, 1.0], [1.0, 2.0]], dtype=torch.float64),
        q=torch.ones(2, dtype=torch.float64),
        G=-torch.eye(2, dtype=torch.float64),
        h=torch.zeros(2, dtype=torch.float64),
        A=torch.ones(1, 2, dtype=torch.float64),
        b=torch.ones(1, dtype=torch.float64),
    )
    return Workload(name="2 variables, batch 1", problem=problem, grad_z=torch.tensor([1.0, 0.0], dtype=torch.float64))
