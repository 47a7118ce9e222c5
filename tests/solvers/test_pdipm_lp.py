"""Linear programs by `pdipm`: vertices finished exactly, degenerate ones, no unique solution, and no solution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from argrad.problems import QP, Flag, Solution, Status, gradients
from argrad_service import engine

pytestmark = pytest.mark.slow

F64 = torch.float64
BOX = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]], dtype=F64)
PYRAMID = torch.tensor([[1.0, 0, 1], [-1, 0, 1], [0, 1, 1], [0, -1, 1]], dtype=F64)


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=F64)


def vertex(seed: int, n: int, m: int, p: int, batch: int) -> tuple[QP, Tensor, Tensor]:
    """LPs with a unique vertex, its z and λ."""
    random = torch.Generator().manual_seed(seed)
    G, A = (torch.randn(batch, rows, n, generator=random, dtype=F64) for rows in (m, p))
    z, nu = (torch.randn(batch, size, generator=random, dtype=F64) for size in (n, p))
    is_active = torch.arange(m) < n - p
    lam = torch.where(is_active, 0.1 + torch.rand(batch, m, generator=random, dtype=F64), 0.0)
    s = torch.where(is_active, 0.0, 0.1 + torch.rand(batch, m, generator=random, dtype=F64))
    q = -((lam.unsqueeze(1) @ G) + (nu.unsqueeze(1) @ A)).squeeze(1)
    h, b = (G @ z.unsqueeze(-1)).squeeze(-1) + s, (A @ z.unsqueeze(-1)).squeeze(-1)
    return QP(q=q, G=G, h=h, A=A if p else None, b=b if p else None), z, lam


def solved(problem: QP) -> engine.Forward:
    return engine.solve(problem, solver="pdipm")


@pytest.mark.parametrize(("n", "m", "p", "batch"), [(2, 4, 0, 1), (5, 12, 1, 16), (20, 50, 5, 8), (60, 130, 10, 2)])
def test_a_unique_vertex_is_finished_exactly(n: int, m: int, p: int, batch: int) -> None:
    problem, z, lam = vertex(1, n, m, p, batch)
    forward = solved(problem)
    assert set(forward.status) == {Status.OPTIMAL}
    assert set(forward.flags) == {()}
    torch.testing.assert_close(forward.solution.z, z, rtol=0, atol=1e-11)
    torch.testing.assert_close(forward.solution.lam, lam, rtol=0, atol=1e-11)
    back = engine.vjp(forward, {"z": torch.ones_like(z)})
    assert set(back.gradient_status) == {"ok"}
    assert bool((back.adjoint.z == 0).all()), "∂c is zero exactly"
    assert bool((back.adjoint.mu != 0).any(-1).all())


@pytest.mark.parametrize("name", ["G", "h", "A", "b", "q"])
@pytest.mark.parametrize("block", ["z", "nu", "lam"])
def test_gradients_against_central_differences(name: str, block: str) -> None:
    problem, _, _ = vertex(2, 4, 9, 1, 2)
    random = torch.Generator().manual_seed(3)
    forward = solved(problem)
    weight = torch.randn(getattr(forward.solution, block).shape, generator=random, dtype=F64)
    adjoint = engine.vjp(forward, {block: weight}).adjoint
    parameters = problem.parameters()
    gradient = gradients(forward.solution, adjoint, wrt=[name], batched=parameters)[name]
    direction = torch.randn(parameters[name].shape, generator=random, dtype=F64)

    def value(step: float) -> float:
        moved = QP(**(parameters | {name: parameters[name] + step * direction}))
        return float((getattr(solved(moved).solution, block) * weight).sum())

    expected = (value(1e-6) - value(-1e-6)) / 2e-6
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-6, abs=1e-8)
    # The multipliers follow the costs, the vertex follows its rows' right-hand sides.
    is_fixed = name in ({"q"} if block == "z" else {"h", "b"})
    assert (abs(expected) > 1e-3) == (not is_fixed)


def test_jvp_is_the_transpose_of_vjp() -> None:
    problem, _, _ = vertex(4, 4, 9, 1, 3)
    random = torch.Generator().manual_seed(5)
    forward = solved(problem)
    moved = {k: torch.randn(t.shape, generator=random, dtype=F64) for k, t in problem.parameters().items()}
    weights = {k: torch.randn(t.shape, generator=random, dtype=F64) for k, t in forward.solution.blocks().items()}
    tangents = engine.jvp(forward, moved).solution.blocks()
    adjoint = engine.vjp(forward, weights).adjoint
    pulled = gradients(forward.solution, adjoint, wrt=moved, batched=moved)
    left = sum(float((tangents[k] * weights[k]).sum()) for k in weights)
    assert left == pytest.approx(sum(float((pulled[k] * moved[k]).sum()) for k in moved), rel=1e-9)


DEGENERATE = {
    "a cut corner": (QP(q=tensor([-1, -2]), G=torch.cat([BOX, tensor([[1, 1]])]), h=tensor([1, 1, 1, 1, 2])), [1, 1]),
    "the top of a pyramid": (QP(q=tensor([0.5, 0, -1]), G=PYRAMID, h=torch.ones(4, dtype=F64)), [0, 0, 1]),
    "a row twice": (QP(q=tensor([-1]), G=tensor([[1], [1], [-1]]), h=torch.ones(3, dtype=F64)), [1]),
    "equalities twice": (QP(q=tensor([0, 0]), A=tensor([[1, 0], [0, 1], [1, 1]]), b=tensor([1, 1, 2])), [1, 1]),
}


@pytest.mark.parametrize("case", DEGENERATE.values(), ids=DEGENERATE)
def test_a_vertex_of_too_many_rows_is_unique_but_its_multipliers_are_not(case: tuple[QP, list[float]]) -> None:
    problem, z = case
    forward = solved(problem)
    assert forward.flags == ((Flag.DEPENDENT,),)
    torch.testing.assert_close(forward.solution.z, tensor([z]), rtol=0, atol=1e-12)
    assert float(forward.dual_residual) < 1e-12
    back = engine.vjp(forward, {"z": torch.ones_like(forward.solution.z)})
    assert back.gradient_status == ("ok",)
    assert back.flags == ((Flag.DEPENDENT,),)
    # d_z = 0, so Cᵀd_y = −g whichever multipliers are taken.
    C = torch.cat([t for t in (problem.A, problem.G) if t is not None])
    pulled = torch.cat([back.adjoint.nu, back.adjoint.mu], dim=1) @ C
    torch.testing.assert_close(pulled, -torch.ones_like(forward.solution.z), rtol=0, atol=1e-10)
    block = "lam" if problem.m else "nu"
    refused = engine.vjp(forward, {block: torch.ones_like(getattr(forward.solution, block))})
    assert refused.gradient_status == ("dependent",)


@pytest.mark.parametrize("lam", [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5], [0.25, 0.25, 0.25, 0.25]])
def test_a_callers_multipliers_do_not_change_what_a_degenerate_vertex_is(lam: list[float]) -> None:
    """A simplex method returns basic multipliers: rows with λ = 0 at such a vertex are not weakly active."""
    problem = QP(q=tensor([0, 0, -1]), G=PYRAMID, h=torch.ones(4, dtype=F64))
    point = Solution(z=tensor([[0, 0, 1]]), nu=tensor([[]]), lam=tensor([lam]), s=torch.zeros(1, 4, dtype=F64))
    forward = engine.at_point(problem, point)
    assert forward.flags == ((Flag.DEPENDENT,),)
    back = engine.vjp(forward, {"z": torch.ones(1, 3, dtype=F64)})
    assert back.gradient_status == ("ok",)
    reference = engine.vjp(solved(problem), {"z": torch.ones(1, 3, dtype=F64)})
    torch.testing.assert_close(back.adjoint.mu, reference.adjoint.mu)


NONUNIQUE = {
    "an edge": (QP(q=tensor([0, -1]), G=BOX, h=torch.ones(4, dtype=F64)), -1.0),
    "no objective": (QP(q=tensor([0, 0]), G=BOX, h=torch.ones(4, dtype=F64)), 0.0),
    "an edge of redundant rows": (
        QP(q=tensor([0, -1]), G=torch.cat([BOX, tensor([[0, 1]])]), h=torch.ones(5, dtype=F64)),
        -1.0,
    ),
    "a face": (QP(q=tensor([1, 0, -1]), G=PYRAMID, h=torch.ones(4, dtype=F64)), -1.0),
    "an equality": (QP(q=tensor([0, -1]), A=tensor([[0, 1]]), b=tensor([-1])), 1.0),
    "nothing at all": (QP(q=tensor([0, 0])), 0.0),
}


@pytest.mark.parametrize("case", NONUNIQUE.values(), ids=NONUNIQUE)
def test_without_a_unique_solution_the_objective_is_exact_and_the_gradient_refused(case: tuple[QP, float]) -> None:
    problem, objective = case
    forward = solved(problem)
    assert forward.status == (Status.OPTIMAL,)
    assert Flag.NONUNIQUE in forward.flags[0]
    assert float(forward.objective) == pytest.approx(objective, abs=1e-12)
    back = engine.vjp(forward, {"z": torch.ones_like(forward.solution.z)})
    assert back.gradient_status == ("nonunique",)
    assert bool(back.adjoint.z.isnan().all())


def test_a_callers_vertex_of_an_edge_is_not_unique_either() -> None:
    problem = QP(q=tensor([0, -1]), G=BOX, h=torch.ones(4, dtype=F64))
    point = Solution(z=tensor([[1, 1]]), nu=tensor([[]]), lam=tensor([[0, 1, 0, 0]]), s=tensor([[0, 0, 2, 2]]))
    forward = engine.at_point(problem, point)
    assert Flag.NONUNIQUE in forward.flags[0]
    assert engine.vjp(forward, {"z": torch.ones(1, 2, dtype=F64)}).gradient_status == ("nonunique",)


UNSOLVABLE = {
    "infeasible": QP(q=tensor([0, -1]), G=torch.cat([BOX, tensor([[0, 1]])]), h=tensor([1, 1, 1, 1, -2])),
    "unbounded": QP(q=tensor([-1, -1]), G=BOX[1:], h=torch.ones(3, dtype=F64)),
}


@pytest.mark.parametrize("status", UNSOLVABLE)
def test_verdicts(status: str) -> None:
    forward = solved(UNSOLVABLE[status])
    assert forward.status == (Status(status),)
    assert engine.vjp(forward, {"z": torch.ones(1, 2, dtype=F64)}).gradient_status == (status,)


def test_verdicts_do_not_touch_their_batchmates() -> None:
    good = QP(q=tensor([-1, -2]), G=BOX, h=torch.ones(4, dtype=F64))
    q = tensor([[-1, -2], [0, -1], [-1, -2]])
    h = torch.ones(3, 4, dtype=F64)
    h[2, 0], h[2, 2] = -1.0, -1.0
    forward = solved(QP(q=q, G=BOX, h=h))
    assert forward.status == (Status.OPTIMAL, Status.OPTIMAL, Status.INFEASIBLE)
    assert torch.equal(forward.solution.z[0], solved(good).solution.z[0])
    back = engine.vjp(forward, {"z": torch.ones(3, 2, dtype=F64)})
    assert back.gradient_status == ("ok", "nonunique", "infeasible")


def test_assignment_problems_against_highs() -> None:
    """As degenerate as linear programs are: n active bounds more than free variables, one redundant equality."""
    k, random = 5, np.random.default_rng(0)
    A = np.zeros((2 * k, k * k))
    for i in range(k):
        A[i, k * i : k * i + k] = 1
        A[k + i, i::k] = 1
    cost = random.uniform(size=(6, k * k))
    eye = torch.eye(k * k, dtype=F64)
    ones = torch.ones(2 * k, dtype=F64)
    rows = {"G": -eye, "h": torch.zeros(k * k, dtype=F64), "A": torch.from_numpy(A), "b": ones}
    forward = solved(QP(q=torch.from_numpy(cost), **rows))
    reference = [linprog(c, A_eq=A, b_eq=np.ones(2 * k)).x for c in cost]
    torch.testing.assert_close(forward.solution.z, torch.tensor(np.array(reference)), rtol=0, atol=1e-10)
    assert set(forward.flags) == {(Flag.DEPENDENT,)}


@pytest.mark.parametrize("rank", [0, 2])
def test_a_singular_q_has_a_unique_solution_where_its_rows_fix_the_rest(rank: int) -> None:
    """`Q` given as zeros is a QP that happens to be linear; of low rank it is in between."""
    problem, z, _ = vertex(6, 4, 9, 0, 2)
    root = torch.zeros(4, 4, dtype=F64)
    root[:rank, :rank] = torch.eye(rank, dtype=F64)
    forward = solved(QP(Q=root, **problem.parameters()))
    assert set(forward.status) == {Status.OPTIMAL}
    if rank == 0:
        torch.testing.assert_close(forward.solution.z, z, rtol=0, atol=1e-12)
    assert float(forward.dual_residual.max()) < 1e-10


def test_small_integer_problems_against_highs() -> None:
    """Degenerate in every way: zero and repeated rows, unbounded faces, no solution."""
    random = np.random.default_rng(1)
    words = {0: Status.OPTIMAL, 2: Status.INFEASIBLE, 3: Status.UNBOUNDED}
    seen = set()
    for trial in range(80):
        n, m = random.integers(1, 6), random.integers(1, 14)
        c, G = random.integers(-2, 3, n).astype(float), random.integers(-1, 2, (m, n)).astype(float)
        h = random.integers(0 if trial % 3 else -2, 3, m).astype(float)
        reference = linprog(c, G, h, bounds=(None, None))
        forward = solved(QP(q=torch.from_numpy(c), G=torch.from_numpy(G), h=torch.from_numpy(h)))
        assert forward.status == (words[reference.status],), trial
        seen.add(reference.status)
        if reference.status != 0:
            continue
        assert float(forward.objective) == pytest.approx(reference.fun, abs=1e-10)
        # The range of each variable over the solutions: zero in all of them where the solution is unique.
        face, ends = np.vstack([G, c]), []
        for i in range(n):
            for sign in (1.0, -1.0):
                end = linprog(sign * np.eye(n)[i], face, np.append(h, reference.fun + 1e-9), bounds=(None, None))
                ends.append(end.fun if end.status == 0 else -np.inf)
        is_unique = max(-ends[2 * i] - ends[2 * i + 1] for i in range(n)) < 1e-6
        assert (Flag.NONUNIQUE not in forward.flags[0]) == is_unique, trial
    assert seen == set(words)
