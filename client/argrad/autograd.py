"""A solve as a differentiable operation of PyTorch: parameters → blocks of the solution.

Its backward and its jvp are operations of `argrad.derivatives` and `argrad.tangents`, differentiable themselves.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from argrad import operations
from argrad.ahead import ahead_of, cotangents_ahead
from argrad.backend import SolvedHere
from argrad.client import Client
from argrad.derivatives import Dims, Gradients, Tensors, apply, formed, merge, owned, signed, without_empty
from argrad.errors import SolveError
from argrad.options import OnFailure, Options
from argrad.problems import Form, Status, parse
from argrad.problems.form import Blocks
from argrad.recorded import Kind, Recorded, State, after_failure
from argrad.results import failed_indices
from argrad.tangents import Tangents
from argrad.warm import WarmStart
from argrad.wire import messages


def differentiable_solve(
    client: Client,
    kind: Kind,
    parameters: Blocks,
    *,
    options: Options,
    gradients: messages.Gradients,
    on_failure: OnFailure,
    timeout_s: float | None,
    request_id: str | None,
    start: WarmStart | None = None,
) -> Blocks:
    """Solve a problem so that autograd can differentiate every block of the solution.

    Args:
        client: Who is asked.
        kind: `qp` or `qp_two_sided`.
        parameters: Those that are given, by name.
        options: Solver and differentiation method.
        gradients: See `Recorded`.
        on_failure: See `argrad.solve_qp`.
        timeout_s: Of the solve, and of each of its derivatives; by default the client's.
        request_id: Of the solve and of its derivatives; drawn at random by default.
        start: Where the solver begins.

    Returns:
        The blocks of the solution by name, differentiable.
    """
    is_pulled_back = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in parameters.values())
    record = Recorded(
        client=client,
        kind=kind,
        names=tuple(parameters),
        options=options,
        gradients=gradients,
        on_failure=on_failure,
        call=operations.call_within(client.timeout_s, timeout_s, request_id or secrets.token_hex(8)),
        learned=find_learned(parameters),
        start=start,
        fetches_ahead=client.fetches_ahead and is_pulled_back and gradients == "adjoint" and start is None,
    )
    return record.named_blocks(apply(_Solve, record, *parameters.values()))


def find_learned(parameters: Blocks) -> frozenset[str]:
    """Names of the parameters with respect to which a derivative may be asked for, in reverse or in forward mode."""
    is_recording = torch.is_grad_enabled()
    return frozenset(name for name, t in parameters.items() if (is_recording and t.requires_grad) or _has_tangent(t))


def _has_tangent(tensor: Tensor) -> bool:
    try:
        return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]
    except RuntimeError:  # a tensor of vmap inside jvp, of which torch does not tell
        return True


@signed
def solved(record: Recorded, *parameters: Tensor) -> Tensors:
    """Ask for the solution; what came of it is noted on the record.

    Args:
        record: Of this solve.
        parameters: In the order of `record.names`.

    Returns:
        The blocks of the solution, in the order of `record.blocks`.

    Raises:
        ProblemError: a parameter does not fit the others, or holds what is not finite.
        SolveError: a problem has no solution, under `raise`.
    """
    given = dict(zip(record.names, parameters, strict=True))
    client = record.client
    if record.start is None and record.gradients == "adjoint" and client.solves_here(given, record.options):
        form = parse(record.kind, given, trusted=record.names)
        here = client.solve_here(form, record.options, record.call)
        return _concluded(record, parameters, form, here.solution, here.statuses, here)
    form = parse(record.kind, given, trusted=client.registry.trusted(given))
    start = None if record.start is None else record.start.at(form)
    if start is not None and start.state is not None:
        record.call = replace(record.call, affinity=start.affinity)
    units = cotangents_ahead(form, record.options) if record.fetches_ahead else None
    steps = operations.solve(
        form,
        options=record.options,
        call=record.call,
        upstream=units,
        gradients=record.gradients,
        learned=record.learned,
        keep_state=record.keep_state and units is None,
        warm_start=start,
        check=False,
        fits=True,
    )
    result = client.run(steps)
    record.ahead = None if units is None else ahead_of(result)
    if result.state is not None:
        record.state = State(record.client, result.state)
    if record.start is not None:
        record.start.keep(form, result, record.state)
    return _concluded(record, parameters, form, result.solution, result.statuses, None)


def _concluded(
    record: Recorded,
    parameters: Sequence[Tensor],
    form: Form,
    blocks: Blocks,
    statuses: Sequence[Status],
    here: SolvedHere | None,
) -> Tensors:
    """Note what came of a solve, and what stands for the solutions of problems that have none."""
    record.failed, record.batched = failed_indices(statuses), form.batched
    record.here = here if record.keep_state else None
    if record.failed and record.on_failure == "raise":
        raise SolveError(statuses, record.failed)
    if record.failed:
        blocks = after_failure(record, parameters, blocks)
    if here is None or record.failed:
        return owned(blocks, record.blocks)
    return tuple(_alias(blocks[name]) for name in record.blocks)


def _alias(block: Tensor) -> Tensor:
    """A block of what was solved here, without a copy where it has all of its memory for itself.

    Autograd sees to it that nobody differentiates what was changed. Another tensor it must be: what comes out of a
    Function holds the Function, and that the outcome with its blocks.
    """
    is_whole = block.numel() > 0 and block.untyped_storage().nbytes() == block.nbytes and block.is_contiguous()
    return block.new_empty(0).set_(block) if is_whole else block.clone()  # type: ignore[call-overload]


class _Solve(torch.autograd.Function):
    """Blocks of the solution of a problem."""

    forward = staticmethod(solved)

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
        pulling = without_empty(cotangents)
        if all(cotangent is None for cotangent in pulling):
            return (None,) * (1 + len(needed))
        wrt = tuple(name for name, is_needed in zip(record.names, needed, strict=True) if is_needed)
        operands = (*ctx.saved_tensors, *pulling)
        # Where a graph is built a further derivative may come, and needs the adjoint.
        if record.gradients == "full" and not torch.is_grad_enabled():
            named = dict(zip(wrt, apply(Gradients, record, wrt, *operands), strict=True))
        else:
            named = formed(record, wrt, *operands)
        return None, *(named.get(name) for name in record.names)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensors:
        return apply(Tangents, ctx.record, *ctx.saved_tensors, *tangents)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, record: Recorded, *parameters: Tensor) -> tuple[Tensors, int]:
        fold, merged = merge(info.batch_size, record, parameters, in_dims[1:])
        blocks = apply(_Solve, record, *merged)
        return tuple(fold.split(block) for block in blocks), 0
