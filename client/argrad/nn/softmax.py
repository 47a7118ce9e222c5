"""Softmax under linear constraints, as a layer."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from argrad.functional import BoundedQPSolution, QPSolution, solve_qp
from argrad.nn.layer import ProblemLayer


class Softmax(ProblemLayer):
    """argmin −yᵀx + τ Σ xᵢ log xᵢ subject to Ax = b, Gx ≤ h, lb ≤ x ≤ ub; arguments as `ProblemLayer` has them.

    With A = 1ᵀ, b = 1 and nothing else it is softmax(y/τ). x ≥ 0 needs no row. With `return_duals` it returns
    `QPSolution(z, nu, lam, s)`, and `BoundedQPSolution` with bounds; x is their z.

    Reference: Sun et al., Alternating Differentiation for Optimization Layers, ICLR 2023, constrained Softmax layer.
    """

    def forward(
        self,
        y: Float[Tensor, "*#batch n"],
        A: Float[Tensor, "*#batch p n"] | None = None,
        b: Float[Tensor, "*#batch p"] | None = None,
        G: Float[Tensor, "*#batch m n"] | None = None,
        h: Float[Tensor, "*#batch m"] | None = None,
        *,
        lb: Float[Tensor, "*#batch n"] | None = None,
        ub: Float[Tensor, "*#batch n"] | None = None,
        tau: Float[Tensor, "*#batch"] | float = 1.0,
    ) -> Float[Tensor, "*batch n"] | QPSolution | BoundedQPSolution:
        """Solve.

        Args:
            y: Scores; large ones attract x.
            A: Rows of the equalities; where there are none, Σ x is free.
            b: Their right-hand sides.
            G: Rows of the inequalities.
            h: Their right-hand sides; +inf does not bind.
            lb: Lower bounds.
            ub: Upper bounds; +inf is none.
            tau: Weight of the entropy, > 0, `()` or `(B,)`; differentiable too.

        Returns:
            x `(B, n)`, or `(n,)` where nothing is batched; with `return_duals` all blocks of the solution.

        Raises:
            ProblemError: see `argrad.solve_qp`; y is called `problem.q`, tau `problem.entropy`.
            SolveError: see there.
            GradientError: see there.
        """
        solution = solve_qp(
            self.client,
            None,
            -y,
            G,
            h,
            A,
            b,
            lb=lb,
            ub=ub,
            entropy=tau,
            options=self.options,
            on_failure=self.on_failure,
            gradients=self.gradients,
            timeout_s=self.timeout_s,
            warm_start=self.warm_start,
        )
        return solution if self.return_duals else solution.z
