"""Layers whose answers are shares: projections on a simplex, sparsemax, and a smooth choice of the k largest."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from argrad.nn.quadratic import Answer, QuadraticLayer, Size, column, identity, ones, zeros
from argrad.nn.separable import LARGE, share
from argrad.problems.rows import stack


def _is_large(layer: QuadraticLayer, y: Tensor, other: Tensor | None) -> bool:
    """Whether it is one problem, large enough to travel as a sparse one, and x alone is wanted."""
    is_one = y.ndim == 1 and (other is None or other.ndim == 1)
    # A compiled graph has no sparse tensors.
    return is_one and not torch.compiler.is_compiling() and y.shape[0] >= LARGE and not layer.return_duals


class SimplexProjection(QuadraticLayer):
    """argmin ½‖x − y‖² subject to 1ᵀx = r, x ≥ 0; arguments as `ProblemLayer` has them.

    One problem of 256 variables or more, without a batch, travels as a sparse one and is solved in the time of a sort;
    it has first derivatives only, and no vmap. Inside `torch.compile` it stays dense.

    On the support, where x > 0, it is y − θ with one θ for all: ∂x/∂y = I − 11ᵀ/|support| there and 0 elsewhere, and
    ∂x/∂r = 1/|support|.

    Reference: Held, Wolfe and Crowder, Validation of subgradient optimization, Mathematical Programming 6, 1974.
    """

    def forward(self, y: Float[Tensor, "*#batch n"], radius: Size = 1.0) -> Float[Tensor, "*batch n"] | Answer:
        """Project.

        Args:
            y: What is projected.
            radius: r > 0, the sum of the answer.

        Returns:
            x `(B, n)`, or `(n,)` where nothing is batched; with `return_duals` all blocks of the solution, x as z.

        Raises:
            ProblemError: see `argrad.solve_qp`; y is called `problem.q`, the radius `problem.b`.
            SolveError: see there; a negative radius is infeasible.
            GradientError: see there.
        """
        total = column(radius, y)
        if _is_large(self, y, total):
            return share(self, y, total, None)
        n = y.shape[-1]
        fixed = self._fixed(y, None, lambda: {"Q": identity(y), "A": ones((1, n), y), "lb": zeros(n, y)})
        solution = self._solve(fixed["Q"], -y, A=fixed["A"], b=total, lb=fixed["lb"])
        return solution if self.return_duals else solution.z


class Sparsemax(QuadraticLayer):
    """argmin ½‖x − y‖² subject to 1ᵀx = 1, 0 ≤ x ≤ u, Gx ≤ h, Ax = b; arguments as `ProblemLayer` has them.

    Without u and rows it is sparsemax; with u Alt-Diff's constrained sparsemax layer. Without rows, one problem of 256
    variables or more, without a batch, travels as a sparse one: see `SimplexProjection`.

    References:
        Martins and Astudillo, From softmax to sparsemax, ICML 2016.
        Sun et al., Alternating Differentiation for Optimization Layers, ICLR 2023, section 4.1 and appendix B.2.
    """

    def forward(
        self,
        y: Float[Tensor, "*#batch n"],
        u: Float[Tensor, "*#batch n"] | None = None,
        *,
        G: Float[Tensor, "*#batch m n"] | None = None,
        h: Float[Tensor, "*#batch m"] | None = None,
        A: Float[Tensor, "*#batch p n"] | None = None,
        b: Float[Tensor, "*#batch p"] | None = None,
    ) -> Float[Tensor, "*batch n"] | Answer:
        """Solve.

        Args:
            y: Scores.
            u: Upper bounds, of sum 1 or more; none by default.
            G: Rows of further inequalities.
            h: Their right-hand sides.
            A: Rows of further equalities, behind 1ᵀx = 1.
            b: Their right-hand sides.

        Returns:
            x `(B, n)`, or `(n,)` where nothing is batched; with `return_duals` all blocks of the solution, x as z; the
            first entry of nu belongs to 1ᵀx = 1.

        Raises:
            ProblemError: see `argrad.solve_qp`; y is called `problem.q`, u `problem.ub`.
            SolveError: see there.
            GradientError: see there.
        """
        n = y.shape[-1]
        if G is None and A is None and h is None and b is None and _is_large(self, y, u):
            return share(self, y, y.new_ones(1), u)
        fixed = self._fixed(y, None, lambda: {"Q": identity(y), "lb": zeros(n, y)})
        solution = self._solve(
            fixed["Q"],
            -y,
            G=G,
            h=h,
            A=stack([y.new_ones(1, n), *(() if A is None else (A,))], rank=2),
            b=stack([y.new_ones(1), *(() if b is None else (b,))], rank=1),
            lb=fixed["lb"],
            ub=u,
        )
        return solution if self.return_duals else solution.z


class TopK(QuadraticLayer):
    """argmin −cᵀx + τ Σ xᵢ log xᵢ subject to 1ᵀx = k, 0 ≤ x ≤ 1: a smooth indicator of the k largest scores.

    As τ falls to 0 it tends to the indicator itself; at k = 1 it is softmax(c/τ). Arguments as `ProblemLayer` has them.

    Reference: Kotary et al., Folded Optimization for End-to-End Model-Based Learning, IJCAI 2023, eq. (19). Deviation:
    there the entropy is printed with the other sign, which is no concave maximisation.
    """

    def forward(self, c: Float[Tensor, "*#batch n"], k: Size, *, tau: Size = 1.0) -> Float[Tensor, "*batch n"] | Answer:
        """Solve.

        Args:
            c: Scores.
            k: How many, 0 < k ≤ n; need not be whole.
            tau: Weight of the entropy, > 0; differentiable too.

        Returns:
            x `(B, n)`, or `(n,)` where nothing is batched; with `return_duals` all blocks of the solution, x as z.

        Raises:
            ProblemError: see `argrad.solve_qp`; c is called `problem.q`, k `problem.b`, tau `problem.entropy`.
            SolveError: see there.
            GradientError: see there; a second derivative has none.
        """
        n = c.shape[-1]
        row = c.new_ones(1, n)
        solution = self._solve(None, -c, A=row, b=column(k, c), ub=torch.ones_like(row[0]), entropy=tau)
        return solution if self.return_duals else solution.z
