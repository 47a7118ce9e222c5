"""Named hard cases: no solution, no unique solution, degenerate ones, and what they may not do to their batchmates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from argrad.problems import QP, Flag, Status
from argrad_service import engine
from argrad_service.engine import SolverOptions
from tests.engine.qps import Case, draw

F64 = torch.float64


def tensor(*rows: object) -> torch.Tensor:
    return torch.tensor(rows[0] if len(rows) == 1 else rows, dtype=F64)


def batch_of(*problems: dict[str, torch.Tensor]) -> QP:
    return QP(**{name: torch.stack([p[name] for p in problems]) for name in problems[0]})


def regular(seed: int, n: int = 4, m: int = 5) -> dict[str, torch.Tensor]:
    return {k: t[0] for k, t in draw(Case("regular", n, m, 0, batch=1), seed).problem.parameters().items()}


def infeasible() -> dict[str, torch.Tensor]:
    good = regular(1)
    G, h = good["G"].clone(), good["h"].clone()
    G[1], h[1], h[0] = -G[0], -2.0, 1.0  # G₀z ≤ 1 and G₀z ≥ 2
    return {**good, "G": G, "h": h}


def nonconvex() -> dict[str, torch.Tensor]:
    good = regular(2)
    return {**good, "Q": good["Q"] - 1.5 * torch.linalg.eigvalsh(good["Q"]).amax() * torch.eye(4, dtype=F64)}


def unbounded() -> dict[str, torch.Tensor]:
    """A flat direction e₀ along which the objective falls and no row stops it."""
    good = regular(3)
    Q, G, q = good["Q"].clone(), good["G"].clone(), good["q"].clone()
    Q[0], Q[:, 0], G[:, 0], q[0] = 0, 0, -G[:, 0].abs(), -1.0
    return {**good, "Q": Q, "G": G, "q": q}


FAILURES = {
    Status.INFEASIBLE: infeasible,
    Status.NONCONVEX: nonconvex,
    Status.UNBOUNDED: unbounded,
}


@pytest.mark.parametrize("status", FAILURES)
def test_a_problem_without_a_solution_gets_its_status_and_its_batchmates_theirs(status: Status) -> None:
    good = [regular(seed) for seed in range(10, 17)]
    alone = engine.solve(batch_of(*good))
    mixed = engine.solve(batch_of(*good[:3], FAILURES[status](), *good[3:]))
    assert mixed.status == (Status.OPTIMAL,) * 3 + (status,) + (Status.OPTIMAL,) * 4
    rest = [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(mixed.solution.z[rest], alone.solution.z, rtol=1e-12, atol=1e-13)
    assert bool(torch.isfinite(mixed.solution.z).all())
    pulled = engine.vjp(mixed, {"z": torch.ones_like(mixed.solution.z)})
    assert pulled.gradient_status == ("ok",) * 3 + (str(status),) + ("ok",) * 4
    assert bool(torch.isnan(pulled.adjoint.z[3]).all())
    reference = engine.vjp(alone, {"z": torch.ones_like(alone.solution.z)}).adjoint
    torch.testing.assert_close(pulled.adjoint.z[rest], reference.z, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(pulled.adjoint.mu[rest], reference.mu, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n", "m", "p"), [(3, 8, 0), (6, 40, 2), (10, 12, 0), (20, 60, 5), (5, 6, 3)])
def test_random_infeasible_problems_are_recognised(n: int, m: int, p: int, seed: int) -> None:
    """A Farkas certificate is built in: some combination of the rows reads 0 ≤ −1."""
    rng = np.random.default_rng([seed, n, m, p])
    G, A = rng.normal(size=(6, m, n)), rng.normal(size=(6, p, n))
    lam, nu = rng.uniform(0.5, 1.5, (6, m)), rng.normal(size=(6, p))
    G[:, -1] = -(np.einsum("bi,bij->bj", lam[:, :-1], G[:, :-1]) + np.einsum("bi,bij->bj", nu, A)) / lam[:, -1:]
    h, b = rng.normal(size=(6, m)), rng.normal(size=(6, p))
    h[:, -1] = (-1 - (lam[:, :-1] * h[:, :-1]).sum(1) - (nu * b).sum(1)) / lam[:, -1]
    root = rng.normal(size=(6, n, n))
    data = {"Q": root @ np.swapaxes(root, 1, 2), "q": rng.normal(size=(6, n)), "G": G, "h": h}
    if p:
        data |= {"A": A, "b": b}
    forward = engine.solve(QP(**{k: torch.from_numpy(v) for k, v in data.items()}))
    assert forward.status == (Status.INFEASIBLE,) * 6


def test_contradicting_equalities_are_infeasible() -> None:
    A, b = tensor([1.0, 1, 0], [1.0, 1, 0]), tensor([1.0, 2])
    problem = QP(Q=torch.eye(3, dtype=F64), q=torch.zeros(3, dtype=F64), A=A, b=b)
    assert engine.solve(problem).status == (Status.INFEASIBLE,)


def test_unbounded_without_constraints() -> None:
    problem = QP(Q=torch.diag(tensor([1.0, 0.0])), q=tensor([0.0, 1.0]))
    assert engine.solve(problem).status == (Status.UNBOUNDED,)


def test_negative_definite_q_is_nonconvex_even_on_a_bounded_set() -> None:
    eye = torch.eye(2, dtype=F64)
    problem = QP(Q=-eye, q=tensor([0.0, 0.1]), G=torch.cat([eye, -eye]), h=torch.ones(4, dtype=F64))
    assert engine.solve(problem).status == (Status.NONCONVEX,)


def test_rows_with_an_infinite_bound_do_not_bind() -> None:
    known = draw(Case("inf", 6, 8, 1, batch=3), 0)
    parts = known.problem.parameters()
    inactive = np.argwhere(known.lam[0] == 0)[0, 0]
    h = parts["h"].clone()
    h[0, inactive] = torch.inf
    forward = engine.solve(QP(**{**parts, "h": h}))
    assert forward.status == (Status.OPTIMAL,) * 3
    np.testing.assert_allclose(forward.solution.z.numpy(), known.z, atol=1e-10)
    assert forward.solution.s[0, inactive] == torch.inf
    assert forward.solution.lam[0, inactive] == 0
    pulled = engine.vjp(forward, {"z": torch.ones_like(forward.solution.z)})
    assert bool(torch.isfinite(pulled.adjoint.mu).all())


def test_weakly_active_rows_give_a_one_sided_derivative_and_a_flag() -> None:
    """minimise ½(z + q)² subject to z ≤ 0 at q = 0: moving q up, z follows; moving it down, z stays."""
    problem = QP(Q=tensor([[[1.0]], [[1.0]]]), q=tensor([[0.0], [1.0]]), G=tensor([[1.0]]), h=tensor([0.0]))
    forward = engine.solve(problem)
    assert forward.status == (Status.OPTIMAL,) * 2
    assert Flag.DEGENERATE in forward.flags[0]
    assert forward.flags[1] == ()
    pulled = engine.vjp(forward, {"z": torch.ones(2, 1, dtype=F64)})
    assert pulled.flags == ((Flag.DEGENERATE,), ())
    assert pulled.adjoint.z.flatten().tolist() == pytest.approx([-1.0, -1.0])
    assert pulled.adjoint.mu.flatten().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("seed", range(4))
def test_weakly_active_rows_match_one_sided_differences(seed: int) -> None:
    """Rows through the unconstrained part of the solution: pushed outwards, h moves nothing."""
    known = draw(Case("weak", 7, 8, 1, batch=2), seed)
    parts = known.problem.parameters()
    inactive = [int(np.argwhere(row == 0)[0, 0]) for row in known.lam]
    h = parts["h"].clone()
    for i, row in enumerate(inactive):
        h[i, row] -= known.s[i, row]  # the row now passes through z: λ = 0 and s = 0
    problem = QP(**{**parts, "h": h})
    forward = engine.solve(problem)
    assert forward.flags == ((Flag.DEGENERATE,),) * 2
    np.testing.assert_allclose(forward.solution.z.numpy(), known.z, atol=1e-9)
    weights = torch.randn(2, 7, dtype=F64, generator=torch.Generator().manual_seed(seed))
    adjoint = engine.vjp(forward, {"z": weights}).adjoint
    direction = torch.randn(2, 7, dtype=F64, generator=torch.Generator().manual_seed(seed + 50))
    step = 1e-6
    base = (forward.solution.z * weights).sum(1)
    sides = []
    for sign in (1, -1):
        there = engine.solve(QP(**{**parts, "h": h, "q": problem.q + sign * step * direction}))
        sides.append(((there.solution.z * weights).sum(1) - base) / (sign * step))
    found = (adjoint.z * direction).sum(1)
    # One side leaves the row, and there the derivative is that of the strongly active rows.
    nearest = torch.minimum((sides[0] - found).abs(), (sides[1] - found).abs())
    assert float(nearest.max()) < 1e-4


@pytest.mark.parametrize("case", [Case("dependent", 6, 5, 0), Case("dependent-p", 8, 5, 2), Case("many", 4, 12, 0)])
def test_duplicate_active_rows_are_flagged_and_leave_z_and_its_gradient_exact(case: Case) -> None:
    known = draw(case, 4)
    parts = known.problem.parameters()
    # Every row twice: the multipliers are not unique, everything else is.
    double = {**parts, "G": torch.cat([parts["G"]] * 2, dim=1), "h": torch.cat([parts["h"]] * 2, dim=1)}
    single, forward = engine.solve(known.problem), engine.solve(QP(**double))
    assert forward.status == (Status.OPTIMAL,) * 3
    has_active = (known.lam > 0).any(1)
    assert forward.flags == tuple((Flag.DEPENDENT,) if some else () for some in has_active)
    np.testing.assert_allclose(forward.solution.z.numpy(), known.z, atol=1e-9)
    assert bool((forward.solution.lam >= 0).all())
    np.testing.assert_allclose(
        (forward.solution.lam[:, : case.m] + forward.solution.lam[:, case.m :]).numpy(), known.lam, atol=1e-8
    )
    weights = torch.randn(3, case.n, dtype=F64, generator=torch.Generator().manual_seed(8))
    reference, pulled = engine.vjp(single, {"z": weights}), engine.vjp(forward, {"z": weights})
    assert pulled.gradient_status == ("ok",) * 3
    torch.testing.assert_close(pulled.adjoint.z, reference.adjoint.z, rtol=1e-8, atol=1e-9)
    both = pulled.adjoint.mu[:, : case.m] + pulled.adjoint.mu[:, case.m :]
    torch.testing.assert_close(both, reference.adjoint.mu, rtol=1e-7, atol=1e-8)
    on_duals = engine.vjp(forward, {"lam": torch.ones_like(forward.solution.lam)})
    assert on_duals.gradient_status == tuple("dependent" if some else "ok" for some in has_active)


def test_dependent_equalities_are_solved_and_flagged() -> None:
    known = draw(Case("dependent-equalities", 6, 4, 2), 5)
    parts = known.problem.parameters()
    A = torch.cat([parts["A"], parts["A"].sum(1, keepdim=True)], dim=1)
    b = torch.cat([parts["b"], parts["b"].sum(1, keepdim=True)], dim=1)
    forward = engine.solve(QP(**{**parts, "A": A, "b": b}))
    assert forward.status == (Status.OPTIMAL,) * 3
    assert forward.flags == ((Flag.DEPENDENT,),) * 3
    np.testing.assert_allclose(forward.solution.z.numpy(), known.z, atol=1e-9)


@pytest.mark.parametrize("rows", [0, 4])
def test_a_solution_that_is_not_unique_has_an_objective_but_no_gradient(rows: int) -> None:
    """minimise ½z₀² + z₀ over a z₁ that plays no part, free or in a box."""
    problem = QP(
        Q=torch.diag(tensor([1.0, 0.0])),
        q=tensor([1.0, 0.0]),
        G=torch.cat([torch.eye(2, dtype=F64), -torch.eye(2, dtype=F64)]) if rows else None,
        h=tensor([2.0, 2.0, 2.0, 2.0]) if rows else None,
    )
    forward = engine.solve(problem)
    assert forward.status == (Status.OPTIMAL,)
    assert Flag.NONUNIQUE in forward.flags[0]
    assert float(forward.objective[0]) == pytest.approx(-0.5, abs=1e-9)
    pulled = engine.vjp(forward, {"z": torch.ones(1, 2, dtype=F64)})
    assert pulled.gradient_status == ("nonunique",)
    assert bool(torch.isnan(pulled.adjoint.z).all())


def test_a_zero_q_with_a_unique_vertex_is_finished_exactly() -> None:
    """minimise z₀ + 2z₁ over z ≥ 1, z₀ + z₁ ≥ 3: the vertex (2, 1)."""
    problem = QP(
        Q=torch.zeros(2, 2, dtype=F64),
        q=tensor([1.0, 2.0]),
        G=tensor([-1.0, 0.0], [0.0, -1.0], [-1.0, -1.0]),
        h=tensor([-1.0, -1.0, -3.0]),
    )
    forward = engine.solve(problem)
    assert forward.status == (Status.OPTIMAL,)
    assert forward.solution.z[0].tolist() == pytest.approx([2.0, 1.0], abs=1e-12)
    pulled = engine.vjp(forward, {"z": tensor([[1.0, 0.0]])})
    assert pulled.adjoint.z[0].tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
    # z₀ = 3 − z₁ moves one for one with the last bound and against the second.
    assert (-pulled.adjoint.mu[0]).tolist() == pytest.approx([0.0, 1.0, -1.0], abs=1e-12)


@pytest.mark.parametrize(("row_scale", "cost_scale"), [(1e8, 1.0), (1e-8, 1.0), (1.0, 1e8), (1.0, 1e-8), (1e6, 1e-6)])
def test_scaled_data_give_the_same_solution(row_scale: float, cost_scale: float) -> None:
    known = draw(Case("scaled", 8, 10, 2, batch=4), 6)
    parts = known.problem.parameters()
    factor = {"Q": cost_scale, "q": cost_scale, "G": row_scale, "h": row_scale, "A": row_scale, "b": row_scale}
    forward = engine.solve(QP(**{k: t * factor[k] for k, t in parts.items()}))
    assert forward.status == (Status.OPTIMAL,) * 4
    np.testing.assert_allclose(forward.solution.z.numpy(), known.z, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(forward.solution.lam.numpy() * row_scale / cost_scale, known.lam, rtol=1e-8, atol=1e-8)
    pulled = engine.vjp(forward, {"z": torch.ones_like(forward.solution.z)})
    reference = engine.vjp(engine.solve(known.problem), {"z": torch.ones_like(forward.solution.z)})
    torch.testing.assert_close(pulled.adjoint.z * cost_scale, reference.adjoint.z, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(pulled.adjoint.mu * row_scale, reference.adjoint.mu, rtol=1e-7, atol=1e-8)


def test_the_iteration_limit_is_a_status_that_says_so() -> None:
    known = draw(Case("limit", 20, 30, 0), 1)
    forward = engine.solve(known.problem, solver="pdipm", options=SolverOptions(max_iterations=1))
    assert set(forward.status) <= {Status.MAX_ITERATIONS, Status.OPTIMAL}
    assert Status.MAX_ITERATIONS in forward.status
    assert int(forward.iterations.max()) <= 1
    assert "max_iterations" in Status.MAX_ITERATIONS.sentence


def test_a_caller_that_gives_up_stops_the_solve_between_iterations() -> None:
    known = draw(Case("stop", 20, 30, 0), 1)
    asked = iter([False, False, True])
    with pytest.raises(engine.Stopped):
        engine.solve(known.problem, solver="pdipm", options=SolverOptions(should_stop=lambda: next(asked)))


def test_a_warm_start_at_the_solution_needs_no_iteration() -> None:
    known = draw(Case("warm", 30, 40, 5, batch=8), 1)
    cold = engine.solve(known.problem)
    warm = engine.solve(known.problem, warm_start=cold.solution)
    assert int(cold.iterations.min()) > 0
    assert warm.iterations.tolist() == [0] * 8
    torch.testing.assert_close(warm.solution.z, cold.solution.z, rtol=1e-11, atol=1e-12)


def test_a_warm_start_from_elsewhere_changes_nothing_but_the_work() -> None:
    known, other = draw(Case("warm", 12, 15, 2, batch=5), 1), draw(Case("warm", 12, 15, 2, batch=5), 2)
    warm = engine.solve(known.problem, warm_start=engine.solve(other.problem).solution)
    assert warm.status == (Status.OPTIMAL,) * 5
    np.testing.assert_allclose(warm.solution.z.numpy(), known.z, atol=1e-9)


class TestPointOfACaller:
    """`at_point`: the solution came from somewhere else."""

    def test_the_engines_own_solution_gives_the_same_gradient(self) -> None:
        known = draw(Case("point", 10, 12, 3, batch=6), 3)
        forward = engine.solve(known.problem)
        again = engine.at_point(known.problem, forward.solution)
        weights = {k: torch.ones_like(t) for k, t in forward.solution.blocks().items()}
        first, second = engine.vjp(forward, weights).adjoint, engine.vjp(again, weights).adjoint
        for name, block in first.blocks().items():
            torch.testing.assert_close(second.blocks()[name], block, rtol=1e-10, atol=1e-11)

    def test_a_rounded_solution_is_made_exact(self) -> None:
        known = draw(Case("point", 10, 12, 3, batch=6), 3)
        forward = engine.solve(known.problem)
        rounded = type(forward.solution)(**{k: t.float() for k, t in forward.solution.blocks().items()})
        again = engine.at_point(known.problem, rounded)
        assert again.status == (Status.OPTIMAL,) * 6
        np.testing.assert_allclose(again.solution.z.numpy(), known.z, atol=1e-10)

    def test_a_point_that_is_no_solution_gets_no_gradient_and_harms_no_other(self) -> None:
        known = draw(Case("point", 10, 12, 3, batch=6), 3)
        blocks = engine.solve(known.problem).solution.blocks()
        blocks["z"] = blocks["z"].clone()
        blocks["z"][2] += 1.0
        again = engine.at_point(known.problem, type(engine.solve(known.problem).solution)(**blocks))
        assert again.status[2] == Status.NUMERICAL_ERROR
        pulled = engine.vjp(again, {"z": torch.ones_like(blocks["z"])})
        assert pulled.gradient_status == ("ok", "ok", "numerical_error", "ok", "ok", "ok")

    def test_nonconvex_points_are_refused(self) -> None:
        good = engine.solve(batch_of(regular(0)))
        again = engine.at_point(batch_of(nonconvex()), good.solution)
        assert again.status == (Status.NONCONVEX,)


def test_unknown_names_are_refused_with_the_list_of_known_ones() -> None:
    problem = batch_of(regular(0))
    with pytest.raises(ValueError, match=r"solver\.name: found 'simplex', wanted one of auto, pivoting, pdipm"):
        engine.solve(problem, solver="simplex")
    forward = engine.solve(problem)
    with pytest.raises(ValueError, match=r"differentiation\.method: found 'magic', wanted one of auto, kkt"):
        engine.vjp(forward, {"z": forward.solution.z}, method="magic")


@pytest.mark.parametrize("seed", range(4))
def test_an_equality_written_as_two_inequalities_has_no_interior_and_is_solved(seed: int) -> None:
    """The two rows are dependent: their multipliers are not unique, their difference and all else is."""
    known = draw(Case("opposite", 8, 6, 1), seed)
    parts = known.problem.parameters()
    A, b = parts.pop("A"), parts.pop("b")
    parts["G"], parts["h"] = torch.cat([parts["G"], A, -A], dim=1), torch.cat([parts["h"], b, -b], dim=1)
    forward = engine.solve(QP(**parts))
    assert forward.status == (Status.OPTIMAL,) * 3
    np.testing.assert_allclose(forward.solution.z.numpy(), known.z, atol=1e-8)
    nu = (forward.solution.lam[:, -2] - forward.solution.lam[:, -1]).numpy()
    np.testing.assert_allclose(nu, known.nu[:, 0], atol=1e-8)
    weights = torch.randn(3, 8, dtype=F64, generator=torch.Generator().manual_seed(8))
    pulled = engine.vjp(forward, {"z": weights})
    reference = engine.vjp(engine.solve(known.problem), {"z": weights})
    assert pulled.gradient_status == ("ok",) * 3
    torch.testing.assert_close(pulled.adjoint.z, reference.adjoint.z, rtol=1e-7, atol=1e-8)


def test_a_single_feasible_point_is_found() -> None:
    """Bounds that leave one point: 1 ≤ z ≤ 1 as four inequalities."""
    eye = torch.eye(2, dtype=F64)
    problem = QP(Q=eye, q=tensor([3.0, -4.0]), G=torch.cat([eye, -eye]), h=tensor([1.0, 1.0, -1.0, -1.0]))
    forward = engine.solve(problem)
    assert forward.status == (Status.OPTIMAL,)
    assert forward.solution.z[0].tolist() == pytest.approx([1.0, 1.0], abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_more_rows_through_the_solution_than_there_are_variables(seed: int) -> None:
    """A degenerate vertex: twice as many rows as variables pass through it, and their multipliers are not unique."""
    rng = np.random.default_rng(seed)
    n, batch = 4, 6
    G, z = rng.normal(size=(batch, 2 * n, n)), rng.normal(size=(batch, n))
    lam = rng.uniform(0.5, 1.5, size=(batch, 2 * n))
    q = -(z + np.einsum("bij,bi->bj", G, lam))
    parts = {"Q": np.eye(n), "q": q, "G": G, "h": np.einsum("bij,bj->bi", G, z)}
    forward = engine.solve(QP(**{k: torch.from_numpy(v) for k, v in parts.items()}))
    assert forward.status == (Status.OPTIMAL,) * batch
    np.testing.assert_allclose(forward.solution.z.numpy(), z, atol=1e-8)
    assert bool((forward.solution.lam >= 0).all())
    assert float(forward.dual_residual.max()) < 1e-8
    assert all(Flag.DEPENDENT in flags for flags in forward.flags)
    # z is pinned by more rows than it has directions: no parameter of the objective moves it.
    pulled = engine.vjp(forward, {"z": torch.ones(batch, n, dtype=F64)})
    assert pulled.gradient_status == ("ok",) * batch
    np.testing.assert_allclose(pulled.adjoint.z.numpy(), 0, atol=1e-8)


@pytest.mark.slow
def test_half_a_million_tiny_problems_fit_in_one_call() -> None:
    q = torch.linspace(-2, 2, 500_000, dtype=F64).unsqueeze(-1)
    forward = engine.solve(QP(Q=tensor([[1.0]]), q=q, G=tensor([[1.0], [-1.0]]), h=tensor([1.0, 1.0])))
    torch.testing.assert_close(forward.solution.z, (-q).clamp(-1, 1), rtol=0, atol=1e-12)


def test_a_problem_that_pivoting_cannot_decide_is_solved_by_pdipm_and_says_so() -> None:
    """A singular Q among definite ones; alone, `auto` names `pdipm` as its solver."""
    flat = {**regular(3), "Q": torch.diag(tensor([0.0, 1.0, 1.0, 1.0])), "q": torch.zeros(4, dtype=F64)}
    box = torch.cat([torch.eye(4, dtype=F64), -torch.eye(4, dtype=F64)])
    flat |= {"G": box, "h": torch.ones(8, dtype=F64), "q": tensor([0.5, 0.0, 0.0, 0.0])}
    other = {**flat, "Q": torch.eye(4, dtype=F64)}
    mixed = engine.solve(batch_of(other, flat), solver="pivoting")
    assert mixed.status == (Status.OPTIMAL,) * 2
    assert mixed.solver == "pivoting"
    assert mixed.flags[0] == ()
    assert Flag.FALLBACK in mixed.flags[1]
    assert mixed.solution.z[1].tolist() == pytest.approx([-1, 0, 0, 0], abs=1e-10)
    alone = engine.solve(batch_of(flat))
    assert alone.solver == "pdipm"
    assert Flag.FALLBACK not in alone.flags[0]


def test_pivoting_stops_for_a_caller_that_gives_up() -> None:
    known = draw(Case("stop", 5, 4, 0), 1)
    with pytest.raises(engine.Stopped):
        engine.solve(known.problem, solver="pivoting", options=SolverOptions(should_stop=lambda: True))


@pytest.mark.parametrize("rows", [0, 1])
def test_the_kernels_call_lapack_by_its_rules_where_nothing_is_active(
    rows: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """LAPACK prints what it finds illegal, such as a leading dimension of 0, and goes on."""
    Q, q = torch.eye(3, dtype=F64).repeat(2, 1, 1), torch.ones(2, 3, dtype=F64)
    G, h = torch.ones(2, rows, 3, dtype=F64), torch.ones(2, rows, dtype=F64)
    forward = engine.solve(QP(Q=Q, q=q, G=G, h=h), solver="pivoting")
    pulled = engine.vjp(forward, {"z": torch.ones(2, 3, dtype=F64)})
    torch.testing.assert_close(forward.solution.z, -q)
    torch.testing.assert_close(pulled.adjoint.z, -torch.ones(2, 3, dtype=F64))
    assert capfd.readouterr() == ("", "")


def test_pivoting_stops_between_pieces_of_a_large_batch() -> None:
    known = draw(Case("stop", 60, 40, 0, batch=400), 1)
    asked = []

    def should_stop() -> bool:
        asked.append(None)
        return len(asked) > 3

    with pytest.raises(engine.Stopped):
        engine.solve(known.problem, solver="pivoting", options=SolverOptions(should_stop=should_stop))
    assert len(asked) >= 4
