"""What all solvers have in common that are a library: exact where it is approximate, honest where it gives up."""

import itertools
import threading
import time

import numpy as np
import pytest
import torch

from argrad.problems import QP, Solution
from argrad_service import engine
from argrad_service.engine import SolverOptions, Stopped
from argrad_service.engine.registry import SOLVERS
from tests.engine.qps import Case, draw, oracle_gradients, relative_error
from tests.solvers.linear import draw_lp

NAMES = ("osqp", "clarabel", "highs", "proxqp")

CASES = [
    Case("regular", n=8, m=10, p=3, batch=6),
    Case("shared Q and rows", n=8, m=10, p=3, batch=6, shared=frozenset("QGA")),
    Case("shared Q", n=8, m=10, p=3, batch=3, shared=frozenset("Q")),
    Case("batch of one", n=7, m=6, p=2, batch=1),
    Case("no inequalities", n=6, m=0, p=2),
    Case("no equalities", n=6, m=8, p=0),
    Case("no constraints", n=6, m=0, p=0),
    Case("many rows", n=5, m=25, p=0),
]


@pytest.fixture(params=NAMES)
def solver(request):
    if not SOLVERS[request.param].is_installed:
        pytest.skip(f"{request.param} is not installed: extra {SOLVERS[request.param].extra!r}")
    return request.param


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def own(solver, **options):
    return SolverOptions(own=options)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exact_solution_and_gradients(solver, case):
    known = draw(case, 0)
    forward = engine.solve(known.problem, solver=solver)
    assert set(forward.status) == {"optimal"}
    assert forward.flags == ((),) * case.batch
    for name in ("z", "nu", "lam", "s"):
        found, wanted = getattr(forward.solution, name).numpy(), getattr(known, name)
        assert np.abs(found - wanted).max(initial=0) < 1e-10, name
    rng = np.random.default_rng(1)
    upstream = {name: rng.normal(size=getattr(known, name).shape) for name in ("z", "nu", "lam", "s")}
    backward = engine.vjp(forward, {name: torch.from_numpy(block) for name, block in upstream.items()})
    assert set(backward.gradient_status) == {"ok"}
    reference = oracle_gradients(known.problem, known, upstream)
    mine = []
    for i in range(case.batch):
        adjoint = [getattr(backward.adjoint, name)[i].numpy() for name in ("z", "nu", "mu")]
        (dz, dnu, mu), z, nu, lam = adjoint, known.z[i], known.nu[i], known.lam[i]
        mine.append(
            {
                "Q": 0.5 * (np.outer(dz, z) + np.outer(z, dz)),
                "q": dz,
                "G": np.outer(mu, z) + np.outer(lam, dz),
                "h": -mu,
                "A": np.outer(dnu, z) + np.outer(nu, dz),
                "b": -dnu,
            }
        )
    # The oracle takes the cotangent of s into its μ, and so does the adjoint.
    assert relative_error(mine, reference) < 1e-8


def test_singular_hessian(solver):
    known = draw(Case("singular", n=10, m=12, p=3, rank=6), 1)
    forward = engine.solve(known.problem, solver=solver)
    assert set(forward.status) == {"optimal"}
    assert np.abs(forward.solution.z.numpy() - known.z).max() < 1e-9


def test_a_gradient_against_central_differences(solver):
    known = draw(Case("differences", n=6, m=7, p=2, batch=2), 3)
    rng = np.random.default_rng(4)
    g = torch.from_numpy(rng.normal(size=known.z.shape))
    adjoint = engine.vjp(engine.solve(known.problem, solver=solver), {"z": g}).adjoint
    parameters = known.problem.parameters()
    step = {name: torch.from_numpy(rng.normal(size=t.shape)) for name, t in parameters.items()}
    loss = []
    for sign in (1, -1):
        moved = QP(**{name: t + sign * 1e-6 * step[name] for name, t in parameters.items()})
        loss.append((engine.solve(moved, solver=solver).solution.z * g).sum())
    z, nu, lam = (torch.from_numpy(t) for t in (known.z, known.nu, known.lam))
    formed = {
        "Q": 0.5 * (adjoint.z[:, :, None] * z[:, None] + z[:, :, None] * adjoint.z[:, None]),
        "q": adjoint.z,
        "G": adjoint.mu[:, :, None] * z[:, None] + lam[:, :, None] * adjoint.z[:, None],
        "h": -adjoint.mu,
        "A": adjoint.nu[:, :, None] * z[:, None] + nu[:, :, None] * adjoint.z[:, None],
        "b": -adjoint.nu,
    }
    slope = sum((formed[name] * step[name]).sum() for name in parameters)
    assert float(slope) == pytest.approx(float(loss[0] - loss[1]) / 2e-6, rel=1e-6)


def test_batch_equals_loop_of_singles_whatever_failed_beside(solver):
    known = draw(Case("loop", n=6, m=8, p=0, batch=5), 5)
    problem = QP(
        **(known.problem.parameters() | {"h": known.problem.h.clone(), "G": known.problem.G.clone()}),
    )
    problem.G[2, 1], problem.h[2, 0], problem.h[2, 1] = -problem.G[2, 0], -1.0, -1.0  # infeasible
    together = engine.solve(problem, solver=solver)
    assert [str(status) for status in together.status] == ["optimal"] * 2 + ["infeasible"] + ["optimal"] * 2
    for i in (0, 1, 3, 4):
        alone = engine.solve(QP(**{k: t[i] for k, t in problem.parameters().items()}), solver=solver)
        torch.testing.assert_close(alone.solution.z[0], together.solution.z[i], rtol=0, atol=1e-12)


EYE = torch.eye(2, dtype=torch.float64)
ONES = torch.ones(2, dtype=torch.float64)

WITHOUT_SOLUTION = {
    "infeasible": QP(Q=EYE, q=ONES, G=numbers([1.0, 0.0], [-1.0, 0.0]), h=numbers(-1.0, -1.0)),
    "infeasible equalities": QP(Q=EYE, q=ONES, A=numbers([1.0, 1.0], [2.0, 2.0]), b=numbers(1.0, 3.0)),
    "unbounded": QP(Q=torch.diag(numbers(1.0, 0.0)), q=numbers(1.0, -1.0), G=numbers([1.0, 0.0]), h=numbers(1.0)),
    "nonconvex": QP(Q=torch.diag(numbers(1.0, -1.0)), q=ONES, G=EYE, h=ONES),
}


@pytest.mark.parametrize("name", WITHOUT_SOLUTION)
def test_says_why_there_is_no_solution(solver, name):
    problem = WITHOUT_SOLUTION[name]
    forward = engine.solve(problem, solver=solver)
    assert forward.status == (name.split()[0],)
    backward = engine.vjp(forward, {"z": torch.ones(1, 2, dtype=torch.float64)})
    assert backward.gradient_status == (name.split()[0],)
    assert bool(torch.isnan(backward.adjoint.z).all())


def test_weakly_active_row_is_flagged(solver):
    problem = QP(Q=EYE, q=numbers(0.0, 1.0), G=numbers([1.0, 0.0]), h=numbers(0.0))
    forward = engine.solve(problem, solver=solver)
    assert forward.flags == (("degenerate",),)
    backward = engine.vjp(forward, {"z": torch.ones(1, 2, dtype=torch.float64)})
    assert backward.gradient_status == ("ok",)
    torch.testing.assert_close(backward.adjoint.z, -torch.ones(1, 2, dtype=torch.float64))


def test_a_row_that_cannot_bind_and_a_row_given_twice(solver):
    rows = numbers([1.0, 0.0], [1.0, 0.0], [0.0, 1.0])
    problem = QP(Q=EYE, q=numbers(-2.0, 1.0), G=rows, h=numbers(0.0, 0.0, float("inf")))
    forward = engine.solve(problem, solver=solver)
    assert forward.status == ("optimal",)
    torch.testing.assert_close(forward.solution.z, numbers([0.0, -1.0]), rtol=0, atol=1e-12)
    assert float(forward.solution.lam.sum()) == pytest.approx(2.0, abs=1e-10)
    assert set(forward.flags[0]) <= {"dependent", "degenerate"}
    assert forward.flags[0]


@pytest.mark.parametrize("name", ["osqp", "highs", "proxqp"])
def test_a_warm_start_ends_at_the_same_solution(name):
    if not SOLVERS[name].is_installed:
        pytest.skip(f"{name} is not installed: extra {SOLVERS[name].extra!r}")
    known = draw(Case("warm", n=8, m=10, p=3), 6)
    z, nu, lam, s = (torch.from_numpy(t) for t in (known.z, known.nu, known.lam, known.s))
    cold = engine.solve(known.problem, solver=name)
    warm = engine.solve(known.problem, solver=name, warm_start=Solution(z=z, nu=nu, lam=lam, s=s))
    torch.testing.assert_close(warm.solution.z, cold.solution.z, rtol=0, atol=1e-12)
    assert int(warm.iterations.sum()) <= int(cold.iterations.sum())


@pytest.mark.parametrize("name", ["osqp", "clarabel", "proxqp"])
def test_without_polish_the_answer_is_the_library_s_own(name):
    if not SOLVERS[name].is_installed:
        pytest.skip(f"{name} is not installed: extra {SOLVERS[name].extra!r}")
    known = draw(Case("own", n=8, m=10, p=3), 7)
    options = SolverOptions(tolerance=1e-4, own={"polish": False})
    forward = engine.solve(known.problem, solver=name, options=options)
    assert set(forward.status) == {"optimal"}
    error = np.abs(forward.solution.z.numpy() - known.z).max()
    assert 1e-12 < error < 1e-2


def test_the_iteration_limit_is_kept_and_said():
    known = draw(Case("limit", n=30, m=40, p=5, batch=2), 8)
    options = SolverOptions(max_iterations=1, own={"polish": False})
    for name in ("clarabel", "osqp"):
        forward = engine.solve(known.problem, solver=name, options=options)
        assert forward.status == ("max_iterations",) * 2, name
        assert int(forward.iterations.max()) <= {"clarabel": 1, "osqp": 100}[name]


def test_stops_before_and_while_it_runs(solver):
    known = draw(Case("stop", n=40, m=50, p=5, batch=200, shared=frozenset("QGA")), 9)
    with pytest.raises(Stopped):
        engine.solve(known.problem, solver=solver, options=SolverOptions(should_stop=lambda: True))
    asked = itertools.count()
    began = time.perf_counter()
    with pytest.raises(Stopped):
        engine.solve(known.problem, solver=solver, options=SolverOptions(should_stop=lambda: next(asked) > 0))
    assert time.perf_counter() - began < 5


def test_two_callers_at_once(solver):
    known = draw(Case("at once", n=6, m=8, p=2, batch=8), 10)
    errors = []

    def call():
        forward = engine.solve(known.problem, solver=solver)
        errors.append(np.abs(forward.solution.z.numpy() - known.z).max())

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(errors) < 1e-10


def test_says_nothing_on_standard_output(solver, capfd):
    known = draw(Case("quiet", n=5, m=6, p=0, batch=3), 11)
    engine.solve(known.problem, solver=solver)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(("of_costs", "of_rows"), [(1e-6, 1.0), (1.0, 1e4), (1e-9, 1e-4), (1e6, 1e-5)])
def test_a_vertex_is_found_whatever_the_units(solver, of_costs, of_rows):
    """The libraries' tolerances are absolute: costs of 1e-6 would meet them anywhere."""
    if "lp" not in SOLVERS[solver].kinds:
        pytest.skip(f"{solver} takes no linear program")
    known = draw_lp(6, 14, 2)
    given = known.problem.parameters()
    scaled = given | {"q": of_costs * given["q"], "h": of_rows * given["h"], "b": of_rows * given["b"]}
    forward = engine.solve(QP(**scaled), solver=solver)
    assert set(forward.status) == {"optimal"}
    assert forward.flags == ((),) * 3
    torch.testing.assert_close(forward.solution.z / of_rows, known.z, rtol=0, atol=1e-9)
    torch.testing.assert_close(forward.solution.lam / of_costs, known.lam, rtol=0, atol=1e-9)
    torch.testing.assert_close(forward.solution.nu / of_costs, known.nu, rtol=0, atol=1e-9)
