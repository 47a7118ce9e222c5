"""A service whose solver does nothing: what it answers a second is what the service itself can, without solving."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from argrad.problems import QP, Adjoint, Solution, Status
from argrad_service.engine.options import SolverOptions
from argrad_service.engine.outcome import Backward, Outcome, Tangents
from argrad_service.server import serve
from argrad_service.settings import load_settings


@dataclass(frozen=True, kw_only=True, eq=False)
class Nothing(Outcome):
    """What was never computed."""

    @property
    def nbytes(self) -> int:
        """Nothing is kept."""
        return 0


class IdentityEngine:
    """Answers every problem with z = q and multipliers of zero."""

    def solve(self, problem: QP, *, options: SolverOptions | None = None, **_: Any) -> Outcome:
        """Answer a batch."""
        batch = problem.batch_size or 1
        zero, count = torch.zeros(batch, dtype=torch.float64), torch.zeros(batch, dtype=torch.int64)
        rows = {"nu": problem.p, "lam": problem.m, "s": problem.m}
        blocks = {name: torch.zeros(batch, size, dtype=torch.float64) for name, size in rows.items()}
        return Nothing(
            problem=problem,
            solution=Solution(z=problem.q.reshape(-1, problem.n).expand(batch, -1), **blocks),
            status=(Status.OPTIMAL,) * batch,
            flags=((),) * batch,
            iterations=count,
            primal_residual=zero,
            dual_residual=zero,
            gap=zero,
            objective=zero,
            solver="identity",
            options=options or SolverOptions(),
        )

    def at_point(self, problem: QP, solution: Solution, **_: Any) -> Outcome:
        """Answer as `solve` does."""
        raise NotImplementedError

    def vjp(self, forward: Outcome, upstream: Mapping[str, Tensor], **_: Any) -> Backward:
        """An adjoint of zeros, but for the cotangent of z in z's place."""
        solution, batch = forward.solution, len(forward.status)
        adjoint = Adjoint(z=upstream["z"], nu=torch.zeros_like(solution.nu), mu=torch.zeros_like(solution.lam))
        return Backward(adjoint=adjoint, gradient_status=("ok",) * batch, flags=((),) * batch, method="identity")

    def jvp(self, forward: Outcome, tangents: Mapping[str, Tensor], **_: Any) -> Tangents:
        """Nothing that is timed asks for it."""
        raise NotImplementedError

    def solvers(self) -> list[dict[str, Any]]:
        """No solvers."""
        return []

    def default_device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")


if __name__ == "__main__":
    serve(load_settings(), IdentityEngine())
