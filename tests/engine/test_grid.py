"""Solutions and gradients over a grid of regular problems, against known solutions and a dense oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from argrad.problems import Adjoint, Solution, Status, gradients
from argrad_service import engine
from tests.engine.qps import Case, draw, oracle_gradients, relative_error

CASES = [
    Case("one-variable", 1, 1, 0),
    Case("unconstrained", 5, 0, 0),
    Case("equalities-only", 6, 0, 3),
    Case("inequalities-only", 8, 6, 0),
    Case("both", 10, 6, 3),
    Case("square", 12, 12, 0),
    Case("more-rows-than-variables", 5, 14, 0),
    Case("many-rows", 4, 60, 0),
    Case("many-rows-and-equalities", 8, 40, 3),
    Case("as-many-equalities-as-variables", 4, 5, 4),
    Case("singular-q", 10, 12, 3, rank=4),
    Case("low-rank-q-many-rows", 6, 30, 0, rank=1),
    Case("shared-q", 8, 6, 2, shared=frozenset({"Q"})),
    Case("shared-matrices", 8, 6, 2, shared=frozenset({"Q", "G", "A"})),
    Case("shared-matrices-many-rows", 4, 20, 1, shared=frozenset({"Q", "G", "A"})),
    Case("shared-matrices-singular-q", 8, 12, 2, rank=5, shared=frozenset({"Q", "G", "A"})),
    Case("batch-of-forty", 10, 8, 2, batch=40),
    Case("badly-scaled", 8, 8, 2, size=1e3),
    Case("badly-scaled-singular-q", 8, 12, 2, rank=5, size=1e2),
    Case("larger", 60, 50, 10),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_solution_and_gradients_are_exact(case: Case, seed: int) -> None:
    known = draw(case, seed)
    problem = known.problem
    forward = engine.solve(problem)
    assert forward.status == (Status.OPTIMAL,) * case.batch
    assert all(flags == () for flags in forward.flags), forward.flags
    scale = max(1.0, case.size)
    for name in ("z", "nu", "lam", "s"):
        found, wanted = getattr(forward.solution, name).numpy(), getattr(known, name)
        np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-9 * scale, err_msg=name)
    assert float(forward.primal_residual.max()) <= 1e-8
    assert float(forward.dual_residual.max()) <= 1e-8
    assert float(forward.gap.max()) <= 1e-8 * scale**2

    rng = np.random.default_rng(seed)
    upstream = {name: rng.normal(size=getattr(known, name).shape) for name in ("z", "nu", "lam", "s")}
    backward = engine.vjp(forward, {name: torch.from_numpy(g) for name, g in upstream.items()})
    assert backward.gradient_status == ("ok",) * case.batch
    names = list(problem.parameters())
    formed = gradients(forward.solution, backward.adjoint, wrt=names, batched=names)
    mine = [{k: v[i].numpy() for k, v in formed.items()} for i in range(case.batch)]
    reference = [{k: g[k] for k in names} for g in oracle_gradients(problem, known, upstream)]
    assert relative_error(mine, reference) <= (1e-8 if case.size == 1.0 else 1e-6)

    # A parameter that the batch shares receives the sum.
    batched = [name for name in names if problem.is_batched(name)]
    summed = gradients(forward.solution, backward.adjoint, wrt=names, batched=batched)
    for name in set(names) - set(batched):
        total = sum(g[name] for g in mine)
        np.testing.assert_allclose(summed[name].numpy(), total, rtol=1e-9, atol=1e-9 * np.abs(total).max())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tangents_and_adjoints_are_transposes(case: Case) -> None:
    """⟨J θ̇, g⟩ = ⟨θ̇, Jᵀg⟩ over every parameter and every block of the solution."""
    known = draw(case, 7)
    forward = engine.solve(known.problem)
    generator = torch.Generator().manual_seed(3)
    tangents = {
        name: torch.randn(t.shape, generator=generator, dtype=t.dtype) for name, t in known.problem.parameters().items()
    }
    upstream = {
        name: torch.randn(t.shape, generator=generator, dtype=t.dtype) for name, t in forward.solution.blocks().items()
    }
    pushed = engine.jvp(forward, tangents)
    assert pushed.gradient_status == ("ok",) * case.batch
    pulled = engine.vjp(forward, upstream)
    batched = [name for name in tangents if known.problem.is_batched(name)]
    formed = gradients(forward.solution, pulled.adjoint, wrt=list(tangents), batched=batched)
    terms_left = [float((pushed.solution.blocks()[k] * g).sum()) for k, g in upstream.items()]
    terms_right = [float((formed[k] * t).sum()) for k, t in tangents.items()]
    size = max(map(abs, terms_left + terms_right))
    assert sum(terms_left) == pytest.approx(sum(terms_right), abs=1e-9 * size * max(1.0, case.size))


@pytest.mark.parametrize("case", CASES[:16], ids=lambda case: case.name)
def test_many_cotangents_equal_one_at_a_time(case: Case) -> None:
    known = draw(case, 2)
    forward = engine.solve(known.problem)
    generator = torch.Generator().manual_seed(5)
    many = {
        name: torch.randn(4, *t.shape, generator=generator, dtype=t.dtype)
        for name, t in forward.solution.blocks().items()
    }
    together = engine.vjp(forward, many).adjoint
    for k in range(4):
        alone = engine.vjp(forward, {name: g[k] for name, g in many.items()}).adjoint
        for name, block in alone.blocks().items():
            torch.testing.assert_close(together.blocks()[name][k], block, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["Q", "q", "G", "h", "A", "b"])
@pytest.mark.parametrize("case", [CASES[4], CASES[8], CASES[10], CASES[13]], ids=lambda case: case.name)
def test_central_differences_agree(case: Case, name: str) -> None:
    """The gradient along a random direction, for a loss that weighs every block of the solution."""
    known = draw(case, 11)
    problem = known.problem
    generator = torch.Generator().manual_seed(13)
    tensors = problem.parameters()
    turn = torch.randn(tensors[name].shape, generator=generator, dtype=torch.float64)

    def moved(step: float) -> torch.Tensor:
        """The parameter a step away; a Q keeps its rank, for it must stay semidefinite."""
        if name != "Q":
            return tensors[name] + step * turn
        frame = torch.eye(case.n, dtype=torch.float64) + step * turn
        return frame.mT @ tensors["Q"] @ frame

    direction = turn.mT @ tensors["Q"] + tensors["Q"] @ turn if name == "Q" else turn
    forward = engine.solve(problem)
    weights = {
        k: torch.randn(t.shape, generator=generator, dtype=t.dtype) for k, t in forward.solution.blocks().items()
    }

    def loss(step: float) -> float:
        there = engine.solve(type(problem)(**{**tensors, name: moved(step)}))
        return sum(float((there.solution.blocks()[k] * w).sum()) for k, w in weights.items())

    step = 1e-5
    difference = (loss(step) - loss(-step)) / (2 * step)
    adjoint = engine.vjp(forward, weights).adjoint
    batched = [name] if problem.is_batched(name) else []
    formed = gradients(forward.solution, adjoint, wrt=[name], batched=batched)[name]
    assert float((formed * direction).sum()) == pytest.approx(difference, rel=2e-6, abs=1e-7)


def test_an_asymmetric_q_is_read_as_its_symmetric_part() -> None:
    known = draw(CASES[4], 0)
    skew = torch.randn(10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tensors = {**known.problem.parameters(), "Q": known.problem.Q + skew - skew.T}
    forward = engine.solve(type(known.problem)(**tensors))
    np.testing.assert_allclose(forward.solution.z.numpy(), known.z, atol=1e-10)


def test_float32_is_solved_in_float64() -> None:
    known = draw(CASES[4], 0)
    single = type(known.problem)(**{k: t.float() for k, t in known.problem.parameters().items()})
    forward = engine.solve(single)
    assert forward.solution.z.dtype == torch.float64
    np.testing.assert_allclose(forward.solution.z.numpy(), known.z, atol=1e-5)
    assert float(forward.dual_residual.max()) < 1e-12


def test_blocks_of_an_adjoint_are_its_vector_gradients() -> None:
    known = draw(CASES[4], 0)
    forward = engine.solve(known.problem)
    adjoint = engine.vjp(forward, {"z": torch.ones_like(forward.solution.z)}).adjoint
    formed = gradients(forward.solution, adjoint, wrt=["q", "h", "b"], batched=["q", "h", "b"])
    assert torch.equal(formed["q"], adjoint.z)
    assert torch.equal(formed["h"], -adjoint.mu)
    assert torch.equal(formed["b"], -adjoint.nu)
    assert isinstance(forward.solution, Solution)
    assert isinstance(adjoint, Adjoint)
