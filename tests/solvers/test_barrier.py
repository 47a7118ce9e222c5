"""`barrier`: the central path, its end, phase I, and what happens without an interior."""

from __future__ import annotations

import pytest
import torch

from argrad.errors import ProblemError
from argrad.problems import QP, Flag, Status
from argrad_service import engine
from argrad_service.engine import Forward, SolverOptions
from tests.engine.qps import Case, draw
from tests.solvers.linear import directions, draw_lp, form, inner, slope, times

pytestmark = pytest.mark.slow

D = torch.float64


def solve(problem: QP, *, tolerance: float = 1e-8, max_iterations: int = 100, **own: object) -> Forward:
    options = SolverOptions(tolerance=tolerance, max_iterations=max_iterations, own=own)
    return engine.solve(problem, solver="barrier", options=options)


LPS = [(6, 14, 0, False), (10, 30, 3, False), (8, 20, 2, True), (3, 3, 0, True)]


@pytest.mark.parametrize(("n", "m", "p", "shared"), LPS)
@pytest.mark.parametrize("path", [{}, {"t0": 5.0, "mu": 2.0}, {"epsilon": 1e-3}])
def test_vertices_are_exact(n: int, m: int, p: int, shared: bool, path: dict[str, float]):
    known = draw_lp(n, m, p, shared=shared)
    found = solve(known.problem, **path)
    assert set(found.status) == {Status.OPTIMAL}
    torch.testing.assert_close(found.solution.z, known.z, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.solution.lam, known.lam, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.solution.nu, known.nu, rtol=0, atol=1e-9)
    assert (found.iterations > 5).all()
    assert (found.measures["interior_radius"] > 0).all()


@pytest.mark.parametrize("case", [Case("both", 8, 12, 2), Case("shared", 5, 10, 0, shared=frozenset("QGA"))])
def test_qps_too(case: Case):
    known = draw(case, seed=1)
    found = solve(known.problem)
    torch.testing.assert_close(found.solution.z, torch.from_numpy(known.z), rtol=0, atol=1e-9)
    torch.testing.assert_close(found.solution.lam, torch.from_numpy(known.lam), rtol=0, atol=1e-8)


@pytest.mark.parametrize(("n", "m", "p", "shared"), LPS)
def test_without_polish_the_barrier_point_is_returned(n: int, m: int, p: int, shared: bool):
    problem = draw_lp(n, m, p, shared=shared).problem
    found = solve(problem, polish=False, epsilon=1e-4, tolerance=1e-4)
    z, lam, t = found.solution.z, found.solution.lam, found.measures["t"].unsqueeze(-1)
    s = problem.h - times(problem.G, z)
    assert set(found.status) == {Status.OPTIMAL}
    assert (s > 0).all()
    torch.testing.assert_close(t * s * lam, torch.ones_like(s), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.gap, m / t.squeeze(1), rtol=1e-6, atol=0)
    assert (m / t <= 1e-4).all()
    assert (found.dual_residual <= 1e-10).all()


@pytest.mark.parametrize("epsilon", [1e-6, 1e-9, 1e-11])
def test_a_small_gap_is_reached_without_losing_the_dual_equation(epsilon: float):
    known = draw_lp(10, 30, 3)
    found = solve(known.problem, polish=False, epsilon=epsilon, tolerance=1e-6)
    assert set(found.status) == {Status.OPTIMAL}
    assert (found.gap <= 2 * epsilon).all()
    torch.testing.assert_close(found.solution.z, known.z, rtol=0, atol=100 * epsilon + 1e-9)


def test_a_gap_above_the_tolerance_is_refused():
    with pytest.raises(ProblemError, match=r"solver.options.epsilon: found 1e-05, wanted at most the tolerance 1e-08"):
        solve(draw_lp(3, 6, 0).problem, polish=False)


def box(low: list[list[float]], high: list[list[float]], q: list[float]) -> QP:
    """Bounds on each of two variables, a row for every side."""
    eye = torch.eye(2, dtype=D)
    h = torch.cat([torch.tensor(high, dtype=D), -torch.tensor(low, dtype=D)], dim=1)
    return QP(q=torch.tensor(q, dtype=D), G=torch.cat([eye, -eye]), h=h)


def test_what_has_no_interior_or_no_point_says_so_and_harms_no_batchmate():
    problem = box([[0.0, 0.0], [0.0, 1.0], [2.0, 0.0]], [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], [1.0, -2.0])
    found = solve(problem)
    assert found.status == (Status.OPTIMAL, Status.NO_INTERIOR, Status.INFEASIBLE)
    assert found.solution.z[0].tolist() == pytest.approx([0.0, 1.0], abs=1e-12)
    alone = solve(box([[0.0, 0.0]], [[1.0, 1.0]], [1.0, -2.0]))
    torch.testing.assert_close(alone.solution.z[0], found.solution.z[0], rtol=0, atol=1e-14)
    assert abs(float(found.measures["interior_radius"][1])) < 1e-9


def test_inconsistent_equalities_are_infeasible():
    A = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=D)
    problem = QP(
        q=torch.ones(2, dtype=D),
        G=-torch.eye(2, dtype=D),
        h=torch.zeros(2, dtype=D),
        A=A,
        b=torch.tensor([1.0, 2.0]).to(D),
    )
    assert solve(problem).status == (Status.INFEASIBLE,)


def test_dependent_equalities_do_no_harm():
    A = torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]], dtype=D)
    q = torch.tensor([1.0, 2.0, 3.0], dtype=D)
    problem = QP(q=q, G=-torch.eye(3, dtype=D), h=torch.zeros(3, dtype=D), A=A, b=torch.tensor([1.0, 2.0], dtype=D))
    found = solve(problem)
    assert found.status == (Status.OPTIMAL,)
    assert found.solution.z[0].tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-12)
    assert Flag.DEPENDENT in found.flags[0]


def test_unbounded():
    G, h = -torch.eye(2, dtype=D), torch.zeros(2, dtype=D)
    q = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [0.5, 2.0]], dtype=D)
    found = solve(QP(q=q, G=G, h=h))
    assert found.status == (Status.OPTIMAL, Status.UNBOUNDED, Status.OPTIMAL)


def test_an_edge_of_solutions_is_flagged_and_its_objective_exact():
    found = solve(box([[0.0, 0.0]], [[1.0, 1.0]], [0.0, 1.0]))
    assert found.status == (Status.OPTIMAL,)
    assert Flag.NONUNIQUE in found.flags[0]
    assert float(found.objective[0]) == pytest.approx(0.0, abs=1e-9)
    back = engine.vjp(found, {"z": torch.ones(1, 2, dtype=D)})
    assert back.gradient_status == ("nonunique",)


def test_rows_that_cannot_bind_have_no_multiplier():
    problem = draw_lp(4, 9, 0, batch=1).problem
    h = problem.h.clone()
    h[:, -1] = torch.inf
    found = solve(QP(q=problem.q, G=problem.G, h=h), polish=False, epsilon=1e-8)
    assert found.status == (Status.OPTIMAL,)
    assert float(found.solution.lam[0, -1]) == 0.0


def test_the_iteration_limit_is_a_status():
    assert set(solve(draw_lp(6, 14, 0).problem, max_iterations=3, epsilon=1e-10).status) == {Status.MAX_ITERATIONS}


def test_a_batch_is_a_loop_of_singles():
    known = draw_lp(10, 30, 3)
    own = {"polish": False, "epsilon": 1e-6, "tolerance": 1e-6}
    together = solve(known.problem, **own)
    for i in range(3):
        one = QP(**{name: block[i] for name, block in known.problem.parameters().items()})
        alone = solve(one, **own)
        torch.testing.assert_close(alone.solution.z[0], together.solution.z[i], rtol=0, atol=1e-12)
        assert alone.iterations[0] == together.iterations[i]


def test_gradients_of_the_vertex_are_those_of_central_differences():
    known = draw_lp(6, 14, 2)
    names = ("q", "G", "h", "A", "b")
    g = torch.randn(3, 6, generator=torch.Generator().manual_seed(3), dtype=D)
    found = solve(known.problem)
    formed = form(found, engine.vjp(found, {"z": g}), names)
    along = directions(known.problem, names)
    reference = slope(lambda problem: (g * solve(problem).solution.z).sum(), known.problem, along)
    assert inner(formed, along) == pytest.approx(reference, rel=1e-6)


def test_should_stop_ends_the_solve():
    with pytest.raises(engine.Stopped):
        engine.solve(draw_lp(3, 6, 0).problem, solver="barrier", options=SolverOptions(should_stop=lambda: True))


@pytest.mark.parametrize("polish", [True, False])
def test_equalities_alone_determine_the_solution_beside_a_row_that_is_far_away(polish: bool):
    A = torch.tensor(
        [[-1.5, 0.0, 0.0, 0.0], [0.25, -0.75, 1.75, 0.0], [1.25, 0.25, 1.25, -0.75], [-0.25, -2, 1.25, -2]], dtype=D
    )
    z, G = torch.tensor([0.5, -1.0, 0.25, 2.0], dtype=D), torch.tensor([[1.25, -1.75, -1.25, -1.0]], dtype=D)
    problem = QP(q=torch.tensor([1.0, -2.0, 0.5, 1.5], dtype=D), A=A, b=A @ z, G=G, h=G @ z + 100.0)
    found = solve(problem, polish=polish, **({} if polish else {"epsilon": 1e-9}))
    assert found.status[0] == Status.OPTIMAL
    torch.testing.assert_close(found.solution.z[0], z, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.solution.nu[0], torch.linalg.solve(A.mT, -problem.q), rtol=0, atol=1e-8)


@pytest.mark.parametrize(("of_costs", "of_rows"), [(1e-6, 1.0), (1.0, 1e-4), (1e-9, 1e-3), (1e6, 1e3)])
def test_a_vertex_is_found_whatever_the_units(of_costs: float, of_rows: float):
    """The path's first end, a gap of ε, says nothing where the whole objective is smaller."""
    known = draw_lp(6, 14, 2)
    given = known.problem.parameters()
    found = solve(
        QP(**given | {"q": of_costs * given["q"], "h": of_rows * given["h"], "b": of_rows * given["b"]}),
        max_iterations=200,
    )
    assert set(found.status) == {Status.OPTIMAL}
    torch.testing.assert_close(found.solution.z / of_rows, known.z, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.solution.lam / of_costs, known.lam, rtol=0, atol=1e-9)
