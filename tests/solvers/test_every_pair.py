"""Every solver with every differentiation method, once, on a small regular problem of each kind that both take."""

from __future__ import annotations

import pytest
import torch

from argrad.problems import QP, Status
from argrad_service import engine
from argrad_service.engine.options import SolverOptions
from argrad_service.engine.registry import METHODS, SOLVERS, Solver

F64 = torch.float64
PROBLEMS = {
    "qp": QP(
        Q=torch.tensor([[[4.0, 1], [1, 2]], [[3, 0], [0, 1]]], dtype=F64),
        q=torch.tensor([[1.0, 1], [-1, 2]], dtype=F64),
        G=-torch.eye(2, dtype=F64),
        h=torch.tensor([0.5, 0.1], dtype=F64),
        A=torch.tensor([[1.0, 1]], dtype=F64),
        b=torch.tensor([1.0], dtype=F64),
    ),
    "lp": QP(
        q=torch.tensor([[-1.0, -2], [-3, -1]], dtype=F64),
        G=torch.tensor([[1.0, 1], [-1, 0], [0, -1], [1, 0]], dtype=F64),
        h=torch.tensor([2.0, 0, 0, 1.5], dtype=F64),
    ),
    "entropy": QP(
        q=torch.tensor([[-1.0, -2, 0.5], [0, 1, 0.3]], dtype=F64),
        A=torch.ones(1, 3, dtype=F64),
        b=torch.ones(1, dtype=F64),
        entropy=torch.tensor(0.7, dtype=F64),
    ),
}
PAIRS = [
    pytest.param(solver, method, kind, id=f"{solver.name}-{method}-{kind}")
    for solver in SOLVERS.values()
    for method in solver.methods
    for kind in solver.kinds
    if kind in METHODS[method].kinds
]


@pytest.mark.parametrize(("solver", "method", "kind"), PAIRS)
def test_each_pair_solves_and_differentiates(solver: Solver, method: str, kind: str) -> None:
    if not solver.is_installed:
        pytest.skip(f"{solver.name} is not installed; ends with the extra {solver.extra}")
    problem = PROBLEMS[kind]
    options = SolverOptions(max_iterations=2000)
    forward = engine.solve(problem, solver=solver.name, options=options)
    reference = engine.solve(problem, solver="pdipm")
    assert set(forward.status) == {Status.OPTIMAL}
    torch.testing.assert_close(forward.solution.z, reference.solution.z, rtol=1e-8, atol=1e-8)
    upstream = {"z": torch.tensor([[1.0, -0.5, 2.0], [0.3, 1, -1]], dtype=F64)[:, : problem.n]}
    own = {"iterations": 1500} if method == "unrolled" and solver.name != "barrier" else {}
    pulled = engine.vjp(forward, upstream, method=method, options=own)
    assert pulled.method == method
    assert set(pulled.gradient_status) == {"ok"}
    if method == "smoothed":
        assert bool((pulled.measures["smoothing_distance"] > 0).all())
        return
    exact = engine.vjp(reference, upstream).adjoint
    torch.testing.assert_close(pulled.adjoint.z, exact.z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pulled.adjoint.nu, exact.nu, rtol=1e-5, atol=1e-5)
