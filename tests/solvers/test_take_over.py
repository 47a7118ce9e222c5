"""A caller's solution taken over by the compiled kernels: the same as by confirming its active set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from argrad.problems import QP, Solution, Status
from argrad_service import engine
from argrad_service.engine.forward import pivoting

D = torch.float64


def draw(batch: int = 6, n: int = 8, m: int = 12) -> QP:
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=D, generator=generator)

    root, G = normal(batch, n, n), normal(batch, m, n)
    h = (G @ normal(batch, n, 1)).squeeze(-1) + torch.rand(batch, m, dtype=D, generator=generator)
    return QP(Q=root @ root.mT + torch.eye(n, dtype=D), q=normal(batch, n), G=G, h=h)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each take-over whether it was done."""
    done: list[bool] = []
    original = pivoting.take_over

    def noted(*arguments: object) -> object:
        point = original(*arguments)  # type: ignore[arg-type]
        done.append(point is not None)
        return point

    monkeypatch.setattr(pivoting, "take_over", noted)
    return done


def test_it_is_what_confirming_the_active_set_gives(counted: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    problem = draw()
    solution = engine.solve(problem).solution
    rough = Solution(**{name: block + 1e-7 * block.abs() for name, block in solution.blocks().items()})
    taken = engine.at_point(problem, rough)
    monkeypatch.setattr(pivoting, "take_over", lambda *_: None)
    confirmed = engine.at_point(problem, rough)
    assert counted == [True]
    assert taken.solver == confirmed.solver
    assert taken.status == confirmed.status == (Status.OPTIMAL,) * 6
    assert torch.equal(taken.iterations, confirmed.iterations)
    upstream = {"z": torch.ones(6, 8, dtype=D), "lam": torch.linspace(-1, 1, 12, dtype=D).repeat(6, 1)}
    for found, wanted in (
        (taken.solution, confirmed.solution),
        (engine.vjp(taken, upstream).adjoint, engine.vjp(confirmed, upstream).adjoint),
    ):
        for name, block in wanted.blocks().items():
            torch.testing.assert_close(found.blocks()[name], block, rtol=1e-10, atol=1e-10)


def test_a_point_that_is_no_solution_is_refused_as_ever(counted: list[bool]) -> None:
    problem = draw()
    solution = engine.solve(problem).solution
    blocks = {name: block.clone() for name, block in solution.blocks().items()}
    blocks["z"][2] += 1.0
    taken = engine.at_point(problem, Solution(**blocks))
    assert counted == [False]
    assert taken.status[2] == Status.NUMERICAL_ERROR
    assert [status for i, status in enumerate(taken.status) if i != 2] == [Status.OPTIMAL] * 5


def test_weakly_active_rows_are_left_to_whoever_flags_them(counted: list[bool]) -> None:
    """At z = 0 the row z₁ ≥ 0 holds without force."""
    problem = QP(
        Q=torch.eye(2, dtype=D).unsqueeze(0),
        q=torch.zeros(1, 2, dtype=D),
        G=torch.tensor([[[-1.0, 0.0]]], dtype=D),
        h=torch.zeros(1, 1, dtype=D),
    )
    zero = torch.zeros(1, 2, dtype=D)
    point = Solution(z=zero, nu=zero[:, :0], lam=zero[:, :1], s=zero[:, :1])
    found = engine.at_point(problem, point)
    assert counted == [False]
    assert found.status == (Status.OPTIMAL,)
    assert found.flags[0]
