"""What the layers below share that state a problem of their own as a QP; and the QP with bounds alone."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from argrad.functional import BoundedQPSolution, QPSolution, solve_qp
from argrad.nn.layer import ProblemLayer

Answer = BoundedQPSolution | QPSolution
Size = Float[Tensor, "*#batch"] | float
"""A number for all problems, or one for each: a float, or a tensor `()` or `(B,)`."""


class QuadraticLayer(ProblemLayer):
    """A layer whose problem is a QP of its own making; arguments as `ProblemLayer` has them."""

    def _solve(
        self,
        Q: Tensor | None,
        q: Tensor,
        *,
        G: Tensor | None = None,
        h: Tensor | None = None,
        A: Tensor | None = None,
        b: Tensor | None = None,
        lb: Tensor | None = None,
        ub: Tensor | None = None,
        entropy: Tensor | float | None = None,
    ) -> Answer:
        return solve_qp(
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
        )


class BoxQP(QuadraticLayer):
    """argmin ½zᵀQz + qᵀz subject to lb ≤ z ≤ ub; arguments as `ProblemLayer` has them.

    With `return_duals` it returns `BoundedQPSolution`.
    """

    def forward(
        self,
        Q: Float[Tensor, "*#batch n n"],
        q: Float[Tensor, "*#batch n"],
        lb: Float[Tensor, "*#batch n"] | None = None,
        ub: Float[Tensor, "*#batch n"] | None = None,
    ) -> Float[Tensor, "*batch n"] | Answer:
        """Solve; parameters and errors as in `argrad.solve_qp`.

        Returns:
            z `(B, n)`, or `(n,)` where nothing is batched; with `return_duals` all blocks of the solution.
        """
        solution = self._solve(Q, q, lb=lb, ub=ub)
        return solution if self.return_duals else solution.z


def identity(like: Tensor) -> Tensor:
    """The Q of a projection of vectors like that."""
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def column(value: Tensor | float, like: Tensor) -> Tensor:
    """A number, or one a problem, as a right-hand side of one row, `(1,)` or `(B, 1)`."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).unsqueeze(-1)
