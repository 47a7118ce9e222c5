"""The backward of a solve as a differentiable operation.

    Adjoint      parameters, solution, cotangents    → the adjoint, from which plain torch forms the gradients
    Gradients    the same                            → the gradients, formed by the service (gradients="full")

The derivative of `Adjoint` is an adjoint again. On the strongly active rows a, with
C = [A; G_a] and g the cotangents, the adjoint δ = [d_z; d_y] solves

    K δ = −ĝ,    K = [Q Cᵀ; C 0],    ĝ = [g_z − Gᵀg_s; g_ν; g_λ,a],    μ = μ_a − g_s.

For a cotangent c of δ let w solve K w = −ĉ: the adjoint of c, at the same point and by the same factor. As K is
symmetric,

    ∂g = w (∂g_s = −G w_z − c_μ),   ∂Q = ½(w_z d_zᵀ + d_z w_zᵀ),   ∂A = w_ν d_zᵀ + d_ν w_zᵀ,   ∂G = w_μ d_zᵀ + μ w_zᵀ:

the gradients of `problems.gradients` with δ in the place of the solution; q, b, h and the solution do not enter K. In
forward mode δ̇ is the adjoint of ĝ˙ + K̇δ. All else that a second derivative needs is in the outer products that form the
gradients from δ and the solution, which torch differentiates. Nothing ends at the second order: the derivative of an
adjoint is an adjoint once more.

It holds where the method is implicit and exact; other methods, whose adjoint is not K⁻¹, are refused.

Each Function takes problem and solution from autograd's saved tensors: a lost forward state costs time only, and an
edit in place raises on every path. Each has a vmap rule: copies of a problem join its batch, copies of a cotangent
become the k cotangents of one call.

Reference: the formulas follow from Amos & Kolter, OptNet, ICML 2017, eqs. (6)–(8), differentiated once more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from argrad import operations
from argrad.errors import GradientError
from argrad.folding import Dim, Fold, own_batch, stacked
from argrad.problems.form import Blocks
from argrad.problems.formed import form_gradients
from argrad.problems.residuals import matrices_of, residual_tangents, times
from argrad.recorded import Recorded, check_cotangents, fill_rows
from argrad.results import check_gradients

Tensors = tuple[Tensor, ...]
Dims = Sequence[Dim]
F = TypeVar("F", bound=Callable[..., Any])

EXACT_METHODS = ("kkt", "bpqp")
"""Methods whose adjoint is that of the KKT conditions, so that its derivative is known."""

_FIRST_ONLY = (
    "a second derivative was asked for: argrad has only first derivatives of {}. "
    "Without create_graph=True (or with one torch.func transform instead of two) there is none"
)


def apply(function: type[torch.autograd.Function], *operands: Any) -> Tensors:
    """Call a Function that returns a tuple."""
    return cast("Tensors", function.apply(*operands))  # type: ignore[no-untyped-call]


def signed(function: F) -> F:
    """A function with its signature, for which torch asks at every call of a Function: finding it takes long."""
    function.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return function


class Adjoint(torch.autograd.Function):
    """The adjoint of a solution, from cotangents of its blocks, some of which may be None."""

    @staticmethod
    @signed
    def forward(record: Recorded, *operands: Any) -> Tensors:
        """Ask for the adjoint."""
        parameters, solution, given = record.unpack(operands, len(record.blocks))
        blocks = record.named_blocks(solution)
        cotangents = {name: tensor for name, tensor in record.named_blocks(given).items() if tensor is not None}
        mask = check_cotangents(record, cotangents, record.unusable(parameters))
        if mask is None and record.ahead is not None and (known := record.ahead.adjoint(cotangents)) is not None:
            record.method = record.ahead.method
            return owned(known, record.adjoint_blocks)
        pulled, here = fill_rows(cotangents, mask, 0.0), record.here_for(parameters)
        if here is not None:
            derived = here.adjoint(pulled, failed=record.failed_gradients, timeout_s=record.call.timeout_s)
            adjoint, statuses, record.method = derived.blocks, derived.statuses, derived.method
        else:
            steps = operations.vjp(
                record.place(parameters, fill_rows(blocks, mask, 0.0)),
                pulled,
                options=record.options,
                call=record.call,
                gradients="adjoint",
                failed_gradients=record.failed_gradients,
            )
            result = record.client.run(steps)
            adjoint, statuses, record.method = result.adjoint or {}, result.gradient_statuses, result.report.method
        if record.on_failure == "raise":
            check_gradients(statuses)
        return owned(fill_rows(adjoint, mask, record.filler), record.adjoint_blocks)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        """Save what the next derivative needs."""
        ctx.record, *operands = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, *output)
        ctx.save_for_forward(*operands, *output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """The adjoint w of the cotangents of δ, and outer products of w and δ."""
        record: Recorded = ctx.record
        sizes = len(record.blocks), len(record.adjoint_blocks)
        parameters, solution, given, adjoint = record.unpack(ctx.saved_tensors, *sizes)
        pulling = record.along_blocks(without_empty(cotangents))
        if all(cotangent is None for cotangent in pulling):
            return (None,) * len(ctx.needs_input_grad)
        check_second_order(record)
        w = apply(Adjoint, record, *parameters, *solution, *pulling)
        needed, _solution, needed_cotangents = record.unpack(ctx.needs_input_grad[1:], len(record.blocks))
        of_cotangents = record.along_blocks(w)
        if "s" in record.blocks and given[record.blocks.index("s")] is not None:
            of_slack = sum_of(times(parameters[record.names.index("G")], w[0]), pulling[record.blocks.index("lam")])
            of_cotangents[record.blocks.index("s")] = None if of_slack is None else -of_slack
        wanted = zip(of_cotangents, given, needed_cotangents, strict=True)
        return (
            None,
            *of_matrices(record, parameters, needed, adjoint, w),
            *(None for _ in solution),
            *(part if tensor is not None and is_needed else None for part, tensor, is_needed in wanted),
        )

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensors:
        """The adjoint of ĝ˙ + K̇δ."""
        record: Recorded = ctx.record
        sizes = len(record.blocks), len(record.adjoint_blocks)
        parameters, solution, _cotangents, adjoint = record.unpack(ctx.saved_tensors, *sizes)
        check_second_order(record)
        moved, _solution, moved_cotangents = record.unpack(tangents, len(record.blocks))
        moving = matrix_moves(record, moved, adjoint)
        pulling = [sum_of(*pair) for pair in zip(moved_cotangents, record.in_blocks(moving), strict=True)]
        if all(cotangent is None for cotangent in pulling):
            return tuple(torch.zeros_like(block) for block in adjoint)
        return apply(Adjoint, record, *parameters, *solution, *pulling)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, record: Recorded, *operands: Any) -> tuple[Tensors, int]:
        """Copies of a problem join its batch; copies of cotangents only become the k cotangents of one call."""
        size = info.batch_size
        parameters, solution, cotangents = record.unpack(operands, len(record.blocks))
        dims, solution_dims, cotangent_dims = record.unpack(in_dims[1:], len(record.blocks))
        given = list(zip(cotangents, cotangent_dims, strict=True))
        if all(dim is None for dim in (*dims, *solution_dims)):
            return _stack_cotangents(size, record, [*parameters, *solution], given)
        fold, merged = merge(size, record, parameters, dims)
        blocks = [fold.block(block, dim) for block, dim in zip(solution, solution_dims, strict=True)]
        pulled = [None if tensor is None else fold.cotangent(tensor, dim) for tensor, dim in given]
        adjoint = apply(Adjoint, record, *merged, *blocks, *pulled)
        return tuple(fold.split(block) for block in adjoint), 0


class Gradients(torch.autograd.Function):
    """Gradients of the parameters named in `wrt`, formed by the service; `formed` is taken where a graph is built."""

    @staticmethod
    @signed
    def forward(record: Recorded, wrt: tuple[str, ...], *operands: Any) -> Tensors:
        """Ask for the gradients."""
        parameters, solution, given = record.unpack(operands, len(record.blocks))
        cotangents = {name: tensor for name, tensor in record.named_blocks(given).items() if tensor is not None}
        if check_cotangents(record, cotangents, record.unusable(parameters)) is not None:
            # The service cannot know which rows of a sum are to be left out.
            return tuple(formed(record, wrt, *operands).values())
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
        return owned(result.gradients or {}, wrt)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        """Nothing is differentiated."""

    @staticmethod
    def vmap(info: Any, in_dims: Dims, record: Recorded, wrt: tuple[str, ...], *operands: Any) -> tuple[Tensors, int]:
        """The gradient of a parameter that the copies share is one a copy: those are formed from the adjoint."""

        def each(*inner: Any) -> Tensors:
            return tuple(formed(record, wrt, *inner).values())

        return torch.vmap(each, in_dims=tuple(in_dims[2:]), randomness=info.randomness)(*operands), 0


def formed(record: Recorded, wrt: tuple[str, ...], *operands: Any) -> Blocks:
    """Gradients of the parameters named in `wrt`, from the adjoint, by operations that torch sees through."""
    parameters, solution, given = record.unpack(operands, len(record.blocks))
    if record.here is not None and not torch.is_grad_enabled():
        known = _formed_here(record, wrt, parameters, given)
        if known is not None:
            return known
    is_wanted = [name in wrt for name in record.names]
    # Where no graph is built there is nothing for a Function to note, which would take longer than a small adjoint.
    adjoint = apply(Adjoint, record, *operands) if torch.is_grad_enabled() else Adjoint.forward(record, *operands)
    return form(record, parameters, is_wanted, record.named_blocks(solution), adjoint)


def _formed_here(
    record: Recorded, wrt: tuple[str, ...], parameters: Sequence[Tensor], given: Sequence[Tensor | None]
) -> Blocks | None:
    """Gradients without an adjoint, where this process knows a way, for a loss of z alone."""
    g_z, *others = given
    here = record.here_for(parameters)
    if here is None or record.failed or g_z is None or any(cotangent is not None for cotangent in others):
        return None
    return here.gradients(g_z, wrt)


def merge(size: int, record: Recorded, parameters: Sequence[Tensor], dims: Dims) -> tuple[Fold, list[Tensor]]:
    """V copies of a problem as one batch."""
    fold = Fold(size=size, batch=own_batch(parameters, dims, record.ranks))
    zipped = zip(parameters, dims, record.ranks, strict=True)
    return fold, [fold.parameter(tensor, dim, rank) for tensor, dim, rank in zipped]


def owned(tensors: Blocks, names: Sequence[str]) -> Tensors:
    """Tensors with memory of their own: autograd forbids some uses of views, and a view keeps the whole reply."""
    return tuple(tensors[name].clone() for name in names)


def without_empty(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Tensors, those without elements as None."""
    return [tensor if tensor is not None and tensor.numel() else None for tensor in tensors]


def check_second_order(record: Recorded) -> None:
    """Refuse what has no second derivative here.

    Raises:
        GradientError: names what it was.
    """
    if "entropy" in record.names:
        raise GradientError(_FIRST_ONLY.format("problems with entropy"))
    if record.method not in EXACT_METHODS:
        raise GradientError(_FIRST_ONLY.format(f"the method {record.method!r}"))


def form(
    record: Recorded, parameters: Sequence[Tensor], wanted: Sequence[bool], at: Blocks, adjoint: Sequence[Tensor]
) -> Blocks:
    """Gradients of the wanted parameters from an adjoint at a point."""
    return form_gradients(
        record.kind,
        at,
        dict(zip(record.adjoint_blocks, adjoint, strict=True)),
        wrt=tuple(name for name, is_wanted in zip(record.names, wanted, strict=True) if is_wanted),
        batched=record.find_batched(parameters),
    )


def of_matrices(
    record: Recorded,
    parameters: Sequence[Tensor],
    needed: Sequence[bool],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of ⟨right, K left⟩ for each parameter, summed over k; both have one block for each of an adjoint."""
    matrices = matrices_of(record.kind)
    wanted = [is_needed and name in matrices for name, is_needed in zip(record.names, needed, strict=True)]
    gradients = form(record, parameters, wanted, as_point(record, left), right)
    has_k = left[0].ndim > (2 if record.find_batched(parameters) else 1)
    summed = {name: gradient.sum(dim=0) if has_k else gradient for name, gradient in gradients.items()}
    return [summed.get(name) for name in record.names]


def matrix_moves(record: Recorded, tangents: Sequence[Tensor | None], at: Sequence[Tensor]) -> Blocks:
    """K̇ times a point that has one block for each of an adjoint, for tangents of the parameters."""
    matrices = matrices_of(record.kind)
    moving = {name: tensor for name, tensor in zip(record.names, tangents, strict=True) if name in matrices}
    return residual_tangents(record.kind, moving, as_point(record, at))


def as_point(record: Recorded, adjoint: Sequence[Tensor]) -> Blocks:
    """Blocks of an adjoint by the names of a solution's; its slack is never looked at."""
    named: Blocks = dict(zip(record.paired_blocks, adjoint, strict=True))
    return named | {"s": named["lam"]} if "s" in record.blocks else named


def sum_of(*parts: Tensor | None) -> Tensor | None:
    """The sum of those that are given; None of none."""
    given = [part for part in parts if part is not None]
    return sum(given[1:], start=given[0]) if given else None


def _stack_cotangents(
    size: int, record: Recorded, point: Sequence[Tensor], given: Sequence[tuple[Tensor | None, Dim]]
) -> tuple[Tensors, int]:
    """V copies of the cotangents of one problem as the k cotangents of one call."""
    block_rank = point[-1].ndim
    is_stacked = [t is not None and t.ndim - (dim is not None) > block_rank for t, dim in given]
    pairs = zip(given, is_stacked, strict=True)
    stacks = [None if t is None else stacked(t, dim, size, has_k=has_k) for (t, dim), has_k in pairs]
    adjoint = apply(Adjoint, record, *point, *stacks)
    if any(is_stacked):
        return tuple(block.reshape(size, -1, *block.shape[1:]) for block in adjoint), 0
    return adjoint, 0
