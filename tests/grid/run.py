"""One case of the grid, solved and differentiated once for all its checks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from argrad.problems import QP, Flag
from argrad.problems import gradients as form
from argrad_service import engine
from argrad_service.engine import Backward, Forward, SolverOptions
from tests.grid import reference
from tests.grid.cases import DTYPES, Case, Exactness, exactness, limit
from tests.grid.situations import BATCH, Drawn, draw

Array = np.ndarray
MATRICES = {"Q": 2, "G": 2, "A": 2, "q": 1, "h": 1, "b": 1, "entropy": 0}
"""Dimensions of each parameter without the batch."""


class Run:
    """A case with its problem, its outcome and its gradient."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.exactness: Exactness = exactness(case)
        self.drawn: Drawn = draw(
            case.kind, case.situation, is_shared=case.sharing == "shared", dtype=DTYPES[case.dtype]
        )
        self.problem: QP = self.drawn.problem

    @cached_property
    def forward(self) -> Forward:
        """Outcome of the problem as it is."""
        return self.solve(self.problem)

    @cached_property
    def upstream(self) -> dict[str, Tensor]:
        """Cotangents: on the multipliers too, where they are unique and the method is exact."""
        rng = np.random.default_rng(1)
        problem = self.problem
        sizes = {"z": problem.n, "nu": problem.p, "lam": problem.m, "s": problem.m}
        has_all = self.drawn.has_unique_multipliers and self.exactness.is_exact
        names = sizes if has_all else ["z"]
        return {name: torch.from_numpy(rng.normal(size=(BATCH, sizes[name]))) for name in names}

    @cached_property
    def backward(self) -> Backward:
        """Adjoint of `upstream`."""
        return self.vjp(self.forward, self.upstream)

    def solve(self, problem: QP, *, plainly: bool = False) -> Forward:
        """Solve as the pair of solver and method asks for, or plainly, by the solver's own defaults."""
        how = Exactness() if plainly else self.exactness
        options = SolverOptions(tolerance=how.tolerance, max_iterations=limit(self.case), own=how.own)
        found = engine.solve(problem, solver=self.case.solver, options=options)
        assert isinstance(found, Forward)
        return found

    def vjp(self, forward: Forward, upstream: Mapping[str, Tensor]) -> Backward:
        """Differentiate by the method."""
        return engine.vjp(forward, upstream, method=self.case.method, options=self.exactness.options)

    @property
    def gradient_error(self) -> float:
        """Error that a gradient may have, relative to its size."""
        return self.exactness.gradient * self.drawn.condition**0.5

    @property
    def slack(self) -> float:
        """Error that a solution may have: an iterate's follows from its tolerance, or its gap."""
        if "polish" not in self.exactness.own:
            return 1e-8 * self.drawn.condition
        gap = float(self.exactness.own.get("epsilon", 0.0))
        # Without strict complementarity the barrier point is √gap away from the solution, not gap.
        weak = 10 * gap**0.5 if self.drawn.weak.any() else 0.0
        return max(1e3 * self.exactness.tolerance, weak) * self.drawn.condition

    @cached_property
    def differentiated(self) -> list[int]:
        """Positions of the problems that have a solution, and a gradient that says to be its own."""
        return [i for i in self.drawn.solvable if Flag.TRUNCATED not in self.backward.flags[i]]

    @cached_property
    def exact(self) -> dict[int, reference.Exact]:
        """The reference's solution of each problem that has one."""
        return {i: reference.solve(self.drawn, i) for i in self.drawn.solvable}

    def exact_adjoint(self, i: int, upstream: Mapping[str, Tensor]) -> tuple[Array, Array, Array]:
        """The reference's adjoint of the i-th problem."""
        given = {name: block[i].numpy() for name, block in upstream.items()}
        return reference.adjoint(self.drawn, i, self.exact[i], given)


def gradients_of(forward: Forward, backward: Backward) -> list[dict[str, Array]]:
    """Gradients of each problem with respect to its own copy of every parameter."""
    names = list(forward.problem.parameters())
    formed = form(forward.solution, backward.adjoint, wrt=names, batched=names)
    return [{name: block[i].numpy() for name, block in formed.items()} for i in range(len(forward.status))]


def single(problem: QP, i: int) -> QP:
    """The i-th problem alone, without a batch dimension."""
    return QP(**{name: own(problem, name, i) for name in problem.parameters()})


def own(problem: QP, name: str, i: int) -> Tensor:
    """A parameter of the i-th problem."""
    block: Tensor = getattr(problem, name)
    return block[i] if block.ndim > MATRICES[name] else block


def directions(run: Run, names: list[str]) -> dict[str, Tensor]:
    """Normal directions of parameters, in float64; that of Q is symmetric."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for name in names:
        block = torch.randn(getattr(run.problem, name).shape, generator=generator, dtype=torch.float64)
        found[name] = 0.5 * (block + block.mT) if name == "Q" else block
    return found


def moved(problem: QP, along: Mapping[str, Tensor], step: float) -> QP:
    """The problem a step away, in float64."""
    blocks = {name: block.double() for name, block in problem.parameters().items()}
    return QP(**blocks | {name: blocks[name] + step * to for name, to in along.items()})
