"""The outcome of one caller's problems, wherever and in however many pieces they were solved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from argrad.problems import QP, Adjoint, Solution
from argrad.problems.qp import DIMENSIONS
from argrad_service.batching.frames import Frame, Sizes
from argrad_service.engine.options import ShouldStop
from argrad_service.engine.outcome import Backward, Forward, Outcome, Tangents

NUMBERS = ("iterations", "primal_residual", "dual_residual", "gap", "objective")

D = TypeVar("D", Backward, Tangents)
P = TypeVar("P", Solution, Adjoint)


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """Some problems of one caller, as the engine solved them.

    Args:
        outcome: Of these alone.
        frame: Their padding.
        count: How many they are.
    """

    outcome: Outcome
    frame: Frame
    count: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Assembled(Outcome):
    """Outcome of a caller's problems; `problem` is what the caller stated.

    Args:
        pieces: Where they can be differentiated, in the order of the batch; empty if nobody will ask.
    """

    pieces: tuple[Piece, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes that keeping this outcome costs."""
        own = sum(t.untyped_storage().nbytes() for t in self.problem.parameters().values())
        return own + sum(piece.outcome.nbytes for piece in self.pieces)

    def stopped_by(self, should_stop: ShouldStop) -> Self:
        """See `Outcome`."""
        pieces = tuple(replace(p, outcome=p.outcome.stopped_by(should_stop)) for p in self.pieces)
        return replace(super().stopped_by(should_stop), pieces=pieces)

    def vjp(
        self, differentiate: Callable[[Outcome, Mapping[str, Tensor]], Backward], upstream: Mapping[str, Tensor]
    ) -> Backward:
        """Differentiate each piece, by cotangents `(…, B, ·)` of all."""
        parts, start = [], 0
        for piece in self.pieces:
            given = {name: t[..., start : start + piece.count, :] for name, t in upstream.items()}
            part = differentiate(piece.outcome, piece.frame.pad_blocks(given))
            parts.append(replace(part, adjoint=piece.frame.trim(part.adjoint)))
            start += piece.count
        if len(parts) == 1:
            return parts[0]
        return replace(parts[0], adjoint=_stacked([part.adjoint for part in parts]), **_said(parts))

    def jvp(
        self, differentiate: Callable[[Outcome, Mapping[str, Tensor]], Tangents], tangents: Mapping[str, Tensor]
    ) -> Tangents:
        """Differentiate each piece, by tangents of parameters, `(B, …)`, or without B where those have none."""
        parts, start = [], 0
        for piece in self.pieces:
            given = {}
            for name, tangent in tangents.items():
                is_batched = tangent.ndim > len(DIMENSIONS[name])
                own = tangent[start : start + piece.count] if is_batched else tangent
                if piece.outcome.problem.is_batched(name) and not is_batched:
                    own = own.expand(piece.count, *own.shape)
                given[name] = own
            part = differentiate(piece.outcome, piece.frame.pad_tangents(given))
            parts.append(replace(part, solution=piece.frame.trim(part.solution)))
            start += piece.count
        if len(parts) == 1:
            return parts[0]
        return replace(parts[0], solution=_stacked([part.solution for part in parts]), **_said(parts))


def _said(parts: Sequence[D]) -> dict[str, Any]:
    """What the derivatives of several pieces say of their problems, in the order of the batch."""
    return {
        "gradient_status": tuple(status for part in parts for status in part.gradient_status),
        "flags": tuple(flags for part in parts for flags in part.flags),
        "measures": {name: torch.cat([part.measures[name] for part in parts]) for name in parts[0].measures},
    }


def _stacked(points: Sequence[P]) -> P:
    """Blocks `(…, b, ·)` of several pieces as those of their batch."""
    blocks = {name: torch.cat([point.blocks()[name] for point in points], dim=-2) for name in points[0].blocks()}
    return type(points[0])(**blocks)


def of_batch(
    merged: Outcome, counts: Sequence[int], frames: Sequence[Frame], problems: Sequence[QP], is_kept: Sequence[bool]
) -> list[Assembled]:
    """Each caller's part of a merged batch.

    Args:
        merged: Of the batch.
        counts: Problems of each caller.
        frames: Their padding.
        problems: As the callers stated them.
        is_kept: Of whom a derivative may be asked for later; a part that is kept holds nothing of the others.

    Raises:
        TypeError: a part is to be kept of an outcome that cannot be divided.
    """
    points = _divided(merged.solution.blocks(), counts)
    numbers = _divided({name: getattr(merged, name) for name in NUMBERS}, counts)
    measures = _divided(merged.measures, counts)
    parts, start = [], 0
    for i, (count, frame) in enumerate(zip(counts, frames, strict=True)):
        stop = start + count
        solution = Solution(**points[i])
        pieces: tuple[Piece, ...] = ()
        if is_kept[i]:
            if not isinstance(merged, Forward):
                raise TypeError(f"an outcome of type {type(merged).__name__} cannot be divided")
            piece = merged.cut(start, stop, problems[i] if _is_as_solved(problems[i], frame, merged.problem) else None)
            solution, pieces = piece.solution, (Piece(outcome=piece, frame=frame, count=count),)
        part = Assembled(
            problem=problems[i],
            solution=frame.trim(solution),
            status=merged.status[start:stop],
            flags=merged.flags[start:stop],
            solver=merged.solver,
            options=merged.options,
            measures=measures[i],
            pieces=pieces,
            **numbers[i],
        )
        parts.append(part)
        start = stop
    return parts


def _is_as_solved(problem: QP, frame: Frame, whole: QP) -> bool:
    """Whether a caller's tensors are what was solved: not padded, in the engine's dtype and on its device."""
    return frame.is_tight and (problem.dtype, problem.device) == (whole.dtype, whole.device)


def of_whole(backward: Backward, counts: Sequence[int], frames: Sequence[Frame]) -> list[Backward]:
    """Each caller's part of the derivative of a merged batch."""
    points, measures = _divided(backward.adjoint.blocks(), counts, -2), _divided(backward.measures, counts)
    parts, start = [], 0
    for i, (count, frame) in enumerate(zip(counts, frames, strict=True)):
        stop = start + count
        part = Backward(
            adjoint=frame.trim(Adjoint(**points[i])),
            gradient_status=backward.gradient_status[start:stop],
            flags=backward.flags[start:stop],
            method=backward.method,
            measures=measures[i],
            method_options=backward.method_options,
        )
        parts.append(part)
        start = stop
    return parts


def _divided(tensors: Mapping[str, Tensor], counts: Sequence[int], axis: int = 0) -> list[dict[str, Tensor]]:
    """Views of each caller's part of tensors of the batch: one visit to torch a tensor, however many callers."""
    parts: list[dict[str, Tensor]] = [{} for _ in counts]
    for name, tensor in tensors.items():
        for part, own in zip(parts, tensor.split_with_sizes(list(counts), axis), strict=True):
            part[name] = own
    return parts


def of_slices(outcomes: Sequence[Outcome], problem: QP) -> Assembled:
    """The outcome of a batch that was solved slice by slice."""
    first, sizes = outcomes[0], Sizes.of(problem)
    blocks = {name: torch.cat([o.solution.blocks()[name] for o in outcomes]) for name in first.solution.blocks()}
    tight = Frame(sizes, sizes)
    return Assembled(
        problem=problem,
        solution=Solution(**blocks),
        status=tuple(status for o in outcomes for status in o.status),
        flags=tuple(flags for o in outcomes for flags in o.flags),
        solver=first.solver,
        options=first.options,
        measures={name: torch.cat([o.measures[name] for o in outcomes]) for name in first.measures},
        pieces=tuple(Piece(outcome=o, frame=tight, count=len(o.status)) for o in outcomes),
        **{name: torch.cat([getattr(o, name) for o in outcomes]) for name in NUMBERS},
    )
