"""The second half of a solve: alone, or slice by slice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from argrad.problems import QP, Form, Solution
from argrad.problems.qp import DIMENSIONS
from argrad.problems.sparse import SparseForm
from argrad.wire.messages import DifferentiationDocument, ReportDocument, SolveReply, SolveRequest, TensorMap
from argrad_service import assembly
from argrad_service.batching.lots import Lot, lot_of
from argrad_service.batching.outcomes import Assembled, of_slices
from argrad_service.engine.options import ShouldStop, never_stop
from argrad_service.engine.outcome import Backward, Outcome, Tangents
from argrad_service.kept import Kept
from argrad_service.registered import Named
from argrad_service.scheduling import Budget, Unfinished
from argrad_service.state import StateStore
from argrad_service.working import Engine, OutOfMemory, Timings, options_of, stage

Answer = tuple[SolveReply, TensorMap]

ROOM_FOR_ONE = 8.0
"""A solve alone may cost this many times the floating-point operations of a batch before it is split."""

_BLANK = SolveReply(status="", report=ReportDocument(solver=""))
"""What replies are copied from."""


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
        versions: Of the caller's tensors before the solve, where state is kept.
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
    batch_size: int | None = field(init=False)
    lot: Lot | None = field(init=False)

    def __post_init__(self) -> None:
        lot, batch_size = None, self.form.batch_size
        object.__setattr__(self, "batch_size", batch_size)
        if self.budget is not None and not isinstance(self.form, SparseForm):
            given = {} if self.cotangent is None else self.cotangent.checked
            lot = lot_of(
                self.request,
                self.form.problem,
                given,
                count=batch_size or 1,
                is_plain=self.start is None and not self._is_remembered,
                prepared=None if self.registered is None else self.registered.prepared,
            )
        object.__setattr__(self, "lot", lot)

    @property
    def _is_remembered(self) -> bool:
        """Whether the next call with the same registered parameters is to begin at this solution."""
        return self.request.warm_start is not None and self.request.warm_start.registered

    def prepared(self) -> Callable[[ShouldStop, Timings], Answer]:
        """The solve itself, or where it is too large for one turn, what solves it in several."""
        if self.lot is None or self.budget is None or self.lot.count == 1 or self.request.deterministic:
            return self
        most = max(self.lot.flops / (ROOM_FOR_ONE * self.budget.flops), self.lot.nbytes / self.budget.nbytes)
        return self if most <= 1 else SplitSolve(self, max(1, int(self.lot.count / most)))

    def __call__(self, should_stop: ShouldStop, timings: Timings) -> Answer:
        """Solve, differentiate if asked, and answer; where memory runs out, once more in two halves.

        Raises:
            OutOfMemory: it does not suffice for half of the problems either, or there is one alone.
        """
        forward: Outcome | None = None
        try:
            with stage(timings, "solve"):
                forward = self.solve(self.form.problem, self.start, should_stop)
        except OutOfMemory:
            if self.lot is None or self.lot.count == 1 or self.request.deterministic:
                raise
        if forward is None:  # not in the clause above: its exception holds on to what the attempt had in memory
            forward = SplitSolve(self, -(-(self.form.batch_size or 1) // 2)).finish(should_stop, timings)
        return self.answer(forward, timings)

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

    def answer(self, forward: Outcome, timings: Timings) -> Answer:
        """Differentiate where that is asked for, and form the reply."""
        with stage(timings, "solve"):
            out = assembly.solved(self.form, forward)
            if self.registered is not None and self._is_remembered:
                blocks = assembly.solution_blocks(self.form, forward)
                self.registered.registration.remember(self.form, blocks)
                self.registered.recount()
        backward = None
        if self.cotangent is not None:
            with stage(timings, "differentiate"):
                upstream = self.cotangent.canonical(forward)
                backward = vjp(self.engine, forward, upstream, self.request.differentiation)
                out |= self.derived(forward, backward)
        return self.reply(forward, backward, out, timings)

    def derived(self, forward: Outcome, backward: Backward) -> TensorMap:
        """What the reply says of derivatives."""
        gradients = assembly.gradients(self.form, forward, backward, self.request, self.wrt)
        return gradients | assembly.measured(self.form, backward)

    def reply(self, forward: Outcome, backward: Backward | None, out: TensorMap, timings: Timings) -> Answer:
        """Keep state, and put the reply together."""
        form = self.form
        token = None
        if self.keep:
            named = self.registered
            kept = Kept(
                form,
                forward.stopped_by(never_stop),
                self.versions,
                registered=None if named is None else named.digest,
                known=frozenset() if named is None else frozenset(named.registration.tensors),
            )
            token = self.store.put(kept, nbytes=kept.nbytes, owner=self.owner)
        reply = _BLANK.model_copy(
            update={
                "status": assembly.per_problem(form, forward.status),
                "report": assembly.report(form, forward, backward),
                "gradient_status": assembly.gradient_status(form, backward),
                "state": token,
                "timings_ms": timings,
            }
        )
        return reply, assembly.in_precision(out, self.request.precision)


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
        self._next(should_stop, timings)
        if self._start < self._batch:
            raise Unfinished
        return self._whole.answer(self._joined(), timings)

    def finish(self, should_stop: ShouldStop, timings: Timings) -> Outcome:
        """Solve every slice in this turn."""
        while self._start < self._batch:
            self._next(should_stop, timings)
        return self._joined()

    @property
    def _batch(self) -> int:
        return self._whole.form.problem.batch_size or 1

    def _next(self, should_stop: ShouldStop, timings: Timings) -> None:
        whole, problem = self._whole, self._whole.form.problem
        rows = slice(self._start, min(self._start + self._size, self._batch))
        parameters = {
            name: t[rows] if t.ndim > len(DIMENSIONS[name]) else t for name, t in problem.parameters().items()
        }
        start = whole.start
        warm = None if start is None else Solution(**{name: t[rows] for name, t in start.blocks().items()})
        with stage(timings, "solve"):
            self._outcomes.append(whole.solve(QP.of_checked(parameters), warm, should_stop))
        self._start = rows.stop

    def _joined(self) -> Outcome:
        outcomes, self._outcomes = self._outcomes, []
        return of_slices(outcomes, self._whole.form.problem)
