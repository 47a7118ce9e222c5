"""The three operations as plain synchronous code on (document, tensors): solve, vjp, jvp.

Each has two halves. `prepare_*` reads the request, refuses what is wrong or too large and touches nothing
else; it returns the other half, which solves and differentiates, and may run much later on another thread.
HTTP and the in-process backend call the same two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from argrad.errors import ProblemError
from argrad.problems import QP, Form, Solution, parse
from argrad.wire.messages import (
    PROTOCOL,
    DifferentiationDocument,
    JvpReply,
    JvpRequest,
    Message,
    ProblemDocument,
    SolverDocument,
    SolveReply,
    SolveRequest,
    TensorMap,
    VjpReply,
    VjpRequest,
)
from argrad_service import assembly
from argrad_service.admission import Limits, Size, TooLarge, check_iterations, check_reply
from argrad_service.engine.options import ShouldStop, SolverOptions, never_stop
from argrad_service.engine.outcome import Backward, Outcome, Tangents
from argrad_service.kept import Kept, versions_of
from argrad_service.state import StateStore

Timings = dict[str, float]
Reply = TypeVar("Reply", bound=Message)
Run = Callable[[ShouldStop, Timings], tuple[Reply, TensorMap]]
"""The second half: solves. It asks the first argument whether to go on, and adds its stages to the second, in ms."""


class Engine(Protocol):
    """What the operations need of an engine; the module `argrad_service.engine` has it."""

    def solve(
        self,
        problem: QP,
        *,
        solver: str = ...,
        options: SolverOptions | None = ...,
        warm_start: Solution | None = ...,
        device: torch.device | None = ...,
    ) -> Outcome:
        """Solve a batch."""
        ...

    def at_point(
        self,
        problem: QP,
        solution: Solution,
        *,
        options: SolverOptions | None = ...,
        device: torch.device | None = ...,
    ) -> Outcome:
        """Take over a point that someone else computed."""
        ...

    def vjp(
        self,
        forward: Outcome,
        upstream: Mapping[str, Tensor],
        *,
        method: str = ...,
        options: Mapping[str, Any] | None = ...,
    ) -> Backward:
        """Form the adjoint."""
        ...

    def jvp(
        self,
        forward: Outcome,
        tangents: Mapping[str, Tensor],
        *,
        method: str = ...,
        options: Mapping[str, Any] | None = ...,
    ) -> Tangents:
        """Push tangents forward."""
        ...

    def solvers(self) -> list[dict[str, Any]]:
        """Table of what can be solved and differentiated how."""
        ...

    def default_device(self) -> torch.device:
        """A GPU where there is one."""
        ...


class Operations:
    """Prepares calls for an engine, and keeps forward state for their backward passes.

    Args:
        engine: Solves and differentiates.
        store: Keeps forward state.
        limits: Bounds on one call.
        device: Where problems are solved; replies come back on the device of the request's tensors.
    """

    def __init__(self, *, engine: Engine, store: StateStore, limits: Limits, device: torch.device) -> None:
        self._engine, self._store, self._limits, self._device = engine, store, limits, device

    def prepare_solve(
        self, request: SolveRequest, tensors: TensorMap, *, owner: str, is_json: bool = False
    ) -> Run[SolveReply]:
        """Check a solve, with `upstream` a differentiation too.

        State is kept unless `upstream` is there or `keep_state` says otherwise; a state that alone is over the
        store's budget is not kept, and the reply has no token.

        Args:
            request: The document.
            tensors: `problem.*`, optional `upstream.*` and `warm_start.*`.
            owner: Whose state it will be.
            is_json: Whether the reply will be JSON, which has a limit of its own.

        Raises:
            ProblemError: a field is wrong.
            TooLarge: the problem, the work or the reply is over a limit.
        """
        check_iterations(self._limits, request.solver.max_iterations)
        parameters, cotangents = _section(tensors, "problem"), _section(tensors, "upstream")
        form = self._parse(request.problem, parameters)
        versions = versions_of(form)
        wrt = assembly.wanted_gradients(request, form) if cotangents else []
        self._check_reply(form, wrt if request.gradients == "full" else [], cotangents, is_json)
        cotangent = assembly.Cotangent(form, cotangents) if cotangents else None
        warm = _section(tensors, "warm_start")
        start = form.point(warm, section="warm_start") if warm else None
        keep = request.keep_state if request.keep_state is not None else cotangent is None

        def run(should_stop: ShouldStop, timings: Timings) -> tuple[SolveReply, TensorMap]:
            with _stage(timings, "solve"):
                forward = self._engine.solve(
                    form.problem,
                    solver=request.solver.name,
                    options=_options(request.solver, should_stop),
                    warm_start=start,
                    device=self._device,
                )
                out = assembly.solved(form, forward)
            backward = None
            if cotangent is not None:
                with _stage(timings, "differentiate"):
                    backward = self._vjp(forward, cotangent, request.differentiation)
                    out |= assembly.gradients(form, forward, backward, request, wrt)
                    out |= assembly.measured(form, backward)
            token = None
            if keep:
                kept = Kept(form, forward.stopped_by(never_stop), versions)
                token = self._store.put(kept, nbytes=kept.nbytes, owner=owner)
            reply = SolveReply(
                status=assembly.per_problem(form, forward.status),
                report=assembly.report(form, forward, backward),
                gradient_status=assembly.gradient_status(form, backward),
                state=token,
                timings_ms=timings,
            )
            return reply, out

        return run

    def prepare_vjp(
        self, request: VjpRequest, tensors: TensorMap, *, owner: str, is_json: bool = False
    ) -> Run[VjpReply]:
        """Check a vjp, by state token or at a point that the caller sends.

        Args:
            request: The document.
            tensors: `upstream.*`; without a token `problem.*` and `solution.*` too.
            owner: Whose state the token must name.
            is_json: Whether the reply will be JSON.

        Raises:
            ProblemError: a field is wrong.
            TooLarge: the problem, the work or the reply is over a limit.
            StateGone: the token names no state.
        """
        kept, form = self._place(request.state, request.problem, tensors, owner)
        cotangents = _section(tensors, "upstream")
        if not cotangents:
            raise ProblemError("upstream", "nothing", "at least one cotangent, such as upstream.z")
        wrt = assembly.wanted_gradients(request, form)
        self._check_reply(form, wrt if request.gradients == "full" else [], cotangents, is_json)
        cotangent = assembly.Cotangent(form, cotangents)
        place = kept or form.point(_section(tensors, "solution"))

        def run(should_stop: ShouldStop, timings: Timings) -> tuple[VjpReply, TensorMap]:
            with _stage(timings, "differentiate"):
                forward = self._forward(form, place, request.solver, should_stop)
                backward = self._vjp(forward, cotangent, request.differentiation)
                out = assembly.measured(form, backward) if kept else assembly.report_tensors(form, forward, backward)
                out |= assembly.gradients(form, forward, backward, request, wrt)
            reply = VjpReply(
                report=assembly.report(form, forward, backward),
                gradient_status=assembly.gradient_status(form, backward),
                timings_ms=timings,
            )
            return reply, out

        return run

    def prepare_jvp(
        self, request: JvpRequest, tensors: TensorMap, *, owner: str, is_json: bool = False
    ) -> Run[JvpReply]:
        """Check a jvp, by state token or at a point that the caller sends.

        Args:
            request: The document.
            tensors: `tangents.*`; without a token `problem.*` and `solution.*` too.
            owner: Whose state the token must name.
            is_json: Whether the reply will be JSON.

        Raises:
            ProblemError: a field is wrong.
            TooLarge: the problem, the work or the reply is over a limit.
            StateGone: the token names no state.
        """
        kept, form = self._place(request.state, request.problem, tensors, owner)
        given = _section(tensors, "tangents")
        if not given:
            raise ProblemError("tangents", "nothing", "at least one tangent, such as tangents.q")
        self._check_reply(form, [], {}, is_json)
        canonical = form.tangents(given)
        place = kept or form.point(_section(tensors, "solution"))

        def run(should_stop: ShouldStop, timings: Timings) -> tuple[JvpReply, TensorMap]:
            with _stage(timings, "differentiate"):
                forward = self._forward(form, place, request.solver, should_stop)
                method = request.differentiation
                tangents = self._engine.jvp(forward, canonical, method=method.method, options=method.options)
                out = assembly.measured(form, tangents) if kept else assembly.report_tensors(form, forward, tangents)
                out |= assembly.tangents(form, forward, tangents, request.failed_gradients)
            reply = JvpReply(
                report=assembly.report(form, forward, tangents),
                gradient_status=assembly.gradient_status(form, tangents),
                timings_ms=timings,
            )
            return reply, out

        return run

    def release(self, token: str, *, owner: str) -> None:
        """Free forward state early.

        Raises:
            StateGone: the token names no state.
        """
        self._store.delete(token, owner=owner)

    def solvers(self) -> dict[str, Any]:
        """The engine's table of solvers and methods, and where it solves."""
        return {"protocol": PROTOCOL, "device": str(self._device), "solvers": self._engine.solvers()}

    def _parse(self, document: ProblemDocument, parameters: dict[str, Tensor]) -> Form:
        Size.of(parameters).check(self._limits)
        return parse(document.kind, parameters)

    def _place(
        self, state: str | None, document: ProblemDocument | None, tensors: TensorMap, owner: str
    ) -> tuple[Kept | None, Form]:
        """Where to differentiate: what a token stands for, or the problem in the request."""
        parameters = _section(tensors, "problem")
        if state is None:
            if not parameters:
                raise ProblemError("state", "nothing", "a state token, or problem.* and solution.*")
            return None, self._parse(document or ProblemDocument(), parameters)
        if parameters or _section(tensors, "solution"):
            raise ProblemError("state", "a token beside problem.* or solution.*", "one of the two")
        kept: Kept = self._store.get(state, owner=owner)
        if not kept.is_current:
            self._store.delete(state, owner=owner)
            kept = self._store.get(state, owner=owner)  # raises: gone
        return kept, kept.form

    def _check_reply(self, form: Form, wrt: list[str], cotangents: dict[str, Tensor], is_json: bool) -> None:
        size, count = Size.of(form.parameters), assembly.cotangent_count(form, cotangents)
        check_reply(self._limits, size, form.parameters, wrt=wrt, cotangents=count, is_json=is_json)

    def _forward(self, form: Form, place: Kept | Solution, solver: SolverDocument, should_stop: ShouldStop) -> Outcome:
        if isinstance(place, Kept):
            return place.forward.stopped_by(should_stop)
        return self._engine.at_point(form.problem, place, options=_options(solver, should_stop), device=self._device)

    def _vjp(
        self, forward: Outcome, cotangent: assembly.Cotangent, differentiation: DifferentiationDocument
    ) -> Backward:
        upstream, own = cotangent.canonical(forward), differentiation.options
        return self._engine.vjp(forward, upstream, method=differentiation.method, options=own)


def _section(tensors: Mapping[str, Tensor], section: str) -> dict[str, Tensor]:
    prefix = section + "."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _options(solver: SolverDocument, should_stop: ShouldStop) -> SolverOptions:
    return SolverOptions(
        tolerance=solver.tolerance,
        max_iterations=solver.max_iterations,
        should_stop=should_stop,
        own=solver.options,
    )


@contextmanager
def _stage(timings: Timings, name: str) -> Iterator[None]:
    """Time a stage; memory that runs out is the call's size, not a defect."""
    began = time.perf_counter()
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise TooLarge("memory of the device", "less than this call needs", "fewer or smaller problems") from None
    timings[name] = 1e3 * (time.perf_counter() - began)
