"""What solves keep for one another never changes a result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from argrad.problems import QP
from argrad_service import engine
from argrad_service.engine import Prepared

D = torch.float64


def draw(n: int, m: int, p: int, batch: int | None, batched: str = "QqGhAb") -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(n + m + p)

    def normal(name: str, *shape: int) -> Tensor:
        lead = (batch,) if batch is not None and name in batched else ()
        return torch.randn(*lead, *shape, generator=random, dtype=D)

    root = normal("Q", n, n)
    given = {
        "Q": root @ root.mT + torch.eye(n, dtype=D),
        "q": normal("q", n),
        "G": normal("G", m, n),
        "h": normal("h", m).abs(),
        "A": normal("A", p, n),
        "b": 0.1 * normal("b", p),
    }
    return {name: tensor for name, tensor in given.items() if tensor.shape[-1] and tensor.shape[-2:-1] != (0,)}


def check_same(found: engine.Outcome, wanted: engine.Outcome) -> None:
    assert found.status == wanted.status
    torch.testing.assert_close(found.solution.blocks(), wanted.solution.blocks(), rtol=0, atol=0)
    upstream = {"z": torch.ones_like(wanted.solution.z)}
    one, other = (engine.vjp(outcome, upstream).adjoint.blocks() for outcome in (found, wanted))
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("solver", ["pivoting", "pdipm"])
@pytest.mark.parametrize(
    ("sizes", "batch", "batched"),
    [
        ((6, 4, 0), 5, "QqGhAb"),
        ((6, 4, 0), 5, "q"),
        ((6, 4, 0), 5, "qGh"),
        ((6, 4, 0), None, ""),
        ((4, 9, 1), 5, "QqGhAb"),
        ((4, 9, 1), 5, "qh"),
        ((5, 0, 2), 3, "q"),
    ],
    ids=str,
)
def test_prepared_solves_are_the_same_to_the_last_bit(
    solver: str, sizes: tuple[int, int, int], batch: int | None, batched: str
) -> None:
    given = draw(*sizes, batch, batched)
    prepared = Prepared(tensor for name, tensor in given.items() if name != "q")
    for seed in range(3):
        q = given["q"] + 0.1 * seed
        problem = QP(**(given | {"q": q}))
        plain = engine.solve(problem, solver=solver)
        check_same(engine.solve(problem, solver=solver, prepared=prepared), plain)
    assert prepared.nbytes > 0
    at = engine.at_point(problem, plain.solution, prepared=prepared)
    check_same(at, engine.at_point(problem, plain.solution))


def test_factors_are_kept_for_the_same_matrices_only() -> None:
    given = draw(6, 4, 0, 5)
    prepared = Prepared([given["Q"], given["G"]])
    engine.solve(QP(**given), prepared=prepared)
    before = prepared.nbytes
    for name in ("Q", "G"):
        other = given | {name: given[name].clone() + (torch.eye(6, dtype=D) if name == "Q" else 0.1)}
        check_same(engine.solve(QP(**other), prepared=prepared), engine.solve(QP(**other)))
    assert prepared.nbytes == before


def test_rows_that_cannot_bind_and_float32_and_indefinite_problems() -> None:
    given = draw(6, 4, 0, 5)
    free = given["h"].clone()
    free[2, 1] = torch.inf
    indefinite = given["Q"].clone()
    indefinite[3] = -torch.eye(6, dtype=D)
    for changes in ({"h": free}, {"Q": indefinite}):
        problem = given | changes
        for dtype in (D, torch.float32):
            same = {name: tensor.to(dtype) for name, tensor in problem.items()}
            prepared = Prepared(same.values())
            for _ in range(2):
                check_same(engine.solve(QP(**same), prepared=prepared), engine.solve(QP(**same)))


def test_closed_keeps_nothing() -> None:
    given = draw(6, 4, 0, 5)
    prepared = Prepared(given.values())
    engine.solve(QP(**given), prepared=prepared)
    prepared.close()
    engine.solve(QP(**given), prepared=prepared)
    assert prepared.nbytes == 0
