"""`pgd`: projections, their closed forms, plain and accelerated steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from argrad.problems import QP, Flag, Status
from argrad_service import engine
from argrad_service.engine import Forward, SolverOptions
from argrad_service.engine.data import residuals, stack
from argrad_service.engine.forward.projections import Polyhedron, projection_on
from argrad_service.engine.options import never_stop
from tests.engine.qps import Case, draw, oracle_gradients, relative_error
from tests.solvers.linear import form

pytestmark = pytest.mark.slow

D = torch.float64


def solve(problem: QP, *, tolerance: float = 1e-8, max_iterations: int = 100, **own: object) -> Forward:
    options = SolverOptions(tolerance=tolerance, max_iterations=max_iterations, own=own)
    return engine.solve(problem, solver="pgd", options=options)


CASES = [
    Case("both", 8, 12, 2),
    Case("shared", 5, 10, 0, shared=frozenset("QGA")),
    Case("equalities", 6, 0, 2),
    Case("free", 6, 0, 0),
    Case("semidefinite", 10, 14, 2, rank=5),
    Case("wide", 12, 5, 1, batch=1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("accelerated", [True, False])
def test_solutions_are_exact(case: Case, accelerated: bool):
    known = draw(case, seed=2)
    found = solve(known.problem, accelerated=accelerated)
    assert set(found.status) == {Status.OPTIMAL}
    np.testing.assert_allclose(found.solution.z, known.z, atol=1e-9)
    np.testing.assert_allclose(found.solution.lam, known.lam, atol=1e-8)
    np.testing.assert_allclose(found.solution.nu, known.nu, atol=1e-8)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_without_polish_the_iterate_meets_the_tolerance(case: Case):
    known = draw(case, seed=2)
    found = solve(known.problem, polish=False, tolerance=1e-6)
    assert set(found.status) == {Status.OPTIMAL}
    y = torch.cat([found.solution.nu, found.solution.lam], dim=1)
    judged = residuals(stack(known.problem), found.solution.z, y)
    assert (judged.scaled <= 1e-6).all()
    error = np.abs(found.solution.z.numpy() - known.z).max()
    assert 1e-13 < error < 1e-3


def test_acceleration_takes_fewer_steps():
    problem = draw(Case("slow", 10, 5, 0, size=1.5), seed=0).problem
    steps = {
        which: solve(problem, polish=False, accelerated=which, tolerance=1e-5).measures["steps"]
        for which in (True, False)
    }
    assert (2 * steps[True] < steps[False]).all()


def test_iterations_count_fifty_steps_and_are_bounded():
    problem = draw(Case("slow", 20, 10, 0, size=3.0), seed=0).problem
    found = solve(problem, polish=False, max_iterations=2, tolerance=1e-12)
    assert set(found.status) == {Status.MAX_ITERATIONS}
    assert found.measures["steps"].tolist() == [100.0] * 3
    assert found.iterations.tolist() == [2] * 3


def constraints(name: str) -> tuple[QP, str]:
    """Rows of which a closed form should be seen, and which."""
    generator = torch.Generator().manual_seed(4)
    eye = torch.eye(4, dtype=D)
    q = torch.randn(3, 4, generator=generator, dtype=D)
    if name == "box":
        # Two bounds on one side of a variable, other scales, a variable without an upper bound, and an inert row.
        G = torch.cat([eye[:3], -2 * eye, 3 * eye[:1], eye[1:2]])
        h = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 1.0, 0.2, 0.6, torch.inf], dtype=D)
        return QP(Q=eye, q=q, G=G, h=h), "box"
    if name == "batched box":
        G = torch.stack([k * torch.cat([eye, -eye]) for k in (1.0, 2.0, 3.0)])
        return QP(Q=eye, q=q, G=G, h=torch.ones(3, 8, dtype=D)), "box"
    A, b = 2.0 * torch.ones(1, 4, dtype=D), torch.tensor([[2.0], [4.0], [0.5]], dtype=D)
    if name == "simplex":
        return QP(
            Q=eye, q=q, G=-3 * eye[[2, 0, 1, 3]], h=torch.tensor([0.0, 0.3, 0.0, 0.0], dtype=D), A=A, b=b
        ), "simplex"
    return QP(Q=eye, q=q, G=torch.cat([eye, -eye]), h=torch.ones(8, dtype=D), A=A, b=b), "polyhedron"


@pytest.mark.parametrize("name", ["box", "batched box", "simplex", "capped simplex"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_closed_forms_are_seen_and_agree_with_the_qp(name: str, scale: float):
    problem, expected = constraints(name)
    data = stack(problem)
    closed, general = projection_on(data, never_stop), Polyhedron(data, never_stop)
    assert closed.name == expected
    v = (scale * data.q).requires_grad_()
    d = data.d.clone().requires_grad_()
    g_z, g_y = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(5), dtype=D)
    found = []
    for projection in (closed, general):
        z, y = projection(v, d)
        value = (g_z[:, :4] * z).sum() + (g_y[:, : y.shape[1]] * y).sum()
        found.append((z.detach(), y.detach(), *torch.autograd.grad(value, (v, d))))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["box", "simplex"])
def test_closed_forms_differentiate(name: str):
    data = stack(constraints(name)[0])
    projection = projection_on(data, never_stop)

    def project(v: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        return projection(v, d)

    assert torch.autograd.gradcheck(project, ((0.7 * data.q).requires_grad_(), data.d.clone().requires_grad_()))


@pytest.mark.parametrize("name", ["box", "simplex", "capped simplex"])
def test_closed_forms_solve_problems(name: str):
    problem, _ = constraints(name)
    root = torch.randn(4, 4, generator=torch.Generator().manual_seed(6), dtype=D)
    problem = QP(**problem.parameters() | {"Q": root @ root.mT + 0.1 * torch.eye(4, dtype=D)})
    found, reference = solve(problem), engine.solve(problem, solver="pdipm")
    for block, expected in found.solution.blocks().items():
        torch.testing.assert_close(expected, reference.solution.blocks()[block], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["box", "simplex", "capped simplex"])
def test_empty_constraints_are_infeasible_and_harm_no_batchmate(name: str):
    problem, _ = constraints(name)
    given = problem.parameters()
    if name == "box":
        h = given["h"].expand(3, -1).clone()
        h[1, 0] = -5.0
        broken = given | {"h": h}
    else:
        b = given["b"].clone()
        b[1] = -20.0
        broken = given | {"b": b}
    found, whole = solve(QP(**broken)), solve(problem)
    assert found.status == (Status.OPTIMAL, Status.INFEASIBLE, Status.OPTIMAL)
    torch.testing.assert_close(found.solution.z[[0, 2]], whole.solution.z[[0, 2]], rtol=0, atol=1e-12)


def test_unbounded_and_nonconvex():
    Q = torch.stack([torch.diag(torch.tensor(d, dtype=D)) for d in ([1.0, 0.0], [1.0, -1.0], [1.0, 1.0])])
    problem = QP(Q=Q, q=torch.tensor([1.0, -1.0], dtype=D), G=-torch.eye(2, dtype=D), h=torch.zeros(2, dtype=D))
    found = solve(problem, max_iterations=2)
    assert found.status == (Status.UNBOUNDED, Status.NONCONVEX, Status.OPTIMAL)


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.name)
def test_gradients(case: Case):
    known = draw(case, seed=3)
    rng = np.random.default_rng(0)
    upstream = {"z": rng.normal(size=known.z.shape), "lam": rng.normal(size=known.lam.shape)}
    if not case.m:
        del upstream["lam"]
    found = solve(known.problem)
    back = engine.vjp(found, {name: torch.from_numpy(block) for name, block in upstream.items()})
    names = tuple(known.problem.parameters())
    formed = form(found, back, names)
    reference = oracle_gradients(known.problem, known, upstream)
    for name in names:
        theirs = np.stack([each[name] for each in reference])
        theirs = theirs if known.problem.is_batched(name) else theirs.sum(0)
        assert relative_error([{name: formed[name].numpy()}], [{name: theirs}]) < 1e-8


def test_a_weakly_active_row_is_flagged():
    eye = torch.eye(2, dtype=D)
    found = solve(QP(Q=eye, q=torch.tensor([-1.0, -2.0], dtype=D), G=eye, h=torch.ones(2, dtype=D)))
    assert found.status == (Status.OPTIMAL,)
    assert found.flags == ((Flag.DEGENERATE,),)


def test_a_batch_is_a_loop_of_singles():
    problem = draw(Case("both", 8, 12, 2), seed=2).problem
    together = solve(problem, polish=False)
    for i in range(3):
        alone = solve(QP(**{name: block[i] for name, block in problem.parameters().items()}), polish=False)
        torch.testing.assert_close(alone.solution.z[0], together.solution.z[i], rtol=0, atol=1e-12)
        assert alone.measures["steps"][0] == together.measures["steps"][i]


def test_should_stop_ends_the_solve():
    problem = draw(Case("both", 8, 12, 2), seed=2).problem
    with pytest.raises(engine.Stopped):
        engine.solve(problem, solver="pgd", options=SolverOptions(should_stop=lambda: True))
