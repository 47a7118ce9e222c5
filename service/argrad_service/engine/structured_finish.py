r"""The active-set finish for data with `structure`: a positive diagonal Q, rows of one entry and a few dense ones.

On an active set the rows of one entry fix their variables. With F the free variables and E the active dense rows,

    x_fixed = r₂/entry        S y_E = E_F Q_F⁻¹ r₁,F − (r₂,E − E_fixed x_fixed),   S = E_F Q_F⁻¹ E_Fᵀ
    x_F = Q_F⁻¹(r₁,F − E_Fᵀ y_E)        y_row = (r₁ − Qx − Eᵀy_E)_column / entry

in O(n k²) for k dense rows. Sets in which two rows fix one variable, or S is singular, are left to the dense code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from argrad.problems import Status
from argrad_service.engine.active_set import Rows, gather_active
from argrad_service.engine.data import Data, inf_norm, residuals
from argrad_service.engine.finish import CONSISTENT, Guess, find_active_set
from argrad_service.engine.operators import Dense
from argrad_service.engine.point import CODE, Finished, Point
from argrad_service.engine.semidefinite import cholesky_or_none
from argrad_service.engine.structure import Structure

WEAK = 1e-10
"""As in `solution`: rows with neither force nor room go to the dense code, which knows what to do with them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StructuredFactor:
    """The KKT system on the active sets of a batch.

    Args:
        data: The problems.
        structure: Of their matrices.
        rows: Active rows.
        active: The same as a mask, `(B, p + m)`.
        is_free: `(B, n)`, variables that no active row fixes.
        E: Dense rows, zero where not active, `(B, k, n)`.
        S: Cholesky factors, `(B, k, k)`; the identity on rows that are not active.
        is_dependent: `(B,)`, where rows are dependent; such problems cannot be solved here.
    """

    data: Data
    structure: Structure
    rows: Rows
    active: Tensor
    is_free: Tensor
    E: Tensor
    S: Tensor
    is_dependent: Tensor

    @property
    def is_nonunique(self) -> Tensor:
        """False: Q is definite."""
        return torch.zeros_like(self.is_dependent)

    @property
    def nbytes(self) -> int:
        """Bytes held beyond the problem's own data."""
        held = (self.rows.index, self.rows.valid, self.active, self.is_free, self.E, self.S)
        return sum(t.untyped_storage().nbytes() for t in held)

    def solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Solve for right-hand sides `(B, n, j)` and `(B, k, j)` on the active rows, with one step of refinement."""
        size = self.data.d.shape[1]
        right, room = r1.mT, self.rows.scatter(r2.permute(2, 0, 1), size).transpose(0, 1)
        x, y = self._solve_once(right, room)
        e1, e2 = self._residual(right, room, x, y)
        dx, dy = self._solve_once(e1, e2)
        x, y = x + dx, y + dy
        error = torch.maximum(*(_largest(e) for e in self._residual(right, room, x, y)))
        scale = torch.maximum(_largest(right), _largest(room))
        error = error / torch.where(scale > 0, scale, torch.ones_like(scale))
        return x.mT, self.rows.gather(y.transpose(0, 1)).permute(1, 2, 0), error

    def _solve_once(self, right: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
        C, q = self.structure.C, self.structure.Q.diagonal.unsqueeze(1)
        unit = C.entry != 0
        entry = torch.where(unit, C.entry, torch.ones_like(C.entry)).unsqueeze(1)
        is_fixing = (self.active & unit).unsqueeze(1)
        column = C.column.unsqueeze(1).expand_as(room)
        fixed = torch.where(is_fixing, room / entry, 0.0)
        x = torch.zeros_like(right).scatter_add(-1, column, fixed)
        free = self.is_free.unsqueeze(1)
        E = Dense(matrix=self.E)
        inner = torch.where(free, right / q, 0.0)
        left = E.times(inner + x) - torch.where(self.active.unsqueeze(1), room, 0.0).index_select(-1, C.where)
        y_dense = torch.cholesky_solve(left.mT, self.S).mT
        force = right - E.transposed(y_dense)
        x = torch.where(free, force / q, x)
        y = torch.where(is_fixing, (force - q * x).gather(-1, column) / entry, 0.0)
        return x, y.index_copy(-1, C.where, y_dense)

    def _residual(self, right: Tensor, room: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        Q, C = self.structure.Q, self.structure.C
        e1 = right - Q.times(x) - C.transposed(y)
        return e1, torch.where(self.active.unsqueeze(1), room - C.times(x), 0.0)


def _largest(block: Tensor) -> Tensor:
    """Largest absolute entry of `(B, j, r)`, `(B,)`."""
    entries = block.abs().flatten(1)
    return entries.amax(-1) if entries.shape[1] else entries.new_zeros(len(entries))


def factor_structured(data: Data, structure: Structure, active: Tensor) -> StructuredFactor:
    """Factor the KKT system of the rows marked in `active`, `(B, p + m)`."""
    C, q = structure.C, structure.Q.diagonal
    is_fixing = active & (C.entry != 0)
    count = torch.zeros_like(data.q).scatter_add(-1, C.column.expand_as(active), is_fixing.to(data.q))
    is_free = count == 0
    on = active.index_select(-1, C.where)
    E = C.rows * on.unsqueeze(-1)
    inner = torch.where(is_free.unsqueeze(1), E, 0.0)
    gram = (inner / q.unsqueeze(1)) @ inner.mT + torch.diag_embed((~on).to(data.q))
    S, is_good = cholesky_or_none(gram)
    # A row without entries is dependent too, if it is active.
    is_empty = (C.entry == 0) & active
    is_empty = is_empty.index_fill(-1, C.where, False).any(-1)
    return StructuredFactor(
        data=data,
        structure=structure,
        rows=gather_active(active),
        active=active,
        is_free=is_free,
        E=E,
        S=S,
        is_dependent=~is_good | (count > 1).any(-1) | is_empty,
    )


def confirm_structured(data: Data, structure: Structure, guess: Guess, *, rounds: int) -> tuple[Tensor, Tensor]:
    """Exchange wrong rows until none is left; the last set `(B, p + m)`, and whether it is right `(B,)`."""

    def candidates(guess: Guess, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        part = data if len(index) == data.B else data.select(index)
        factor = factor_structured(part, structure.select(index), guess.active)
        _, y, s, error = _solution(factor)
        on_rows = inf_norm(torch.where(guess.active, s, 0.0)) <= CONSISTENT * (1e-3 + inf_norm(s))
        return y, s, ~factor.is_dependent & (error <= CONSISTENT) & on_rows

    return find_active_set(guess, data.p, candidates, rounds=rounds)


def finish_structured(data: Data, structure: Structure, point: Point) -> None:
    """Solve exactly and hand the factor on, if every problem of the batch has its active set and no weak row.

    Args:
        data: The problems.
        structure: Of their matrices.
        point: z, y and `finished` are set; where some problem is not so simple nothing is, and the dense code follows.
    """
    if not bool((point.is_exact & (point.status == CODE[Status.OPTIMAL])).all()):
        return
    factor = factor_structured(data, structure, point.active)
    z, y, s, _ = _solution(factor)
    y[:, data.p :].clamp_(min=0)
    lam, s = y[:, data.p :], torch.where(point.active, 0.0, s.clamp(min=0))[:, data.p :]
    no_force = lam <= WEAK * inf_norm(lam).unsqueeze(-1)
    is_weak = (no_force & (s <= WEAK * (1 + data.h.abs()))).any(-1)
    if bool((is_weak | factor.is_dependent).any()):
        return
    point.z, point.y = z, y
    judged = residuals(data, z, y)
    point.finished = Finished(factor=factor, s=s, judged=judged, worst=float(judged.scaled.amax()))


def _solution(factor: StructuredFactor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Z, y, s = d − Cz and the relative residual on an active set."""
    data, rows = factor.data, factor.rows
    z, y, error = factor.solve(-data.q.unsqueeze(-1), rows.gather(data.d).unsqueeze(-1))
    z = z.squeeze(-1)
    s = data.d - factor.structure.C.times(z.unsqueeze(1)).squeeze(1)
    return z, rows.scatter(y.squeeze(-1), data.d.shape[1]), s, error
