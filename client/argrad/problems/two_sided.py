"""OSQP's form: ½xᵀPx + qᵀx subject to l ≤ Ax ≤ u, with y > 0 at the upper bound and y < 0 at the lower."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from argrad.problems.form import Blocks, Form
from argrad.problems.qp import Adjoint, Solution, gradients, outer_pair
from argrad.problems.rows import TWO_SIDED
from argrad.problems.shapes import Dimensions, check_names


class TwoSidedQP(Form):
    """Kind `qp_two_sided`: every row has a lower and an upper bound."""

    @property
    def dimensions(self) -> Dimensions:
        """See `Form`."""
        return TWO_SIDED

    @property
    def block_sizes(self) -> dict[str, int]:
        """See `Form`: x and y."""
        return {"x": self.problem.n, "y": self.row_map.size}

    def _duals(self, nu: Tensor, lam: Tensor) -> Tensor:
        """λ_u − λ_l + ν of every row, or the same of something linear in them."""
        lower, upper, equal = self.row_map.spread(nu, lam)
        return upper - lower + equal

    def solution(self, solution: Solution) -> Blocks:
        """See `Form`."""
        return self._without_batch({"x": solution.z, "y": self._duals(solution.nu, solution.lam)})

    def adjoint(self, adjoint: Adjoint, solution: Solution) -> Blocks:  # noqa: ARG002 - linear in this form
        """See `Form`: x = ∂q, and y, which is −∂u where the row's y > 0 and −∂l where it is < 0."""
        return self._without_batch({"x": adjoint.z, "y": self._duals(adjoint.nu, adjoint.mu)})

    def gradients(self, solution: Solution, adjoint: Adjoint, wrt: Collection[str]) -> Blocks:
        """See `Form`; ∂A = dy xᵀ + y dxᵀ."""
        check_names("wrt", wrt, self.names)
        objective = {"P": "Q", "q": "q"}
        formed = gradients(
            solution,
            adjoint,
            wrt=[objective[name] for name in wrt if name in objective],
            batched=[objective[name] for name in self.batched if name in objective],
        )
        formed = {name: formed[canonical] for name, canonical in objective.items() if name in wrt}
        if "A" in wrt:
            y, d_y = self._duals(solution.nu, solution.lam), self._duals(adjoint.nu, adjoint.mu)
            is_batched = "A" in self.batched
            formed["A"] = outer_pair(d_y, solution.z, y, adjoint.z, is_batched)
        both = dict(zip(("l", "u"), self.row_map.bound_gradients(solution, adjoint), strict=True))
        return formed | {n: t if n in self.batched else t.sum(dim=-2) for n, t in both.items() if n in wrt}

    def solution_tangents(self, tangents: Solution, solution: Solution) -> Blocks:  # noqa: ARG002 - linear in this form
        """See `Form`."""
        return self._without_batch({"x": tangents.z, "y": self._duals(tangents.nu, tangents.lam)})

    def upstream(
        self,
        cotangents: Mapping[str, Tensor],
        solution: Solution | None = None,  # noqa: ARG002 - linear in this form
    ) -> Blocks:
        """See `Form`."""
        given = self._cotangent_blocks(cotangents)
        canonical = {"z": given["x"]} if "x" in given else {}
        if "y" in given:
            y = given["y"]
            nu, lam = self.row_map.collect(y[..., :0], y[..., :0], -y, y, y)
            canonical |= {"nu": nu, "lam": lam}
        return canonical

    def tangents(self, tangents: Mapping[str, Tensor]) -> Blocks:
        """See `Form`."""
        self._check_tangents(tangents)
        canonical = {to: tangents[name] for name, to in (("P", "Q"), ("q", "q")) if name in tangents}
        if "A" in tangents:
            # A row that is −Aᵢ or Aᵢ in G, or Aᵢ among the equalities, moves as it does.
            A = tangents["A"].transpose(-1, -2)
            rows = self.row_map.collect(A[..., :0], A[..., :0], -A, A, A)
            canonical |= {name: rows_dot.transpose(-1, -2) for name, rows_dot in zip(("A", "G"), rows, strict=True)}
        return self._as_canonical(canonical | self._right_hand_tangents(tangents, "l", "u"))

    def point(self, blocks: Mapping[str, Tensor], *, section: str = "solution") -> Solution:
        """See `Form`."""
        given = self._point_blocks(section, blocks)
        x, y = given["x"], given["y"]
        nu, lam = self.row_map.collect(y[..., :0], y[..., :0], (-y).clamp(min=0), y.clamp(min=0), y)
        return Solution(z=x, nu=nu, lam=lam, s=self._slack(x))
