"""The calls of a client, without any I/O: the same for the synchronous client, the async one, and autograd.

Each operation is a generator that yields an `Exchange`, is sent the reply, and returns the result. `StateGoneError` is
thrown into it: it then sends problem and solution, once.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Generator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Real
from typing import Literal, cast

import torch
from torch import Tensor

from argrad.backend import Call
from argrad.errors import DeadlineExceededError, ProblemError, StateGoneError
from argrad.options import Options
from argrad.problems import QP, Form, check_finite, check_names, parse
from argrad.problems.sparse import SparseForm
from argrad.problems.sparse_tensors import as_given, as_parts, form_of_sparse, is_sparse, part_names
from argrad.problems.two_sided import TwoSidedQP
from argrad.replies import named, one_each, read_report, read_statuses, section
from argrad.results import GradientResult, Point, SolveResult, TangentResult
from argrad.wire.messages import (
    FailedGradients,
    Gradients,
    JvpReply,
    JvpRequest,
    Message,
    ProblemDocument,
    SolveReply,
    SolveRequest,
    TensorMap,
    VjpReply,
    VjpRequest,
    WarmStartDocument,
)

Name = Literal["solve", "vjp", "jvp", "register"]
WarmStarting = Mapping[str, Tensor] | Point | Literal["registered"]
"""Where a solve begins: at blocks by name, at an earlier result, or at the last one with the registered parameters."""

REGISTERED: Literal["registered"] = "registered"

_LONGEST_S = 1e8
_ITERATED = ("altdiff", "unrolled")
"""Methods that differentiate the iterations of the solver, not the conditions at its solution."""


class _IterationsGone(Exception):  # noqa: N818 - a verdict, not an error
    """The service has no state, and the method cannot begin at a solution."""


@dataclass(frozen=True, eq=False)
class Exchange:
    """Send a message, and read the reply.

    Args:
        name: Of the operation.
        request: The document.
        tensors: Beside it.
        call: Deadline, request id and affinity.
        learned: Parameters that need a gradient, and so are new in most calls.
    """

    name: Name
    request: Message
    tensors: TensorMap
    call: Call
    learned: frozenset[str] = frozenset()


Reply = tuple[Message, TensorMap]
Steps = Generator[Exchange, Reply, Reply]


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """Where derivatives are taken, as a request says it.

    Args:
        kind: Of the problem.
        parameters: By the caller's names.
        solution: Blocks by the caller's names.
        state: Token that stands for all three, while the service keeps it.
        learned: Parameters that need a gradient.
        is_own: Whether a solve with the same options found the solution, and would find it again.
    """

    kind: Literal["qp", "qp_two_sided", "sparse_qp"]
    parameters: Mapping[str, Tensor]
    solution: Mapping[str, Tensor]
    state: str | None
    learned: frozenset[str] = frozenset()
    is_own: bool = False


def form_of(problem: QP | Form, trusted: Collection[str] = ()) -> Form:
    """A problem in the caller's form, checked, values included.

    Args:
        problem: Of either kind.
        trusted: Parameters whose values were checked before.

    Raises:
        ProblemError: a value is not finite.
    """
    if isinstance(problem, Form):
        return problem
    parameters = problem.parameters()
    return form_of_sparse(parameters) if is_sparse(parameters) else parse("qp", parameters, trusted=trusted)


def kind_of(form: Form) -> Literal["qp", "qp_two_sided", "sparse_qp"]:
    """Name of a form on the wire."""
    if isinstance(form, SparseForm):
        return "sparse_qp"
    return "qp_two_sided" if isinstance(form, TwoSidedQP) else "qp"


def place_of(point: Point) -> Place:
    """A point, as a request says it."""
    return Place(
        kind=kind_of(point.problem),
        parameters=point.problem.parameters,
        solution=point.solution,
        state=point.state,
        learned=learned_of(point.problem),
        is_own=isinstance(point, SolveResult),
    )


def learned_of(form: Form) -> frozenset[str]:
    """Parameters that say that they need a gradient."""
    return frozenset(name for name, tensor in form.parameters.items() if tensor.requires_grad)


def call_within(default_s: float | None, timeout_s: float | None, request_id: str | None) -> Call:
    """What surrounds one call: its deadline, by default the client's, its request id, and an affinity of its own.

    Raises:
        ProblemError: the deadline is zero, negative or not a number.
    """
    check_timeout(timeout_s)
    chosen_s = default_s if timeout_s is None else timeout_s
    return Call(timeout_s=chosen_s, request_id=request_id, affinity=secrets.token_hex(8))


def check_timeout(timeout_s: float | None) -> None:
    """Refuse a deadline that no call could meet, or no clock can tell.

    Raises:
        ProblemError: zero, negative, not a number, or more than three years.
    """
    if timeout_s is None:
        return
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, Real) or not 0 < timeout_s <= _LONGEST_S:
        raise ProblemError("timeout_s", repr(timeout_s), "seconds above zero, at most 1e8, or None for no limit")


def check_problem(problem: object) -> None:
    """Refuse what is no problem.

    Raises:
        ProblemError: it is something else.
    """
    if not isinstance(problem, QP | Form):
        raise ProblemError("problem", type(problem).__name__, "argrad.QP(…), or argrad.problems.parse(kind, tensors)")


def _check_kinds(options: object, **tensors: object) -> None:
    """Refuse options that are none, and tensors that have no names."""
    if not isinstance(options, Options):
        raise ProblemError("options", type(options).__name__, "argrad.Options(…)")
    for name, given in tensors.items():
        if given is not None and not isinstance(given, Mapping):
            raise ProblemError(name, type(given).__name__, "tensors by name, such as {'z': tensor}")


def _check_point(point: object) -> None:
    if not isinstance(point, Point):
        raise ProblemError("at", type(point).__name__, "the result of a solve, or argrad.Point(…)")


def _parts_wanted(form: Form, wrt: Collection[str]) -> list[str]:
    """Parameters whose gradients are wanted, by the names that the wire has.

    Raises:
        ProblemError: they are no sequence of names, or one of them is not of the problem.
    """
    if isinstance(wrt, str):
        raise ProblemError("wrt", repr(wrt), f"names in a sequence, of {', '.join(form.names)}")
    parts = part_names(form, wrt)
    check_names("wrt", parts, form.names)
    return parts


def solve(
    problem: QP | Form,
    *,
    options: Options,
    call: Call,
    upstream: Mapping[str, Tensor] | None = None,
    wrt: Collection[str] | None = None,
    gradients: Gradients = "full",
    failed_gradients: FailedGradients = "nan",
    keep_state: bool | None = None,
    warm_start: WarmStarting | None = None,
    learned: frozenset[str] | None = None,
    check: bool = True,
    fits: bool = False,
) -> Generator[Exchange, Reply, SolveResult]:
    """POST /v1/solve; see `Client.solve`.

    `learned` parameters are by default those that say so themselves; `fits` says that `upstream` needs no check.
    """
    is_named = isinstance(warm_start, Point) or warm_start == REGISTERED
    _check_kinds(options, upstream=upstream, warm_start=None if is_named else warm_start)
    form = form_of(problem)
    learned = learned_of(form) if learned is None else learned
    if wrt is not None:
        wrt = _parts_wanted(form, wrt)
    tensors = named("problem", form.parameters)
    if upstream is not None:
        if not fits:
            check_upstream(form, upstream)
        tensors |= _directions("upstream", upstream, options)
    start: WarmStartDocument | None = None
    if isinstance(warm_start, Point) and warm_start.state is not None:
        start, call = WarmStartDocument(state=warm_start.state), replace(call, affinity=warm_start.affinity)
    elif warm_start == REGISTERED:
        start = WarmStartDocument(registered=True)
    elif warm_start is not None:
        tensors |= _start(form, warm_start)
    names = None if wrt is None else tuple(wrt)
    request = _solve_request(kind_of(form), options.text, names, gradients, failed_gradients, keep_state)
    if start is not None:
        request = request.model_copy(update={"warm_start": start})
    began = time.monotonic()
    try:
        message, out = yield Exchange("solve", request, tensors, call, learned)
    except StateGoneError:
        if start is None or not isinstance(warm_start, Point):
            raise
        request = request.model_copy(update={"warm_start": None})
        tensors = tensors | _start(form, warm_start)
        message, out = yield Exchange("solve", request, tensors, less(call, time.monotonic() - began), learned)
    reply = cast("SolveReply", message)
    like = form.problem.q
    result = SolveResult(
        problem=form,
        solution=section(out, "solution", like),
        state=reply.state,
        affinity=call.affinity,
        statuses=read_statuses(reply.status),
        report=read_report(reply.report, out, reply.timings_ms),
        gradients=as_given(form, section(out, "gradients", like)) or None,
        adjoint=section(out, "adjoint", like) or None,
        gradient_statuses=one_each(reply.gradient_status),
    )
    return result.check() if check else result


@lru_cache(maxsize=128)
def _solve_request(
    kind: Literal["qp", "qp_two_sided", "sparse_qp"],
    options_text: str,
    wrt: tuple[str, ...] | None,
    gradients: Gradients,
    failed_gradients: FailedGradients,
    keep_state: bool | None,
) -> SolveRequest:
    """The document of a solve, which a training loop sends again and again."""
    options = Options.from_text(options_text)
    return SolveRequest(
        problem=ProblemDocument(kind=kind),
        solver=options.solver_document,
        differentiation=options.differentiation_document,
        wrt=None if wrt is None else list(wrt),
        gradients=gradients,
        failed_gradients=failed_gradients,
        keep_state=keep_state,
        deterministic=options.deterministic,
        precision=options.precision,
    )


def _directions(section: str, tensors: Mapping[str, Tensor], options: Options) -> TensorMap:
    """Cotangents or tangents in the precision in which they travel."""
    is_narrow = options.precision == "float32"
    return named(section, {name: tensor.float() if is_narrow else tensor for name, tensor in tensors.items()})


def _start(form: Form, warm_start: WarmStarting) -> TensorMap:
    """A warm start as tensors. Rows of problems that failed hold what is not finite: those begin at 0."""
    if isinstance(warm_start, Point):
        blocks = {name: block for name, block in warm_start.solution.items() if name != "s"}
        warm_start = {name: torch.nan_to_num(block, 0.0, 0.0, 0.0) for name, block in blocks.items()}
    assert not isinstance(warm_start, str)  # noqa: S101 - that needs no tensors
    form.point(warm_start, section="warm_start")
    return named("warm_start", warm_start)


def vjp_at(
    point: Point,
    upstream: Mapping[str, Tensor],
    *,
    options: Options,
    call: Call,
    wrt: Collection[str] | None,
    gradients: Gradients,
    failed_gradients: FailedGradients,
    check: bool,
) -> Generator[Exchange, Reply, GradientResult]:
    """Check what a vjp is asked, as the service would, and make it; see `Client.vjp`."""
    _check_point(point)
    _check_kinds(options, upstream=upstream)
    if wrt is not None:
        wrt = _parts_wanted(point.problem, wrt)
    check_upstream(point.problem, upstream, point if isinstance(point, SolveResult) else None)
    result = yield from vjp(
        place_of(point),
        upstream,
        options=options,
        call=replace(call, affinity=point.affinity),
        wrt=wrt,
        gradients=gradients,
        failed_gradients=failed_gradients,
    )
    if result.gradients is not None:
        result = replace(result, gradients=as_given(point.problem, result.gradients))
    return result.check() if check else result


def jvp_at(
    point: Point,
    tangents: Mapping[str, Tensor],
    *,
    options: Options,
    call: Call,
    failed_gradients: FailedGradients,
    check: bool,
) -> Generator[Exchange, Reply, TangentResult]:
    """Check what a jvp is asked, as the service would, and make it; see `Client.jvp`."""
    _check_point(point)
    _check_kinds(options, tangents=tangents)
    tangents = as_parts(point.problem, tangents)
    point.problem.tangents(tangents)
    result = yield from jvp(
        place_of(point),
        tangents,
        options=options,
        call=replace(call, affinity=point.affinity),
        failed_gradients=failed_gradients,
    )
    return result.check() if check else result


def vjp(
    place: Place,
    upstream: Mapping[str, Tensor],
    *,
    options: Options,
    call: Call,
    wrt: Collection[str] | None = None,
    gradients: Gradients = "full",
    failed_gradients: FailedGradients = "nan",
) -> Generator[Exchange, Reply, GradientResult]:
    """POST /v1/vjp; nothing is checked here.

    A method that differentiates the solver's own iterations cannot begin at a solution: where its state is gone, one
    POST /v1/solve repeats them, and brings the gradients.
    """
    request = VjpRequest(
        problem=ProblemDocument(kind=place.kind),
        solver=options.solver_document,
        differentiation=options.differentiation_document,
        wrt=None if wrt is None else list(wrt),
        gradients=gradients,
        failed_gradients=failed_gradients,
        precision=options.precision,
    )
    began = time.monotonic()
    try:
        message, out = yield from _at("vjp", place, request, _directions("upstream", upstream, options), call)
    except _IterationsGone:
        solved = yield from solve(
            parse(place.kind, place.parameters),
            options=options,
            call=less(call, time.monotonic() - began),
            upstream=upstream,
            wrt=wrt,
            gradients=gradients,
            failed_gradients=failed_gradients,
            learned=place.learned,
            check=False,
        )
        return GradientResult(
            gradients=solved.gradients,
            adjoint=solved.adjoint,
            gradient_statuses=solved.gradient_statuses,
            report=solved.report,
        )
    reply = cast("VjpReply", message)
    like = next(iter(place.parameters.values()))
    return GradientResult(
        gradients=section(out, "gradients", like) or None,
        adjoint=section(out, "adjoint", like) or None,
        gradient_statuses=one_each(reply.gradient_status),
        report=read_report(reply.report, out, reply.timings_ms),
    )


def jvp(
    place: Place,
    tangents: Mapping[str, Tensor],
    *,
    options: Options,
    call: Call,
    failed_gradients: FailedGradients = "nan",
) -> Generator[Exchange, Reply, TangentResult]:
    """POST /v1/jvp; nothing is checked here."""
    request = JvpRequest(
        problem=ProblemDocument(kind=place.kind),
        solver=options.solver_document,
        differentiation=options.differentiation_document,
        failed_gradients=failed_gradients,
        precision=options.precision,
    )
    message, out = yield from _at("jvp", place, request, _directions("tangents", tangents, options), call)
    reply = cast("JvpReply", message)
    like = next(iter(place.parameters.values()))
    return TangentResult(
        tangents=section(out, "tangents", like),
        gradient_statuses=one_each(reply.gradient_status),
        report=read_report(reply.report, out, reply.timings_ms),
    )


def _at(name: Name, place: Place, request: VjpRequest | JvpRequest, direction: TensorMap, call: Call) -> Steps:
    """Differentiate by state token; without one, or once the state is gone, by problem and solution."""
    began = time.monotonic()
    if place.state is not None:
        by_state = request.model_copy(update={"state": place.state, "problem": None})
        try:
            return (yield Exchange(name, by_state, direction, call))
        except StateGoneError:
            pass
    if place.is_own and request.differentiation.method in _ITERATED:
        raise _IterationsGone
    # s = h − Gz needs not travel.
    solution = {key: block for key, block in place.solution.items() if key != "s"}
    tensors = named("problem", place.parameters) | named("solution", solution) | direction
    return (yield Exchange(name, request, tensors, less(call, time.monotonic() - began), place.learned))


def less(call: Call, elapsed_s: float) -> Call:
    """What is left of a call after some seconds.

    Raises:
        DeadlineExceededError: nothing is.
    """
    if call.timeout_s is None:
        return call
    if elapsed_s >= call.timeout_s:
        raise DeadlineExceededError(f"no result within {call.timeout_s:g} s")
    return replace(call, timeout_s=call.timeout_s - elapsed_s)


def check_upstream(form: Form, upstream: Mapping[str, Tensor], at: SolveResult | None = None) -> None:
    """Refuse cotangents of the wrong names or shapes, and values that are not finite.

    Args:
        form: The problem.
        upstream: Cotangents by block.
        at: Where they are taken; the rows of problems that failed there may hold anything.

    Raises:
        ProblemError: names the cotangent.
    """
    form.upstream(upstream)
    failed = list(at.failed) if at is not None else []
    for name, tensor in upstream.items():
        if failed:
            tensor = tensor.detach().clone()
            if form.batch_size is None:
                tensor.zero_()
            else:
                tensor[..., failed, :] = 0.0
        check_finite(f"upstream.{name}", tensor)
