"""`smoothed`: each smoothing against central differences of its own solution map, computed without the method."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from argrad.problems import QP, Flag
from argrad_service import engine
from argrad_service.engine import SolverOptions
from tests.solvers.linear import directions, draw_lp, form, inner, slope, times

pytestmark = pytest.mark.slow

D = torch.float64
VECTORS = ("q", "h", "b")
KNOWN = [(6, 14, 2, False), (5, 12, 1, True), (4, 9, 1, False)]


def barrier_point(problem: QP, t: float, start: Tensor) -> Tensor:
    """The minimiser of qᵀz − (1/t) Σ log s on Az = b: plain Newton on the dense equations, one problem at a time."""
    G, A = (block.expand(3, *block.shape[-2:]) for block in (problem.G, problem.A))
    points = []
    for i in range(3):
        z = start[i] + torch.linalg.pinv(A[i]) @ (problem.b[i] - A[i] @ start[i])
        basis = torch.linalg.svd(A[i])[2][problem.p :].mT
        for k in range(-3, 1):
            for _ in range(40):
                s = problem.h[i] - G[i] @ z
                gradient = t * 10.0**k * problem.q[i] + G[i].mT @ (1 / s)
                hessian = G[i].mT @ torch.diag(s**-2) @ G[i]
                move = basis @ torch.linalg.solve(basis.mT @ hessian @ basis, -basis.mT @ gradient)
                decrement = float((move @ hessian @ move).sqrt())
                z = z + move * (1.0 if decrement < 0.25 else 1 / (1 + decrement))
        points.append(z)
    return torch.stack(points)


def cotangent(n: int) -> Tensor:
    return torch.randn(3, n, generator=torch.Generator().manual_seed(9), dtype=D)


@pytest.mark.parametrize("t", [10.0, 1000.0])
@pytest.mark.parametrize(("n", "m", "p", "shared"), KNOWN)
def test_barrier(n: int, m: int, p: int, shared: bool, t: float):
    known = draw_lp(n, m, p, shared=shared, seed=1)
    g = cotangent(n)
    forward = engine.solve(known.problem, solver="pdipm")
    back = engine.vjp(forward, {"z": g}, method="smoothed", options={"smoothing": "barrier", "t": t})
    assert back.gradient_status == ("ok",) * 3
    assert back.flags == ((Flag.SMOOTHED,),) * 3
    interior = engine.solve(
        known.problem, solver="barrier", options=SolverOptions(tolerance=0.1, own={"polish": False, "epsilon": 0.1})
    ).solution.z
    along = directions(known.problem, VECTORS)
    reference = slope(lambda problem: (g * barrier_point(problem, t, interior)).sum(), known.problem, along)
    assert inner(form(forward, back, VECTORS), along) == pytest.approx(reference, rel=1e-6)
    moved = (barrier_point(known.problem, t, interior) - known.z).norm(dim=1)
    torch.testing.assert_close(back.measures["smoothing_distance"], moved, rtol=1e-6, atol=1e-12)
    assert back.adjoint.z.abs().max() > 1e-8  # ∂q is not zero


def test_barrier_point_of_the_solver_has_all_six_gradients():
    known = draw_lp(6, 14, 2, seed=1)
    names = ("q", "G", "h", "A", "b")
    options = SolverOptions(tolerance=1e-2, own={"polish": False, "epsilon": 1e-2})
    upstream = {"z": cotangent(6), "lam": torch.randn(3, 14, dtype=D), "nu": torch.randn(3, 2, dtype=D)}

    def value(problem: QP) -> Tensor:
        found = engine.solve(problem, solver="barrier", options=options).solution.blocks()
        return torch.stack([(found[name] * g).sum() for name, g in upstream.items()]).sum()

    forward = engine.solve(known.problem, solver="barrier", options=options)
    back = engine.vjp(forward, upstream, method="smoothed")
    assert (back.measures["smoothing_distance"] == 0).all()
    assert back.measures["t"].tolist() == forward.measures["t"].tolist()
    along = directions(known.problem, names)
    reference = slope(value, known.problem, along)
    assert inner(form(forward, back, names), along) == pytest.approx(reference, rel=1e-6)


def test_barrier_and_unrolled_agree_on_the_barrier_point():
    known = draw_lp(6, 14, 2, seed=1)
    options = SolverOptions(tolerance=1e-3, own={"polish": False, "epsilon": 1e-3})
    forward = engine.solve(known.problem, solver="barrier", options=options)
    upstream = {"z": cotangent(6).expand(2, -1, -1), "s": torch.ones(2, 3, 14, dtype=D)}
    smoothed, unrolled = (engine.vjp(forward, upstream, method=name).adjoint for name in ("smoothed", "unrolled"))
    for name in ("z", "nu", "mu"):
        torch.testing.assert_close(getattr(smoothed, name), getattr(unrolled, name), rtol=1e-6, atol=1e-8)


def test_a_sharp_barrier_approaches_the_vertex():
    known = draw_lp(6, 14, 2, seed=1)
    forward = engine.solve(known.problem, solver="pdipm")
    exact = engine.vjp(forward, {"z": cotangent(6)}, method="kkt").adjoint
    errors = []
    for t in (1e2, 1e5, 1e8):
        found = engine.vjp(forward, {"z": cotangent(6)}, method="smoothed", options={"t": t})
        errors.append(float((found.adjoint.mu - exact.mu).norm() + found.adjoint.z.norm()))
    assert errors[0] > 100 * errors[1] > 1e4 * errors[2]


@pytest.mark.parametrize("gamma", [0.1, 3.0])
@pytest.mark.parametrize(("n", "m", "p", "shared"), KNOWN)
def test_quadratic(n: int, m: int, p: int, shared: bool, gamma: float):
    known = draw_lp(n, m, p, shared=shared, seed=1)
    g = cotangent(n)
    forward = engine.solve(known.problem, solver="pdipm")
    back = engine.vjp(forward, {"z": g}, method="smoothed", options={"smoothing": "quadratic", "gamma": gamma})
    assert back.gradient_status == ("ok",) * 3
    assert all(Flag.SMOOTHED in flags for flags in back.flags)

    def solution(problem: QP) -> Tensor:
        return engine.solve(QP(**problem.parameters() | {"Q": gamma * torch.eye(n, dtype=D)})).solution.z

    along = directions(known.problem, VECTORS)
    reference = slope(lambda problem: (g * solution(problem)).sum(), known.problem, along)
    assert inner(form(forward, back, VECTORS), along) == pytest.approx(reference, rel=1e-6)
    moved = (solution(known.problem) - known.z).norm(dim=1)
    torch.testing.assert_close(back.measures["smoothing_distance"], moved, rtol=1e-8, atol=1e-9)


def simplex(q: Tensor, h: float = 0.0) -> QP:
    n = q.shape[-1]
    ones = torch.ones(1, n, dtype=D)
    return QP(q=q, G=-torch.eye(n, dtype=D), h=torch.full((n,), h, dtype=D), A=ones, b=torch.ones(1, dtype=D))


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_entropy_on_the_simplex_is_the_softmax(tau: float):
    q = torch.randn(3, 5, generator=torch.Generator().manual_seed(2), dtype=D)
    g = cotangent(5)
    forward = engine.solve(simplex(q), solver="pdipm")
    back = engine.vjp(forward, {"z": g}, method="smoothed", options={"smoothing": "entropy", "tau": tau})
    assert back.gradient_status == ("ok",) * 3
    leaf = q.clone().requires_grad_()
    z = torch.softmax(-leaf / tau, dim=-1)
    (expected,) = torch.autograd.grad((g * z).sum(), leaf)
    torch.testing.assert_close(back.adjoint.z, expected, rtol=1e-8, atol=1e-10)
    # On the simplex of size b the solution is b times the softmax.
    torch.testing.assert_close(-back.adjoint.nu[:, 0], (g * z).sum(-1).detach(), rtol=1e-8, atol=1e-10)
    moved = (z - forward.solution.z).norm(dim=1).detach()
    torch.testing.assert_close(back.measures["smoothing_distance"], moved, rtol=1e-8, atol=1e-10)


def test_entropy_without_lower_bounds_has_no_gradient():
    forward = engine.solve(simplex(torch.randn(3, 5, dtype=D), h=1.0), solver="pdipm")
    back = engine.vjp(forward, {"z": cotangent(5)}, method="smoothed", options={"smoothing": "entropy"})
    assert back.gradient_status == ("no_lower_bounds",) * 3
    assert back.adjoint.z.isnan().all()


def box(q: Tensor, h: Tensor) -> QP:
    eye = torch.eye(q.shape[-1], dtype=D)
    return QP(q=q, G=torch.cat([eye, -eye]), h=h)


def test_random_perturbations_of_a_box_have_their_closed_form():
    q, sigma, samples = torch.tensor([[0.1, -0.2], [0.0, 0.3], [-0.4, 0.05]], dtype=D), 0.3, 4000
    h = torch.tensor([1.0, 2.0, 1.0, 0.5], dtype=D)
    forward = engine.solve(box(q, h), solver="pdipm")
    g = cotangent(2)
    options = {"smoothing": "random", "sigma": sigma, "samples": samples, "seed": 1}
    back = engine.vjp(forward, {"z": g}, method="smoothed", options=options)
    # zᵢ is its upper bound with probability Φ(−qᵢ/σ), its lower one otherwise.
    density = torch.exp(-0.5 * (q / sigma) ** 2) / math.sqrt(2 * math.pi) / sigma
    upper = torch.special.ndtr(-q / sigma)
    expected = -g * density * (h[:2] + h[2:])
    miss = (back.adjoint.z - expected).norm(dim=1)
    error = back.measures["standard_error"]
    assert (miss < 4 * error).all()
    assert (error < 0.2 * g.norm(dim=1) * 5).all()
    spread = 4 * (g.abs() / (2 * math.sqrt(samples)))
    assert ((-back.adjoint.mu[:, :2] - g * upper).abs() < spread).all()
    assert ((-back.adjoint.mu[:, 2:] + g * (1 - upper)).abs() < spread).all()
    mean = upper * h[:2] - (1 - upper) * h[2:]
    expected_distance = (mean - forward.solution.z).norm(dim=1)
    torch.testing.assert_close(back.measures["smoothing_distance"], expected_distance, rtol=0, atol=0.1)


def test_random_errors_fall_with_the_root_of_the_samples_and_seeds_repeat():
    q, h = torch.tensor([[0.1, -0.2]], dtype=D), torch.ones(4, dtype=D)
    forward = engine.solve(box(q, h), solver="pdipm")

    def vjp(samples: int, seed: int) -> engine.Backward:
        options = {"smoothing": "random", "samples": samples, "seed": seed, "sigma": 0.3}
        return engine.vjp(forward, {"z": torch.ones(1, 2, dtype=D)}, method="smoothed", options=options)

    few, many = vjp(100, 0), vjp(1600, 0)
    assert float(many.measures["standard_error"]) == pytest.approx(float(few.measures["standard_error"]) / 4, rel=0.3)
    assert torch.equal(few.adjoint.z, vjp(100, 0).adjoint.z)
    assert not torch.equal(few.adjoint.z, vjp(100, 1).adjoint.z)


@pytest.mark.parametrize("smoothing", ["barrier", "quadratic", "random"])
def test_a_batch_is_a_loop_of_singles(smoothing: str):
    problem = draw_lp(5, 12, 1, seed=2).problem
    g, options = cotangent(5), {"smoothing": smoothing, "samples": 20, "sigma": 0.01}
    together = engine.vjp(engine.solve(problem, solver="pdipm"), {"z": g}, method="smoothed", options=options)
    assert together.gradient_status == ("ok",) * 3
    for i in range(3):
        one = QP(**{name: block[i] for name, block in problem.parameters().items()})
        forward = engine.solve(one, solver="pdipm")
        alone = engine.vjp(forward, {"z": g[i : i + 1]}, method="smoothed", options=options)
        torch.testing.assert_close(alone.adjoint.z[0], together.adjoint.z[i], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(alone.adjoint.mu[0], together.adjoint.mu[i], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("smoothing", ["barrier", "quadratic", "random"])
def test_many_cotangents_are_one_after_the_other(smoothing: str):
    problem = draw_lp(5, 12, 1, shared=True, seed=2).problem
    options = {"smoothing": smoothing, "samples": 20, "sigma": 0.01}
    forward = engine.solve(problem, solver="pdipm")
    upstream = {"z": torch.randn(4, 3, 5, dtype=D), "s": torch.randn(4, 3, 12, dtype=D)}
    together = engine.vjp(forward, upstream, method="smoothed", options=options).adjoint
    for i in range(4):
        one = engine.vjp(
            forward, {name: block[i] for name, block in upstream.items()}, method="smoothed", options=options
        ).adjoint
        torch.testing.assert_close(one.z, together.z[i], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(one.mu, together.mu[i], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("smoothing", ["barrier", "quadratic", "random"])
def test_an_edge_of_solutions_has_a_smoothed_gradient(smoothing: str):
    problem = box(torch.tensor([[0.0, 1.0]], dtype=D), torch.ones(4, dtype=D))
    forward = engine.solve(problem, solver="pdipm")
    assert Flag.NONUNIQUE in forward.flags[0]
    back = engine.vjp(forward, {"z": torch.ones(1, 2, dtype=D)}, method="smoothed", options={"smoothing": smoothing})
    assert back.gradient_status == ("ok",)
    assert back.adjoint.z[0, 0] < -0.1


@pytest.mark.parametrize("smoothing", ["barrier", "quadratic", "random"])
def test_what_has_no_solution_has_no_gradient_and_harms_no_batchmate(smoothing: str):
    h = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, -2.0, 0.0]], dtype=D)
    q, g, options = torch.tensor([0.3, -1.0], dtype=D), torch.ones(2, 2, dtype=D), {"smoothing": smoothing}
    back = engine.vjp(engine.solve(box(q, h), solver="pdipm"), {"z": g}, method="smoothed", options=options)
    assert back.gradient_status == ("ok", "infeasible")
    assert back.adjoint.z[1].isnan().all()
    alone = engine.vjp(engine.solve(box(q, h[:1]), solver="pdipm"), {"z": g[:1]}, method="smoothed", options=options)
    torch.testing.assert_close(alone.adjoint.mu[0], back.adjoint.mu[0], rtol=1e-10, atol=1e-12)


def test_a_problem_without_an_interior_has_no_barrier_but_a_quadratic_gradient():
    problem = box(torch.tensor([[1.0, 1.0]], dtype=D), torch.tensor([1.0, 1.0, 0.0, -1.0], dtype=D))
    forward, g = engine.solve(problem, solver="pdipm"), {"z": torch.ones(1, 2, dtype=D)}
    assert engine.vjp(forward, g, method="smoothed").gradient_status == ("no_interior",)
    quadratic = engine.vjp(forward, g, method="smoothed", options={"smoothing": "quadratic"})
    assert quadratic.gradient_status == ("ok",)


def test_samples_without_a_solution_refuse_the_gradient():
    problem = QP(q=torch.tensor([[0.01, 1.0]], dtype=D), G=-torch.eye(2, dtype=D), h=torch.zeros(2, dtype=D))
    forward = engine.solve(problem, solver="pdipm")
    g = {"z": torch.ones(1, 2, dtype=D)}
    back = engine.vjp(forward, g, method="smoothed", options={"smoothing": "random", "samples": 10})
    assert back.gradient_status == ("unsolvable_sample",)


def test_qps_take_a_barrier_too_and_points_of_callers():
    root = torch.randn(4, 4, generator=torch.Generator().manual_seed(3), dtype=D)
    known = draw_lp(4, 9, 0, seed=1)
    problem = QP(**known.problem.parameters() | {"Q": root @ root.mT})
    forward = engine.solve(problem, solver="pdipm")
    exact = engine.vjp(forward, {"z": cotangent(4)}).adjoint
    at_point = engine.at_point(problem, forward.solution)
    for outcome in (forward, at_point):
        found = engine.vjp(outcome, {"z": cotangent(4)}, method="smoothed", options={"t": 1e10}).adjoint
        torch.testing.assert_close(found.z, exact.z, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(times(problem.G.mT, found.mu), times(problem.G.mT, exact.mu), rtol=1e-5, atol=1e-5)


def test_a_sharp_barrier_keeps_the_small_eigenvalues_of_Q():
    small = 2.0**-16
    Q, G = torch.diag(torch.tensor([4.0, 1.0, small], dtype=torch.float64)), torch.tensor([[1.0, 1.0, 0.0]]).double()
    problem = QP(Q=Q, q=torch.tensor([-4.0, -2.0, -small], dtype=torch.float64), G=G, h=torch.tensor([1.0]).double())
    forward = engine.solve(problem, solver="pdipm")
    upstream = {"z": torch.tensor([[1.0, -2.0, 1.0]], dtype=torch.float64)}
    for t in (1e8, 1e10, 1e12):
        back = engine.vjp(forward, upstream, method="smoothed", options={"smoothing": "barrier", "t": t})
        exact = engine.vjp(forward, upstream, method="kkt")
        assert back.gradient_status == ("ok",)
        torch.testing.assert_close(back.adjoint.z, exact.adjoint.z, rtol=100 / t + 1e-9, atol=100 / t + 1e-9)
