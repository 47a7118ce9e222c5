"""What every form of a QP does: quantities in the caller's blocks and parameters, to and from the canonical ones.

Inside, every block has the batch dimension B, which is 1 where no parameter is batched; the dicts that a caller gives
and gets have it only if some parameter has it. k cotangents stand in front of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from argrad.errors import ProblemError
from argrad.problems.qp import QP, Adjoint, Solution
from argrad.problems.rows import RowMap, stack
from argrad.problems.shapes import Dimensions, batch_size, check_alike, check_finite, check_names, shape_of

Blocks = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Form(ABC):
    """A problem in the caller's form.

    Args:
        parameters: As given, by the caller's names, without those that have no elements.
        problem: The canonical QP that is solved.
        row_map: Where bounds and two-sided rows went.
    """

    parameters: Mapping[str, Tensor]
    problem: QP
    row_map: RowMap

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that were given."""
        return tuple(self.parameters)

    @property
    @abstractmethod
    def dimensions(self) -> Dimensions:
        """Dimensions of every parameter of this form, without the batch."""

    @property
    @abstractmethod
    def block_sizes(self) -> dict[str, int]:
        """Length of each block of a solution, by the caller's names."""

    @cached_property
    def batched(self) -> frozenset[str]:
        """The parameters that have a batch dimension of their own."""
        return frozenset(name for name, t in self.parameters.items() if t.ndim > len(self.dimensions[name]))

    @cached_property
    def batch_size(self) -> int | None:
        """B, or None where no parameter has a batch dimension."""
        return batch_size(self.parameters, self.dimensions)

    @abstractmethod
    def solution(self, solution: Solution) -> Blocks:
        """A canonical solution `(B, ·)` as the caller's blocks."""

    @abstractmethod
    def adjoint(self, adjoint: Adjoint, solution: Solution) -> Blocks:
        """A canonical adjoint `(…, B, ·)` at a canonical solution as the caller's blocks."""

    @abstractmethod
    def gradients(self, solution: Solution, adjoint: Adjoint, wrt: Collection[str]) -> Blocks:
        """Gradients of the caller's parameters, shaped like them, behind k if the adjoint has it.

        Args:
            solution: Canonical, `(B, ·)`.
            adjoint: Canonical, `(B, ·)` or `(k, B, ·)`.
            wrt: The parameters whose gradients are wanted, some of `names`.

        Raises:
            ProblemError: a name in `wrt` is not one of the problem's.
        """

    @abstractmethod
    def solution_tangents(self, tangents: Solution, solution: Solution) -> Blocks:
        """Tangents of a canonical solution, at that solution, as tangents of the caller's blocks."""

    @abstractmethod
    def upstream(self, cotangents: Mapping[str, Tensor], solution: Solution | None = None) -> Blocks:
        """Cotangents of the caller's blocks as canonical ones: z nu lam s, of which only those that are needed.

        Their values are not looked at: rows of problems that failed may hold anything.

        Args:
            cotangents: `(B, ·)` or, all of them, `(k, B, ·)`, without B where no parameter is batched.
            solution: Canonical. Only cotangents on the bounds of variables fixed by lb = ub need it, which are refused
                without.

        Raises:
            ProblemError: a name, a shape, a dtype or a device does not fit, or there is no cotangent at all.
        """

    @abstractmethod
    def tangents(self, tangents: Mapping[str, Tensor]) -> Blocks:
        """Tangents of the caller's parameters as tangents of canonical parameters, shaped like those.

        Raises:
            ProblemError: a name, a shape, a dtype or a device does not fit, a value is not finite, or the two sides
                of a row with l = u move apart, which has no derivative.
        """

    @abstractmethod
    def point(self, blocks: Mapping[str, Tensor], *, section: str = "solution") -> Solution:
        """A solution in the caller's blocks, `(B, ·)` where a parameter is batched, as the canonical one.

        Args:
            blocks: All multipliers; a slack `s` may be absent and is then h − Gz.
            section: Where the blocks come from, for messages.

        Raises:
            ProblemError: a block is missing, unknown or not finite, or its shape, dtype or device does not fit.
        """

    def _without_batch(self, blocks: Blocks) -> Blocks:
        """Drop the batch dimension of one that nothing asked for."""
        return blocks if self.batch_size is not None else {name: t.squeeze(-2) for name, t in blocks.items()}

    def _block_shape(self, size: int) -> tuple[int, ...]:
        return (size,) if self.batch_size is None else (self.batch_size, size)

    def _point_blocks(self, section: str, blocks: Mapping[str, Tensor]) -> Blocks:
        """Checked blocks `(B, ·)`; those without elements, and `s`, may be absent."""
        sizes, batch = self.block_sizes, self.batch_size or 1
        check_names(section, blocks, sizes)
        check_alike(section, blocks, ("q", self.problem.q))
        complete: Blocks = {}
        for name, size in sizes.items():
            tensor = blocks.get(name)
            shape = self._block_shape(size)
            if tensor is None and size and name != "s":
                raise ProblemError(f"{section}.{name}", "nothing", f"a tensor of shape {shape}")
            if tensor is not None and tuple(tensor.shape) != shape and (size or tensor.numel()):
                raise ProblemError(f"{section}.{name}", f"shape {shape_of(tensor)}", str(shape))
            if size == 0:
                complete[name] = self.problem.q.new_zeros(batch, 0)
            elif tensor is not None:
                # The slack of a row with h = +inf is +inf.
                if name == "s":
                    check_finite(f"{section}.s", tensor, "finite numbers or +inf", allowing=torch.inf)
                else:
                    check_finite(f"{section}.{name}", tensor)
                complete[name] = tensor.reshape(batch, size)
        return complete

    def _slack(self, z: Tensor) -> Tensor:
        """Slack h − Gz of the canonical problem, `(B, m)`."""
        G, h = self.problem.G, self.problem.h
        if G is None or h is None:
            return z.new_zeros(*z.shape[:-1], 0)
        return h - (z @ G.mT if G.ndim == 2 else (G @ z.unsqueeze(-1)).squeeze(-1))

    def _cotangent_blocks(self, cotangents: Mapping[str, Tensor]) -> Blocks:
        """Checked cotangents `(…, B, ·)`, all with or all without k in front."""
        sizes = self.block_sizes
        check_names("upstream", cotangents, sizes)
        cotangents = {name: tensor for name, tensor in cotangents.items() if sizes[name] or tensor.numel()}
        if not cotangents:
            raise ProblemError("upstream", "no cotangent", f"at least one of {', '.join(sizes)}")
        check_alike("upstream", cotangents, ("q", self.problem.q))
        first, reference = next(iter(cotangents.items()))
        rank = len(self._block_shape(0))
        leading = tuple(reference.shape[: reference.ndim - rank])
        checked: Blocks = {}
        for name, tensor in cotangents.items():
            shape = self._block_shape(sizes[name])
            if len(leading) > 1 or tuple(tensor.shape) != (*leading, *shape):
                wanted = f"{shape} or {('k', *shape)}".replace("'", "")
                if name != first and tensor.shape[-rank:] == shape:
                    wanted = f"{(*leading, *shape)}, as upstream.{first} has shape {shape_of(reference)}"
                raise ProblemError(f"upstream.{name}", f"shape {shape_of(tensor)}", wanted)
            checked[name] = tensor if self.batch_size is not None else tensor.unsqueeze(-2)
        if leading == (0,):
            raise ProblemError(f"upstream.{first}", "0 cotangents", "at least one")
        return checked

    def _check_tangents(self, tangents: Mapping[str, Tensor]) -> None:
        if not tangents:
            raise ProblemError("tangents", "no tangent", f"at least one of {', '.join(self.names)}")
        check_names("tangents", tangents, self.names)
        check_alike("tangents", tangents, ("q", self.problem.q))
        for name, tensor in tangents.items():
            if tensor.shape != self.parameters[name].shape:
                wanted = f"{shape_of(self.parameters[name])}, as problem.{name} has"
                raise ProblemError(f"tangents.{name}", f"shape {shape_of(tensor)}", wanted)
            check_finite(f"tangents.{name}", tensor)

    def _right_hand_tangents(self, tangents: Mapping[str, Tensor], lower: str, upper: str) -> Blocks:
        """Tangents of canonical h and b, where some parameter in them has a tangent."""
        if not tangents.keys() & {"h", "b", lower, upper}:
            return {}
        row_map, q = self.row_map, self.problem.q
        l_dot, u_dot = self._side_tangents(tangents, lower, upper)
        own_h, own_b = (
            tangents[name] if name in tangents else q.new_zeros(size)
            for name, size in (("h", row_map.own_m), ("b", row_map.own_p))
        )
        sides = (-l_dot[..., row_map.lower], u_dot[..., row_map.upper])
        # A side without rows has not made the canonical parameter batched.
        h_dot = stack([own_h, *(side for side in sides if side.shape[-1])], rank=1)
        b_dot = stack([own_b, *(side for side in (u_dot[..., row_map.equal],) if side.shape[-1])], rank=1)
        return {"h": h_dot, "b": b_dot}

    def _as_canonical(self, tangents: Blocks) -> Blocks:
        """Tangents of the canonical parameters that are there, expanded where those are batched and these are not."""
        parameters = self.problem.parameters()
        return {name: tangent.expand_as(parameters[name]) for name, tangent in tangents.items() if name in parameters}

    def _side_tangents(self, tangents: Mapping[str, Tensor], lower: str, upper: str) -> tuple[Tensor, Tensor]:
        """Tangents of both sides of the rows, `(r,)` or `(B, r)`, 0 where a side is not there or infinite."""
        sides = []
        for name in (lower, upper):
            values, tangent = self.parameters.get(name), tangents.get(name)
            if values is None or tangent is None:
                sides.append(self.problem.q.new_zeros(self.row_map.size))
            else:
                sides.append(torch.where(torch.isfinite(values), tangent, 0.0))
        l_dot, u_dot = sides
        apart = (l_dot != u_dot)[..., self.row_map.equal]
        if bool(apart.any()):
            where = torch.nonzero(apart)[0].tolist()
            where[-1] = int(self.row_map.equal[where[-1]])
            found = f"other values than tangents.{upper} at {where}, where {lower} = {upper}"
            raise ProblemError(f"tangents.{lower}", found, "the same there: such a row is an equality")
        return l_dot, u_dot
