"""Euclidean projections on polyhedra {Az = b, Gz ≤ h}, with their multipliers, differentiable in the point and in b, h.

    P(v) = argmin ½‖z − v‖²,   z − v + Cᵀy = 0

Closed forms where every problem's rows have their shape: a **box**, no equalities and at most one non-zero in each
inequality; a **simplex**, one equality with equal coefficients and lower bounds alone, one for each variable. (A ball
is not a polyhedron; no rows say it.) Everything else is a QP with Q = I: its Gram matrix CCᵀ is formed once, the active
set of the last projection is tried first, and what that does not solve goes to `pdipm`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from argrad.problems import Status
from argrad_service.engine.active_set import factor_active_set
from argrad_service.engine.data import Data, matvec_t, take
from argrad_service.engine.finish import DualCandidates, Guess, find_active_set
from argrad_service.engine.forward import pdipm
from argrad_service.engine.forward.systems import DualForm, dual_form
from argrad_service.engine.options import ShouldStop, SolverOptions
from argrad_service.engine.point import CODE

ROUNDS = 12
"""Candidate sets that a projection tries, from the last one's active set, before `pdipm` is asked."""


class Projection(Protocol):
    """A projection on the polyhedra of a batch."""

    name: str
    """What it is: `box`, `simplex` or `polyhedron`."""

    def __call__(self, v: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """Project v `(B, n)` for right-hand sides d `(B, p + m)`; z `(B, n)` and y `(B, p + m)`, λ ≥ 0."""
        ...

    def is_empty(self) -> Tensor:
        """`(B,)`, polyhedra that were found to have no point, by the last projection."""
        ...

    def select(self, index: Tensor) -> Projection:
        """The projection of a sub-batch."""
        ...


def projection_on(data: Data, should_stop: ShouldStop) -> Projection:
    """The projection on the constraints of the problems; looks at the rows once, which synchronises."""
    rows = data.G.detach()
    count = (rows != 0).sum(-1)
    if bool((count <= 1).all()) and data.m:
        column = rows.abs().argmax(-1)
        factor = rows.gather(2, column.unsqueeze(-1)).squeeze(-1)
        if data.p == 0:
            return Box(column=column, factor=factor, n=data.n, empty=_empty_box(column, factor, data))
        ones = data.A[:, 0, :1]
        is_sum = data.p == 1 and bool(((data.A[:, 0] == ones) & (ones != 0)).all())
        each = torch.arange(data.n, device=column.device)
        is_bounds = data.m == data.n and bool((column.sort(-1).values == each).all() and (factor < 0).all())
        if is_sum and is_bounds:
            return Simplex(column=column, factor=factor, ones=ones, empty=_empty_simplex(factor, ones, data))
    return Polyhedron(data, should_stop)


@dataclass(frozen=True, kw_only=True, eq=False)
class Box:
    """Bounds: z_j ≤ d/factor where the row's factor is positive, z_j ≥ d/factor where it is negative.

    Args:
        column: `(1 or B, m)`, j of each row.
        factor: `(1 or B, m)`, the row's non-zero, 0 where it has none.
        n: Number of variables.
        empty: `(B,)`.
    """

    column: Tensor
    factor: Tensor
    n: int
    empty: Tensor
    name = "box"

    def __call__(self, v: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """Project; of several rows on one side of a variable the tightest binds."""
        lower, upper, at_lower, at_upper = _bounds(self.column, self.factor, d, self.n)
        z = torch.minimum(torch.maximum(v, lower), upper)
        y = torch.zeros_like(d)
        factor = self.factor.expand_as(d)
        for at, force in ((at_lower, (lower - v).clamp(min=0)), (at_upper, (v - upper).clamp(min=0))):
            # A variable without a bound on this side points nowhere and has no force.
            has_bound = (at >= 0) & torch.isfinite(force)
            row = at.clamp(min=0)
            share = torch.where(has_bound, force, 0.0) / factor.gather(1, row).abs().clamp(min=1e-300)
            y = y.scatter_add(1, row, torch.where(has_bound, share, 0.0))
        return z, y

    def is_empty(self) -> Tensor:
        """`(B,)`."""
        return self.empty

    def select(self, index: Tensor) -> Box:
        """The projection of a sub-batch."""
        column, factor = take(self.column, index), take(self.factor, index)
        return replace(self, column=column, factor=factor, empty=self.empty[index])


def _bounds(column: Tensor, factor: Tensor, d: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bounds `(B, n)`, ∓inf where there is none, and the rows that give them, −1 where none does."""
    column, factor = column.expand_as(d), factor.expand_as(d)
    value = d / torch.where(factor != 0, factor, torch.ones_like(factor))
    position = torch.arange(d.shape[1], device=d.device).expand_as(column)
    blank = d.new_full((len(d), n), torch.inf)
    none = torch.full((len(d), n), -1, device=d.device, dtype=position.dtype)
    found = []
    for sign in (-1.0, 1.0):
        # The tightest is the least of ±value; the first row that attains it gives the bound.
        tight = torch.where(factor * sign > 0, sign * value.detach(), torch.inf)
        best = blank.scatter_reduce(1, column, tight, "amin")
        attains = torch.isfinite(tight) & (tight == best.gather(1, column))
        row = none.scatter_reduce(1, column, torch.where(attains, position, -1), "amax")
        bound = torch.where(row >= 0, value.gather(1, row.clamp(min=0)), sign * torch.inf)
        found.append((bound, row))
    (lower, at_lower), (upper, at_upper) = found
    return lower, upper, at_lower, at_upper


def _empty_box(column: Tensor, factor: Tensor, data: Data) -> Tensor:
    lower, upper, _, _ = _bounds(column, factor, data.d, data.n)
    return (lower > upper).any(-1) | ((factor == 0) & (data.d < 0)).any(-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Simplex:
    """Lower bounds and a sum: z_j ≥ l_j = d/factor, Σ z_j = b/a (Held, Wolfe & Crowder, 1974, by sorting).

    Args:
        column: `(1 or B, n)`, j of each inequality.
        factor: `(1 or B, n)`, its non-zero, negative.
        ones: `(1 or B, 1)`, the equality's coefficient a.
        empty: `(B,)`.
    """

    column: Tensor
    factor: Tensor
    ones: Tensor
    empty: Tensor
    name = "simplex"

    def __call__(self, v: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """Project: z = l + (v − l − θ)₊ with θ such that the sum is right."""
        b, h = d[:, :1], d[:, 1:]
        column, factor = self.column.expand_as(h), self.factor.expand_as(h)
        lower = torch.zeros_like(v).scatter(1, column, h / factor)
        total = b / self.ones - lower.sum(-1, keepdim=True)
        room = v - lower
        with torch.no_grad():
            order = room.sort(-1, descending=True).values
            rank = torch.arange(1, v.shape[1] + 1, device=v.device, dtype=v.dtype)
            is_above = order * rank > order.cumsum(-1) - total
            count = is_above.sum(-1, keepdim=True).clamp(min=1)
            # Those above θ are the `count` largest; ties at the edge are at θ and add nothing.
            above = torch.argsort(torch.argsort(room, -1, descending=True), -1) < count
        theta = (torch.where(above, room, 0.0).sum(-1, keepdim=True) - total) / count
        z = lower + torch.where(above, room - theta, 0.0)
        force = torch.where(above, 0.0, theta - room).clamp(min=0)
        return z, torch.cat([theta / self.ones, force.gather(1, column) / -factor], dim=1)

    def is_empty(self) -> Tensor:
        """`(B,)`."""
        return self.empty

    def select(self, index: Tensor) -> Simplex:
        """The projection of a sub-batch."""
        column, factor = take(self.column, index), take(self.factor, index)
        return replace(self, column=column, factor=factor, ones=take(self.ones, index), empty=self.empty[index])


def _empty_simplex(factor: Tensor, ones: Tensor, data: Data) -> Tensor:
    lower = data.h / factor
    total = data.b / ones
    return total.squeeze(1) < lower.sum(-1) - 1e-12 * (1 + total.abs().squeeze(1) + lower.abs().sum(-1))


class Polyhedron:
    """Any rows, by the active set of a QP with Q = I."""

    name = "polyhedron"

    def __init__(self, data: Data, should_stop: ShouldStop, form: DualForm | None = None) -> None:
        eye = torch.eye(data.n, dtype=data.q.dtype, device=data.q.device).unsqueeze(0)
        self.data = replace(data, Q=eye, is_linear=False)
        self.should_stop = should_stop
        self.form = form or dual_form(self.data, eye)
        self.active = torch.zeros_like(data.d, dtype=torch.bool)
        self.active[:, : data.p] = True
        self.y = torch.zeros_like(data.d)
        self.empty = torch.zeros(data.B, dtype=torch.bool, device=data.q.device)

    def __call__(self, v: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """Project; the derivative is that of the KKT system of the active set."""
        z, y = _ProjectedOn.apply(v, d, self)  # type: ignore[no-untyped-call]
        return z, y

    def solve(self, v: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """The projection itself, outside autograd; keeps the active set for the next one."""
        scale = self.form.scale
        form = replace(self.form, c=scale * d - matvec_t(self.form.V, v), half_q=-v)
        candidates = DualCandidates(form)
        guess = Guess(active=self.active, z=v, y=self.y)
        active, is_found = find_active_set(guess, self.data.p, candidates, rounds=ROUNDS)
        if not bool((is_found | self.empty).all()):
            index = torch.nonzero(~is_found & ~self.empty).squeeze(-1)
            part = replace(self.data, q=-v, d=d).select(index)
            found = pdipm.solve(part, SolverOptions(should_stop=self.should_stop), None)
            active[index], self.y[index] = found.active, found.y
            self.empty[index] = found.status == CODE[Status.INFEASIBLE]
        every = torch.arange(len(v), device=v.device)
        y, _, _ = candidates(Guess(active=active, z=v, y=self.y), every)
        y[:, self.data.p :].clamp_(min=0)
        self.active, self.y = active, y * scale
        return form.primal(y), self.y

    def is_empty(self) -> Tensor:
        """`(B,)`."""
        return self.empty

    def select(self, index: Tensor) -> Polyhedron:
        """The projection of a sub-batch."""
        part = Polyhedron(self.data.select(index), self.should_stop, self.form.select(index))
        part.active, part.y, part.empty = self.active[index], self.y[index], self.empty[index]
        return part


class _ProjectedOn(torch.autograd.Function):
    """z, y of `Polyhedron.solve`, with the derivative of section `kkt`: Q = I, q = −v."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, d: Tensor, on: Polyhedron) -> tuple[Tensor, Tensor]:
        z, y = on.solve(v, d)
        ctx.data, ctx.active = on.data, on.active
        return z, y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_z, grad_y = grads
        data: Data = ctx.data
        factor = factor_active_set(data, ctx.active, lower=data.Q)
        d_z, d_y, _ = factor.solve(-grad_z.unsqueeze(-1), -factor.rows.gather(grad_y).unsqueeze(-1))
        return -d_z.squeeze(-1), -factor.rows.scatter(d_y.squeeze(-1), data.d.shape[1]), None
