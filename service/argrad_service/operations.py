"""The three operations as plain synchronous code on (document, tensors): solve, vjp, jvp.

Each has two halves. `prepare_*` reads the request, refuses what is wrong or too large and touches nothing
else; it returns the other half, which solves and differentiates, and may run much later on another thread.
HTTP and the in-process backend call the same two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from argrad.errors import ProblemError
from argrad.problems import Form, Solution, Status, parse
from argrad.wire.messages import (
    PROTOCOL,
    JvpReply,
    JvpRequest,
    Precision,
    ProblemDocument,
    SolverDocument,
    SolveReply,
    SolveRequest,
    TensorMap,
    VjpReply,
    VjpRequest,
)
from argrad_service import assembly
from argrad_service.admission import Limits, Size, check_iterations, check_reply
from argrad_service.engine.options import ShouldStop, never_stop
from argrad_service.engine.outcome import Outcome
from argrad_service.kept import Kept, Recalled, versions_of, warm_start_at
from argrad_service.registered import Named, Registrations
from argrad_service.scheduling import Budget
from argrad_service.solves import Solve, jvp
from argrad_service.state import ProblemGone, StateGone, StateStore
from argrad_service.vjps import Vjp
from argrad_service.working import Engine, Run, Timings, options_of, stage

_AT_ANY_SOLUTION = frozenset({"auto", "kkt", "bpqp"})
"""Methods that give the same gradient whoever has found the solution; others repeat what the solver did."""


class Operations:
    """Prepares calls for an engine, and keeps forward state for their backward passes.

    Args:
        engine: Solves and differentiates.
        store: Keeps forward state.
        limits: Bounds on one call.
        device: Where problems are solved; replies come back on the device of the request's tensors.
        registrations: Parameters that calls may name; None where nothing can be registered.
        budget: Of a batch of several callers' problems; None where every call is solved alone, and in one piece.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        store: StateStore,
        limits: Limits,
        device: torch.device,
        registrations: Registrations | None = None,
        budget: Budget | None = None,
    ) -> None:
        self._engine, self._store, self._limits, self._device = engine, store, limits, device
        self._registrations, self._budget = registrations, budget

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
            StateGone: the token to begin at names no state.
            ProblemGone: nothing is registered under the digest.
        """
        check_iterations(self._limits, request.solver.max_iterations)
        given = _sections(tensors)
        parameters, cotangents = given.get("problem", {}), given.get("upstream", {})
        form, registered = self._parse(request.problem, parameters, owner)
        wrt = assembly.wanted_gradients(request, form) if cotangents else []
        self._check_reply(form, wrt if request.gradients == "full" else [], cotangents, is_json)
        cotangents = _widened(cotangents, form, request.precision)
        cotangent = assembly.Cotangent(form, cotangents) if cotangents else None
        start = self._start(form, request, given.get("warm_start", {}), owner, registered)
        keep = request.keep_state if request.keep_state is not None else cotangent is None

        return Solve(
            engine=self._engine,
            store=self._store,
            device=self._device,
            budget=self._budget,
            request=request,
            form=form,
            versions=versions_of(form) if keep else (),
            start=start,
            cotangent=cotangent,
            wrt=wrt,
            keep=keep,
            owner=owner,
            registered=registered,
        ).prepared()

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
            ProblemGone: nothing is registered under the digest.
        """
        kept, form, registered = self._place(request, tensors, owner)
        cotangents = _section(tensors, "upstream")
        if not cotangents:
            raise ProblemError("upstream", "nothing", "at least one cotangent, such as upstream.z")
        wrt = assembly.wanted_gradients(request, form)
        self._check_reply(form, wrt if request.gradients == "full" else [], cotangents, is_json)
        cotangent = assembly.Cotangent(form, _widened(cotangents, form, request.precision))
        place = kept or form.point(_section(tensors, "solution"))

        return Vjp(
            engine=self._engine,
            device=self._device,
            request=request,
            form=form,
            cotangent=cotangent,
            wrt=wrt,
            forward=self._forward(form, place, request, registered, owner),
            kept=kept if isinstance(kept, Kept) else None,
            point=place if isinstance(place, Solution) and registered is None else None,
            is_by_token=kept is not None,
            is_merged=self._budget is not None,
        )

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
            ProblemGone: nothing is registered under the digest.
        """
        kept, form, registered = self._place(request, tensors, owner)
        given = _section(tensors, "tangents")
        if not given:
            raise ProblemError("tangents", "nothing", "at least one tangent, such as tangents.q")
        self._check_reply(form, [], {}, is_json)
        canonical = form.tangents(_widened(given, form, request.precision))
        place = kept or form.point(_section(tensors, "solution"))
        forwarded = self._forward(form, place, request, registered, owner)

        def run(should_stop: ShouldStop, timings: Timings) -> tuple[JvpReply, TensorMap]:
            with stage(timings, "differentiate"):
                forward = forwarded(should_stop)
                method = request.differentiation
                tangents = jvp(self._engine, forward, canonical, method)
                out = assembly.measured(form, tangents) if kept else assembly.report_tensors(form, forward, tangents)
                out |= assembly.tangents(form, forward, tangents, request.failed_gradients)
            reply = JvpReply.model_construct(
                report=assembly.report(form, forward, tangents),
                gradient_status=assembly.gradient_status(form, tangents),
                timings_ms=timings,
            )
            return reply, assembly.in_precision(out, request.precision)

        return run

    def release(self, token: str, *, owner: str) -> None:
        """Free forward state early.

        Raises:
            StateGone: the token names no state.
        """
        self._store.delete(token, owner=owner)

    def recall(self, token: str, request: VjpRequest, tensors: TensorMap, *, owner: str) -> None:
        """Take over forward state of another replica: problem and solution, as a caller would send them.

        Args:
            token: Under which it was kept there, and is here.
            request: What a vjp there would say.
            tensors: `problem.*` and `solution.*`.
            owner: Whose state it is.

        Raises:
            ProblemError: it is no problem with its solution.
            ProblemGone: nothing is registered here under the digest that it names.
        """
        _, form, named = self._place(request, tensors, owner)
        recalled = Recalled(form, form.point(_section(tensors, "solution")), request.solver, named)
        self._store.restore(token, recalled, nbytes=recalled.nbytes, owner=owner)

    def solvers(self) -> dict[str, Any]:
        """The engine's table of solvers and methods, and where it solves."""
        return {"protocol": PROTOCOL, "device": str(self._device), "solvers": self._engine.solvers()}

    def _start(
        self,
        form: Form,
        request: SolveRequest,
        blocks: dict[str, Tensor],
        owner: str,
        named: Named | None,
    ) -> Solution | None:
        """Where a solve begins: at tensors of the request, at what a token stands for, or at the last of its kind."""
        token, begins_at_last = None, False
        if request.warm_start is not None:
            token, begins_at_last = request.warm_start.state, request.warm_start.registered
        if begins_at_last and (blocks or token is not None):
            raise ProblemError("warm_start.registered", "true beside a token or tensors", "one of them")
        if begins_at_last:
            if named is None:
                raise ProblemError("warm_start.registered", "true", "problem.registered, whose last solution is meant")
            return named.registration.start(form)
        if token is None:
            return form.point(blocks, section="warm_start") if blocks else None
        if blocks:
            raise ProblemError("warm_start.state", "a token beside tensors", "one of the two")
        kept: Kept | Recalled = self._store.get(token, owner=owner)
        return warm_start_at(kept, form)

    def _parse(self, document: ProblemDocument, parameters: dict[str, Tensor], owner: str) -> tuple[Form, Named | None]:
        """The problem of a call, with the registered parameters that it names."""
        registered = None
        if document.registered is not None:
            if self._registrations is None:
                raise ProblemGone
            registered = self._registrations.find(document, parameters, owner=owner)
        known = {} if registered is None else registered.registration.tensors
        parameters |= known
        Size.of(parameters).check(self._limits)
        return parse(document.kind, parameters, trusted=known), registered

    def _place(
        self, request: VjpRequest | JvpRequest, tensors: TensorMap, owner: str
    ) -> tuple[Kept | Recalled | None, Form, Named | None]:
        """Where to differentiate: what a token stands for, or the problem in the request."""
        state, document, parameters = request.state, request.problem, _section(tensors, "problem")
        if state is None:
            document = document or ProblemDocument()
            if not parameters and document.registered is None:
                raise ProblemError("state", "nothing", "a state token, or problem.* and solution.*")
            return None, *self._parse(document, parameters, owner)
        if parameters or (document is not None and document.registered) or _section(tensors, "solution"):
            raise ProblemError("state", "a token beside problem.* or solution.*", "one of the two")
        kept: Kept | Recalled = self._store.get(state, owner=owner)
        if isinstance(kept, Recalled) and request.differentiation.method not in _AT_ANY_SOLUTION:
            raise StateGone
        if not kept.is_current:
            self._store.delete(state, owner=owner)
            kept = self._store.get(state, owner=owner)  # raises: gone
        return kept, kept.form, None

    def _check_reply(self, form: Form, wrt: list[str], cotangents: dict[str, Tensor], is_json: bool) -> None:
        size, count = Size.of(form.parameters), assembly.cotangent_count(form, cotangents)
        check_reply(self._limits, size, form.parameters, wrt=wrt, cotangents=count, is_json=is_json)

    def _forward(
        self,
        form: Form,
        place: Kept | Recalled | Solution,
        request: VjpRequest | JvpRequest,
        registered: Named | None,
        owner: str,
    ) -> Callable[[ShouldStop], Outcome]:
        """What is differentiated, for whoever asks whether to go on."""
        if isinstance(place, Kept):
            return place.forward.stopped_by
        if isinstance(place, Recalled):
            return functools.partial(self._revived, place, str(request.state), owner)
        return lambda should_stop: self._at_point(form, place, request.solver, registered, should_stop)

    def _revived(self, recalled: Recalled, token: str, owner: str, should_stop: ShouldStop) -> Outcome:
        """Factor what another replica has solved, and keep that under its token."""
        form = recalled.form
        forward = self._at_point(form, recalled.solution, recalled.solver, recalled.named, should_stop)
        if any(status != Status.OPTIMAL for status in forward.status):
            raise StateGone
        kept = Kept(form, forward.stopped_by(never_stop), versions_of(form))
        self._store.restore(token, kept, nbytes=kept.nbytes, owner=owner)
        return forward

    def _at_point(
        self, form: Form, point: Solution, solver: SolverDocument, named: Named | None, should_stop: ShouldStop
    ) -> Outcome:
        return self._engine.at_point(
            form.problem,
            point,
            options=options_of(solver, should_stop),
            device=self._device,
            prepared=None if named is None else named.prepared,
        )


def _widened(directions: dict[str, Tensor], form: Form, precision: Precision) -> dict[str, Tensor]:
    """Cotangents or tangents that may have travelled in float32, in the problem's dtype."""
    if precision == "float64":
        return directions
    return {name: tensor.to(form.problem.q.dtype) for name, tensor in directions.items()}


def _section(tensors: Mapping[str, Tensor], section: str) -> dict[str, Tensor]:
    prefix = section + "."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _sections(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each section that has any."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        section, _, own = name.partition(".")
        found.setdefault(section, {})[own] = tensor
    return found
