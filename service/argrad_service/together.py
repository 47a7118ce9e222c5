"""The calls of several callers as one batch: what can be done once is done once, and each gets its part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from argrad.errors import ArgradError
from argrad.problems import QP, Form, Solution
from argrad.problems.bounded import BoundedQP
from argrad.wire.messages import TensorMap, VjpReply
from argrad_service import assembly
from argrad_service.batching.frames import Frame, Sizes, frame_of, padded
from argrad_service.batching.outcomes import Assembled, of_batch, of_whole
from argrad_service.batching.replies import divide
from argrad_service.engine.joined import join
from argrad_service.engine.options import ShouldStop, never_stop
from argrad_service.engine.outcome import Backward, Outcome
from argrad_service.engine.threads import in_one_thread
from argrad_service.solves import Answer, Solve, vjp
from argrad_service.vjps import Vjp
from argrad_service.working import Engine, Timings, options_of, stage

A = TypeVar("A", Solve, Vjp)
Pulled = tuple[VjpReply, TensorMap]

COMPILED = frozenset({"auto", "pivoting"})
"""Solvers whose work is done by kernels."""

SHORT = 2e7
"""Floating-point operations of a batch, by its lots, up to which it takes one thread: other cores serve requests."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Participant(Generic[A]):
    """A call in a merged batch.

    Args:
        asked: What is to be done.
        timings: Gets the stages, in ms; each participant's are the batch's.
        has_left: Whether its caller waits no more.
    """

    asked: A
    timings: Timings
    has_left: Callable[[], bool]


def solve_together(
    participants: Sequence[Participant[Solve]], should_stop: ShouldStop
) -> list[Answer | Exception | None]:
    """Solve the problems of several callers, whose lots have one key, as one batch.

    Args:
        participants: The callers.
        should_stop: Whether none of them waits any more.

    Returns:
        Of each its answer, the error that is its own alone, or None where its caller left.

    Raises:
        Stopped: `should_stop()` was true.
        Exception: the batch failed as a whole; each may still succeed alone.
    """
    solves = [participant.asked for participant in participants]
    flops = sum(solve.lot.flops for solve in solves if solve.lot is not None)
    is_short = solves[0].request.solver.name in COMPILED and flops <= SHORT
    with in_one_thread() if is_short else nullcontext():
        return _solve_together(participants, should_stop)


def _solve_together(
    participants: Sequence[Participant[Solve]], should_stop: ShouldStop
) -> list[Answer | Exception | None]:
    solves, timings = [participant.asked for participant in participants], Timings()
    first = solves[0]
    with stage(timings, "solve"):
        problems, counts = [solve.form.problem for solve in solves], [solve.batch_size or 1 for solve in solves]
        sizes = [Sizes.of(problem) for problem in problems]
        outer = frame_of(sizes)
        frames = [Frame(own, outer) for own in sizes]
        problem = padded(problems, counts, outer)
        batch = _Batch.of(solves, counts, frames, problem)
        merged = first.solve(problem, None, should_stop)
        outcomes = of_batch(merged, counts, frames, problems, [solve.keep for solve in solves])
        outs = batch.solved(merged, outcomes)
    backwards: Sequence[Backward | None] = [None] * len(solves)
    failures: list[Exception | None] = [None] * len(solves)
    if first.cotangent is not None:
        with stage(timings, "differentiate"):
            backwards, derived, failures = batch.differentiated(merged, outcomes, first.engine)
            for out, more in zip(outs, derived, strict=True):
                out |= more
    answers: list[Answer | Exception | None] = []
    for i, participant in enumerate(participants):
        if failures[i] is not None or participant.has_left():
            answers.append(failures[i])
        else:
            participant.timings.update(timings)
            answers.append(solves[i].reply(outcomes[i], backwards[i], outs[i], participant.timings))
    return answers


def pull_back_together(
    participants: Sequence[Participant[Vjp]], should_stop: ShouldStop
) -> list[Pulled | Exception | None]:
    """Differentiate at the states of several callers, or at the points that they bring, as one batch.

    Args:
        participants: The callers, whose lots have one key; each has a `part`, or each a `point`.
        should_stop: Asked while points are taken over: a state takes no longer than one question.

    Returns:
        As of `solve_together`.

    Raises:
        Exception: the batch failed as a whole; each may still succeed alone.
    """
    calls, timings = [participant.asked for participant in participants], Timings()
    counts = [call.batch_size or 1 for call in calls]
    with in_one_thread(), stage(timings, "differentiate"):
        parts = [call.part for call in calls if call.part is not None]
        outcomes: Sequence[Outcome]
        if parts:
            merged: Outcome = join([forward for forward, _ in parts])
            outcomes = [call.forward(never_stop) for call in calls]
            batch = _Batch.of(calls, counts, [frame for _, frame in parts], merged.problem)
            reports: Sequence[TensorMap] = [{} for _ in calls]
        else:
            merged, outcomes, batch = _taken_over(calls, counts, should_stop)
            reports = batch.reported(merged, outcomes)
        backwards, derived, failures = batch.differentiated(merged, outcomes, calls[0].engine)
        outs = [report | more for report, more in zip(reports, derived, strict=True)]
    answers: list[Pulled | Exception | None] = []
    for i, participant in enumerate(participants):
        if failures[i] is not None or participant.has_left():
            answers.append(failures[i])
        else:
            participant.timings.update(timings)
            answers.append(calls[i].reply(outcomes[i], backwards[i], outs[i], participant.timings))
    return answers


def _taken_over(
    calls: Sequence[Vjp], counts: Sequence[int], should_stop: ShouldStop
) -> tuple[Outcome, list[Assembled], _Batch]:
    """The solutions that several callers bring, taken over as those of one batch; and each caller's part of it."""
    first, problems = calls[0], [call.form.problem for call in calls]
    sizes = [Sizes.of(problem) for problem in problems]
    outer = frame_of(sizes)
    frames = [Frame(own, outer) for own in sizes]
    problem = padded(problems, counts, outer)
    points = [frame.pad_blocks(call.point.blocks()) for frame, call in zip(frames, calls, strict=True) if call.point]
    merged = first.engine.at_point(
        problem,
        Solution(**{name: torch.cat([blocks[name] for blocks in points]) for name in points[0]}),
        options=options_of(first.request.solver, should_stop),
        device=first.device,
    )
    outcomes = of_batch(merged, counts, frames, problems, [False] * len(calls))
    return merged, outcomes, _Batch.of(calls, counts, frames, problem)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Batch:
    """The callers of a batch.

    Args:
        asked: What each asks.
        counts: How many problems each has.
        frames: Their padding.
        form: All problems in the form of `plain` callers, every parameter batched; None where there are no such.
        plain: Callers whose reply can be cut from the batch's: their blocks and parameters are the canonical ones, and
            no gradient is summed over several problems.
    """

    asked: Sequence[Solve | Vjp]
    counts: Sequence[int]
    frames: Sequence[Frame]
    form: Form | None
    plain: Sequence[int]

    @classmethod
    def of(cls, asked: Sequence[Solve | Vjp], counts: Sequence[int], frames: Sequence[Frame], problem: QP) -> _Batch:
        """Of these calls, whose problems together are `problem`."""
        plain = [i for i, one in enumerate(asked) if _is_plain(one)]
        form = _plain_form(problem, sum(counts), asked[plain[0]].form, frames[0].outer) if plain else None
        return cls(asked=asked, counts=counts, frames=frames, form=form, plain=plain)

    def solved(self, merged: Outcome, outcomes: Sequence[Assembled]) -> list[TensorMap]:
        """`solution.*` and `report.*` of each caller."""
        return self._each(
            self.plain,
            lambda form: assembly.solved(form, merged),
            lambda i: assembly.solved(self.asked[i].form, outcomes[i]),
        )

    def reported(self, merged: Outcome, outcomes: Sequence[Outcome]) -> list[TensorMap]:
        """`report.*` of each caller."""
        return self._each(
            self.plain,
            lambda form: assembly.report_tensors(form, merged),
            lambda i: assembly.report_tensors(self.asked[i].form, outcomes[i]),
        )

    def differentiated(
        self, merged: Outcome, outcomes: Sequence[Outcome], engine: Engine
    ) -> tuple[list[Backward], list[TensorMap], list[Exception | None]]:
        """Of each caller the derivative, its tensors in the reply, and what was wrong with its cotangent, if anything.

        Args:
            merged: Outcome of the batch.
            outcomes: Of each caller.
            engine: Differentiates.
        """
        upstream, failures = self._upstream(outcomes)
        first = self.asked[self.plain[0] if self.plain else 0]
        backward = vjp(engine, merged, upstream, first.request.differentiation)
        parts = of_whole(backward, self.counts, self.frames)
        alike = [i for i in self.plain if _wants(self.asked[i]) == _wants(first)]

        def together(form: Form) -> TensorMap:
            gradients = assembly.gradients(form, merged, backward, first.request, first.wrt)
            return gradients | assembly.measured(form, backward)

        tensors = self._each(alike, together, lambda i: self.asked[i].derived(outcomes[i], parts[i]))
        return parts, tensors, failures

    def _upstream(self, outcomes: Sequence[Outcome]) -> tuple[dict[str, Tensor], list[Exception | None]]:
        """The cotangents of the batch; and which were wrong at the solution that was found, zero here."""
        failures: list[Exception | None] = [None] * len(self.asked)
        given: list[dict[str, Tensor]] = []
        for i, (asked, outcome, frame) in enumerate(zip(self.asked, outcomes, self.frames, strict=True)):
            cotangent = asked.cotangent
            if cotangent is None:
                raise RuntimeError("calls with and without cotangents share a key")
            try:
                own = cotangent.canonical(outcome)
            except ArgradError as error:
                failures[i] = error
                own = {name: torch.zeros_like(t) for name, t in cotangent.checked.items()}
            given.append(frame.pad_blocks(own))
        return {name: torch.cat([blocks[name] for blocks in given], dim=-2) for name in given[0]}, failures

    def _each(
        self, plain: Sequence[int], together: Callable[[Form], TensorMap], alone: Callable[[int], TensorMap]
    ) -> list[TensorMap]:
        """Tensors of each caller's reply: cut from those of the batch for some, formed for each of the others."""
        if self.form is None or not plain:
            return [alone(i) for i in range(len(self.asked))]
        is_single = [asked.batch_size is None for asked in self.asked]
        parts = divide(together(self.form), self.counts, self.frames, is_single)
        chosen = set(plain)
        return [part if i in chosen else alone(i) for i, part in enumerate(parts)]


def _is_plain(asked: Solve | Vjp) -> bool:
    form = asked.form
    if not isinstance(form, BoundedQP) or form.row_map.size:
        return False
    return asked.batch_size is None or len(form.batched) == len(form.parameters)


def _wants(asked: Solve | Vjp) -> tuple[object, ...]:
    return (asked.request.gradients, asked.request.failed_gradients, *asked.wrt)


def _plain_form(problem: QP, batch: int, like: Form, outer: Sizes) -> BoundedQP:
    parameters = {
        name: t if problem.is_batched(name) else t.expand(batch, *t.shape) for name, t in problem.parameters().items()
    }
    row_map = replace(like.row_map, own_m=outer.m, own_p=outer.p)
    return BoundedQP(parameters=parameters, problem=problem, row_map=row_map)
