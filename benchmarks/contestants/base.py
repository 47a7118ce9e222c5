"""What a contestant is, and what those that are torch functions share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.forms import Rows, as_qp
from benchmarks.workloads import Workload


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a contestant returned: z `(B, n)` and gradients by the names of the workload's parameters."""

    z: Float[Tensor, "batch n"]
    gradients: dict[str, Tensor]


class Contestant(Protocol):
    """A solver with a gradient; `forward` and `backward` are what the clock sees."""

    def prepare(self, workload: Workload) -> None:
        """Take the workload, outside the clock."""
        ...

    def forward(self) -> None:
        """Solve the batch."""
        ...

    def backward(self) -> None:
        """Pull the cotangent back to every parameter asked for; only after `forward`, once for each."""
        ...

    def answer(self) -> Answer:
        """What the last forward and backward returned."""
        ...


class TorchContestant:
    """A contestant that is a torch function: autograd does its backward."""

    def prepare(self, workload: Workload) -> None:
        self.workload = workload
        self.leaves = {name: workload.parameters[name].clone().requires_grad_() for name in workload.wrt}
        self.given: dict[str, Tensor] = {**workload.parameters, **self.leaves}
        self.build(workload)

    def build(self, workload: Workload) -> None:
        """Make what is made once for problems of one structure."""

    def solve(self, given: Mapping[str, Tensor]) -> Float[Tensor, "batch n"]:
        """The solution as a function of the workload's parameters."""
        raise NotImplementedError

    def forward(self) -> None:
        self.z = self.solve(self.given)

    def backward(self) -> None:
        leaves = list(self.leaves.values())
        loss = (self.z * self.workload.grad_z).sum()
        found = torch.autograd.grad(loss, leaves, allow_unused=True)  # absent is zero: c of a linear program
        self.found = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]

    def answer(self) -> Answer:
        return Answer(
            z=self.z.detach(), gradients={k: g.detach() for k, g in zip(self.leaves, self.found, strict=True)}
        )


class RowsContestant(TorchContestant):
    """A peer that takes every workload as the QP of `forms`."""

    def solve(self, given: Mapping[str, Tensor]) -> Float[Tensor, "batch n"]:
        rows = as_qp(self.workload.kind, given)
        return self.solve_rows(rows)[..., : self.workload.grad_z.shape[-1]]

    def solve_rows(self, rows: Rows) -> Float[Tensor, "batch n"]:
        """The solution of the QP."""
        raise NotImplementedError


def everywhere(rows: Rows, batch: int) -> Rows:
    """The same with every parameter batched, for peers that know no shared ones; views, not copies."""

    def matrix(part: Tensor) -> Tensor:
        return part.expand(batch, *part.shape[-2:])

    def vector(part: Tensor) -> Tensor:
        return part.expand(batch, part.shape[-1])

    return Rows(
        Q=matrix(rows.Q),
        q=vector(rows.q),
        G=matrix(rows.G),
        h=vector(rows.h),
        A=None if rows.A is None else matrix(rows.A),
        b=None if rows.b is None else vector(rows.b),
    )
