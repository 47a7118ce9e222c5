"""Layers on sequences: denoising by total variation, and a schedule that cannot change faster than a ramp."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from argrad.nn.quadratic import Answer, QuadraticLayer, Size, column, identity, zeros


def differences(n: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
    """The matrix `(n − 1, n)` of D x = (x₁ − x₂, x₂ − x₃, …).

    Args:
        n: Length of x, 2 or more.
        dtype: Of the matrix; torch's default.
        device: Where it lies.
    """
    whole = torch.eye(n, dtype=dtype, device=device)
    return whole[:-1] - whole[1:]


class TotalVariation(QuadraticLayer):
    """argmin ½‖x − y‖² + w‖Dx‖₁; arguments as `ProblemLayer` has them.

    As a QP in (x, t), t = |Dx|, with the multipliers λ⁺, λ⁻ ≥ 0 of its two groups of rows, λ⁺ + λ⁻ = w:

        minimise ½‖x − y‖² + w 1ᵀt   subject to   Dx − t ≤ 0,   −Dx − t ≤ 0;     x = y − Dᵀ(λ⁺ − λ⁻)

    D is what its user gives: `differences(n)`, or an `nn.Parameter` that starts there and is learned. With
    `return_duals` it returns `QPSolution`, whose z is (x, t). Without independent rows among those of Dx = 0 the
    multipliers are not unique, and a second derivative may be refused.

    References:
        Amos and Kolter, OptNet, ICML 2017, section 4.2.
        Kotary et al., Folded Optimization, IJCAI 2023, eq. (33).
    """

    def forward(
        self, y: Float[Tensor, "*#batch n"], D: Float[Tensor, "*#batch m n"], weight: Size = 1.0
    ) -> Float[Tensor, "*batch n"] | Answer:
        """Denoise.

        Args:
            y: Signals.
            D: What is to be sparse is Dx.
            weight: w > 0, in units of y; differentiable too.

        Returns:
            x `(B, n)`, or `(n,)` where nothing is batched; with `return_duals` all blocks of the solution of the QP.

        Raises:
            ProblemError: see `argrad.solve_qp`; y and the weight are called `problem.q`, D `problem.G`.
            SolveError: see there; a negative weight is unbounded.
            GradientError: see there.
        """
        m, n = D.shape[-2:]
        costs = column(weight, y)
        batch = next((part.shape[:1] for part in (y, costs) if part.ndim > 1), ())
        q = torch.cat([-y.expand(*batch, y.shape[-1]), costs.expand(*batch, m)], dim=-1)
        fixed = self._fixed(y, m, lambda: {"Q": pad(identity(y), (0, m, 0, m)), "h": zeros(2 * m, y)})
        minus_t = -torch.eye(m, dtype=D.dtype, device=D.device).expand(*D.shape[:-2], m, m)
        G = torch.cat([torch.cat([D, minus_t], dim=-1), torch.cat([-D, minus_t], dim=-1)], dim=-2)
        solution = self._solve(fixed["Q"], q, G=G, h=fixed["h"])
        return solution if self.return_duals else solution.z[..., :n]


class EnergySchedule(QuadraticLayer):
    """argmin Σ ½(x_k − d_k)² subject to |x_{k+1} − x_k| ≤ r, lb ≤ x ≤ ub: generation that follows a demand d.

    What a generator delivers cannot change by more than r from one time slot to the next. Arguments as `ProblemLayer`
    has them.

    Reference: Sun et al., Alternating Differentiation for Optimization Layers, ICLR 2023, section 5.2, with 24 hourly
    slots, without lb and ub, and without the ½, which changes no solution.
    """

    def forward(
        self,
        demand: Float[Tensor, "*#batch T"],
        ramp: Size,
        *,
        lb: Float[Tensor, "*#batch T"] | None = None,
        ub: Float[Tensor, "*#batch T"] | None = None,
    ) -> Float[Tensor, "*batch T"] | Answer:
        """Schedule.

        Args:
            demand: Predicted demand of T ≥ 2 slots, in any unit of power.
            ramp: r ≥ 0, the largest change between slots, in that unit; differentiable too.
            lb: Least generation of each slot.
            ub: Largest generation of each slot.

        Returns:
            x `(B, T)`, or `(T,)` where nothing is batched; with `return_duals` all blocks of the solution, x as z; lam
            begins with the T − 1 rows x_k − x_{k+1} ≤ r, and ends with x_{k+1} − x_k ≤ r.

        Raises:
            ProblemError: see `argrad.solve_qp`; the demand is called `problem.q`, the ramp `problem.h`.
            SolveError: see there.
            GradientError: see there.
        """
        slots = demand.shape[-1]
        fixed = self._fixed(demand, None, lambda: self._constants(demand))
        limits = column(ramp, demand)
        h = limits.expand(*limits.shape[:-1], 2 * (slots - 1))
        solution = self._solve(fixed["Q"], -demand, G=fixed["G"], h=h, lb=lb, ub=ub)
        return solution if self.return_duals else solution.z

    def _constants(self, demand: Tensor) -> dict[str, Tensor]:
        D = differences(demand.shape[-1], dtype=demand.dtype, device=demand.device)
        return {"Q": identity(demand), "G": torch.cat([D, -D])}
