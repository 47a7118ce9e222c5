"""Batches that share Q and rows, by the inverse of their Gram matrix: against problems with matrices of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from argrad.problems import QP
from argrad_service.engine import compiled
from argrad_service.engine.data import Data, stack
from argrad_service.engine.kernels import shared_rows
from argrad_service.engine.kernels.active_set import DEGENERATE, INFEASIBLE, SOLVED
from benchmarks import workloads
from benchmarks.forms import as_qp

F64 = torch.float64
BATCH = 12


@pytest.fixture(autouse=True)
def solver() -> None:
    """These are calls of one kernel: once is enough."""


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes each range that the kernel of shared rows was given."""
    ranges: list[int] = []
    kernel = shared_rows.solve_shared_range

    def noted(*arguments: Any) -> Any:
        ranges.append(arguments[3] - arguments[2])
        return kernel(*arguments)

    monkeypatch.setattr(shared_rows, "solve_shared_range", noted)
    return ranges


def draw(*, n: int, m: int, p: int, room: float, seed: int) -> dict[str, Tensor]:
    """Rows shared by the batch; the less room there is, the more of them are active."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=F64)

    root, inside = normal(n, n), normal(BATCH, n)
    data = {"Q": root @ root.mT / n + 0.1 * torch.eye(n, dtype=F64), "q": 3 * normal(BATCH, n), "G": normal(m, n)}
    data["h"] = inside @ data["G"].mT + room * torch.rand(BATCH, m, generator=random, dtype=F64)
    if p:
        data["A"] = normal(p, n)
        data["b"] = inside @ data["A"].mT
    return data


def with_own_rows(data: Data) -> Data:
    return Data(**{**vars(data), "Q": data.Q.expand(data.B, -1, -1), "C": data.C.expand(data.B, -1, -1)})


@pytest.mark.parametrize("room", [0.0, 0.1, 3.0, 30.0], ids=["nearly all active", "most", "some", "few"])
@pytest.mark.parametrize("p", [0, 4])
def test_solutions_are_those_of_problems_with_rows_of_their_own(taken: list[int], room: float, p: int) -> None:
    data = stack(QP(**draw(n=60, m=50, p=p, room=room + 1e-3, seed=p)))
    found = compiled.solve_batch(data)
    assert sum(taken) == BATCH
    expected = compiled.solve_batch(with_own_rows(data))
    assert sum(taken) == BATCH
    assert found.code.tolist() == expected.code.tolist() == [SOLVED] * BATCH
    assert torch.equal(found.active, expected.active)
    for name in ("z", "y", "s"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-8, atol=1e-10)
    assert float(found.report[:, 4].max()) < 1e-12


def test_total_variation_needs_no_dual_active_set(taken: list[int]) -> None:
    """Its pairs of opposite rows are nearly dependent where both are guessed active: no reason to give up."""
    workload = workloads.total_variation(40, 16, seed=1)
    rows = as_qp("tv", workload.parameters)
    data = stack(QP(Q=rows.Q, q=rows.q, G=rows.G, h=rows.h))
    found = compiled.solve_batch(data)
    assert sum(taken) == 16
    assert found.code.tolist() == [SOLVED] * 16
    assert int(found.steps.max()) <= shared_rows.ROUNDS
    expected = compiled.solve_batch(with_own_rows(data))
    assert torch.equal(found.active, expected.active)
    torch.testing.assert_close(found.z, expected.z, rtol=0, atol=1e-10)


def test_dependent_rows_are_left_to_the_other_kernel(taken: list[int]) -> None:
    given = draw(n=60, m=45, p=0, room=1.0, seed=3)
    given["G"][1], given["h"][:, 1] = given["G"][0], given["h"][:, 0] + 1.0
    assert compiled.solve_batch(stack(QP(**given))).code.tolist() == [SOLVED] * BATCH
    assert taken == []


def test_a_weakly_active_row_is_said_to_be_one(taken: list[int]) -> None:
    eye = torch.eye(48, dtype=F64)
    problem = QP(Q=eye, q=-torch.ones(BATCH, 48, dtype=F64), G=eye, h=torch.ones(48, dtype=F64))
    assert compiled.solve_batch(stack(problem)).code.tolist() == [DEGENERATE] * BATCH
    assert sum(taken) == BATCH


def test_few_problems_or_rows_and_one_thread_of_neighbours(taken: list[int]) -> None:
    given = draw(n=60, m=50, p=2, room=0.5, seed=4)
    together = compiled.solve_batch(stack(QP(**given)))
    few = {name: given[name][:3] for name in ("q", "h", "b")}
    alone = compiled.solve_batch(stack(QP(**{**given, **few})))
    assert sum(taken) == BATCH
    torch.testing.assert_close(alone.z, together.z[:3], rtol=1e-9, atol=1e-11)
    compiled.solve_batch(stack(QP(**draw(n=60, m=shared_rows.LEAST_ROWS - 1, p=0, room=1.0, seed=5))))
    assert sum(taken) == BATCH


def test_what_is_not_finite_or_not_feasible_changes_no_neighbour(taken: list[int]) -> None:
    given = draw(n=60, m=50, p=2, room=0.5, seed=6)
    expected = compiled.solve_batch(stack(QP(**given)))
    data = stack(QP(**given))
    data.q[3, 0] = np.nan
    found = compiled.solve_batch(data)
    assert found.code[3] not in (SOLVED, INFEASIBLE)
    rest = [i for i in range(BATCH) if i != 3]
    assert torch.equal(found.z[rest], expected.z[rest])
    assert sum(taken) == 2 * BATCH
