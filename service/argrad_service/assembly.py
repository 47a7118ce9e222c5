"""How outcomes of the engine become replies: the caller's blocks, dtype, device and batch dimension."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from argrad.errors import ProblemError
from argrad.problems import Adjoint, Form, Solution, Status, check_finite, check_names
from argrad.problems.form import Blocks
from argrad.wire.messages import FailedGradients, GradientOptions, Precision, ReportDocument, TensorMap
from argrad_service.engine.outcome import Backward, Outcome, Tangents

Point = TypeVar("Point", Solution, Adjoint)
_OK = "ok"
_AT_A_POINT = frozenset({"lam_lb", "lam_ub"})
"""Blocks whose cotangents mean something else where the point is another (variables fixed by lb = ub)."""


_REPORT = ReportDocument(solver="")
"""What replies are copied from, which takes less than pydantic's `model_construct`."""


class Cotangent:
    """The caller's cotangents of the solution, checked.

    A cotangent that is not finite is refused, but only once it is known that its problem has a gradient: the
    loss of a failed problem is NaN, and so is what autograd makes of it.

    Args:
        form: The problem.
        given: Cotangents by the caller's names, `(B, ·)` or `(k, B, ·)`, without B where nothing is batched.
        is_finite: Whether they are known to be finite.

    Raises:
        ProblemError: a name or a shape does not fit.

    Attributes:
        checked: Canonical cotangents, for whoever asks for shapes.
    """

    def __init__(self, form: Form, given: Mapping[str, Tensor], *, is_finite: bool = False) -> None:
        self._form, self._given = form, given
        self._needs_point = not _AT_A_POINT.isdisjoint(given)
        self.checked = form.upstream(given, _placeholder(form) if self._needs_point else None)
        self._is_finite = is_finite or all(math.isfinite(tensor.sum().item()) for tensor in given.values())

    def canonical(self, forward: Outcome) -> dict[str, Tensor]:
        """The cotangents of z, ν, λ and s at an outcome; zero for problems that have no gradient.

        Raises:
            ProblemError: a cotangent of a problem with a solution is not finite.
        """
        if self._is_finite and not self._needs_point:
            return self.checked
        given = self._given if self._is_finite else self._cleaned(forward.status)
        return self._form.upstream(given, _on_caller(self._form, forward.solution))

    def _cleaned(self, status: Sequence[Status]) -> dict[str, Tensor]:
        is_usable = torch.tensor([word == Status.OPTIMAL for word in status])
        mask = is_usable[0] if self._form.batch_size is None else is_usable.unsqueeze(-1)
        cleaned = {name: torch.where(mask.to(t.device), t, torch.zeros_like(t)) for name, t in self._given.items()}
        for name, tensor in cleaned.items():
            check_finite(f"upstream.{name}", tensor)
        return cleaned


def cotangent_count(form: Form, given: Mapping[str, Tensor]) -> int:
    """K, by the cotangent with the most dimensions; 0 without cotangents."""
    plain = 1 if form.batch_size is None else 2
    return max((tensor.shape[0] if tensor.ndim > plain else 1 for tensor in given.values()), default=0)


def wanted_gradients(options: GradientOptions, form: Form) -> list[str]:
    """Names of the parameters whose gradients are wanted.

    Raises:
        ProblemError: a name is not a parameter of the problem, or is there twice.
    """
    if options.wrt is None:
        return list(form.names)
    check_names("wrt", options.wrt, form.names)
    if len(set(options.wrt)) != len(options.wrt):
        raise ProblemError("wrt", f"a name twice in {options.wrt}", "each name once")
    return options.wrt


def solved(form: Form, forward: Outcome) -> TensorMap:
    """`solution.*` and `report.*`."""
    return _in_section("solution", solution_blocks(form, forward)) | report_tensors(form, forward)


def solution_blocks(form: Form, forward: Outcome) -> Blocks:
    """The solution in the caller's blocks."""
    return _as_given(form.solution(_on_caller(form, forward.solution)), form)


def report_tensors(form: Form, forward: Outcome, differentiated: Backward | Tangents | None = None) -> TensorMap:
    """`report.*`: one number a problem; float64 whatever the caller's dtype, iterations int64."""
    names = ("iterations", "primal_residual", "dual_residual", "gap", "objective")
    numbers = {f"report.{name}": getattr(forward, name) for name in names}
    if form.batch_size is None:
        numbers = {name: tensor[0] for name, tensor in numbers.items()}
    for outcome in (forward, differentiated):
        if outcome is not None:
            numbers |= measured(form, outcome)
    return numbers


def measured(form: Form, outcome: Outcome | Backward | Tangents) -> TensorMap:
    """`report.*` of what a solver or a method measured beyond residuals: all that a derivative by token adds."""
    is_single = form.batch_size is None
    return {f"report.{name}": values[0] if is_single else values for name, values in outcome.measures.items()}


def report(form: Form, forward: Outcome, differentiated: Backward | Tangents | None) -> ReportDocument:
    """`report` without its tensors; flags of the solution and of its differentiation together."""
    more = () if differentiated is None else differentiated.flags
    flags: list[list[str]] = [[]] * len(forward.flags)
    if any(forward.flags) or any(more):
        flags = [[flag.value for flag in found] for found in forward.flags]
        for found, others in zip(flags, more, strict=False):
            found += [flag.value for flag in others if flag.value not in found]
    # What is written here needs no check, and a batch may be thousands.
    known: dict[str, Any] = {"solver": forward.solver, "flags": flags[0] if form.batch_size is None else flags}
    if differentiated is not None:
        known |= {"method": differentiated.method, "method_options": dict(differentiated.method_options) or None}
    return _REPORT.model_copy(update=known)


def per_problem(form: Form, values: Sequence[str]) -> str | list[str]:
    """One string for each problem, or the only one where nothing is batched."""
    if form.batch_size is None:
        return str(values[0])
    if values.count(values[0]) == len(values):
        return [str(values[0])] * len(values)
    return [str(value) for value in values]


def gradient_status(form: Form, differentiated: Backward | Tangents | None) -> str | list[str] | None:
    """Of each problem `ok`, or why it has no gradient."""
    return None if differentiated is None else per_problem(form, differentiated.gradient_status)


def gradients(
    form: Form, forward: Outcome, backward: Backward, options: GradientOptions, wrt: Sequence[str]
) -> TensorMap:
    """`gradients.*` or `adjoint.*`, with `failed_gradients` where a problem has none."""
    solution, adjoint = _at_caller(form, forward, backward, options.failed_gradients)
    if options.gradients == "adjoint":
        return _named("adjoint", form.adjoint(adjoint, solution), form)
    return _named("gradients", form.gradients(solution, adjoint, wrt), form)


def adjoint_blocks(form: Form, forward: Outcome, backward: Backward, failed: FailedGradients) -> Blocks:
    """The adjoint in the caller's blocks, with `failed` where a problem has none."""
    solution, adjoint = _at_caller(form, forward, backward, failed)
    return _as_given(form.adjoint(adjoint, solution), form)


def _at_caller(form: Form, forward: Outcome, backward: Backward, failed: FailedGradients) -> tuple[Solution, Adjoint]:
    solution, adjoint = _on_caller(form, forward.solution), _on_caller(form, backward.adjoint)
    if failed == "zero" and (is_failed := [status != _OK for status in backward.gradient_status]) and any(is_failed):
        # The last iterate of a failed problem may be infinite, and 0·∞ is not 0.
        solution = Solution(**_zeroed(solution.blocks(), is_failed))
        adjoint = Adjoint(**_zeroed(adjoint.blocks(), is_failed))
    return solution, adjoint


def tangents(form: Form, forward: Outcome, outcome: Tangents, failed: FailedGradients) -> TensorMap:
    """`tangents.*` of the solution, with `failed_gradients` where a problem has none."""
    return _in_section("tangents", tangent_blocks(form, forward, outcome, failed))


def tangent_blocks(form: Form, forward: Outcome, outcome: Tangents, failed: FailedGradients) -> Blocks:
    """Tangents of the solution in the caller's blocks, with `failed` where a problem has none."""
    blocks, is_failed = (
        _on_caller(form, outcome.solution).blocks(),
        [status != _OK for status in outcome.gradient_status],
    )
    if failed == "zero" and any(is_failed):
        blocks = _zeroed(blocks, is_failed)
    solution = _on_caller(form, forward.solution)
    return _as_given(form.solution_tangents(Solution(**blocks), solution), form)


def _on_caller(form: Form, point: Point) -> Point:
    """A solution or an adjoint on the device of the caller's tensors."""
    if point.z.device == form.problem.device:
        return point
    return type(point)(**{name: tensor.to(form.problem.device) for name, tensor in point.blocks().items()})


def _placeholder(form: Form) -> Solution:
    """A point to check cotangents against before there is a solution."""
    problem, batch = form.problem, form.batch_size or 1
    sizes = {"z": problem.n, "nu": problem.p, "lam": problem.m, "s": problem.m}
    return Solution(**{name: problem.q.new_zeros(batch, size) for name, size in sizes.items()})


def _zeroed(blocks: Mapping[str, Tensor], is_failed: Sequence[bool]) -> dict[str, Tensor]:
    """Blocks `(…, B, ·)` with the rows of failed problems zero."""
    mask = torch.tensor(is_failed).unsqueeze(-1)
    return {name: torch.where(mask.to(t.device), torch.zeros_like(t), t) for name, t in blocks.items()}


def _as_given(blocks: Mapping[str, Tensor], form: Form) -> Blocks:
    """Blocks in the dtype and on the device of the problem."""
    device, dtype = form.problem.device, form.problem.dtype
    if all(tensor.dtype == dtype and tensor.device == device for tensor in blocks.values()):
        return dict(blocks)
    return {name: tensor.to(device=device, dtype=dtype) for name, tensor in blocks.items()}


def _in_section(section: str, blocks: Blocks) -> TensorMap:
    return {f"{section}.{name}": tensor for name, tensor in blocks.items()}


def _named(section: str, blocks: Mapping[str, Tensor], form: Form) -> TensorMap:
    return _in_section(section, _as_given(blocks, form))


def in_precision(tensors: TensorMap, precision: Precision) -> TensorMap:
    """Tensors of a reply in the precision in which they travel."""
    if precision == "float64":
        return tensors
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
