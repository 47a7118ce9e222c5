"""Kernels for small problems beside those for all sizes, and what both say of values that are not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from argrad.problems import QP
from argrad_service.engine import compiled
from argrad_service.engine.data import Data, stack
from argrad_service.engine.kernels.active_set import DEGENERATE, INFEASIBLE, NOT_DEFINITE, SOLVED

BATCH = 200


@pytest.fixture(autouse=True)
def solver() -> None:
    """The kernels themselves are called: once is enough."""


def draw(n: int, m: int, p: int, shared: str, seed: int) -> QP:
    """Problems of which some have rows that are dependent, weakly active or contradictory."""
    generator = torch.Generator().manual_seed(seed)

    def normal(name: str, *shape: int) -> Tensor:
        return torch.randn(*(() if name in shared else (BATCH,)), *shape, dtype=torch.float64, generator=generator)

    L = normal("Q", n, n)
    Q = L @ L.mT + 1e-2 * torch.eye(n, dtype=torch.float64)
    G, A, inside = normal("G", m, n), normal("A", p, n), normal("z", n)
    h = (G @ inside.unsqueeze(-1)).squeeze(-1) + torch.rand(BATCH, m, dtype=torch.float64, generator=generator)
    if m > 1 and "G" not in shared:
        G[::5, 1] = G[::5, 0]
        h[::5, 1] = h[::5, 0]
        G[1::7, 1] = -G[1::7, 0]
        h[1::7, 1] = -h[1::7, 0] - 0.5
    b = (A @ inside.unsqueeze(-1)).squeeze(-1)
    rows = {"G": G, "h": h} if m else {}
    equalities = {"A": A, "b": b} if p else {}
    return QP(Q=Q, q=3 * normal("q", n), **rows, **equalities)


def both(data: Data, monkeypatch: pytest.MonkeyPatch) -> tuple[compiled.Solved, compiled.Solved]:
    small = compiled.solve_batch(data)
    with monkeypatch.context() as patched:
        patched.setattr(compiled, "is_small", lambda n, rows: False)
        return small, compiled.solve_batch(data)


@pytest.mark.parametrize(
    ("n", "m", "p"), [(1, 1, 0), (2, 0, 1), (3, 0, 0), (5, 10, 0), (5, 10, 2), (10, 10, 0), (12, 40, 3), (12, 5, 6)]
)
@pytest.mark.parametrize("shared", ["", "Q", "QGA"], ids=["batched", "shared Q", "shared matrices"])
def test_small_problems_are_solved_as_all_are(
    n: int, m: int, p: int, shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = stack(draw(n, m, p, shared, seed=n + m + p))
    small, general = both(data, monkeypatch)
    assert compiled.is_small(n, m + p)
    solved = (small.code == SOLVED) & (general.code == SOLVED)
    # On a degenerate set the two may stop at different ones of several: both then leave the problem to another solver.
    assert bool((solved | (small.code != SOLVED) & (general.code != SOLVED)).all())
    assert bool(((small.code == INFEASIBLE) == (general.code == INFEASIBLE)).all())
    assert int(solved.sum()) > BATCH // 2
    for name in ("z", "y", "s"):
        torch.testing.assert_close(
            getattr(small, name)[solved], getattr(general, name)[solved], rtol=1e-9, atol=1e-9, msg=name
        )
    assert bool((small.active == general.active)[solved].all())
    assert float(small.report[solved, 4].max()) < 1e-12


@pytest.mark.parametrize("right", ["z", "z and rows"])
def test_small_problems_are_differentiated_as_all_are(right: str, monkeypatch: pytest.MonkeyPatch) -> None:
    n, m, p = 6, 9, 2
    data = stack(draw(n, m, p, "G", seed=3))
    small, general = both(data, monkeypatch)
    assert small.is_whole
    assert general.is_whole
    generator = torch.Generator().manual_seed(1)
    r1 = torch.randn(BATCH, 3, n, dtype=torch.float64, generator=generator)
    r2 = torch.randn(BATCH, 3, m + p, dtype=torch.float64, generator=generator) if right != "z" else None
    found = compiled.finish(data, small).factor.solve_rows(r1, r2)
    with monkeypatch.context() as patched:
        patched.setattr(compiled, "is_small", lambda n, rows: False)
        wanted = compiled.finish(data, general).factor.solve_rows(r1, r2)
    for one, other in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert float(found[2].max()) < 1e-12
    assert bool((found[1].transpose(1, 2)[~small.active] == 0).all())


def test_a_matrix_that_is_not_definite_and_a_weakly_active_row_are_left_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Q = torch.stack([torch.zeros(2, 2), torch.eye(2), torch.eye(2)]).double()
    h = torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64)
    data = stack(QP(Q=Q, q=torch.zeros(3, 2, dtype=torch.float64), G=torch.ones(1, 2, dtype=torch.float64), h=h))
    for solved in both(data, monkeypatch):
        assert solved.code.tolist() == [NOT_DEFINITE, DEGENERATE, SOLVED]
        assert not solved.is_whole


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in ("Q", "q", "G", "h", "A", "b")
        for value in (float("nan"), float("inf"), float("-inf"))
        if (name, value) != ("h", float("inf"))  # such a row does not bind
    ],
)
@pytest.mark.parametrize("n", [4, 20])
def test_no_problem_with_a_value_that_is_not_finite_counts_as_solved(name: str, value: float, n: int) -> None:
    """Whoever hands data over that nobody has looked at relies on it, whichever row or column holds the value."""
    good = {key: tensor.clone() for key, tensor in draw(n, 3, 2, "", seed=0).parameters().items()}
    for at in np.ndindex(*good[name].shape[1:]):
        bad = good | {name: good[name].clone()}
        bad[name][(7, *at)] = value
        solved = compiled.solve_batch(stack(QP(**bad)))
        assert solved.code[7] != SOLVED, at
        assert not solved.is_whole


def test_where_no_kernel_runs_nothing_is_left_of_other_problems() -> None:
    for _ in range(3):  # memory that was in use before
        assert compiled.solve_batch(stack(draw(3, 2, 0, "", seed=1))).z.any()
        Q = -torch.eye(3, dtype=torch.float64)
        solved = compiled.solve_batch(stack(QP(Q=Q, q=torch.ones(BATCH, 3, dtype=torch.float64))))
        assert solved.code.tolist() == [NOT_DEFINITE] * BATCH
        for block in (solved.z, solved.y, solved.s, solved.report, solved.active):
            assert not bool(block.any())
