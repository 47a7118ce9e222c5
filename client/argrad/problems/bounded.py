"""A QP with bounds on its variables: ½zᵀQz + qᵀz subject to Az = b (ν), Gz ≤ h (λ), lb ≤ z ≤ ub (λ_lb, λ_ub ≥ 0)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from argrad.errors import ProblemError
from argrad.problems.form import Blocks, Form
from argrad.problems.qp import Adjoint, Solution, gradients
from argrad.problems.rows import BOUNDED
from argrad.problems.shapes import Dimensions, check_names


class BoundedQP(Form):
    """Kind `qp`: a QP with optional bounds on its variables."""

    @property
    def dimensions(self) -> Dimensions:
        """See `Form`."""
        return BOUNDED

    @property
    def block_sizes(self) -> dict[str, int]:
        """See `Form`: z nu lam s, and lam_lb and lam_ub where that bound is given."""
        m, p = self.row_map.own_m, self.row_map.own_p
        sizes = {"z": self.problem.n, "nu": p, "lam": m, "s": m}
        return sizes | {f"lam_{name}": self.problem.n for name in ("lb", "ub") if name in self.parameters}

    def solution(self, solution: Solution) -> Blocks:
        """See `Form`; λ_lb, λ_ub ≥ 0."""
        if self.row_map.size == 0:
            return self._without_batch(solution.blocks())
        nu, lam = self.row_map.own(solution.nu, solution.lam)
        blocks = {"z": solution.z, "nu": nu, "lam": lam, "s": solution.s[..., : self.row_map.own_m]}
        return self._without_batch(blocks | self._bounds("lam", solution.nu, solution.lam, solution))

    def adjoint(self, adjoint: Adjoint, solution: Solution) -> Blocks:
        """See `Form`: z nu mu, and mu_lb = ∂lb and mu_ub = −∂ub where that bound is given."""
        nu, mu = self.row_map.own(adjoint.nu, adjoint.mu)
        blocks = {"z": adjoint.z, "nu": nu, "mu": mu}
        return self._without_batch(blocks | self._bounds("mu", adjoint.nu, adjoint.mu, solution))

    def _bounds(self, prefix: str, nu: Tensor, lam: Tensor, solution: Solution) -> Blocks:
        """Parts of canonical ν and λ, or of something linear in them, that belong to lb and to ub.

        The multiplier ν of a fixed variable is λ_ub if positive and −λ_lb if negative.
        """
        if not self.row_map.size:
            return {}
        at_lower, at_upper, at_fixed = self.row_map.spread(nu, lam)
        up = self.row_map.presses_up(solution.nu)
        both = {"lb": at_lower - (1 - up) * at_fixed, "ub": at_upper + up * at_fixed}
        return {f"{prefix}_{name}": both[name] for name in both if name in self.parameters}

    def gradients(self, solution: Solution, adjoint: Adjoint, wrt: Collection[str]) -> Blocks:
        """See `Form`."""
        check_names("wrt", wrt, self.names)
        nu, lam = self.row_map.own(solution.nu, solution.lam)
        d_nu, mu = self.row_map.own(adjoint.nu, adjoint.mu)
        formed = gradients(
            Solution(z=solution.z, nu=nu, lam=lam, s=solution.s),
            Adjoint(z=adjoint.z, nu=d_nu, mu=mu),
            wrt=[name for name in wrt if name not in ("lb", "ub")],
            batched=self.batched,
        )
        if "lb" in wrt or "ub" in wrt:
            both = dict(zip(("lb", "ub"), self.row_map.bound_gradients(solution, adjoint), strict=True))
            formed |= {n: t if n in self.batched else t.sum(dim=-2) for n, t in both.items() if n in wrt}
        return formed

    def solution_tangents(self, tangents: Solution, solution: Solution) -> Blocks:
        """See `Form`."""
        nu, lam = self.row_map.own(tangents.nu, tangents.lam)
        blocks = {"z": tangents.z, "nu": nu, "lam": lam, "s": tangents.s[..., : self.row_map.own_m]}
        return self._without_batch(blocks | self._bounds("lam", tangents.nu, tangents.lam, solution))

    def upstream(self, cotangents: Mapping[str, Tensor], solution: Solution | None = None) -> Blocks:
        """See `Form`."""
        given = self._cotangent_blocks(cotangents)
        canonical = {"z": given["z"]} if "z" in given else {}
        like = next(iter(given.values()))

        def block(name: str, size: int) -> Tensor:
            return given[name] if name in given else like.new_zeros(*like.shape[:-1], size)

        if self.row_map.size == 0:  # the caller's rows are all there are
            if "nu" in given or "lam" in given:
                canonical |= {"nu": block("nu", self.row_map.own_p), "lam": block("lam", self.row_map.own_m)}
            return canonical | {"s": given["s"]} if "s" in given else canonical
        m, p, n = self.row_map.own_m, self.row_map.own_p, self.problem.n
        lower, upper = block("lam_lb", n), block("lam_ub", n)
        fixed = like.new_zeros(*like.shape[:-1], n)
        if len(self.row_map.equal) and ("lam_lb" in given or "lam_ub" in given):
            if solution is None:
                name = "lam_lb" if "lam_lb" in given else "lam_ub"
                found = f"a cotangent, and variables with lb = ub {self.row_map.equal.tolist()[:8]}"
                raise ProblemError(f"upstream.{name}", found, "rows of A for them, with a cotangent on nu")
            up = self.row_map.presses_up(solution.nu).to(like)
            fixed = up * upper - (1 - up) * lower
        if given.keys() - {"z", "s"}:
            nu, lam = self.row_map.collect(block("nu", p), block("lam", m), lower, upper, fixed)
            canonical |= {"nu": nu, "lam": lam}
        if "s" in given:
            canonical["s"] = pad(given["s"], (0, self.problem.m - m))
        return canonical

    def tangents(self, tangents: Mapping[str, Tensor]) -> Blocks:
        """See `Form`."""
        self._check_tangents(tangents)
        canonical = {name: tangents[name] for name in ("Q", "q", "entropy") if name in tangents}
        # The rows of bounds are unit vectors, whatever moves.
        for name, matrix, own in (("G", self.problem.G, self.row_map.own_m), ("A", self.problem.A, self.row_map.own_p)):
            if matrix is not None and name in tangents:
                canonical[name] = pad(tangents[name], (0, 0, 0, matrix.shape[-2] - own))
        return self._as_canonical(canonical | self._right_hand_tangents(tangents, "lb", "ub"))

    def point(self, blocks: Mapping[str, Tensor], *, section: str = "solution") -> Solution:
        """See `Form`."""
        given = self._point_blocks(section, blocks)
        zero = torch.zeros_like(given["z"])
        lower, upper = given.get("lam_lb", zero), given.get("lam_ub", zero)
        nu, lam = self.row_map.collect(given["nu"], given["lam"], lower, upper, upper - lower)
        s = self._slack(given["z"])
        if "s" in given:
            s = torch.cat([given["s"], s[..., self.row_map.own_m :]], dim=-1)
        return Solution(z=given["z"], nu=nu, lam=lam, s=s)
