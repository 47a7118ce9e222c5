"""Who is timed: argrad's engine and the libraries beside it, behind one interface.

Each contestant takes a workload, solves it, pulls the cotangent back to Q, q, G and h, and shows its answer.
Peers are given the tolerances at which their KKT residual is at most 1e-8, or as near to it as they come.
"""

from __future__ import annotations

import os
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol
from unittest import mock

import torch
from jaxtyping import Float
from torch import Tensor

from argrad.problems import Adjoint, Solution, gradients
from argrad_service import engine
from benchmarks.workloads import Workload

WRT = ("Q", "q", "G", "h")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a contestant returned: `z` `(B, n)`, `lam` `(B, m)` and gradients by the names Q q G h."""

    z: Float[Tensor, "batch n"]
    lam: Float[Tensor, "batch m"]
    gradients: dict[str, Tensor]


class Contestant(Protocol):
    """A solver with a gradient; `forward` and `backward` are what the clock sees."""

    name: str
    settings: str

    def prepare(self, workload: Workload) -> None:
        """Take the workload, outside the clock."""
        ...

    def forward(self) -> None:
        """Solve the batch."""
        ...

    def backward(self) -> None:
        """Pull the cotangent back to every parameter; only after `forward`, once for each."""
        ...

    def answer(self) -> Answer:
        """What the last forward and backward returned."""
        ...


class Engine:
    """argrad's engine in this process, gradients formed as the reply `gradients: "full"` forms them."""

    def __init__(self, solver: str = "auto") -> None:
        self.name = "argrad" if solver == "auto" else f"argrad {solver}"
        self.solver = solver
        self.settings = f"solver {solver}, tolerance 1e-8"

    def prepare(self, workload: Workload) -> None:
        self.workload = workload

    def forward(self) -> None:
        self.outcome = engine.solve(self.workload.problem, solver=self.solver)

    def backward(self) -> None:
        self.adjoint: Adjoint = engine.vjp(self.outcome, {"z": self.workload.grad_z}).adjoint
        self.formed = gradients(self.outcome.solution, self.adjoint, wrt=WRT, batched=WRT)

    def answer(self) -> Answer:
        solution: Solution = self.outcome.solution
        return Answer(z=solution.z, lam=solution.lam, gradients=self.formed)


class _AutogradPeer:
    """A peer that is a torch function: autograd does its backward."""

    def prepare(self, workload: Workload) -> None:
        self.workload = workload
        parameters = workload.problem.parameters()
        self.leaves = [parameters[name].clone().requires_grad_() for name in WRT]

    def backward(self) -> None:
        self.formed = torch.autograd.grad((self.z * self.workload.grad_z).sum(), self.leaves)

    def answer(self) -> Answer:
        found = {name: grad.detach() for name, grad in zip(WRT, self.formed, strict=True)}
        return Answer(z=self.z.detach(), lam=self.lam, gradients=found)

    z: Tensor
    lam: Tensor


class Qpth(_AutogradPeer):
    """OptNet's own solver: a batched interior point in torch."""

    name = "qpth"
    settings = "defaults (eps 1e-12, maxIter 20)"

    def __init__(self) -> None:
        # qpth imports cvxpy for a solver that is not used here; a hundred megabytes for an import statement.
        with mock.patch.dict(sys.modules, {"cvxpy": sys.modules.get("cvxpy", types.ModuleType("cvxpy"))}):
            from qpth.qp import QPFunction
        self.function: Any = QPFunction(verbose=-1)
        self.absent = torch.empty(0, dtype=torch.float64)

    def forward(self) -> None:
        self.z = self.function(*self.leaves, self.absent, self.absent)
        self.lam = self.z.grad_fn.lams  # type: ignore[union-attr]  # qpth keeps them on its context


class Proxsuite(_AutogradPeer):
    """ProxQP's layer with its parallel batch solver."""

    name = "proxsuite"
    settings = "eps 1e-10, eps_backward 1e-9, rho and mu_backward 1e-8, omp_parallel on all cores, float64"

    def __init__(self) -> None:
        from proxsuite.torch.qplayer import QPFunction

        self.function: Any = QPFunction(
            eps=1e-10, eps_backward=1e-9, rho_backward=1e-8, mu_backward=1e-8, omp_parallel=True
        )
        self.absent = torch.empty(0, dtype=torch.float64)

    def forward(self) -> None:
        Q, q, G, h = self.leaves
        with _as_proxsuite_needs():
            self.z, _, lam = self.function(Q, q, self.absent, self.absent, G, torch.full_like(h, -1e20), h)
        self.lam = lam.detach()

    def backward(self) -> None:
        with _as_proxsuite_needs():
            super().backward()


@contextmanager
def _as_proxsuite_needs() -> Iterator[None]:
    """Its gradients have torch's default dtype, and its threads are half of os.cpu_count()."""
    before, cores = torch.get_default_dtype(), os.cpu_count() or 1
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch("os.cpu_count", return_value=2 * cores), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)


def installed_versions() -> dict[str, str]:
    """Versions of whatever takes part, by distribution name."""
    found = {}
    for name in ("argrad", "torch", "numpy", "qpth", "proxsuite", "httpx", "uvicorn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found
