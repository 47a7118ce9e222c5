"""A solve as a differentiable operation of PyTorch.

Four `torch.autograd.Function`s work on a `Recorded` solve:

    _Solve      parameters                          → blocks of the solution
    _Adjoint    parameters, solution, cotangents    → the adjoint, from which plain torch forms the gradients
    _Gradients  the same                            → the gradients, formed by the service (gradients="full")
    _Tangents   parameters, solution, tangents      → tangents of the solution

Derivatives of the last three raise, for the service has first derivatives only. Each takes problem and solution from
autograd's saved tensors: so a lost forward state costs time only, and an edit in place raises on every path. Each has
a vmap rule: copies of a problem join its batch, copies of a cotangent become the k cotangents of one call.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from argrad import operations
from argrad.client import Client
from argrad.errors import GradientError, SolveError
from argrad.folding import Dim, Fold, own_batch, stacked
from argrad.options import OnFailure, Options
from argrad.problems import check_finite, parse
from argrad.problems.form import Blocks
from argrad.problems.formed import form_gradients
from argrad.recorded import Kind, Recorded, State, after_failure, check_cotangents, fill_rows
from argrad.results import check_gradients
from argrad.wire.messages import Gradients

Tensors = tuple[Tensor, ...]
Dims = Sequence[Dim]


def differentiable_solve(
    client: Client,
    kind: Kind,
    parameters: Blocks,
    *,
    options: Options,
    gradients: Gradients,
    on_failure: OnFailure,
    timeout_s: float | None,
    request_id: str | None,
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

    Returns:
        The blocks of the solution by name, differentiable.
    """
    record = Recorded(
        client=client,
        kind=kind,
        names=tuple(parameters),
        options=options,
        gradients=gradients,
        on_failure=on_failure,
        call=operations.call_within(client.timeout_s, timeout_s, request_id or secrets.token_hex(8)),
        keep_state=_is_tracked(parameters.values()),
    )
    return record.named_blocks(_apply(_Solve, record, *parameters.values()))


def _apply(function: type[torch.autograd.Function], *operands: Any) -> Tensors:
    return cast("Tensors", function.apply(*operands))  # type: ignore[no-untyped-call]


def _is_tracked(tensors: Iterable[Tensor]) -> bool:
    """Whether a derivative may be asked for, in reverse or in forward mode."""
    return any((torch.is_grad_enabled() and tensor.requires_grad) or _has_tangent(tensor) for tensor in tensors)


def _has_tangent(tensor: Tensor) -> bool:
    try:
        return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]
    except RuntimeError:  # a tensor of vmap inside jvp, of which torch does not tell
        return True


class _Solve(torch.autograd.Function):
    """Blocks of the solution of a problem."""

    @staticmethod
    def forward(record: Recorded, *parameters: Tensor) -> Tensors:
        form = parse(record.kind, dict(zip(record.names, parameters, strict=True)))
        steps = operations.solve(
            form, options=record.options, call=record.call, keep_state=record.keep_state, check=False
        )
        result = record.client.run(steps)
        record.failed, record.batched = result.failed, form.batched
        if result.state is not None:
            record.state = State(record.client, result.state)
        if result.failed and record.on_failure == "raise":
            raise SolveError(result.statuses, result.failed)
        blocks = result.solution
        if result.failed:
            blocks = after_failure(record, parameters, blocks)
        return _owned(blocks, record.blocks)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.record, *parameters = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*parameters, *output)
        ctx.save_for_forward(*parameters, *output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        record: Recorded = ctx.record
        operands = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        cotangents = tuple(tensor if tensor is not None and tensor.numel() else None for tensor in cotangents)
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * (1 + len(needed))
        wrt = tuple(name for name, is_needed in zip(record.names, needed, strict=True) if is_needed)
        if record.gradients == "full":
            formed = dict(zip(wrt, _apply(_Gradients, record, wrt, *operands, *cotangents), strict=True))
        else:
            formed = _formed(record, wrt, *operands, *cotangents)
        return None, *(formed.get(name) for name in record.names)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensors:
        return _apply(_Tangents, ctx.record, *ctx.saved_tensors, *tangents)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, record: Recorded, *parameters: Tensor) -> tuple[Tensors, int]:
        fold, merged = _merge(info.batch_size, record, parameters, in_dims[1:])
        blocks = _apply(_Solve, record, *merged)
        return tuple(fold.split(block) for block in blocks), 0


class _Derivative(torch.autograd.Function):
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


class _Adjoint(_Derivative):
    """The adjoint of a solution, from cotangents of its blocks, some of which may be None."""

    @staticmethod
    def forward(record: Recorded, *operands: Any) -> Tensors:
        parameters, solution, given = record.unpack(operands, len(record.blocks))
        blocks = record.named_blocks(solution)
        cotangents = {name: tensor for name, tensor in record.named_blocks(given).items() if tensor is not None}
        mask = check_cotangents(record, cotangents, record.unusable(parameters))
        steps = operations.vjp(
            record.place(parameters, fill_rows(blocks, mask, 0.0)),
            fill_rows(cotangents, mask, 0.0),
            options=record.options,
            call=record.call,
            gradients="adjoint",
            failed_gradients=record.failed_gradients,
        )
        result = record.client.run(steps)
        if record.on_failure == "raise":
            check_gradients(result.gradient_statuses)
        adjoint = fill_rows(result.adjoint or {}, mask, record.filler)
        return _owned(adjoint, record.adjoint_blocks)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, record: Recorded, *operands: Any) -> tuple[Tensors, int]:
        size = info.batch_size
        parameters, solution, cotangents = record.unpack(operands, len(record.blocks))
        dims, solution_dims, cotangent_dims = record.unpack(in_dims[1:], len(record.blocks))
        given = list(zip(cotangents, cotangent_dims, strict=True))
        if all(dim is None for dim in (*dims, *solution_dims)):
            return _stack_cotangents(size, record, [*parameters, *solution], given)
        fold, merged = _merge(size, record, parameters, dims)
        blocks = [fold.block(block, dim) for block, dim in zip(solution, solution_dims, strict=True)]
        pulled = [None if tensor is None else fold.cotangent(tensor, dim) for tensor, dim in given]
        adjoint = _apply(_Adjoint, record, *merged, *blocks, *pulled)
        return tuple(fold.split(block) for block in adjoint), 0


class _Gradients(_Derivative):
    """Gradients of the parameters named in `wrt`, formed by the service."""

    @staticmethod
    def forward(record: Recorded, wrt: tuple[str, ...], *operands: Any) -> Tensors:
        parameters, solution, given = record.unpack(operands, len(record.blocks))
        cotangents = {name: tensor for name, tensor in record.named_blocks(given).items() if tensor is not None}
        if check_cotangents(record, cotangents, record.unusable(parameters)) is not None:
            # The service cannot know which rows of a sum are to be left out.
            return tuple(_formed(record, wrt, *operands).values())
        steps = operations.vjp(
            record.place(parameters, record.named_blocks(solution)),
            cotangents,
            options=record.options,
            call=record.call,
            wrt=wrt,
            failed_gradients=record.failed_gradients,
        )
        result = record.client.run(steps)
        if record.on_failure == "raise":
            check_gradients(result.gradient_statuses)
        return _owned(result.gradients or {}, wrt)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, record: Recorded, wrt: tuple[str, ...], *operands: Any) -> tuple[Tensors, int]:
        """The gradient of a parameter that the copies share is one a copy: those are formed from the adjoint."""

        def formed(*inner: Any) -> Tensors:
            return tuple(_formed(record, wrt, *inner).values())

        return torch.vmap(formed, in_dims=tuple(in_dims[2:]), randomness=info.randomness)(*operands), 0


class _Tangents(_Derivative):
    """Tangents of the blocks of a solution, from tangents of the parameters, some of which may be None."""

    @staticmethod
    def forward(record: Recorded, *operands: Any) -> Tensors:
        parameters, solution, given = record.unpack(operands, len(record.names))
        pairs = zip(record.names, given, strict=True)
        tangents = {name: tensor for name, tensor in pairs if tensor is not None}
        for name, tensor in tangents.items():
            check_finite(f"tangents.{name}", tensor)
        mask = record.unusable(parameters)
        steps = operations.jvp(
            record.place(parameters, fill_rows(record.named_blocks(solution), mask, 0.0)),
            tangents,
            options=record.options,
            call=record.call,
            failed_gradients=record.failed_gradients,
        )
        result = record.client.run(steps)
        if record.on_failure == "raise":
            check_gradients(result.gradient_statuses)
        moved = fill_rows(result.tangents, mask, record.filler)
        return _owned(moved, record.blocks)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, record: Recorded, *operands: Any) -> tuple[Tensors, int]:
        size = info.batch_size
        parameters, solution, tangents = record.unpack(operands, len(record.names))
        dims, solution_dims, tangent_dims = record.unpack(in_dims[1:], len(record.names))
        if all(dim is None for dim in (*dims, *solution_dims)):
            # One call a direction: each reuses the factor of the state, which a batch of copies would form anew.
            directions = [
                [t if dim is None else t.select(dim, i) for t, dim in zip(tangents, tangent_dims, strict=True)]
                for i in range(size)
            ]
            each = [_apply(_Tangents, record, *parameters, *solution, *one) for one in directions]
            return tuple(torch.stack(blocks) for blocks in zip(*each, strict=True)), 0
        fold = Fold(size=size, batch=own_batch(parameters, dims, record.ranks))
        merged, moved = [], []
        for tensor, dim, tangent, tangent_dim, rank in zip(
            parameters, dims, tangents, tangent_dims, record.ranks, strict=True
        ):
            # A tangent has the shape of its parameter: if either differs between copies, both are expanded.
            is_shared = tangent_dim is None and dim is None and tensor.ndim == rank
            merged.append(tensor if is_shared else fold.expanded_parameter(tensor, dim, rank))
            if tangent is not None and not is_shared:
                tangent = fold.expanded_parameter(tangent, tangent_dim, rank)
            moved.append(tangent)
        blocks = [fold.block(block, dim) for block, dim in zip(solution, solution_dims, strict=True)]
        out = _apply(_Tangents, record, *merged, *blocks, *moved)
        return tuple(fold.split(block) for block in out), 0


def _formed(record: Recorded, wrt: tuple[str, ...], *operands: Any) -> Blocks:
    """Gradients of the parameters named in `wrt`, from the adjoint, by operations that torch sees through."""
    parameters, solution, _ = record.unpack(operands, len(record.blocks))
    adjoint = _apply(_Adjoint, record, *operands)
    return form_gradients(
        record.kind,
        record.named_blocks(solution),
        dict(zip(record.adjoint_blocks, adjoint, strict=True)),
        wrt=wrt,
        batched=record.find_batched(parameters),
    )


def _merge(size: int, record: Recorded, parameters: Sequence[Tensor], dims: Dims) -> tuple[Fold, list[Tensor]]:
    """V copies of a problem as one batch."""
    fold = Fold(size=size, batch=own_batch(parameters, dims, record.ranks))
    zipped = zip(parameters, dims, record.ranks, strict=True)
    return fold, [fold.parameter(tensor, dim, rank) for tensor, dim, rank in zipped]


def _stack_cotangents(
    size: int, record: Recorded, point: Sequence[Tensor], given: Sequence[tuple[Tensor | None, Dim]]
) -> tuple[Tensors, int]:
    """V copies of the cotangents of one problem as the k cotangents of one call."""
    block_rank = point[-1].ndim
    is_stacked = [t is not None and t.ndim - (dim is not None) > block_rank for t, dim in given]
    pairs = zip(given, is_stacked, strict=True)
    stacks = [None if t is None else stacked(t, dim, size, has_k=has_k) for (t, dim), has_k in pairs]
    adjoint = _apply(_Adjoint, record, *point, *stacks)
    if any(is_stacked):
        return tuple(block.reshape(size, -1, *block.shape[1:]) for block in adjoint), 0
    return adjoint, 0


def _owned(tensors: Blocks, names: Sequence[str]) -> Tensors:
    """Tensors with memory of their own: autograd forbids some uses of views, and a view keeps the whole reply."""
    return tuple(tensors[name].clone() for name in names)


def _refuse_second_derivative() -> NoReturn:
    raise GradientError(
        "a second derivative was asked for: argrad has first derivatives of solutions only. "
        "Without create_graph=True (or with one torch.func transform instead of two) there is none"
    )
