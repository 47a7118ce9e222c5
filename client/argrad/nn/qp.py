"""A quadratic program as a layer."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from argrad.client import Client
from argrad.functional import BoundedQPSolution, QPSolution, solve_qp
from argrad.operations import check_timeout
from argrad.options import OnFailure, Options, check_choices
from argrad.wire.messages import Gradients


class QPLayer(nn.Module):
    """argmin ½zᵀQz + qᵀz subject to Az = b, Gz ≤ h, lb ≤ z ≤ ub, solved by a service or in this process.

    The layer has no parameters of its own: whatever goes in is differentiated, be it another layer's output or an
    `nn.Parameter`. It pickles and copies; copies share the client.

    Args:
        client: A `Client`, or an address for one of the layer's own: `http://…`, or `local`.
        solver: A solver of `Client.solvers()`, or `auto`.
        tolerance: Bound on the scaled KKT residuals at which a problem counts as solved.
        max_iterations: Bound on the iterations of one problem.
        method: A differentiation method of `Client.solvers()`, or `auto`.
        solver_options: Options of that solver alone; see `argrad.Options`.
        method_options: Options of that method alone.
        on_failure: `raise`, `nan` or `zero_grad`; see `argrad.solve_qp`.
        gradients: `adjoint` or `full`; see there.
        timeout_s: Seconds for each solve, and each backward; by default the client's.
        return_duals: Return `QPSolution(z, nu, lam, s)` (`BoundedQPSolution` with bounds) in place of z.

    Raises:
        ProblemError: an option cannot have that value.
    """

    def __init__(
        self,
        client: Client | str,
        *,
        solver: str = "auto",
        tolerance: float = 1e-8,
        max_iterations: int = 100,
        method: str = "auto",
        solver_options: Mapping[str, bool | float | str] | None = None,
        method_options: Mapping[str, bool | float | str] | None = None,
        on_failure: OnFailure = "raise",
        gradients: Gradients = "adjoint",
        timeout_s: float | None = None,
        return_duals: bool = False,
    ) -> None:
        super().__init__()
        check_choices(on_failure, gradients)
        check_timeout(timeout_s)
        self.options = Options(
            solver=solver,
            tolerance=tolerance,
            max_iterations=max_iterations,
            method=method,
            solver_options=solver_options or {},
            method_options=method_options or {},
        )
        self.on_failure, self.gradients = on_failure, gradients
        self.timeout_s, self.return_duals = timeout_s, return_duals
        self.client = Client(client) if isinstance(client, str) else client

    def forward(
        self,
        Q: Float[Tensor, "*#batch n n"],
        q: Float[Tensor, "*#batch n"],
        G: Float[Tensor, "*#batch m n"] | None = None,
        h: Float[Tensor, "*#batch m"] | None = None,
        A: Float[Tensor, "*#batch p n"] | None = None,
        b: Float[Tensor, "*#batch p"] | None = None,
        *,
        lb: Float[Tensor, "*#batch n"] | None = None,
        ub: Float[Tensor, "*#batch n"] | None = None,
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
            options=self.options,
            on_failure=self.on_failure,
            gradients=self.gradients,
            timeout_s=self.timeout_s,
        )
        return solution if self.return_duals else solution.z

    def extra_repr(self) -> str:
        """What `print` shows of the layer."""
        return f"{self.client!r}, solver={self.options.solver!r}, on_failure={self.on_failure!r}"
