"""The second half of a solve: alone, together with other callers' solves, or slice by slice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from argrad.errors import ArgradError
from argrad.problems import QP, Form, Solution
from argrad.problems.qp import DIMENSIONS
from argrad.problems.sparse import SparseForm
from argrad.wire.messages import DifferentiationDocument, SolveReply, SolveRequest, TensorMap
from argrad_service import assembly
from argrad_service.batching.frames import Frame, Sizes, frame_of, padded
from argrad_service.batching.lots import Lot, lot_of
from argrad_service.batching.outcomes import Assembled, of_batch, of_slices
from argrad_service.engine.options import ShouldStop, never_stop
from argrad_service.engine.outcome import Backward, Forward, Outcome, Tangents
from argrad_service.kept import Kept
from argrad_service.registered import Named
from argrad_service.scheduling import Budget, Unfinished
from argrad_service.state import StateStore
from argrad_service.working import Engine, Timings, options_of, stage

Answer = tuple[SolveReply, TensorMap]

ROOM_FOR_ONE = 8.0
"""A solve alone may cost this many times the floating-point operations of a batch before it is split."""


def vjp(
    engine: Engine, forward: Outcome, upstream: Mapping[str, Tensor], differentiation: DifferentiationDocument
) -> Backward:
    """Differentiate an outcome, wherever it was solved, by canonical cotangents."""

    def differentiate(outcome: Outcome, given: Mapping[str, Tensor]) -> Backward:
        return engine.vjp(outcome, given, method=differentiation.method, options=differentiation.options)

    return forward.vjp(differentiate, upstream) if isinstance(forward, Assembled) else differentiate(forward, upstream)


def jvp(
    engine: Engine, forward: Outcome, tangents: Mapping[str, Tensor], differentiation: DifferentiationDocument
) -> Tangents:
    """Push canonical tangents of parameters forward at an outcome, wherever it was solved."""

    def differentiate(outcome: Outcome, given: Mapping[str, Tensor]) -> Tangents:
        return engine.jvp(outcome, given, method=differentiation.method, options=differentiation.options)

    return forward.jvp(differentiate, tangents) if isinstance(forward, Assembled) else differentiate(forward, tangents)


@dataclass(frozen=True, kw_only=True, eq=False)
class Solve:
    """A checked solve; called, it solves alone.

    Args:
        engine: Solves and differentiates.
        store: Keeps forward state.
        device: Where to solve.
        budget: Of a batch; None where nothing is merged or split.
        request: The document.
        form: The problem.
        versions: Of the caller's tensors before the solve.
        start: Warm start.
        cotangent: Of a differentiation in the same call.
        wrt: Parameters whose gradients are wanted.
        keep: Whether forward state is kept.
        owner: Whose state it will be.
        registered: Parameters that the call named instead of sending them.
    """

    engine: Engine
    store: StateStore
    device: torch.device
    budget: Budget | None
    request: SolveRequest
    form: Form
    versions: tuple[int, ...]
    start: Solution | None
    cotangent: assembly.Cotangent | None
    wrt: Sequence[str]
    keep: bool
    owner: str
    registered: Named | None = None
    lot: Lot | None = field(init=False)

    def __post_init__(self) -> None:
        lot = None
        if self.budget is not None and not isinstance(self.form, SparseForm):
            given = {} if self.cotangent is None else self.cotangent.checked
            lot = lot_of(self.request, self.form.problem, given, is_plain=self.start is None)
        object.__setattr__(self, "lot", lot)

    def prepared(self) -> Callable[[ShouldStop, Timings], Answer]:
        """The solve itself, or where it is too large for one turn, what solves it in several."""
        if self.lot is None or self.budget is None or self.lot.count == 1 or self.request.deterministic:
            return self
        most = max(self.lot.flops / (ROOM_FOR_ONE * self.budget.flops), self.lot.nbytes / self.budget.nbytes)
        return self if most <= 1 else SplitSolve(self, max(1, int(self.lot.count / most)))

    def __call__(self, should_stop: ShouldStop, timings: Timings) -> Answer:
        """Solve, differentiate if asked, and answer."""
        with stage(timings, "solve"):
            forward = self.solve(self.form.problem, self.start, should_stop)
            out = assembly.solved(self.form, forward)
        return self.answer(forward, out, timings)

    def solve(self, problem: QP, start: Solution | None, should_stop: ShouldStop) -> Outcome:
        """Solve some problems as this call asks."""
        registered = self.registered
        outcome = self.engine.solve(
            problem,
            solver=self.request.solver.name,
            options=options_of(self.request.solver, should_stop),
            warm_start=start,
            device=self.device,
            prepared=None if registered is None else registered.prepared,
        )
        if registered is not None:
            registered.recount()
        return outcome

    def answer(self, forward: Outcome, out: TensorMap, timings: Timings, backward: Backward | None = None) -> Answer:
        """Differentiate where that is asked for and not done yet, keep state, and form the reply."""
        form, request = self.form, self.request
        if self.cotangent is not None:
            with stage(timings, "differentiate"):
                if backward is None:
                    upstream = self.cotangent.canonical(forward)
                    backward = vjp(self.engine, forward, upstream, request.differentiation)
                out |= assembly.gradients(form, forward, backward, request, self.wrt)
                out |= assembly.measured(form, backward)
        token = None
        if self.keep:
            kept = Kept(form, forward.stopped_by(never_stop), self.versions)
            token = self.store.put(kept, nbytes=kept.nbytes, owner=self.owner)
        reply = SolveReply(
            status=assembly.per_problem(form, forward.status),
            report=assembly.report(form, forward, backward),
            gradient_status=assembly.gradient_status(form, backward),
            state=token,
            timings_ms=timings,
        )
        return reply, assembly.in_precision(out, request.precision)


class SplitSolve:
    """A solve whose batch is too large for one turn: each call but the last solves a slice and raises `Unfinished`.

    Args:
        whole: The solve.
        size: Problems of a slice.
    """

    def __init__(self, whole: Solve, size: int) -> None:
        self._whole, self._size = whole, size
        self._outcomes: list[Outcome] = []
        self._start = 0

    def __call__(self, should_stop: ShouldStop, timings: Timings) -> Answer:
        """Solve the next slice; after the last, answer.

        Raises:
            Unfinished: there are more slices.
        """
        whole, problem = self._whole, self._whole.form.problem
        batch = problem.batch_size or 1
        rows = slice(self._start, min(self._start + self._size, batch))
        parameters = {
            name: t[rows] if t.ndim > len(DIMENSIONS[name]) else t for name, t in problem.parameters().items()
        }
        start = whole.start
        warm = None if start is None else Solution(**{name: t[rows] for name, t in start.blocks().items()})
        with stage(timings, "solve"):
            self._outcomes.append(whole.solve(QP.of_checked(parameters), warm, should_stop))
        self._start = rows.stop
        if self._start < batch:
            raise Unfinished
        forward = of_slices(self._outcomes, problem)
        self._outcomes = []
        return whole.answer(forward, assembly.solved(whole.form, forward), timings)


@dataclass(frozen=True, kw_only=True, eq=False)
class Participant:
    """A solve in a merged batch.

    Args:
        solve: What is to be done.
        timings: Gets the stages, in ms; each participant's are the batch's.
        has_left: Whether its caller waits no more.
    """

    solve: Solve
    timings: Timings
    has_left: Callable[[], bool]


def solve_together(participants: Sequence[Participant], should_stop: ShouldStop) -> list[Answer | Exception | None]:
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
    solves = [participant.solve for participant in participants]
    problems, counts = [solve.form.problem for solve in solves], [solve.form.batch_size or 1 for solve in solves]
    sizes = [Sizes.of(problem) for problem in problems]
    outer = frame_of(sizes)
    timings: Timings = {}
    with stage(timings, "solve"):
        merged = solves[0].solve(padded(problems, counts, outer), None, should_stop)
        outcomes, start = [], 0
        for solve, own, count in zip(solves, sizes, counts, strict=True):
            piece = None
            if solve.keep:
                if not isinstance(merged, Forward):
                    raise TypeError(f"an outcome of type {type(merged).__name__} cannot be divided")
                piece = merged.cut(start, start + count)
            outcomes.append(of_batch(merged, start, count, Frame(own, outer), solve.form.problem, piece))
            start += count
        solved = [assembly.solved(solve.form, outcome) for solve, outcome in zip(solves, outcomes, strict=True)]
    backwards, failures = _differentiated(solves, merged, outcomes, Frames(sizes, outer), timings)
    answers: list[Answer | Exception | None] = []
    for participant, outcome, out, backward, failure in zip(
        participants, outcomes, solved, backwards, failures, strict=True
    ):
        if failure is not None or participant.has_left():
            answers.append(failure)
            continue
        participant.timings.update(timings)
        answers.append(participant.solve.answer(outcome, out, participant.timings, backward))
    return answers


@dataclass(frozen=True)
class Frames:
    """Sizes of each participant's problems, and of the batch."""

    own: Sequence[Sizes]
    outer: Sizes


def _differentiated(
    solves: Sequence[Solve], merged: Outcome, outcomes: Sequence[Assembled], frames: Frames, timings: Timings
) -> tuple[list[Backward | None], list[Exception | None]]:
    """The batch's derivatives, cut up; and which cotangents were wrong at the solution that was found."""
    failures: list[Exception | None] = [None] * len(solves)
    if solves[0].cotangent is None:
        return [None] * len(solves), failures
    with stage(timings, "differentiate"):
        given: list[dict[str, Tensor]] = []
        for i, (solve, outcome, own) in enumerate(zip(solves, outcomes, frames.own, strict=True)):
            cotangent = solve.cotangent
            if cotangent is None:
                raise RuntimeError("solves with and without cotangents share a key")
            try:
                upstream = cotangent.canonical(outcome)
            except ArgradError as error:
                failures[i] = error
                upstream = {name: torch.zeros_like(t) for name, t in cotangent.checked.items()}
            given.append(Frame(own, frames.outer).pad_blocks(upstream))
        whole = {name: torch.cat([blocks[name] for blocks in given], dim=-2) for name in given[0]}
        backward = vjp(solves[0].engine, merged, whole, solves[0].request.differentiation)
        return _cut_up(backward, outcomes, frames), failures


def _cut_up(backward: Backward, outcomes: Sequence[Assembled], frames: Frames) -> list[Backward | None]:
    parts: list[Backward | None] = []
    start = 0
    for outcome, own in zip(outcomes, frames.own, strict=True):
        rows = slice(start, start + len(outcome.status))
        start = rows.stop
        adjoint = type(backward.adjoint)(**{name: t[..., rows, :] for name, t in backward.adjoint.blocks().items()})
        parts.append(
            Backward(
                adjoint=Frame(own, frames.outer).trim(adjoint),
                gradient_status=backward.gradient_status[rows],
                flags=backward.flags[rows],
                method=backward.method,
                measures={name: values[rows] for name, values in backward.measures.items()},
            )
        )
    return parts
