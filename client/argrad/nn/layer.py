"""What every layer has that solves a problem: who solves it and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from argrad.client import Client
from argrad.operations import check_timeout
from argrad.options import OnFailure, Options, check_choices
from argrad.warm import WarmStart
from argrad.wire.messages import Gradients, Precision


class ProblemLayer(nn.Module):
    """A problem as a layer, solved by a service or in this process.

    The layer has no parameters of its own: whatever goes in is differentiated, be it another layer's output or an
    `nn.Parameter`. It pickles and copies; copies share the client.

    Args:
        client: A `Client`, or an address for one of the layer's own, or several: `http://…`, or `local`.
        solver: A solver of `Client.solvers()`, or `auto`.
        tolerance: Bound on the scaled KKT residuals at which a problem counts as solved.
        max_iterations: Bound on the iterations of one problem.
        method: A differentiation method of `Client.solvers()`, or `auto`.
        solver_options: Options of that solver alone; see `argrad.Options`.
        method_options: Options of that method alone.
        on_failure: `raise`, `nan` or `zero_grad`; see `argrad.solve_qp`.
        gradients: `adjoint` or `full`; see there.
        timeout_s: Seconds for each solve, and each backward; by default the client's.
        return_duals: Return the whole solution, with its multipliers, in place of z.
        deterministic: See `argrad.Options`.
        precision: See there.
        warm_start: Begin each solve at the last solution of the layer, if it is of the same sizes, batch included; see
            `argrad.WarmStart`.

    Raises:
        ProblemError: an option cannot have that value.
    """

    def __init__(
        self,
        client: Client | str | Sequence[str],
        *,
        solver: str = "auto",
        tolerance: float = 1e-8,
        max_iterations: int = 100,
        method: str = "auto",
        solver_options: Mapping[str, bool | float | str | None] | None = None,
        method_options: Mapping[str, bool | float | str | None] | None = None,
        on_failure: OnFailure = "raise",
        gradients: Gradients = "adjoint",
        timeout_s: float | None = None,
        return_duals: bool = False,
        deterministic: bool = False,
        precision: Precision = "float64",
        warm_start: bool = False,
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
            deterministic=deterministic,
            precision=precision,
        )
        self.on_failure, self.gradients = on_failure, gradients
        self.timeout_s, self.return_duals = timeout_s, return_duals
        self.warm_start = WarmStart() if warm_start else None
        self.client = client if isinstance(client, Client) else Client(client)

    def extra_repr(self) -> str:
        """What `print` shows of the layer."""
        return f"{self.client!r}, solver={self.options.solver!r}, on_failure={self.on_failure!r}"
