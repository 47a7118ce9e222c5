r"""Alt-Diff's recursion: ADMM from zero at a constant penalty, and the Jacobians of its iterates alongside.

With w = y/ρ − s (`splitting`), D = [w > 0] of the iterate (1 on equalities) and Σ = 2D − I

    ∂x⁺ = H⁻¹[σ∘∂x − ∂q + CᵀP(∂d − Σ∂w)],    ∂w⁺ = C∂x⁺ − ∂d + D∂w

`Columns` carries ∂x and ∂w with respect to q and d as they stand: n + p + m columns, each through H⁻¹, C and Cᵀ. Where
H does not change and σ = 0, which is every QP, `Eliminated` has the same Jacobians for less. Without ∂x,

    ∂w⁺ = S + (D − MΣ)∂w,    M = CH⁻¹CᵀP,    S = −CH⁻¹∂q + (M − I)∂d

begins at zero and has the same S at every step, so that ∂w = WS with W⁺ = I + (D − MΣ)W: one product of matrices of
size p + m a step, whatever the parameters. ∂x follows from the last W alone.

Reference: Sun et al., Alternating Differentiation for Optimization Layers, ICLR 2023, eqs. (5a)–(5g), algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from argrad_service.engine.forward.entropic_step import EntropicStep
from argrad_service.engine.forward.splitting import Splitting
from argrad_service.engine.inverses import DenseHessians, Inverse
from argrad_service.engine.operators import Dense
from argrad_service.engine.options import ShouldStop, Stopped

LOOK_EVERY = 10
"""Steps between two loop tests on a GPU, where each waits for the device."""

MOST_ROWS = 2
"""M is formed up to this many rows a variable; beyond, products with C, H⁻¹ and Cᵀ in turn are cheaper."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """Adjoint blocks; steps, and whether ε was reached, `(B,)`."""

    d_z: Tensor
    d_y: Tensor
    iterations: Tensor
    is_truncated: Tensor


class Jacobians(Protocol):
    """Derivatives of ADMM's iterates with respect to q and d."""

    def step(self, x: Tensor, w: Tensor, is_frozen: Tensor) -> None:
        """Go on by the step that led from w `(B, r)` to x⁺ `(B, n)`, in the problems that are not frozen `(B,)`."""
        ...

    def pull(self, w: Tensor, g_z: Tensor, g_y: Tensor) -> tuple[Tensor, Tensor]:
        """J_qᵀg `(B, k, n)` and J_dᵀg `(B, k, r)`, for cotangents of x and of y = ρw₊ at the last w."""
        ...


def recur(
    problem: Splitting,
    rho: Tensor,
    cotangents: tuple[Tensor, Tensor],
    is_dropped: Tensor,
    *,
    truncation: float,
    max_iterations: int,
    should_stop: ShouldStop,
) -> Found:
    """ADMM and its Jacobians, until ‖x⁺ − x‖/‖x‖ < ε.

    Args:
        problem: The problems, with their penalties' weights.
        rho: `(B, 1)`, by which the weights are multiplied.
        cotangents: Of z `(B, k, n)` and of y `(B, k, p + m)`.
        is_dropped: See `Pattern`.
        truncation: ε.
        max_iterations: Bound on the steps.
        should_stop: Asked between two steps.

    Returns:
        Adjoint blocks `(B, k, ·)`.

    Raises:
        Stopped: should_stop() was true.
    """
    inverse, penalties = _inverse(problem, rho), rho * problem.weights
    x, w = torch.zeros_like(problem.q), torch.zeros_like(problem.d)
    if problem.tau is not None:
        x = torch.ones_like(x)
    changes = isinstance(inverse, EntropicStep) or bool((problem.hessians.sigma > 0).any())
    pattern = Pattern(problem.is_equality, is_dropped)
    jacobians: Jacobians = (Columns if changes else Eliminated)(problem, inverse, penalties, pattern)
    done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    iterations = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    every = 1 if x.device.type == "cpu" else LOOK_EVERY
    for k in range(max_iterations):
        if k % every == 0:
            if should_stop():
                raise Stopped
            if bool(done.all()):
                break
        after = problem.primal(x, w, inverse, penalties)
        change = torch.linalg.vector_norm(after - x, dim=-1)
        is_near = change <= truncation * torch.linalg.vector_norm(x, dim=-1)
        jacobians.step(after, w, done)
        is_frozen = done.unsqueeze(-1)
        w = torch.where(is_frozen, w, problem.dual(after, w, 1.0))
        x = torch.where(is_frozen, x, after)
        iterations = iterations + (~done).to(iterations)
        done = done | is_near
    d_z, d_y = jacobians.pull(w, *cotangents)
    return Found(d_z=d_z, d_y=-d_y, iterations=iterations, is_truncated=done)


def _inverse(problem: Splitting, rho: Tensor) -> Inverse:
    """H⁻¹; of one problem its Cholesky factor, for the explicit inverse costs more than it saves."""
    if len(rho) == 1 and isinstance(problem.hessians, DenseHessians):
        return problem.hessians.factor(rho)
    return problem.hessians.inverse(rho)


@dataclass(frozen=True, eq=False)
class Pattern:
    """D of an iterate.

    Args:
        is_equality: `(1, r)`.
        is_dropped: `(B, r)`, rows that the solution has weakly active or not at all, of problems with weakly active
            rows: as in the other methods the derivative is that on the side where they are not active. The iterates of
            such a row cross zero for ever, and a pattern that follows them has the derivative of neither side.
    """

    is_equality: Tensor
    is_dropped: Tensor

    def __call__(self, w: Tensor) -> Tensor:
        """D, `(B, r)`."""
        return (self.is_equality | ((w > 0) & ~self.is_dropped)).to(w)


class Eliminated:
    """W and D after the last step and before it, which is what ∂w and ∂x are made of.

    Args:
        problem: The problems.
        inverse: H⁻¹.
        penalties: P, `(B, r)`.
        pattern: D of an iterate.
    """

    def __init__(self, problem: Splitting, inverse: Inverse, penalties: Tensor, pattern: Pattern) -> None:
        self._pattern = pattern
        self._problem, self._inverse, self._penalties = problem, inverse, penalties.unsqueeze(1)
        n, r = problem.q.shape[1], problem.d.shape[1]
        self._eye = torch.eye(r, dtype=problem.q.dtype, device=problem.q.device)
        # Rows of these are the columns of W, and of M.
        self._W = self._before = problem.q.new_zeros(len(problem.q), r, r)
        self._D_before = torch.ones_like(problem.d)
        self._M: Tensor | None = None
        if isinstance(problem.C, Dense) and r <= MOST_ROWS * n:
            self._M = self._through(self._eye.expand(len(penalties), -1, -1))

    def _through(self, v: Tensor) -> Tensor:
        C = self._problem.C
        return C.times(self._inverse.apply(C.transposed(self._penalties * v)))

    def step(self, x: Tensor, w: Tensor, is_frozen: Tensor) -> None:  # noqa: ARG002 - see Jacobians
        """W⁺ = I + DW − MΣW."""
        D = self._pattern(w)
        W = self._W
        if self._M is None:
            after = self._eye + D.unsqueeze(1) * W - self._through((2 * D - 1).unsqueeze(1) * W)
        else:
            between = (1 - 2 * D).unsqueeze(-1) * self._M
            between.diagonal(dim1=1, dim2=2).add_(D)
            after = torch.baddbmm(self._eye.expand_as(W), W, between)
        if bool(is_frozen.any()):
            kept = is_frozen[:, None, None]
            self._before, after = torch.where(kept, self._before, W), torch.where(kept, W, after)
            self._D_before = torch.where(is_frozen.unsqueeze(-1), self._D_before, D)
        else:
            self._before, self._D_before = W, D
        self._W = after

    def pull(self, w: Tensor, g_z: Tensor, g_y: Tensor) -> tuple[Tensor, Tensor]:
        """Through ∂y = PD∂w and ∂x to ∂w, by W to S, and from there to q and d."""
        C, P = self._problem.C, self._penalties
        u = self._inverse.apply(g_z)
        t = P * C.times(u)
        onto = (P * self._pattern(w).unsqueeze(1) * g_y) @ self._W.mT
        onto = onto - ((2 * self._D_before - 1).unsqueeze(1) * t) @ self._before.mT
        f = self._inverse.apply(C.transposed(onto))
        return -u - f, t + P * C.times(f) - onto


class Columns:
    """∂x `(B, c, n)` and ∂w `(B, c, r)` themselves, c = n + r.

    Args:
        problem: The problems.
        inverse: H⁻¹, or the x-update whose H depends on x.
        penalties: P, `(B, r)`.
        pattern: D of an iterate.
    """

    def __init__(self, problem: Splitting, inverse: Inverse, penalties: Tensor, pattern: Pattern) -> None:
        self._pattern = pattern
        self._problem, self._inverse, self._penalties = problem, inverse, penalties.unsqueeze(1)
        n, r = problem.q.shape[1], problem.d.shape[1]
        eye = torch.eye(n + r, dtype=problem.q.dtype, device=problem.q.device).unsqueeze(0)
        self._q, self._d = eye[..., :n], eye[..., n:]
        self._x = problem.q.new_zeros(len(problem.q), n + r, n)
        self._w = problem.q.new_zeros(len(problem.q), n + r, r)

    def step(self, x: Tensor, w: Tensor, is_frozen: Tensor) -> None:
        """Both recursions as they stand; with entropy H has τD(1/x⁺) besides."""
        problem, C = self._problem, self._problem.C
        inverse = self._inverse.at(x) if isinstance(self._inverse, EntropicStep) else self._inverse
        D = self._pattern(w).unsqueeze(1)
        right = C.transposed(self._penalties * (self._d - (2 * D - 1) * self._w)) - self._q
        dx = inverse.apply(right + problem.hessians.sigma.unsqueeze(1) * self._x)
        dw = C.times(dx) - self._d + D * self._w
        kept = is_frozen[:, None, None]
        self._x, self._w = torch.where(kept, self._x, dx), torch.where(kept, self._w, dw)

    def pull(self, w: Tensor, g_z: Tensor, g_y: Tensor) -> tuple[Tensor, Tensor]:
        """Products with the Jacobians."""
        dy = self._penalties * self._pattern(w).unsqueeze(1) * self._w
        pulled = g_z @ self._x.mT + g_y @ dy.mT
        n = self._q.shape[-1]
        return pulled[..., :n], pulled[..., n:]
