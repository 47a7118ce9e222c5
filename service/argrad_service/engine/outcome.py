"""What the engine takes and returns, whatever the solver and the differentiation method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from jaxtyping import Float, Int
from torch import Tensor

from argrad.problems import QP, Adjoint, Flag, Solution, Status
from argrad_service.engine.data import Data, cut
from argrad_service.engine.options import ShouldStop, SolverOptions
from argrad_service.engine.point import KKTFactor


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """Outcome of a forward solve: a verdict on each problem.

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
        options: With which it ran, its own ones read; methods that repeat its iteration need them.
        measures: What else the solver measured, `(B,)` each, on the CPU.
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
    options: SolverOptions
    measures: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes that keeping this outcome costs."""
        raise NotImplementedError

    def stopped_by(self, should_stop: ShouldStop) -> Self:
        """The same outcome for another call, which its derivatives ask whether to go on."""
        return replace(self, options=replace(self.options, should_stop=should_stop))


@dataclass(frozen=True, kw_only=True, eq=False)
class Forward(Outcome):
    """Outcome of a batch of dense problems, with what its backward needs.

    Args:
        data: The problems in stacked rows.
        factor: What `kkt` reuses: the system of the active set, and which problems have a solution.
    """

    data: Data
    factor: KKTFactor

    def cut(self, start: int, stop: int, problem: QP | None = None) -> Forward:
        """The outcome of the problems from start to stop alone, of more than one; it holds nothing of the others.

        Args:
            start: First problem.
            stop: One behind the last.
            problem: These problems, if the caller holds them anyway; by default they are copied.

        Raises:
            TypeError: the outcome of problems with an entropy cannot be divided.
        """
        factor, numbers = self.factor.cut(start, stop), {}
        if problem is None:
            given = self.problem.parameters()
            own = {name: cut(t, start, stop) if self.problem.is_batched(name) else t for name, t in given.items()}
            problem = QP.of_checked(own)
        for name in ("iterations", "primal_residual", "dual_residual", "gap", "objective"):
            numbers[name] = getattr(self, name)[start:stop].clone()
        return replace(
            self,
            problem=problem,
            data=factor.factor.data,
            factor=factor,
            solution=Solution(**{name: t[start:stop].clone() for name, t in self.solution.blocks().items()}),
            status=self.status[start:stop],
            flags=self.flags[start:stop],
            measures={name: cut(values, start, stop) for name, values in self.measures.items()},
            **numbers,
        )

    @property
    def nbytes(self) -> int:
        """Bytes that keeping this outcome costs."""
        tensors = [*self.problem.parameters().values(), *self.solution.blocks().values()]
        return sum(t.untyped_storage().nbytes() for t in tensors) + self.factor.nbytes


@dataclass(frozen=True, kw_only=True, eq=False)
class Backward:
    """Outcome of a backward pass.

    Args:
        adjoint: Rows of problems without a gradient are NaN.
        gradient_status: Of each problem `ok`, or why it has no gradient.
        flags: What else is to be known of each problem's gradient.
        method: Name of the differentiation method that ran.
        measures: What else the method measured, `(B,)` each, on the CPU.
        method_options: With which it ran, by name; defaults included.
    """

    adjoint: Adjoint
    gradient_status: tuple[str, ...]
    flags: tuple[tuple[Flag, ...], ...]
    method: str
    measures: Mapping[str, Tensor] = field(default_factory=dict)
    method_options: Mapping[str, bool | float | str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Tangents:
    """Outcome of a forward-mode pass: tangents of the solution; rows without a derivative are NaN."""

    solution: Solution
    gradient_status: tuple[str, ...]
    flags: tuple[tuple[Flag, ...], ...]
    method: str
    measures: Mapping[str, Tensor] = field(default_factory=dict)
    method_options: Mapping[str, bool | float | str] = field(default_factory=dict)
