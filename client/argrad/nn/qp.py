"""A quadratic program as a layer."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from argrad.functional import BoundedQPSolution, QPSolution, solve_qp
from argrad.nn.layer import ProblemLayer


class QPLayer(ProblemLayer):
    """argmin ½zᵀQz + qᵀz subject to Az = b, Gz ≤ h, lb ≤ z ≤ ub; arguments as `ProblemLayer` has them.

    With `entropy` τ the objective has τ Σ zᵢ log zᵢ too. With `return_duals` it returns `QPSolution(z, nu, lam, s)`,
    and `BoundedQPSolution` with bounds.
    """

    def forward(
        self,
        Q: Float[Tensor, "*#batch n n"] | None,
        q: Float[Tensor, "*#batch n"],
        G: Float[Tensor, "*#batch m n"] | None = None,
        h: Float[Tensor, "*#batch m"] | None = None,
        A: Float[Tensor, "*#batch p n"] | None = None,
        b: Float[Tensor, "*#batch p"] | None = None,
        *,
        lb: Float[Tensor, "*#batch n"] | None = None,
        ub: Float[Tensor, "*#batch n"] | None = None,
        entropy: Float[Tensor, "*#batch"] | float | None = None,
    ) -> Float[Tensor, "*batch n"] | QPSolution | BoundedQPSolution:
        """Solve; parameters and errors as in `argrad.solve_qp`.

        Returns:
            z `(B, n)`, or `(n,)` where nothing is batched; with `return_duals` all blocks of the solution.
        """
        solution = solve_qp(
            self.client,
            Q,
            q,
            G,
            h,
            A,
            b,
            lb=lb,
            ub=ub,
            entropy=entropy,
            options=self.options,
            on_failure=self.on_failure,
            gradients=self.gradients,
            timeout_s=self.timeout_s,
            warm_start=self.warm_start,
        )
        return solution if self.return_duals else solution.z
