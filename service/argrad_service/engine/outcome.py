"""What the engine takes and returns, whatever the solver and the differentiation method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from argrad.problems import QP, Adjoint, Flag, Solution, Status

ShouldStop = Callable[[], bool]
"""Asked between two iterations; True ends the solve with `Stopped`."""


class Stopped(Exception):  # noqa: N818 - not an error: the caller asked for it
    """The solve ended because nobody wants its result any more."""


def never_stop() -> bool:
    """The `ShouldStop` of a caller that waits as long as it takes."""
    return False


@dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """What every solver understands.

    Args:
        tolerance: Bound on the scaled KKT residuals at which a problem is optimal.
        max_iterations: Bound on the iterations of one problem; `pivoting` has bounds of its own on rounds and steps.
        should_stop: Asked between two iterations; by `pivoting` once, before its kernels run.
    """

    tolerance: float = 1e-8
    max_iterations: int = 100
    should_stop: ShouldStop = never_stop


@dataclass(frozen=True, kw_only=True, eq=False)
class Forward:
    """Outcome of a forward solve: a verdict on each problem, and what its backward needs.

    All tensors are float64 and have the batch dimension B (1 where no parameter is batched).

    Args:
        problem: The problem as it was solved, on the engine's device.
        solution: Rows of problems that are not optimal hold the last iterate.
        status: Verdict on each problem.
        flags: What else is to be known of each problem.
        iterations: Iterations of each problem, `(B,)`, on the CPU.
        primal_residual: max(‖Az − b‖∞, ‖(Gz − h)₊‖∞), `(B,)`, on the CPU, as are the next three.
        dual_residual: ‖Qz + q + Aᵀν + Gᵀλ‖∞.
        gap: |zᵀQz + qᵀz + bᵀν + hᵀλ|, the duality gap.
        objective: ½zᵀQz + qᵀz.
        solver: Name of the solver that ran.
        factor: What the differentiation method reuses; None if it has to be formed.
    """

    problem: QP
    solution: Solution
    status: tuple[Status, ...]
    flags: tuple[tuple[Flag, ...], ...]
    iterations: Int[Tensor, " batch"]
    primal_residual: Float[Tensor, " batch"]
    dual_residual: Float[Tensor, " batch"]
    gap: Float[Tensor, " batch"]
    objective: Float[Tensor, " batch"]
    solver: str
    factor: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes that keeping this outcome costs."""
        tensors = [*self.problem.parameters().values(), *self.solution.blocks().values()]
        return sum(t.untyped_storage().nbytes() for t in tensors) + (self.factor.nbytes if self.factor else 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Backward:
    """Outcome of a backward pass.

    Args:
        adjoint: Rows of problems without a gradient are NaN.
        gradient_status: Of each problem `ok`, or why it has no gradient.
        flags: What else is to be known of each problem's gradient.
        method: Name of the differentiation method that ran.
    """

    adjoint: Adjoint
    gradient_status: tuple[str, ...]
    flags: tuple[tuple[Flag, ...], ...]
    method: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Tangents:
    """Outcome of a forward-mode pass: tangents of the solution; rows without a derivative are NaN."""

    solution: Solution
    gradient_status: tuple[str, ...]
    flags: tuple[tuple[Flag, ...], ...]
    method: str
