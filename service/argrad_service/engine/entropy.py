"""Problems with a separable entropy on a given active set: their KKT system, and Newton's method in log z.

    stationarity   Qz + q + τ(1 + log z) + C_aᵀy = 0,    C_a z = d_a

Its derivative has Q + τD(1/z), which is infinite where z is 0. With z scaled by R = D(√(z/τ)), dz = R u,

    [ I + RQR   R C_aᵀ ] [u ]   [R r₁]
    [ C_a R       0    ] [dy] = [ r₂ ]

nothing is: where z_i has underflowed dz_i is 0, and each entry of dz keeps its relative accuracy. This is the KKT
system of a strictly convex QP, and factored as such. Newton's method moves w = log z,

    dw = −(F + Q dz + C_aᵀ dy)/τ,    F the residual of stationarity,

so that stationarity, linear in w and y where Q is absent, holds after a full step whatever the size of z.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from argrad_service.engine.active_set import ActiveSetFactor, Rows, factor_active_set
from argrad_service.engine.data import Data, entropy_slope, inf_norm, matvec, matvec_t
from argrad_service.engine.finish import Guess

NEWTON_STEPS = 12
"""Steps on one active set at most."""

CONVERGED = 1e-7
"""The step of log z below which Newton's method, being quadratic, has converged."""

SOLVED = 1e-9
"""Relative residual up to which an active set's equations count as solved: Newton's method leaves 1e-15 where they have
a solution."""

TRUSTED = 1e-3
"""Entries of a guess above this fraction of its largest are taken as they are, smaller ones from stationarity."""

LARGEST_LOG = 700.0
"""Bound on log z, below what overflows."""

SMALLEST_LOG = -708.0
"""Log of a z that is zero."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EntropyFactor:
    """The KKT system at a point and on an active set; stands in for an `ActiveSetFactor`.

    Args:
        data: The problems.
        root: R, `(B, n)`.
        scaled: Factor of the system above.
    """

    data: Data
    root: Tensor
    scaled: ActiveSetFactor

    @property
    def rows(self) -> Rows:
        """The active rows."""
        return self.scaled.rows

    @property
    def is_dependent(self) -> Tensor:
        """`(B,)`, whether active rows are linearly dependent."""
        return self.scaled.is_dependent

    @property
    def is_nonunique(self) -> Tensor:
        """`(B,)`: the objective is strictly convex, so never but for numbers that cannot be told from zero."""
        return self.scaled.is_nonunique

    @property
    def nbytes(self) -> int:
        """Bytes held beyond the problem's own data."""
        own = 0 if self.data.is_linear else self.scaled.data.Q.untyped_storage().nbytes()
        return self.scaled.nbytes + self.root.untyped_storage().nbytes() + own

    def solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Solve for right-hand sides `(B, n, j)` and `(B, k, j)`; the third result is the relative residual `(B,)`."""
        u, y, error = self.scaled.solve(self.root.unsqueeze(-1) * r1, r2)
        return self.root.unsqueeze(-1) * u, y, error


def factor_entropy(data: Data, z: Tensor, active: Tensor) -> EntropyFactor:
    """Factor the KKT system at z `(B, n)` ≥ 0 on the rows marked in `active` `(B, p + m)`."""
    root = (z / tau_of(data)).sqrt()
    scaled = replace(data, is_linear=False, tau=None, full_G=None)
    if not data.is_linear:
        Q = root.unsqueeze(2) * data.Q * root.unsqueeze(1)
        Q.diagonal(dim1=1, dim2=2).add_(1.0)
        scaled = replace(scaled, Q=Q)
    factor = factor_active_set(scaled, active, columns=root, is_identity=data.is_linear)
    return EntropyFactor(data=data, root=root, scaled=factor)


class EntropyCandidates:
    """Candidate active sets, each solved by Newton's method from the guess; keeps the last solution of each problem.

    Args:
        data: The problems.
    """

    def __init__(self, data: Data) -> None:
        self._data = data
        self.z, self.y = torch.zeros_like(data.q), torch.zeros_like(data.d)

    def __call__(self, guess: Guess, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `finish.Candidates`."""
        data = self._data.select(index)
        z, y, is_solved = solve_on_rows(data, guess)
        self.z[index], self.y[index] = z, y
        return y, data.d - matvec(data.C, z), is_solved


def solve_on_rows(data: Data, guess: Guess) -> tuple[Tensor, Tensor, Tensor]:
    """Solution of the problem whose rows are the active ones, as equations.

    Args:
        data: The problems.
        guess: Active rows, and a point near the solution; multipliers of other rows are not looked at.

    Returns:
        z `(B, n)`, exactly 0 where it is below the smallest normal float64, y `(B, p + m)`, and whether the equations
        hold, those of the rows and of stationarity, `(B,)`.
    """
    tau, active = tau_of(data), guess.active
    y = torch.where(active, guess.y, 0.0)
    w = _start(data, guess.z, guess.y)
    last = w.new_full((data.B,), torch.inf)
    for _ in range(NEWTON_STEPS):
        z = w.exp()
        slope = stationarity(data, z, w, y)
        factor = factor_entropy(data, z, active)
        away = torch.where(active, data.d - matvec(data.C, z), 0.0)
        dz, dy, _ = factor.solve(-slope.unsqueeze(-1), factor.rows.gather(away).unsqueeze(-1))
        dz, full = dz.squeeze(-1), factor.rows.scatter(dy.squeeze(-1), data.d.shape[1])
        dw = -(slope + curvature(data, dz) + matvec_t(data.C, full)) / tau
        # Where z is that small, before and after, it does not count: rounding moves its logarithm.
        counts = torch.maximum(w, w + dw) > SMALLEST_LOG
        w, y = move(w, dw), y + full
        last = inf_norm(torch.where(counts, dw, 0.0))
        if not bool((last > CONVERGED * (1 + inf_norm(w))).any()):
            break
    z = underflow(w)
    off = torch.where(active, data.d - matvec(data.C, z), 0.0)
    is_on_rows = inf_norm(off) <= SOLVED * (1e-3 + inf_norm(data.d))
    is_settled = last <= 1e1 * CONVERGED * (1 + inf_norm(w))
    return z, y, is_on_rows & is_settled & _is_stationary(data, z, y)


def _is_stationary(data: Data, z: Tensor, y: Tensor) -> Tensor:
    """Whether ‖Qz + q + τ(1 + log z) + Cᵀy‖∞ is small against its terms, `(B,)`.

    An underflowed z is right if it wants to be smaller still.
    """
    slope, is_small = entropy_slope(tau_of(data).squeeze(-1), z)
    Qz, Cty = curvature(data, z), matvec_t(data.C, y)
    missed = Qz + data.q + slope + Cty
    missed = torch.where(is_small, missed.clamp(max=0), missed)
    size = torch.stack([inf_norm(term) for term in (Qz, data.q, slope, Cty)]).amax(0)
    return inf_norm(missed) <= SOLVED * size


def stationarity(data: Data, z: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """Qz + q + τ(1 + w) + Cᵀy, `(B, n)`."""
    return data.q + curvature(data, z) + tau_of(data) * (1 + w) + matvec_t(data.C, y)


def curvature(data: Data, x: Tensor) -> Tensor:
    """Qx, `(B, n)`; nothing is computed where Q is absent."""
    return torch.zeros_like(x) if data.is_linear else matvec(data.Q, x)


def move(w: Tensor, dw: Tensor) -> Tensor:
    """Move w by a step dw of log z, which never brings z far beyond where its linear model z(1 + dw) does.

    A small entry may rise to a tenth of the largest by e^dw, for it hardly counts before.
    """
    rise = torch.log1p(dw.clamp(min=0))
    cap = (w.amax(-1, keepdim=True) - 2.3).expand_as(w)
    up = torch.maximum(w + rise, torch.minimum(w + dw, cap))
    return torch.where(dw > 0, up, w + dw).clamp(max=LARGEST_LOG)


def underflow(w: Tensor) -> Tensor:
    """e^w, and 0 where that is below the smallest normal number."""
    z = w.exp()
    return torch.where(z >= torch.finfo(z.dtype).tiny, z, 0.0)


def log_entropy(z: Tensor) -> Tensor:
    """Log z, 0 where z is 0: what it multiplies is 0 there."""
    return torch.where(z > 0, z, 1.0).log()


def _start(data: Data, z: Tensor, y: Tensor) -> Tensor:
    """Log z of a guess: large entries as they are, small ones as stationarity has them."""
    largest = z.amax(-1, keepdim=True)
    floor = torch.where(largest > 0, TRUSTED * largest, 1.0)
    by_slope = -(data.q + curvature(data, z) + matvec_t(data.C, y)) / tau_of(data) - 1
    by_slope = torch.minimum(torch.nan_to_num(by_slope), floor.log())
    return torch.where(z > floor, z.clamp(min=torch.finfo(z.dtype).tiny).log(), by_slope)


def tau_of(data: Data) -> Tensor:
    """τ `(B, 1)` of problems that have it."""
    if data.tau is None:
        raise RuntimeError("the problem has no entropy")
    return data.tau.unsqueeze(-1)
