"""Linear programs by the libraries that take them."""

import numpy as np
import pytest
import torch

from argrad.problems import QP
from argrad_service import engine
from argrad_service.engine import SolverOptions

NAMES = ("osqp", "clarabel", "highs")


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


EYE = torch.eye(2, dtype=torch.float64)


def vertex_lp(n=6, m=9, p=2, batch=3, seed=0):
    """LPs whose solution is a vertex with n − p active inequalities, chosen first."""
    rng = np.random.default_rng(seed)
    z, nu = rng.normal(size=(batch, n)), rng.normal(size=(batch, p))
    A, G = rng.normal(size=(batch, p, n)), rng.normal(size=(batch, m, n))
    is_active = np.zeros((batch, m), dtype=bool)
    for row in is_active:
        row[rng.permutation(m)[: n - p]] = True
    lam = np.where(is_active, rng.uniform(0.2, 2, (batch, m)), 0.0)
    s = np.where(is_active, 0.0, rng.uniform(0.2, 2, (batch, m)))
    q = -np.einsum("bij,bi->bj", A, nu) - np.einsum("bij,bi->bj", G, lam)
    data = {"q": q, "A": A, "b": np.einsum("bij,bj->bi", A, z), "G": G, "h": np.einsum("bij,bj->bi", G, z) + s}
    return QP(**{name: torch.from_numpy(block) for name, block in data.items()}), z, nu, lam


@pytest.mark.parametrize("solver", NAMES)
def test_vertex_is_exact_and_its_gradients_are_right(solver):
    problem, z, nu, lam = vertex_lp()
    forward = engine.solve(problem, solver=solver)
    assert set(forward.status) == {"optimal"}
    assert forward.flags == ((),) * 3
    for found, wanted in zip(
        (forward.solution.z, forward.solution.nu, forward.solution.lam), (z, nu, lam), strict=True
    ):
        assert np.abs(found.numpy() - wanted).max() < 1e-10
    rng = np.random.default_rng(1)
    g = torch.from_numpy(rng.normal(size=z.shape))
    adjoint = engine.vjp(forward, {"z": g}).adjoint
    assert float(adjoint.z.abs().max()) < 1e-12
    step = {name: torch.from_numpy(rng.normal(size=t.shape)) for name, t in problem.parameters().items()}
    losses = []
    for sign in (1, -1):
        moved = QP(**{name: t + sign * 1e-6 * step[name] for name, t in problem.parameters().items()})
        losses.append(float((engine.solve(moved, solver=solver).solution.z * g).sum()))
    zt = forward.solution.z
    slope = -(adjoint.mu * step["h"]).sum() - (adjoint.nu * step["b"]).sum()
    slope = slope + (adjoint.mu[:, :, None] * zt[:, None] * step["G"]).sum()
    slope = slope + (adjoint.nu[:, :, None] * zt[:, None] * step["A"]).sum()
    assert float(slope) == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("solver", NAMES)
def test_solution_that_is_not_unique_is_flagged_and_has_no_gradient(solver):
    problem = QP(q=numbers(1.0, 1.0), G=-EYE, h=numbers(0.0, 0.0), A=numbers([1.0, 1.0]), b=numbers(1.0))
    forward = engine.solve(problem, solver=solver)
    assert forward.status == ("optimal",)
    assert float(forward.objective) == pytest.approx(1.0, abs=1e-10)
    assert "nonunique" in forward.flags[0]
    backward = engine.vjp(forward, {"z": torch.ones(1, 2, dtype=torch.float64)})
    assert backward.gradient_status == ("nonunique",)


@pytest.mark.parametrize("solver", NAMES)
@pytest.mark.parametrize(
    ("verdict", "problem"),
    [
        ("infeasible", QP(q=numbers(1.0, 1.0), G=numbers([1.0, 0.0], [-1.0, 0.0]), h=numbers(-1.0, -1.0))),
        ("unbounded", QP(q=numbers(1.0, -1.0), G=numbers([1.0, 0.0]), h=numbers(1.0))),
    ],
    ids=["infeasible", "unbounded"],
)
def test_says_why_there_is_no_solution(solver, verdict, problem):
    assert engine.solve(problem, solver=solver).status == (verdict,)


@pytest.mark.parametrize("solver", [*NAMES, "pdipm", "admm", "barrier"])
def test_without_costs_every_point_is_a_solution(solver):
    """Multipliers are zero then: rounding in their place would make a vertex a unique solution."""
    rng = np.random.default_rng(0)
    G = torch.from_numpy(rng.normal(size=(8, 10, 4)))
    z = torch.from_numpy(rng.normal(size=(8, 4)))
    h = torch.einsum("bij,bj->bi", G, z) + 0.1 + torch.from_numpy(rng.random((8, 10)))
    box = torch.cat([torch.eye(4), -torch.eye(4)]).to(G).expand(8, -1, -1)
    bounds = torch.full((8, 8), 50.0, dtype=torch.float64)
    problem = QP(q=torch.zeros_like(z), G=torch.cat([G, box], 1), h=torch.cat([h, bounds], 1))
    forward = engine.solve(problem, solver=solver)
    assert set(forward.status) == {"optimal"}
    assert all("nonunique" in flags for flags in forward.flags)
    assert bool((forward.solution.lam == 0).all())
    assert set(engine.vjp(forward, {"z": torch.ones_like(z)}).gradient_status) == {"nonunique"}


@pytest.mark.parametrize("solver", NAMES)
def test_vertex_with_more_rows_than_variables_through_it(solver):
    rows = numbers([1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0])
    problem = QP(q=numbers(-1.0, -1.0), G=rows, h=numbers(1.0, 1.0, 2.0, 0.0))
    forward = engine.solve(problem, solver=solver)
    assert forward.status == ("optimal",)
    torch.testing.assert_close(forward.solution.z, numbers([1.0, 1.0]), rtol=0, atol=1e-10)
    assert forward.flags[0]


@pytest.mark.parametrize("own", [{"algorithm": "simplex"}, {"algorithm": "ipm"}, {"presolve": True}], ids=str)
def test_every_algorithm_of_highs_ends_at_the_vertex(own):
    problem, z, *_ = vertex_lp(n=10, m=20, p=3, seed=2)
    forward = engine.solve(problem, solver="highs", options=SolverOptions(own=own))
    assert set(forward.status) == {"optimal"}
    assert np.abs(forward.solution.z.numpy() - z).max() < 1e-10


def test_time_limit_of_highs_is_kept_and_said():
    problem, *_ = vertex_lp(n=150, m=400, p=10, batch=1, seed=3)
    forward = engine.solve(problem, solver="highs", options=SolverOptions(own={"time_limit_s": 0.001}))
    assert forward.status == ("max_iterations",)
    assert forward.measures["ran_out_of_time"].tolist() == [1.0]
