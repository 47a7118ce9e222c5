"""`admm`: exact with the finish, within its tolerance without, structured inverses, verdicts, warm starts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from argrad.errors import ProblemError
from argrad.problems import QP, Flag, Status, gradients
from argrad_service import engine
from argrad_service.engine import Forward, SolverOptions, Stopped, inverses, structure
from argrad_service.engine.data import stack
from argrad_service.engine.structured_finish import StructuredFactor
from tests.engine.qps import Case, draw, oracle_gradients, relative_error
from tests.engine.test_grid import CASES
from tests.solvers.linear import draw_lp
from tests.solvers.test_entropy import draw as draw_entropy

pytestmark = pytest.mark.slow

D = torch.float64


def solve(problem: QP, *, tolerance: float = 1e-8, max_iterations: int = 100, **own: object) -> Forward:
    options = SolverOptions(tolerance=tolerance, max_iterations=max_iterations, own=own)
    found = engine.solve(problem, solver="admm", options=options)
    assert isinstance(found, Forward)
    return found


def tensor(*rows: object) -> torch.Tensor:
    return torch.tensor(rows, dtype=D)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_solutions_and_gradients_are_exact(case: Case):
    known = draw(case, 1)
    found = solve(known.problem)
    assert found.status == (Status.OPTIMAL,) * case.batch
    assert all(flags == () for flags in found.flags)
    for name in ("z", "nu", "lam", "s"):
        np.testing.assert_allclose(
            getattr(found.solution, name), getattr(known, name), rtol=1e-8, atol=1e-9 * max(1.0, case.size)
        )
    generator = np.random.default_rng(0)
    upstream = {name: generator.normal(size=getattr(known, name).shape) for name in ("z", "nu", "lam", "s")}
    backward = engine.vjp(found, {name: torch.from_numpy(g) for name, g in upstream.items()})
    names = list(known.problem.parameters())
    formed = engine_gradients(found, backward, names)
    reference = [{k: g[k] for k in names} for g in oracle_gradients(known.problem, known, upstream)]
    assert relative_error(formed, reference) <= (1e-8 if case.size == 1.0 else 1e-6)


def engine_gradients(found: Forward, backward: engine.Backward, names: list[str]) -> list[dict[str, np.ndarray]]:
    formed = gradients(found.solution, backward.adjoint, wrt=names, batched=names)
    return [{k: v[i].numpy() for k, v in formed.items()} for i in range(len(found.status))]


WITHOUT = [
    case for case in CASES if case.name in ("inequalities-only", "both", "singular-q", "shared-matrices", "larger")
]


@pytest.mark.parametrize("case", WITHOUT, ids=lambda case: case.name)
@pytest.mark.parametrize("own", [{}, {"restarts": False, "relaxation": 1.0}], ids=["default", "plain"])
def test_without_polish_the_iterate_meets_the_tolerance(case: Case, own: dict[str, object]):
    known = draw(case, 0)
    found = solve(known.problem, polish=False, max_iterations=2000, tolerance=1e-7, **own)
    assert set(found.status) == {Status.OPTIMAL}
    np.testing.assert_allclose(found.solution.z, known.z, atol=2e-4)
    assert (found.measures["steps"] == 40 * found.iterations).all()
    assert float((found.solution.z - torch.from_numpy(known.z)).abs().max()) > 1e-13


def test_truncation_is_the_papers():
    """It stops at the first step with ‖x⁺ − x‖/‖x‖ < ε, each problem at its own."""
    known = draw(Case("both", 10, 6, 3, batch=4), 0)
    steps, errors = [], []
    for epsilon in (1e-1, 1e-3, 1e-5):
        found = solve(
            known.problem, polish=False, truncation=epsilon, tolerance=0.1, max_iterations=2000, block=7, adaptive=False
        )
        steps.append(found.measures["steps"])
        errors.append(np.abs(found.solution.z.numpy() - known.z).max())
        alone = QP(**{name: t[2] for name, t in known.problem.parameters().items()})
        single = solve(
            alone, polish=False, truncation=epsilon, tolerance=0.1, max_iterations=2000, block=50, adaptive=False
        )
        assert single.measures["steps"][0] == steps[-1][2]
    assert (steps[0] < steps[1]).all()
    assert (steps[1] < steps[2]).all()
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("polish", [False, True])
def test_a_truncation_is_the_answer_and_says_so(polish: bool):
    """At ε = 0.1 the residuals are above the largest tolerance there is: done, all the same, and flagged."""
    known = draw(Case("both", 10, 6, 3, batch=4), 0)
    found = solve(known.problem, polish=polish, truncation=0.1, adaptive=False, block=1)
    assert set(found.status) == {Status.OPTIMAL}
    size = 1 + np.abs(known.z).max()
    errors = np.abs(found.solution.z.numpy() - known.z).max(-1) / size
    for error, residual, flags in zip(errors, found.primal_residual, found.flags, strict=True):
        assert (error < 1e-8) != (Flag.TRUNCATED in flags)
        assert (residual < 1e-8) != (Flag.TRUNCATED in flags)
    assert polish or set(found.flags) == {(Flag.TRUNCATED,)}


def test_a_truncation_within_the_tolerance_has_no_flag():
    known = draw(Case("both", 10, 6, 3, batch=4), 0)
    found = solve(known.problem, polish=False, truncation=1e-11, max_iterations=2000)
    assert set(found.status) == {Status.OPTIMAL}
    assert set(found.flags) == {()}


def test_a_truncated_problem_without_a_solution_is_not_called_solved():
    eye = torch.eye(2, dtype=torch.float64)
    G, h = torch.cat([eye[:1], -eye[:1]]), torch.tensor([-1.0, -1.0], dtype=torch.float64)
    problem = QP(Q=eye, q=torch.ones(2, dtype=torch.float64), G=G, h=h)
    found = solve(problem, polish=False, truncation=1e-3)
    assert found.status == (Status.INFEASIBLE,)


def test_a_given_penalty_without_adaptation_is_kept():
    known = draw(Case("both", 6, 5, 2), 3)
    found = solve(known.problem, rho=2.0, adaptive=False)
    assert (found.measures["rho"] == 1.0).all()
    np.testing.assert_allclose(found.solution.z, known.z, atol=1e-9)


@pytest.mark.parametrize(("n", "m", "p", "shared"), [(6, 14, 0, False), (10, 30, 3, False), (8, 20, 2, True)])
def test_vertices_of_linear_programs_are_exact(n: int, m: int, p: int, shared: bool):
    known = draw_lp(n, m, p, shared=shared)
    found = solve(known.problem, max_iterations=1000)
    assert set(found.status) == {Status.OPTIMAL}
    torch.testing.assert_close(found.solution.z, known.z, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.solution.lam, known.lam, rtol=0, atol=1e-9)


EYE = torch.eye(2, dtype=D)
VERDICTS = {
    "infeasible": (QP(Q=EYE, q=tensor(1.0, 1.0), G=tensor([1.0, 0], [-1, 0]), h=tensor(-1.0, -1.0)), Status.INFEASIBLE),
    "equations": (QP(Q=EYE, q=tensor(1.0, 1.0), A=tensor([1.0, 0], [1, 0]), b=tensor(0.0, 1.0)), Status.INFEASIBLE),
    "unbounded": (QP(Q=tensor([1.0, 0], [0, 0]), q=tensor(1.0, 1.0)), Status.UNBOUNDED),
    "unbounded-lp": (QP(q=tensor(-1.0, -2.0), G=tensor([1.0, -1], [-1, 0]), h=tensor(1.0, 0.0)), Status.UNBOUNDED),
    "infeasible-lp": (
        QP(q=tensor(-1.0, -2.0), G=tensor([1.0, 1], [-1, 0], [0, -1]), h=tensor(-1.0, 0.0, 0.0)),
        Status.INFEASIBLE,
    ),
    "nonconvex": (QP(Q=-EYE, q=tensor(1.0, 1.0)), Status.NONCONVEX),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_what_has_no_solution_is_recognised(name: str):
    problem, status = VERDICTS[name]
    found = solve(problem)
    assert found.status == (status,)
    assert int(found.iterations[0]) < 100
    backward = engine.vjp(found, {"z": torch.ones(1, 2, dtype=D)})
    assert backward.gradient_status == (str(status),)


def test_weak_and_redundant_rows_are_flagged():
    weak = solve(QP(Q=EYE, q=tensor(0.0, 1.0), G=-EYE, h=tensor(0.0, 0.0)))
    assert weak.flags == ((Flag.DEGENERATE,),)
    twice = solve(QP(Q=EYE, q=tensor(-3.0, -1.0), G=tensor([1.0, 0], [1, 0]), h=tensor(0.0, 0.0)))
    assert twice.flags == ((Flag.DEPENDENT,),)
    torch.testing.assert_close(twice.solution.z, tensor([0.0, 1.0]))


def test_a_failed_problem_leaves_its_neighbours_alone():
    good = draw(Case("both", 6, 5, 2, batch=4), 0).problem
    tensors = dict(good.parameters())
    bad = {**tensors, "Q": tensors["Q"].clone(), "h": tensors["h"].clone(), "G": tensors["G"].clone()}
    bad["Q"][1] = -bad["Q"][1]
    bad["G"][2, 0], bad["h"][2, 0] = 0.0, -1.0
    found = solve(QP(**bad), polish=False, max_iterations=2000)
    assert found.status[1] == Status.NONCONVEX
    assert found.status[2] == Status.INFEASIBLE
    alone = solve(QP(**tensors), polish=False, max_iterations=2000)
    torch.testing.assert_close(found.solution.z[[0, 3]], alone.solution.z[[0, 3]], rtol=0, atol=1e-12)
    assert found.iterations[[0, 3]].tolist() == alone.iterations[[0, 3]].tolist()


@pytest.mark.parametrize("case", [Case("both", 9, 7, 2, batch=4), Case("shared", 9, 7, 2, 4, shared=frozenset("QGA"))])
def test_a_batch_is_a_loop_of_singles(case: Case):
    problem = draw(case, 5).problem
    together = solve(problem, polish=False, max_iterations=2000)
    for i in range(case.batch):
        one = {name: t[i] if problem.is_batched(name) else t for name, t in problem.parameters().items()}
        alone = solve(QP(**one), polish=False, max_iterations=2000)
        torch.testing.assert_close(together.solution.z[i], alone.solution.z[0], rtol=0, atol=1e-9)


def test_a_warm_start_saves_steps():
    problem = draw(Case("square", 12, 12, 0), 0).problem
    cold = solve(problem, polish=False, max_iterations=2000)
    options = SolverOptions(max_iterations=2000, own={"polish": False})
    warm = engine.solve(problem, solver="admm", options=options, warm_start=cold.solution)
    assert (warm.iterations < cold.iterations).all()
    assert (warm.iterations <= 2).all()


def test_it_stops_when_nobody_waits():
    problem = draw(Case("both", 6, 5, 2), 0).problem
    with pytest.raises(Stopped):
        engine.solve(problem, solver="admm", options=SolverOptions(should_stop=lambda: True))


def test_wrong_options_are_named():
    with pytest.raises(ProblemError, match=r"solver\.options\.relaxation"):
        solve(VERDICTS["nonconvex"][0], relaxation=2.5)


def sparsemax(n: int, *, batch: int = 3, upper: float = 0.3, seed: int = 0, diagonal: bool = False) -> QP:
    """½zᵀQz − yᵀz over the capped simplex, Q the identity or a diagonal."""
    generator = torch.Generator().manual_seed(seed)
    eye = torch.eye(n, dtype=D)
    Q = eye * (0.5 + torch.rand(n, dtype=D, generator=generator)) if diagonal else eye
    h = torch.cat([torch.zeros(n, dtype=D), torch.full((n,), upper, dtype=D)])
    y = torch.randn(batch, n, dtype=D, generator=generator)
    return QP(Q=Q, q=-y, G=torch.cat([-eye, eye]), h=h, A=torch.ones(1, n, dtype=D), b=torch.ones(1, dtype=D))


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("method", ["kkt", "altdiff", "folded"])
def test_sparsemax_in_closed_form_equals_the_dense_code(monkeypatch: pytest.MonkeyPatch, diagonal: bool, method: str):
    problem = sparsemax(80, diagonal=diagonal)
    upstream = {name: torch.randn(3, k, dtype=D) for name, k in (("z", 80), ("nu", 1), ("lam", 160), ("s", 160))}
    quick = solve(problem)
    assert isinstance(quick.factor.factor, StructuredFactor)
    adjoint = engine.vjp(quick, upstream, method=method).adjoint
    monkeypatch.setattr(structure, "LEAST_VARIABLES", 10**6)
    dense = solve(problem)
    assert not isinstance(dense.factor.factor, StructuredFactor)
    for name, block in dense.solution.blocks().items():
        torch.testing.assert_close(quick.solution.blocks()[name], block, rtol=0, atol=1e-12)
    expected = engine.vjp(dense, upstream).adjoint
    for name, block in expected.blocks().items():
        torch.testing.assert_close(adjoint.blocks()[name], block, rtol=1e-8, atol=1e-9)


def test_sparsemax_without_polish_iterates_in_closed_form():
    problem = sparsemax(100)
    exact = solve(problem)
    found = solve(problem, polish=False, max_iterations=500)
    assert set(found.status) == {Status.OPTIMAL}
    torch.testing.assert_close(found.solution.z, exact.solution.z, rtol=0, atol=1e-6)


def test_structure_is_found_only_where_it_is():
    assert structure.detect(stack(sparsemax(80))) is not None
    full = sparsemax(80).parameters()
    full["Q"] = full["Q"] + 1e-3
    assert structure.detect(stack(QP(**full))) is None
    corner = sparsemax(80).parameters()
    corner["Q"] = corner["Q"].clone()
    corner["Q"][7, 5] = corner["Q"][5, 7] = 1e-9
    assert structure.detect(stack(QP(**corner))) is None
    dense = sparsemax(80).parameters()
    dense["G"] = torch.randn(160, 80, dtype=D)
    assert structure.detect(stack(QP(**dense))) is None


def test_a_degenerate_structured_problem_goes_to_the_dense_code():
    """A variable with l = u has two dependent rows."""
    tensors = sparsemax(70).parameters()
    tensors["h"] = tensors["h"].clone()
    tensors["h"][70 + 4] = 0.0
    found = solve(QP(**tensors))
    assert set(found.status) == {Status.OPTIMAL}
    assert not isinstance(found.factor.factor, StructuredFactor)
    assert float(found.solution.z[:, 4].abs().max()) <= 1e-12


def test_inverses_are_inverses():
    generator = torch.Generator().manual_seed(0)
    data = stack(draw(Case("shared", 9, 7, 2, 4, shared=frozenset("QGA")), 0).problem)
    weights = 0.5 + torch.rand(1, 9, dtype=D, generator=generator)
    hessians = inverses.dense_hessians(data.Q, data.C, weights, batch=4)
    rho = torch.tensor([[1e-3], [0.1], [1.0], [1e4]], dtype=D)
    v = torch.randn(4, 2, 9, dtype=D, generator=generator)
    H = data.Q + data.C.mT @ ((rho * weights).unsqueeze(-1) * data.C)
    assert isinstance(hessians, inverses.SharedHessians)
    found = hessians.inverse(rho).apply(v)
    torch.testing.assert_close(found @ H, v, rtol=1e-9, atol=1e-9)
    made = structure.detect(stack(sparsemax(80)))
    assert made is not None
    full = stack(sparsemax(80))
    weights = 0.5 + torch.rand(1, 161, dtype=D, generator=generator)
    H = full.Q + full.C.mT @ ((rho * weights).unsqueeze(-1) * full.C)
    v = torch.randn(4, 2, 80, dtype=D, generator=generator)
    found = inverses.structured_hessians(made, weights).inverse(rho).apply(v)
    torch.testing.assert_close(found @ H, v, rtol=1e-9, atol=1e-9)


def test_unrolling_repeats_the_plain_iteration():
    known = draw(Case("inequalities-only", 8, 6, 0), 0)
    found = solve(known.problem, polish=False, adaptive=False, restarts=False, max_iterations=2000, tolerance=1e-9)
    upstream = {"z": torch.ones(3, 8, dtype=D)}
    backward = engine.vjp(found, upstream, method="unrolled")
    assert (backward.measures["unrolled_distance"] <= 1e-12).all()
    torch.testing.assert_close(
        backward.adjoint.z, engine.vjp(found, upstream, method="kkt").adjoint.z, rtol=1e-4, atol=1e-5
    )


ENTROPY = [{}, {"n": 20, "m": 8, "p": 3}, {"rank": 4}, {"tau": 0.01}, {"m": 0}, {"p": 0}]


@pytest.mark.parametrize("size", ENTROPY, ids=str)
def test_problems_with_entropy(size: dict[str, int]):
    problem = QP(**draw_entropy(1, **size))
    expected = engine.solve(problem, solver="pdipm").solution
    found = solve(problem)
    assert set(found.status) == {Status.OPTIMAL}
    torch.testing.assert_close(found.solution.z, expected.z, rtol=1e-8, atol=0)
    torch.testing.assert_close(found.solution.lam, expected.lam, rtol=0, atol=1e-10)
    rough = solve(problem, polish=False, max_iterations=500)
    assert set(rough.status) == {Status.OPTIMAL}
    torch.testing.assert_close(rough.solution.z, expected.z, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tau", [10.0, 0.1, 0.02])
def test_softmax_keeps_its_relative_accuracy(tau: float):
    scores = 4 * torch.randn(4, 40, generator=torch.Generator().manual_seed(0), dtype=D)
    one = torch.ones(1, dtype=D)
    found = solve(QP(q=-scores, A=torch.ones(1, 40, dtype=D), b=one, entropy=torch.tensor(tau, dtype=D))).solution.z
    expected = torch.softmax(scores / tau, -1)
    is_normal = expected > 1e-300
    torch.testing.assert_close(found[is_normal], expected[is_normal], rtol=1e-10, atol=0)


def test_entropy_without_a_positive_point_is_infeasible():
    tau = torch.tensor(0.5, dtype=D)
    negative = solve(QP(q=tensor(1.0, 1.0), A=tensor([1.0, 1.0]), b=tensor(-1.0), entropy=tau))
    assert negative.status == (Status.INFEASIBLE,)
    rows = QP(q=tensor(1.0, 1.0), G=tensor([-1.0, 0], [1, 0]), h=tensor(-2.0, 1.0), entropy=tau)
    assert solve(rows).status == (Status.INFEASIBLE,)
