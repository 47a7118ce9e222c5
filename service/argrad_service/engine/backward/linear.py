"""Batched solution of v = Φᵀv + s by iteration: linear fixed-point iteration, GMRES, BiCGSTAB.

Vectors are `(B, c, N)`; every one of the B·c systems has its own coefficients and its own convergence: what has
converged does not move any more. All three stop where ‖s + Φᵀv − v‖ ≤ tolerance·‖s‖.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from argrad_service.engine.options import ShouldStop, Stopped

RESTART = 100
"""Vectors that GMRES keeps."""

Product = Callable[[Tensor], Tensor]
"""v to Φᵀv."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearSolution:
    """What an iteration found.

    Args:
        v: `(B, c, N)`.
        iterations: Products with Φᵀ of each problem, `(B,)`.
        is_converged: `(B,)`, whether all c systems of a problem met the tolerance.
    """

    v: Tensor
    iterations: Tensor
    is_converged: Tensor


def _norm(v: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(v, dim=-1)
    return length


def _quotient(left: Tensor, right: Tensor) -> Tensor:
    """left/right, 0 where right is."""
    return torch.where(
        right == 0, torch.zeros_like(left), left / torch.where(right == 0, torch.ones_like(right), right)
    )


class _Progress:
    """Counts, and the loop test."""

    def __init__(self, s: Tensor, tolerance: float, should_stop: ShouldStop) -> None:
        self.target = tolerance * _norm(s)
        self.iterations = torch.zeros(len(s), dtype=torch.int64, device=s.device)
        self.moves = self.target > 0
        self._should_stop = should_stop

    def goes_on(self, residual: Tensor) -> bool:
        """Whether some system is not there; `residual` is `(B, c)`. NaN never arrives, and is not waited for."""
        self.moves = self.moves & (residual > self.target)
        if not bool(self.moves.any()):
            return False
        if self._should_stop():
            raise Stopped
        self.iterations = self.iterations + self.moves.any(-1).to(self.iterations)
        return True

    def conclude(self, v: Tensor, residual: Tensor) -> LinearSolution:
        """The result, judged by its true residual."""
        # A residual of rounding size may be above the tolerance times a norm that is smaller than v's.
        near = residual <= torch.maximum(2 * self.target, 1e-14 * _norm(v))
        return LinearSolution(v=v, iterations=self.iterations, is_converged=near.all(-1))


def lfpi(
    product: Product, s: Tensor, *, tolerance: float, max_iterations: int, should_stop: ShouldStop
) -> LinearSolution:
    """V ← Φᵀv + s from v = s; converges at the rate ρ(Φ), if that is below one."""
    progress = _Progress(s, tolerance, should_stop)
    v = s
    residual = product(v)
    for _ in range(max_iterations):
        if not progress.goes_on(_norm(residual)):
            break
        v = torch.where(progress.moves.unsqueeze(-1), v + residual, v)
        residual = s + product(v) - v
    return progress.conclude(v, _norm(residual))


def bicgstab(
    product: Product, s: Tensor, *, tolerance: float, max_iterations: int, should_stop: ShouldStop
) -> LinearSolution:
    """BiCGSTAB on I − Φᵀ (van der Vorst, 1992); two products an iteration."""
    progress = _Progress(s, tolerance, should_stop)
    v, r = torch.zeros_like(s), s
    shadow, p = r, r
    rho = (shadow * r).sum(-1, keepdim=True)
    for _ in range(max_iterations):
        if not progress.goes_on(_norm(r)):
            break
        moves = progress.moves.unsqueeze(-1)
        Ap = p - product(p)
        alpha = _quotient(rho, (shadow * Ap).sum(-1, keepdim=True))
        half = r - alpha * Ap
        At = half - product(half)
        omega = _quotient((At * half).sum(-1, keepdim=True), At.square().sum(-1, keepdim=True))
        v = torch.where(moves, v + alpha * p + omega * half, v)
        r_next = half - omega * At
        rho_next = (shadow * r_next).sum(-1, keepdim=True)
        beta = _quotient(rho_next * alpha, rho * omega)
        # Where the recursion has broken down it begins anew, from the residual.
        broke = (beta == 0) | (rho_next.abs() <= 1e-30 * _norm(shadow).unsqueeze(-1) * _norm(r_next).unsqueeze(-1))
        p_next = torch.where(broke, r_next, r_next + beta * (p - omega * Ap))
        shadow = torch.where(moves & broke, r_next, shadow)
        rho_next = torch.where(broke, r_next.square().sum(-1, keepdim=True), rho_next)
        r, p = torch.where(moves, r_next, r), torch.where(moves, p_next, p)
        rho = torch.where(moves, rho_next, rho)
    return progress.conclude(v, _norm(s + product(v) - v))


def gmres(
    product: Product, s: Tensor, *, tolerance: float, max_iterations: int, should_stop: ShouldStop
) -> LinearSolution:
    """GMRES on I − Φᵀ (Saad & Schultz, 1986), restarted every `RESTART` vectors, orthogonalised twice."""
    progress = _Progress(s, tolerance, should_stop)
    v, r = torch.zeros_like(s), s
    left = max_iterations
    while left > 0:
        # A cycle ends by an estimate of the residual; here is the residual itself.
        progress.moves = progress.target > 0
        if not progress.goes_on(_norm(r)):
            break
        size = min(RESTART, left, max(s.shape[-1], 1))
        step = _cycle(product, torch.where(progress.moves.unsqueeze(-1), r, 0.0), size, progress)
        v = v + step[0]
        r = s + product(v) - v
        left -= step[1]
    return progress.conclude(v, _norm(r))


def _cycle(product: Product, r: Tensor, size: int, progress: _Progress) -> tuple[Tensor, int]:
    """The correction of one cycle `(B, c, N)`, and how many vectors it took."""
    length = _norm(r)
    basis = r.new_zeros(*r.shape[:2], size + 1, r.shape[-1])
    basis[:, :, 0] = _quotient(r, length.unsqueeze(-1))
    R = r.new_zeros(*r.shape[:2], size + 1, size)
    right = r.new_zeros(*r.shape[:2], size + 1)
    right[..., 0] = length
    turns: list[tuple[Tensor, Tensor]] = []
    taken = 0
    for j in range(size):
        w = basis[:, :, j] - product(basis[:, :, j])
        before = _norm(w)
        for _ in range(2):
            h = torch.einsum("bcjn,bcn->bcj", basis[:, :, : j + 1], w)
            w = w - torch.einsum("bcjn,bcj->bcn", basis[:, :, : j + 1], h)
            R[:, :, : j + 1, j] += h
        below = _norm(w)
        below = torch.where(below > 1e-14 * before, below, torch.zeros_like(below))
        basis[:, :, j + 1] = _quotient(w, below.unsqueeze(-1))
        for i, (cos, sin) in enumerate(turns):
            upper, lower = R[:, :, i, j].clone(), R[:, :, i + 1, j].clone()
            R[:, :, i, j], R[:, :, i + 1, j] = cos * upper + sin * lower, cos * lower - sin * upper
        pivot = R[:, :, j, j].clone()
        radius = torch.hypot(pivot, below)
        cos, sin = _quotient(pivot, radius), _quotient(below, radius)
        turns.append((cos, sin))
        R[:, :, j, j] = radius
        right[..., j + 1] = -sin * right[..., j]
        right[..., j] = cos * right[..., j]
        taken = j + 1
        # Nothing is gained in a direction that is not there.
        residual = torch.where(radius == 0, 0.0, right[..., j + 1].abs())
        if j + 1 < size and not progress.goes_on(residual):
            break
    square, right = R[:, :, :taken, :taken], right[..., :taken]
    diagonal = square.diagonal(dim1=-2, dim2=-1)
    empty = diagonal == 0
    square = square + torch.diag_embed(empty.to(square))
    right = torch.where(empty, 0.0, right)
    y = torch.linalg.solve_triangular(square, right.unsqueeze(-1), upper=True)
    return torch.einsum("bcjn,bcj->bcn", basis[:, :, :taken], y.squeeze(-1)), taken


SOLVERS: dict[str, Callable[..., LinearSolution]] = {"lfpi": lfpi, "gmres": gmres, "bicgstab": bicgstab}
"""By the names of the option `linear`."""
