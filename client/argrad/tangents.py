"""The jvp of a solve as a differentiable operation."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from argrad import operations
from argrad.derivatives import (
    Adjoint,
    Dims,
    Tensors,
    apply,
    check_second_order,
    form,
    matrix_moves,
    of_matrices,
    owned,
    signed,
    sum_of,
    without_empty,
)
from argrad.folding import Fold, own_batch
from argrad.problems import check_finite
from argrad.problems.residuals import residual_tangents, times
from argrad.recorded import Recorded, fill_rows
from argrad.results import check_gradients


class Tangents(torch.autograd.Function):
    """Tangents t of the blocks of a solution, from tangents of the parameters, some of which may be None.

        K t = −r,    r = [Q̇z + q̇ + Ċᵀy; Ċz − ḋ],    ṡ = ḣ − Ġz − Gż where the row is not active

    t is the adjoint of r, and for a cotangent c of t with its adjoint w the form c·t is w·r: hence both derivatives.
    """

    @staticmethod
    @signed
    def forward(record: Recorded, *operands: Any) -> Tensors:
        """Ask for the tangents."""
        parameters, solution, given = record.unpack(operands, len(record.names))
        pairs = zip(record.names, given, strict=True)
        tangents = {name: tensor for name, tensor in pairs if tensor is not None}
        for name, tensor in tangents.items():
            check_finite(f"tangents.{name}", tensor)
        mask = record.unusable(parameters)
        here = record.here_for(parameters)
        if here is not None:
            derived = here.tangents(tangents, failed=record.failed_gradients, timeout_s=record.call.timeout_s)
            moved, statuses, record.method = derived.blocks, derived.statuses, derived.method
        else:
            steps = operations.jvp(
                record.place(parameters, fill_rows(record.named_blocks(solution), mask, 0.0)),
                tangents,
                options=record.options,
                call=record.call,
                failed_gradients=record.failed_gradients,
            )
            result = record.client.run(steps)
            moved, statuses, record.method = result.tangents, result.gradient_statuses, result.report.method
        if record.on_failure == "raise":
            check_gradients(statuses)
        return owned(fill_rows(moved, mask, record.filler), record.blocks)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        """Save what the next derivative needs."""
        ctx.record, *operands = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, *output)
        ctx.save_for_forward(*operands, *output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of w·r: the gradients of a solve for ṗ, those of K for the parameters, and Ċw for the solution."""
        record: Recorded = ctx.record
        parameters, solution, given, pushed = record.unpack(ctx.saved_tensors, len(record.names), len(record.blocks))
        pulling = without_empty(cotangents)
        if all(cotangent is None for cotangent in pulling):
            return (None,) * len(ctx.needs_input_grad)
        check_second_order(record)
        w = apply(Adjoint, record, *parameters, *solution, *pulling)
        needed, _solution, needed_tangents = record.unpack(ctx.needs_input_grad[1:], len(record.names))
        of_given = form(record, parameters, needed_tangents, record.named_blocks(solution), w)
        return (
            None,
            *of_matrices(record, parameters, needed, record.off_slack(pushed), w),
            *record.in_blocks(matrix_moves(record, given, w)),
            *(of_given.get(name) for name in record.names),
        )

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensors:
        """The adjoint of ṙ + K̇t."""
        record: Recorded = ctx.record
        parameters, solution, given, pushed = record.unpack(ctx.saved_tensors, len(record.names), len(record.blocks))
        check_second_order(record)
        moved, moved_solution, moved_given = record.unpack(tangents, len(record.names))
        blocks = record.named_blocks(solution)
        further = [torch.zeros_like(b) if t is None else t for b, t in zip(solution, moved_solution, strict=True)]
        parts = (
            residual_tangents(record.kind, dict(zip(record.names, moved_given, strict=True)), blocks),
            matrix_moves(record, given, record.off_slack(further)),
            matrix_moves(record, moved, record.off_slack(pushed)),
        )
        pulling = [sum_of(*each) for each in zip(*(record.in_blocks(part) for part in parts), strict=True)]
        if all(cotangent is None for cotangent in pulling):
            return tuple(torch.zeros_like(block) for block in solution)
        moving = apply(Adjoint, record, *parameters, *solution, *pulling)
        out = record.along_blocks(moving)
        if "s" in record.blocks:
            G_dz = times(parameters[record.names.index("G")], moving[0]) if "G" in record.names else None
            away = sum_of(G_dz, pulling[record.blocks.index("lam")])
            room = torch.zeros_like(blocks["s"]) if away is None else -away
            out[record.blocks.index("s")] = torch.where(blocks["lam"] > 0, 0.0, room)
        return tuple(cast("Tensors", out))

    @staticmethod
    def vmap(info: Any, in_dims: Dims, record: Recorded, *operands: Any) -> tuple[Tensors, int]:
        """Copies of a problem join its batch."""
        size = info.batch_size
        parameters, solution, tangents = record.unpack(operands, len(record.names))
        dims, solution_dims, tangent_dims = record.unpack(in_dims[1:], len(record.names))
        if all(dim is None for dim in (*dims, *solution_dims)):
            # One call a direction: each reuses the factor of the state, which a batch of copies would form anew.
            directions = [
                [t if dim is None else t.select(dim, i) for t, dim in zip(tangents, tangent_dims, strict=True)]
                for i in range(size)
            ]
            each = [apply(Tangents, record, *parameters, *solution, *one) for one in directions]
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
        out = apply(Tangents, record, *merged, *blocks, *moved)
        return tuple(fold.split(block) for block in out), 0
