"""What is OSQP's own: its process for large problems, its blocks of iterations, what one problem leaves to the next."""

import time

import numpy as np
import pytest
import torch

from argrad_service import engine
from argrad_service.engine import SolverOptions, Stopped
from argrad_service.engine.forward import osqp_session
from argrad_service.engine.forward.osqp_session import Apart, Here, Numbers, Patterns
from tests.engine.qps import Case, draw

pytestmark = pytest.mark.slow


def random_problem(seed=0, n=8, r=6):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(n, n))
    P, A = root @ root.T + np.eye(n), rng.normal(size=(r, n))
    columns = np.repeat(np.arange(n), np.arange(1, n + 1))
    rows = np.concatenate([np.arange(j + 1) for j in range(n)])
    starts = np.concatenate([[0], np.cumsum(np.arange(1, n + 1))])
    settings = {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iter": 4000, "rho": 0.1}
    patterns = Patterns(
        n=n,
        r=r,
        P=(rows, starts),
        A=(np.tile(np.arange(r), n), np.arange(0, r * n + 1, r)),
        settings=settings,
    )
    numbers = Numbers(
        P=P[rows, columns], q=rng.normal(size=n), A=A.T.ravel(), l=np.full(r, -np.inf), u=rng.normal(size=r)
    )
    return patterns, numbers


def test_here_and_apart_agree_and_the_process_ends():
    patterns, numbers = random_problem()
    here, apart = Here(patterns), Apart(patterns, lambda: False)
    first = here.solve(numbers)
    assert first.status == "solved"
    again = Numbers(P=None, q=2 * numbers.q, A=None, l=numbers.l, u=numbers.u)
    for problem in (numbers, again):
        mine, theirs = Here(patterns).solve(numbers) if problem is numbers else here.solve(again), apart.solve(problem)
        assert mine.status == theirs.status
        np.testing.assert_allclose(mine.x, theirs.x, atol=1e-7)
    apart.close()
    assert apart._process.returncode is not None


def test_a_process_that_died_is_said():
    patterns, numbers = random_problem()
    apart = Apart(patterns, lambda: False)
    apart._process.kill()
    apart._process.wait()
    with pytest.raises(RuntimeError, match="OSQP's process ended with code -9"):
        apart.solve(numbers)
    apart.close()


def test_a_large_problem_is_solved_apart(monkeypatch):
    opened = []

    class Counted(Apart):
        def __init__(self, *args):
            opened.append(self)
            super().__init__(*args)

    monkeypatch.setattr(osqp_session, "MOST_HELD", 1.0)
    monkeypatch.setattr(osqp_session, "Apart", Counted)
    known = draw(Case("apart", n=10, m=12, p=3, batch=4), 0)
    forward = engine.solve(known.problem, solver="osqp")
    assert np.abs(forward.solution.z.numpy() - known.z).max() < 1e-10
    assert opened
    assert all(apart._process.returncode is not None for apart in opened)


def test_a_stop_ends_the_process_at_once(monkeypatch):
    monkeypatch.setattr(osqp_session, "MOST_HELD", 1.0)
    known = draw(Case("stop", n=300, m=300, p=0, batch=8), 0)
    began = time.perf_counter()
    with pytest.raises(Stopped):
        engine.solve(
            known.problem,
            solver="osqp",
            options=SolverOptions(should_stop=lambda: time.perf_counter() > began + 0.3),
        )
    assert time.perf_counter() - began < 5


def test_an_infeasible_problem_leaves_nothing_to_the_next_of_its_thread():
    patterns, numbers = random_problem()
    alone = Here(patterns).solve(numbers)
    after = Here(patterns)
    bounds = np.ones_like(numbers.u)
    nowhere = Numbers(P=numbers.P, q=numbers.q, A=np.zeros_like(numbers.A), l=bounds, u=bounds)
    assert after.solve(nowhere).status.startswith("primal infeasible")
    then = after.solve(numbers)
    np.testing.assert_allclose(then.x, alone.x, atol=1e-7)


def test_iterations_go_on_from_block_to_block(monkeypatch):
    monkeypatch.setattr(osqp_session, "BLOCK", (50, 50))
    known = draw(Case("blocks", n=20, m=30, p=4, batch=2), 1)
    options = SolverOptions(own={"polish": False})
    forward = engine.solve(known.problem, solver="osqp", options=options)
    assert set(forward.status) == {"optimal"}
    assert int(forward.iterations.max()) > 50


def test_its_own_options_are_its_own():
    known = draw(Case("options", n=6, m=7, p=2), 2)
    options = SolverOptions(own={"rho": 1.0, "alpha": 1.0, "adaptive_rho": False, "own_polishing": True})
    forward = engine.solve(known.problem, solver="osqp", options=options)
    assert np.abs(forward.solution.z.numpy() - known.z).max() < 1e-10
    assert bool(torch.isfinite(forward.solution.lam).all())
