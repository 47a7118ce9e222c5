"""A sparse solve as a differentiable operation of PyTorch: values and vectors → blocks of the solution.

`argrad.autograd` for kind `sparse_qp`. Patterns are inputs without derivatives, gradients of values are formed on them,
and nothing of size n × n exists anywhere. A sparse tensor that was given receives its gradient through its values, as a
sparse tensor of the same layout and pattern.

First derivatives only, in reverse and forward mode; no vmap, for a sparse problem is solved alone.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from argrad import operations
from argrad.autograd import find_learned
from argrad.client import Client
from argrad.derivatives import signed
from argrad.errors import GradientError, SolveError
from argrad.options import OnFailure, Options
from argrad.problems import check_finite, parse
from argrad.problems.form import Blocks
from argrad.problems.sparse import Constants, pattern_gradients
from argrad.problems.sparse_parsing import parse_beside
from argrad.problems.sparse_tensors import take_apart
from argrad.recorded import Recorded, State, after_failure, check_cotangents, fill_rows
from argrad.results import check_gradients, failed_indices
from argrad.wire import messages

Tensors = tuple[Tensor, ...]


def differentiable_sparse_solve(
    client: Client,
    given: Mapping[str, Tensor],
    *,
    options: Options,
    gradients: messages.Gradients,
    on_failure: OnFailure,
    timeout_s: float | None,
    request_id: str | None,
) -> Blocks:
    """Solve a sparse problem so that autograd can differentiate every block of the solution.

    Args:
        client: Who is asked.
        given: Parameters of a QP, at least one of its matrices a sparse tensor.
        options: Solver and differentiation method.
        gradients: Who forms gradients of values.
        on_failure: See `argrad.solve_qp`.
        timeout_s: Of the solve, and of each of its derivatives; by default the client's.
        request_id: Of the solve and of its derivatives; drawn at random by default.

    Returns:
        z nu lam s, differentiable.

    Raises:
        ProblemError: a parameter does not fit; nothing was sent.
        SolveError: there is no solution, under `on_failure="raise"`.
    """
    return solve_parts(
        client,
        take_apart(given),
        options=options,
        gradients=gradients,
        on_failure=on_failure,
        timeout_s=timeout_s,
        request_id=request_id,
    )


def solve_parts(
    client: Client,
    parts: Blocks,
    *,
    constants: Constants | None = None,
    options: Options,
    gradients: messages.Gradients,
    on_failure: OnFailure,
    timeout_s: float | None,
    request_id: str | None,
) -> Blocks:
    """`differentiable_sparse_solve` of parameters of kind `sparse_qp`, in their order; beside constants, of vectors."""
    record = Recorded(
        client=client,
        kind="sparse_qp",
        names=tuple(parts),
        options=options,
        gradients=gradients,
        on_failure=on_failure,
        call=operations.call_within(client.timeout_s, timeout_s, request_id or secrets.token_hex(8)),
        learned=find_learned(parts),
        constants=constants,
    )
    return record.named_blocks(_apply(_Solve, record, *parts.values()))


def _apply(function: type[torch.autograd.Function], *operands: Any) -> Tensors:
    return cast("Tensors", function.apply(*operands))  # type: ignore[no-untyped-call]


class _First(torch.autograd.Function):
    """What every operation here refuses."""

    @staticmethod
    def vmap(*_: Any) -> NoReturn:
        raise GradientError("a sparse problem is solved alone: it cannot be mapped over; call it in a loop")


class _Solve(_First):
    """Blocks of the solution of a problem."""

    @staticmethod
    @signed
    def forward(record: Recorded, *parameters: Tensor) -> Tensors:
        given, client = dict(zip(record.names, parameters, strict=True)), record.client
        form = parse(record.kind, given) if record.constants is None else parse_beside(record.constants, given)
        if record.gradients == "adjoint" and client.solves_here(given, record.options):
            here = client.solve_here(form, record.options, record.call)
            record.failed, solution, statuses = failed_indices(here.statuses), here.solution, here.statuses
            record.here = here if record.keep_state else None
        else:
            steps = operations.solve(
                form,
                options=record.options,
                call=record.call,
                learned=record.learned,
                keep_state=record.keep_state,
                check=False,
            )
            result = client.run(steps)
            record.failed, solution, statuses = result.failed, result.solution, result.statuses
            if result.state is not None:
                record.state = State(client, result.state)
        if record.failed and record.on_failure == "raise":
            raise SolveError(statuses, record.failed)
        blocks = after_failure(record, parameters, solution) if record.failed else solution
        return tuple(blocks[name].clone() for name in record.blocks)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.record, *parameters = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*parameters, *output)
        ctx.save_for_forward(*parameters, *output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        record: Recorded = ctx.record
        needed = ctx.needs_input_grad[1:]
        given = [tensor if tensor is not None and tensor.numel() else None for tensor in cotangents]
        wrt = tuple(name for name, is_needed in zip(record.names, needed, strict=True) if is_needed)
        if not wrt or all(tensor is None for tensor in given):
            return (None,) * (1 + len(needed))
        operands = (record, wrt, *ctx.saved_tensors, *given)
        # Where nothing records there is nobody to refuse a second derivative to, and calling a Function takes long.
        found = _apply(_Gradients, *operands) if torch.is_grad_enabled() else _Gradients.forward(*operands)
        formed = dict(zip(wrt, found, strict=True))
        return None, *(formed.get(name) for name in record.names)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensors:
        return _apply(_Tangents, ctx.record, *ctx.saved_tensors, *tangents)


class _Derivative(_First):
    """A first derivative, which has none itself: so nothing is saved."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        pass

    @staticmethod
    def backward(*_: Any) -> NoReturn:
        _refuse_second_derivative()

    @staticmethod
    def jvp(*_: Any) -> NoReturn:
        _refuse_second_derivative()


class _Gradients(_Derivative):
    """Gradients of the parameters named in `wrt`."""

    @staticmethod
    @signed
    def forward(record: Recorded, wrt: tuple[str, ...], *operands: Any) -> Tensors:
        parameters, solution, given = record.unpack(operands, len(record.blocks))
        cotangents = {name: tensor for name, tensor in record.named_blocks(given).items() if tensor is not None}
        mask = check_cotangents(record, cotangents, record.unusable(parameters))
        if mask is not None and bool(mask):
            return _filled(record, wrt, parameters)
        blocks, here = record.named_blocks(solution), record.here_for(parameters)
        formed: Blocks | None = None
        if here is not None:
            derived = here.adjoint(cotangents, failed=record.failed_gradients, timeout_s=record.call.timeout_s)
            adjoint, statuses = derived.blocks, derived.statuses
        else:
            steps = operations.vjp(
                record.place(parameters, blocks),
                cotangents,
                options=record.options,
                call=record.call,
                wrt=wrt,
                gradients=record.gradients,
                failed_gradients=record.failed_gradients,
            )
            result = record.client.run(steps)
            formed, adjoint, statuses = result.gradients, result.adjoint or {}, result.gradient_statuses
        if record.on_failure == "raise":
            check_gradients(statuses)
        if formed is None:
            named = dict(zip(record.names, parameters, strict=True))
            formed = pattern_gradients(named, blocks, adjoint, wrt)
        return tuple(formed[name].clone() for name in wrt)


class _Tangents(_Derivative):
    """Tangents of the blocks of a solution, from tangents of the parameters, some of which may be None."""

    @staticmethod
    @signed
    def forward(record: Recorded, *operands: Any) -> Tensors:
        parameters, solution, given = record.unpack(operands, len(record.names))
        pairs = zip(record.names, given, strict=True)
        tangents = {name: tensor for name, tensor in pairs if tensor is not None}
        for name, tensor in tangents.items():
            check_finite(f"tangents.{name}", tensor)
        blocks = record.named_blocks(solution)
        mask = record.unusable(parameters)
        if mask is not None:
            return tuple(fill_rows(blocks, mask, record.filler).values())
        here = record.here_for(parameters)
        if here is not None:
            derived = here.tangents(tangents, failed=record.failed_gradients, timeout_s=record.call.timeout_s)
            moved, statuses = derived.blocks, derived.statuses
        else:
            steps = operations.jvp(
                record.place(parameters, blocks),
                tangents,
                options=record.options,
                call=record.call,
                failed_gradients=record.failed_gradients,
            )
            result = record.client.run(steps)
            moved, statuses = result.tangents, result.gradient_statuses
        if record.on_failure == "raise":
            check_gradients(statuses)
        return tuple(moved[name].clone() for name in record.blocks)


def _filled(record: Recorded, wrt: Sequence[str], parameters: Sequence[Tensor]) -> Tensors:
    """What stands for the gradients of a problem that has none."""
    named = dict(zip(record.names, parameters, strict=True))
    return tuple(torch.full_like(named[name], record.filler) for name in wrt)


def _refuse_second_derivative() -> NoReturn:
    raise GradientError(
        "a second derivative was asked for: sparse problems have first derivatives only. "
        "Without create_graph=True (or with one torch.func transform instead of two) there is none"
    )
