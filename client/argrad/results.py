"""What a call gives back: solutions, gradients, tangents, and how they came about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor

from argrad.errors import GradientError, SolveError
from argrad.problems.form import Blocks, Form
from argrad.problems.status import Flag, Status

OK = "ok"
"""Gradient status of a problem that has a gradient."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """How an answer came about; tensors and `flags` have one entry a problem, or are one entry if nothing is batched.

    Args:
        solver: Solver that ran.
        method: Differentiation method that ran, if one did.
        method_options: Options of that method with which it ran, by name: defaults included, null ones not.
        flags: What else is to be known of each problem (see `argrad.Flag`).
        iterations: Iterations of each problem.
        primal_residual: max(‖Az − b‖∞, ‖(Gz − h)₊‖∞).
        dual_residual: ‖Qz + q + Aᵀν + Gᵀλ‖∞.
        gap: Duality gap.
        objective: ½zᵀQz + qᵀz.
        measures: What the solver or the method measured beyond those, one number a problem, by name.
        timings_ms: What each stage took where the problem was solved, in milliseconds.
    """

    solver: str
    method: str | None
    flags: tuple[tuple[Flag, ...], ...]
    iterations: Int[Tensor, "*batch"] | None = None
    primal_residual: Float[Tensor, "*batch"] | None = None
    dual_residual: Float[Tensor, "*batch"] | None = None
    gap: Float[Tensor, "*batch"] | None = None
    objective: Float[Tensor, "*batch"] | None = None
    measures: Blocks = field(default_factory=dict)
    timings_ms: dict[str, float] = field(default_factory=dict)
    method_options: dict[str, bool | float | str | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Point:
    """A solution of a problem, whoever found it: where derivatives are taken.

    Args:
        problem: The problem, in the caller's form.
        solution: Its blocks by name: `z nu lam s` (and `lam_lb lam_ub` ≥ 0 where bounds are given), or `x y`; `(B, ·)`,
            without B where nothing is batched. `s` may be absent.
        state: Token of the forward state that the service keeps, if it does.
        affinity: Key by which a proxy finds the replica that keeps it.
    """

    problem: Form
    solution: Blocks
    state: str | None = None
    affinity: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class SolveResult(Point):
    """Outcome of a solve.

    Args:
        statuses: Verdict on each problem (one where nothing is batched).
        report: How the solution came about.
        gradients: Of each parameter that was asked for, if `upstream` was given and `gradients="full"`.
        adjoint: The adjoint `z nu mu`, if `upstream` was given and `gradients="adjoint"`.
        gradient_statuses: Of each problem `ok`, or why it has no gradient.
    """

    statuses: tuple[Status, ...]
    report: Report
    gradients: Blocks | None = None
    adjoint: Blocks | None = None
    gradient_statuses: tuple[str, ...] = ()

    @property
    def failed(self) -> tuple[int, ...]:
        """Positions in the batch of the problems that have no solution."""
        return failed_indices(self.statuses)

    def check(self) -> SolveResult:
        """The result itself, if every problem has a solution.

        Raises:
            SolveError: names the problems that have none.
        """
        if self.failed:
            raise SolveError(self.statuses, self.failed)
        return self


@dataclass(frozen=True, kw_only=True, eq=False)
class GradientResult:
    """Outcome of a vjp.

    Args:
        gradients: Of each parameter that was asked for, shaped like it, behind `(k,)` for k cotangents.
        adjoint: The adjoint instead, if `gradients="adjoint"`.
        gradient_statuses: Of each problem `ok`, or why it has no gradient.
        report: How it came about.
    """

    gradients: Blocks | None
    adjoint: Blocks | None
    gradient_statuses: tuple[str, ...]
    report: Report

    def check(self) -> GradientResult:
        """The result itself, if every problem has a gradient.

        Raises:
            GradientError: names the problems that have none.
        """
        check_gradients(self.gradient_statuses)
        return self


@dataclass(frozen=True, kw_only=True, eq=False)
class TangentResult:
    """Outcome of a jvp.

    Args:
        tangents: Of each block of the solution, shaped like it.
        gradient_statuses: Of each problem `ok`, or why it has no derivative.
        report: How it came about.
    """

    tangents: Blocks
    gradient_statuses: tuple[str, ...]
    report: Report

    def check(self) -> TangentResult:
        """The result itself, if every problem has a derivative.

        Raises:
            GradientError: names the problems that have none.
        """
        check_gradients(self.gradient_statuses)
        return self


def failed_indices(statuses: Sequence[Status]) -> tuple[int, ...]:
    """Positions of the problems that are not optimal."""
    if statuses.count(Status.OPTIMAL) == len(statuses):
        return ()
    return tuple(i for i, status in enumerate(statuses) if status != Status.OPTIMAL)


def check_gradients(statuses: Sequence[str]) -> None:
    """Refuse a batch in which some problem has no gradient.

    Raises:
        GradientError: names the problems, and why.
    """
    if statuses.count(OK) == len(statuses):
        return
    indices = [i for i, status in enumerate(statuses) if status != OK]
    shown = ", ".join(f"{i}: {statuses[i]}" for i in indices[:8])
    more = f", and {len(indices) - 8} more" if len(indices) > 8 else ""
    raise GradientError(
        f"{len(indices)} of {len(statuses)} problems have no gradient ({shown}{more}); "
        "on_failure='nan' or 'zero_grad' lets the rest of the batch go on",
        indices,
    )
