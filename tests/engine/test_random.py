"""Hundreds of random problems with an independent solver beside us: DAQP, a dual active-set method."""

from __future__ import annotations

import daqp
import numpy as np
import pytest
import torch

from argrad.problems import QP, Status
from argrad_service import engine

EQUALITY = 5
"""DAQP's code of a row that always holds."""


def optnet(n: int, m: int, p: int, batch: int, *, slack_on: float = 1.0) -> QP:
    """OptNet's random QPs (its footnote 4); a share 1 − slack_on of the rows passes through z₀."""
    rng = np.random.default_rng([n, m, p, batch])
    U = rng.uniform(size=(batch, n, n))
    G, A, z0 = rng.normal(size=(batch, m, n)), rng.normal(size=(batch, p, n)), rng.normal(size=(batch, n))
    s0 = rng.uniform(size=(batch, m)) * (rng.uniform(size=(batch, m)) < slack_on)
    data = {
        "Q": np.swapaxes(U, 1, 2) @ U + 1e-3 * np.eye(n),
        "q": rng.normal(size=(batch, n)),
        "G": G,
        "h": np.einsum("bij,bj->bi", G, z0) + s0,
    }
    if p:
        data |= {"A": A, "b": np.einsum("bij,bj->bi", A, z0)}
    return QP(**{name: torch.from_numpy(value) for name, value in data.items()})


def solve_with_daqp(problem: QP, i: int) -> np.ndarray:
    rows, upper = problem.G[i].numpy(), problem.h[i].numpy()
    lower, sense = np.full(problem.m, -1e30), np.zeros(problem.m, dtype=np.int32)
    if problem.A is not None and problem.b is not None:
        b = problem.b[i].numpy()
        rows, upper, lower = np.vstack([rows, problem.A[i].numpy()]), np.r_[upper, b], np.r_[lower, b]
        sense = np.r_[sense, np.full(problem.p, EQUALITY)].astype(np.int32)
    z, _, flag, _ = daqp.solve(
        problem.Q[i].numpy().copy(),
        problem.q[i].numpy().copy(),
        np.ascontiguousarray(rows),
        upper.copy(),
        lower,
        sense,
        primal_tol=1e-11,
        dual_tol=1e-11,
    )
    assert flag == 1
    return np.asarray(z)


@pytest.mark.parametrize(
    ("n", "m", "p", "batch", "slack_on"),
    [
        pytest.param(5, 10, 0, 200, 1.0, id="tiny-many-rows"),
        pytest.param(10, 100, 0, 100, 1.0, id="ten-rows-a-variable"),
        pytest.param(5, 10, 2, 200, 1.0, id="tiny-with-equalities"),
        pytest.param(20, 60, 5, 50, 1.0, id="equalities-and-many-rows"),
        pytest.param(50, 50, 10, 32, 1.0, id="square-with-equalities"),
        pytest.param(100, 100, 0, 8, 1.0, id="optnet-hundred"),
        pytest.param(5, 10, 0, 200, 0.5, id="degenerate-tiny"),
        pytest.param(10, 30, 2, 100, 0.5, id="degenerate-with-equalities"),
    ],
)
def test_every_random_problem_agrees_with_daqp(n: int, m: int, p: int, batch: int, slack_on: float) -> None:
    problem = optnet(n, m, p, batch, slack_on=slack_on)
    forward = engine.solve(problem)
    assert forward.status == (Status.OPTIMAL,) * batch
    reference = np.stack([solve_with_daqp(problem, i) for i in range(batch)])
    np.testing.assert_allclose(forward.solution.z.numpy(), reference, rtol=1e-9, atol=1e-9)
    assert float(forward.primal_residual.max()) < 1e-10
    assert float(forward.dual_residual.max()) < 1e-9
    assert float(forward.gap.max()) < 1e-8
    pulled = engine.vjp(forward, {"z": torch.ones_like(forward.solution.z)})
    assert pulled.gradient_status == ("ok",) * batch


def test_thousands_of_rows_on_few_variables_agree_with_daqp() -> None:
    problem = optnet(10, 4000, 1, 2)
    forward = engine.solve(problem)
    assert forward.status == (Status.OPTIMAL,) * 2
    reference = np.stack([solve_with_daqp(problem, i) for i in range(2)])
    np.testing.assert_allclose(forward.solution.z.numpy(), reference, rtol=1e-9, atol=1e-9)
