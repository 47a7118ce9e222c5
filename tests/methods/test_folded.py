"""`folded`: every map and linear solver against a dense oracle; the spectral radius; the linear solvers alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from argrad.errors import ProblemError
from argrad.problems import QP, Flag, Solution, gradients
from argrad_service import engine
from argrad_service.engine import SolverOptions
from argrad_service.engine.backward import linear
from argrad_service.engine.backward.linear import SOLVERS as LINEAR
from argrad_service.engine.forward.fixed_points import admm_map, pgd_map
from argrad_service.engine.options import never_stop
from tests.engine.qps import Case, draw, oracle_gradients, relative_error
from tests.engine.test_grid import CASES
from tests.solvers.linear import draw_lp
from tests.solvers.test_entropy import draw as draw_entropy

pytestmark = pytest.mark.slow

D = torch.float64
BLOCKS = ("z", "nu", "lam", "s")
MAPS = [
    {},
    {"linear": "bicgstab"},
    {"linear": "lfpi"},
    {"rho": 1.0},
    {"map": "pgd"},
    {"map": "pgd", "linear": "bicgstab"},
]


@pytest.mark.parametrize("options", MAPS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_are_exact(case: Case, options: dict[str, object]):
    if case.size > 1 and options not in MAPS[:3]:
        pytest.skip(
            "maps without a penalty for each row need well-scaled data; the measures and the refusal are tested"
        )
    known = draw(case, 1)
    upstream = {name: np.random.default_rng(1).normal(size=getattr(known, name).shape) for name in BLOCKS}
    forward = engine.solve(known.problem)
    backward = engine.vjp(
        forward, {k: torch.from_numpy(g) for k, g in upstream.items()}, method="folded", options=options
    )
    assert set(backward.gradient_status) == {"ok"}
    names = list(known.problem.parameters())
    formed = gradients(forward.solution, backward.adjoint, wrt=names, batched=names)
    mine = [{k: v[i].numpy() for k, v in formed.items()} for i in range(case.batch)]
    reference = [{k: g[k] for k in names} for g in oracle_gradients(known.problem, known, upstream)]
    assert relative_error(mine, reference) <= (1e-7 if case.size == 1.0 else 1e-6)
    assert set(backward.measures) == {"spectral_radius", "linear_iterations", "adjoint_residual"}


@pytest.mark.parametrize("options", [{"rho": 1.0}, {"map": "pgd"}], ids=str)
def test_what_is_too_badly_conditioned_is_refused_or_right(options: dict[str, object]):
    known = draw(Case("badly-scaled", 8, 8, 2, size=1e3), 1)
    forward = engine.solve(known.problem)
    upstream = {"z": torch.ones(3, 8, dtype=D)}
    exact = engine.vjp(forward, upstream, method="kkt").adjoint
    backward = engine.vjp(forward, upstream, method="folded", options=options)
    for i, status in enumerate(backward.gradient_status):
        assert status in ("ok", "inaccurate")
        if status == "ok":
            torch.testing.assert_close(backward.adjoint.z[i], exact.z[i], rtol=1e-3, atol=1e-4)
        else:
            assert backward.adjoint.z[i].isnan().all()


@pytest.mark.parametrize("map", ["admm", "pgd"])
def test_the_spectral_radius_is_that_of_the_map(map: str):
    known = draw(Case("inequalities-only", 7, 5, 0, batch=2), 3)
    forward = engine.solve(known.problem)
    of = admm_map(forward, rho=1.0) if map == "admm" else pgd_map(forward)
    size = 5 if map == "admm" else 7
    Phi = torch.stack([of.vjp(e.expand(2, 1, size))[:, 0] for e in torch.eye(size, dtype=D)], dim=-1)
    radius = torch.linalg.eigvals(Phi).abs().amax(-1)
    options = {"map": map, "power_iterations": 400} | ({"rho": 1.0} if map == "admm" else {})
    backward = engine.vjp(forward, {"z": torch.ones(2, 7, dtype=D)}, method="folded", options=options)
    torch.testing.assert_close(backward.measures["spectral_radius"], radius, rtol=2e-2, atol=1e-6)


def test_iteration_converges_at_the_rate_of_the_spectral_radius():
    """Theorem 1: the number of iterations to a tolerance is about log(tolerance)/log ρ(Φ)."""
    known = draw(Case("inequalities-only", 7, 5, 0, batch=4), 3)
    forward = engine.solve(known.problem)
    upstream = {"z": torch.ones(4, 7, dtype=D)}
    options = {"linear": "lfpi", "rho": 1.0, "tolerance": 1e-10, "power_iterations": 400}
    backward = engine.vjp(forward, upstream, method="folded", options=options)
    expected = np.log(1e-10) / np.log(backward.measures["spectral_radius"].numpy())
    taken = backward.measures["linear_iterations"].numpy()
    assert (taken < 1.3 * expected + 5).all()
    assert (taken > 0.5 * expected - 5).all()
    krylov = engine.vjp(forward, upstream, method="folded", options=options | {"linear": "gmres"})
    assert (krylov.measures["linear_iterations"] < backward.measures["linear_iterations"]).all()


@pytest.mark.parametrize("linear", ["lfpi", "gmres", "bicgstab"])
def test_too_few_iterations_are_refused(linear: str):
    known = draw(Case("both", 10, 8, 2), 3)
    forward = engine.solve(known.problem)
    options = {"linear": linear, "rho": 1.0, "max_iterations": 2}
    backward = engine.vjp(forward, {"z": torch.ones(3, 10, dtype=D)}, method="folded", options=options)
    assert set(backward.gradient_status) == {"inaccurate"}
    assert backward.adjoint.z.isnan().all()


@pytest.mark.parametrize("solver", ["auto", "pdipm", "admm", "pgd"])
def test_any_solver_may_have_found_the_point(solver: str):
    known = draw(Case("both", 6, 5, 2), 3)
    forward = engine.solve(known.problem, solver=solver)
    upstream = {"z": torch.ones(3, 6, dtype=D)}
    exact = engine.vjp(forward, upstream, method="kkt").adjoint
    found = engine.vjp(forward, upstream, method="folded").adjoint
    for name, block in exact.blocks().items():
        torch.testing.assert_close(found.blocks()[name], block, rtol=1e-8, atol=1e-9)


def test_a_callers_point():
    known = draw(Case("both", 6, 5, 2), 3)
    at = engine.at_point(known.problem, Solution(**{name: torch.from_numpy(getattr(known, name)) for name in BLOCKS}))
    upstream = {"z": torch.ones(3, 6, dtype=D)}
    exact = engine.vjp(at, upstream, method="kkt").adjoint
    found = engine.vjp(at, upstream, method="folded").adjoint
    torch.testing.assert_close(found.z, exact.z, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("map", ["admm", "pgd"])
@pytest.mark.parametrize("shared", [False, True])
def test_vertices_of_linear_programs(map: str, shared: bool):
    known = draw_lp(6, 14, 2, shared=shared)
    forward = engine.solve(known.problem, solver="pdipm")
    generator = torch.Generator().manual_seed(5)
    upstream = {k: torch.randn(t.shape, generator=generator, dtype=D) for k, t in forward.solution.blocks().items()}
    exact = engine.vjp(forward, upstream, method="kkt").adjoint
    found = engine.vjp(forward, upstream, method="folded", options={"map": map}).adjoint
    for name, block in exact.blocks().items():
        torch.testing.assert_close(found.blocks()[name], block, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("map", ["admm", "pgd"])
def test_degenerate_points(map: str):
    eye = torch.eye(2, dtype=D)
    ones = torch.ones(1, 2, dtype=D)
    weak = engine.solve(QP(Q=eye, q=torch.tensor([0.0, 1.0], dtype=D), G=-eye, h=torch.zeros(2, dtype=D)))
    backward = engine.vjp(weak, {"z": ones}, method="folded", options={"map": map})
    torch.testing.assert_close(backward.adjoint.z, torch.tensor([[-1.0, 0.0]], dtype=D))
    assert backward.flags == ((Flag.DEGENERATE,),)
    G = torch.tensor([[1.0, 0], [1, 0]], dtype=D)
    twice = engine.solve(QP(Q=eye, q=torch.tensor([-3.0, -1.0], dtype=D), G=G, h=torch.zeros(2, dtype=D)))
    backward = engine.vjp(twice, {"z": ones}, method="folded", options={"map": map})
    torch.testing.assert_close(backward.adjoint.z, torch.tensor([[0.0, -1.0]], dtype=D))
    torch.testing.assert_close(backward.adjoint.mu @ G, torch.tensor([[-1.0, 0.0]], dtype=D))
    refused = engine.vjp(twice, {"lam": ones}, method="folded", options={"map": map})
    assert refused.gradient_status == ("dependent",)
    # A face of solutions: minimise −x − y over x + y ≤ 1, x, y ≥ 0.
    face = QP(q=torch.tensor([-1.0, -1.0], dtype=D), G=torch.cat([torch.ones(1, 2, dtype=D), -eye]), h=D_of(1, 0, 0))
    backward = engine.vjp(engine.solve(face), {"z": ones}, method="folded", options={"map": map})
    assert backward.gradient_status[0] != "ok"
    assert backward.adjoint.z.isnan().all()


def D_of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=D)


def test_a_failed_problem_leaves_its_neighbours_alone():
    good = draw(Case("both", 6, 5, 2, batch=3), 0).problem
    tensors = dict(good.parameters())
    bad = {**tensors, "Q": tensors["Q"].clone()}
    bad["Q"][1] = -bad["Q"][1]
    upstream = {"z": torch.ones(3, 6, dtype=D)}
    exact = engine.vjp(engine.solve(good), upstream, method="folded").adjoint
    backward = engine.vjp(engine.solve(QP(**bad)), upstream, method="folded")
    assert backward.gradient_status == ("ok", "nonconvex", "ok")
    torch.testing.assert_close(backward.adjoint.z[[0, 2]], exact.z[[0, 2]], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", LINEAR)
def test_linear_solvers_solve_every_system_of_a_batch(name: str):
    """Systems of very different difficulty, one with a zero right-hand side, one that is singular and consistent."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(4, 12, 12, dtype=D, generator=generator))[0]
    values = torch.stack([torch.linspace(0, top, 12, dtype=D) for top in (0.1, 0.9, 0.95, 0.5)])
    values[3, -1] = 1.0
    Phi = turn @ torch.diag_embed(values) @ turn.mT
    right = torch.randn(4, 2, 12, dtype=D, generator=generator)
    right[1, 1] = 0
    right[3] -= (right[3] @ turn[3, :, -1:]) * turn[3, :, -1]
    found = LINEAR[name](lambda v: v @ Phi, right, tolerance=1e-11, max_iterations=2000, should_stop=never_stop)
    assert found.is_converged.all()
    torch.testing.assert_close(found.v - found.v @ Phi, right, rtol=0, atol=1e-9)
    assert found.iterations[0] < found.iterations[2]


def test_gmres_restarts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear, "RESTART", 4)
    generator = torch.Generator().manual_seed(0)
    Phi = 0.05 * torch.randn(2, 30, 30, dtype=D, generator=generator)
    right = torch.randn(2, 1, 30, dtype=D, generator=generator)
    found = linear.gmres(lambda v: v @ Phi, right, tolerance=1e-12, max_iterations=500, should_stop=never_stop)
    assert found.is_converged.all()
    torch.testing.assert_close(found.v - found.v @ Phi, right, rtol=0, atol=1e-10)


def test_it_stops_when_nobody_waits():
    known = draw(Case("both", 6, 5, 2), 0)
    asked = []

    def should_stop() -> bool:
        return len(asked) > 0

    forward = engine.solve(known.problem, solver="pdipm", options=SolverOptions(should_stop=should_stop))
    asked.append(True)
    with pytest.raises(engine.Stopped):
        engine.vjp(forward, {"z": torch.ones(3, 6, dtype=D)}, method="folded", options={"rho": 1.0})


@pytest.mark.parametrize("size", [{}, {"n": 20, "m": 8, "p": 3}, {"n": 12, "rank": 4}, {"tau": 0.01}], ids=str)
@pytest.mark.parametrize("options", MAPS[:4], ids=str)
def test_problems_with_entropy(size: dict[str, float], options: dict[str, object]):
    forward = engine.solve(QP(**draw_entropy(1, **size)), solver="pdipm")
    generator = torch.Generator().manual_seed(5)
    upstream = {k: torch.randn(t.shape, generator=generator, dtype=D) for k, t in forward.solution.blocks().items()}
    exact = engine.vjp(forward, upstream, method="kkt").adjoint
    backward = engine.vjp(forward, upstream, method="folded", options=options)
    assert set(backward.gradient_status) == {"ok"}
    for name, block in exact.blocks().items():
        torch.testing.assert_close(backward.adjoint.blocks()[name], block, rtol=1e-8, atol=1e-9)
    with pytest.raises(ProblemError, match=r"differentiation\.options\.map"):
        engine.vjp(forward, upstream, method="folded", options={"map": "pgd"})


def test_a_nearly_singular_Q_has_a_gradient():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 3, 5, generator=generator, dtype=torch.float64)
    Q = root.mT @ root + 2.0**-16 * torch.eye(5, dtype=torch.float64)
    G = torch.randn(6, 6, 5, generator=generator, dtype=torch.float64)
    z, q = torch.randn(6, 5, generator=generator, dtype=torch.float64), torch.zeros(6, 5, dtype=torch.float64)
    h = (G @ z.unsqueeze(-1)).squeeze(-1)
    h[:, 1:] += 1.0
    q = -(Q @ z.unsqueeze(-1)).squeeze(-1) - G[:, 0]
    forward = engine.solve(QP(Q=Q, q=q, G=G, h=h), solver="pdipm")
    upstream = {"z": torch.randn(6, 5, generator=generator, dtype=torch.float64)}
    back = engine.vjp(forward, upstream, method="folded")
    assert back.gradient_status == ("ok",) * 6
    assert (back.measures["adjoint_residual"] <= 1e-8).all()
    exact = engine.vjp(forward, upstream, method="kkt").adjoint.z
    assert ((back.adjoint.z - exact).norm(dim=1) <= 1e-5 * exact.norm(dim=1)).all()
