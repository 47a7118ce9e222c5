"""Problems of different sizes in one batch: padded by variables and rows that change nothing, and trimmed after.

With n, p, m of a problem and N, P, M of its frame, the padded problem is

    minimise ½zᵀQz + qᵀz + ½d‖w‖²   subject to   Az = b,  w₁ = 0,  Gz ≤ h,  0 ≤ +∞,      w = (w₁, w₂)

with N − n variables w, of which the first P − p have an equality of their own. Its solution is (z, 0), its multipliers
are (ν, 0) and (λ, 0), and so is every derivative, exactly: nothing couples z and w. d is the largest entry of Q's
diagonal, so that tests relative to it decide as without padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from argrad.problems import QP, Adjoint, Solution
from argrad.problems.qp import DIMENSIONS

Point = TypeVar("Point", Solution, Adjoint)

SMALLEST = 8
"""Up to this many, every size is a class of its own."""

SYMBOL = {"z": "n", "nu": "p", "lam": "m", "s": "m", "mu": "m"}
"""Size of each block of a solution or an adjoint."""


@dataclass(frozen=True)
class Sizes:
    """Variables, equalities and inequalities."""

    n: int
    p: int
    m: int

    @classmethod
    def of(cls, problem: QP) -> Sizes:
        """Of a problem."""
        return cls(problem.n, problem.p, problem.m)


def ceiling(size: int) -> int:
    """The end of a size's class: a quarter of an octave: …, 8, 10, 12, 14, 16, 20 and so on."""
    if size <= SMALLEST:
        return size
    step = 1 << ((size - 1).bit_length() - 3)
    return -(-size // step) * step


def frame_of(sizes: Sequence[Sizes]) -> Sizes:
    """The smallest frame in which problems of these sizes find room, each with a variable for each row it lacks."""
    p = max(own.p for own in sizes)
    return Sizes(max(own.n - own.p for own in sizes) + p, p, max(own.m for own in sizes))


def padded(problems: Sequence[QP], counts: Sequence[int], frame: Sizes) -> QP:
    """One batch of problems that have the same parameters, each padded to the frame.

    Args:
        problems: Of one dtype, on one device; shared parameters are repeated.
        counts: Problems in each.
        frame: See `frame_of`.

    Returns:
        A problem whose every parameter has a batch dimension, but for those that all the problems share; q always.
    """
    parameters: dict[str, Tensor | None] = {}
    for name in problems[0].parameters():
        symbols = DIMENSIONS[name]
        shape = tuple(getattr(frame, symbol) for symbol in symbols)
        given: list[Tensor] = [getattr(problem, name) for problem in problems]
        if all(tensor.shape == shape for tensor in given):
            # Callers who name the same registered parameters have the very same tensors.
            is_shared = name != "q" and len(given) > 1 and all(tensor is given[0] for tensor in given)
            if is_shared or max(counts) == 1:
                parameters[name] = given[0] if is_shared else torch.stack(given)
                continue
        parts = [_batched(tensor, len(symbols), count) for tensor, count in zip(given, counts, strict=True)]
        if all(part.shape[1:] == shape for part in parts):
            parameters[name] = torch.cat(parts)
        else:
            parameters[name] = _framed(name, parts, problems, counts, shape)
    return QP.of_checked(parameters)


def _batched(tensor: Tensor, rank: int, count: int) -> Tensor:
    return tensor if tensor.ndim > rank else tensor.expand(count, *tensor.shape)


def _framed(
    name: str, parts: Sequence[Tensor], problems: Sequence[QP], counts: Sequence[int], shape: tuple[int, ...]
) -> Tensor:
    fill = torch.inf if name == "h" else 0.0
    whole = parts[0].new_full((sum(counts), *shape), fill)
    start = 0
    for part, problem, count in zip(parts, problems, counts, strict=True):
        room = whole[start : start + count]
        start += count
        room[(slice(None), *(slice(size) for size in part.shape[1:]))] = part
        if name == "Q" and problem.n < shape[0]:
            largest = part.diagonal(dim1=1, dim2=2).abs().amax(1, keepdim=True)
            room.diagonal(dim1=1, dim2=2)[:, problem.n :] = torch.where(largest > 0, largest, 1.0)
        elif name == "A":
            own = slice(problem.n, problem.n + shape[0] - problem.p)
            room[:, problem.p :, own].diagonal(dim1=1, dim2=2).fill_(1.0)
    return whole


@dataclass(frozen=True)
class Frame:
    """One caller's problems in a batch.

    Args:
        own: Their sizes.
        outer: Sizes of the batch.
    """

    own: Sizes
    outer: Sizes

    @property
    def is_tight(self) -> bool:
        """Whether there is no padding."""
        return self.own == self.outer

    def trim(self, point: Point) -> Point:
        """A solution or an adjoint `(…, B, ·)` of padded problems without the padding."""
        if self.is_tight:
            return point
        blocks = {name: t[..., : getattr(self.own, SYMBOL[name])] for name, t in point.blocks().items()}
        return type(point)(**blocks)

    def trim_block(self, tensor: Tensor, symbols: Sequence[str]) -> Tensor:
        """A tensor whose last dimensions are sizes of the batch, n, p or m each, without the padding."""
        for axis, symbol in enumerate(reversed(symbols), 1):
            tensor = tensor.narrow(-axis, 0, getattr(self.own, symbol))
        return tensor

    def pad_blocks(self, blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cotangents of z, ν, λ and s, `(…, B, ·)`, with zeros for the padding."""
        if self.is_tight:
            return dict(blocks)
        return {name: pad(t, (0, getattr(self.outer, SYMBOL[name]) - t.shape[-1])) for name, t in blocks.items()}

    def pad_tangents(self, tangents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tangents of parameters, `(B, …)`, with zeros for the padding."""
        if self.is_tight:
            return dict(tangents)
        out = {}
        for name, tangent in tangents.items():
            missing: list[int] = []
            for axis, symbol in enumerate(reversed(DIMENSIONS[name]), 1):
                missing += [0, getattr(self.outer, symbol) - tangent.shape[-axis]]
            out[name] = pad(tangent, missing)
        return out
