"""`breakpoint`: separable problems solved exactly, against the solvers that know nothing of their form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import argrad
from argrad import Client, Options
from argrad.errors import ProblemError, SolveError

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")

F64 = torch.float64
BREAKPOINT, CLARABEL = Options(solver="breakpoint"), Options(solver="clarabel")


def diagonal(values: torch.Tensor) -> torch.Tensor:
    i = torch.arange(len(values))
    where = torch.stack([i, i])
    return torch.sparse_coo_tensor(where, values, (len(values),) * 2, check_invariants=True).coalesce()


def bounds(n: int) -> torch.Tensor:
    i = torch.arange(n)
    where = torch.stack([torch.arange(2 * n), torch.cat([i, i])])
    values = torch.cat([torch.ones(n), -torch.ones(n)]).double()
    return torch.sparse_coo_tensor(where, values, (2 * n, n), check_invariants=True).coalesce()


def knapsack(n: int, seed: int, *, is_uneven: bool = True) -> dict[str, torch.Tensor]:
    """Scores, capacities and a budget; with weights of both signs if uneven, else sparsemax with capacities."""
    g = torch.Generator().manual_seed(seed)
    upper = torch.rand(n, generator=g, dtype=F64) * 2 / n + 0.5 / n
    a = torch.randn(n, generator=g, dtype=F64) if is_uneven else torch.ones(n, dtype=F64)
    d = torch.rand(n, generator=g, dtype=F64) + 0.5 if is_uneven else torch.ones(n, dtype=F64)
    inside = torch.rand(n, generator=g, dtype=F64) * upper
    return {
        "d": d,
        "q": torch.randn(n, generator=g, dtype=F64) / n,
        "h": torch.cat([upper, torch.zeros(n, dtype=F64)]),
        "a": a,
        "b": (a @ inside)[None],
    }


def solve(given: dict[str, torch.Tensor], options: Options, client: Client) -> torch.Tensor:
    n = len(given["q"])
    A = given["a"][None].to_sparse_coo() if "a" in given else None
    solution = argrad.solve_qp(
        client, diagonal(given["d"]), given["q"], bounds(n), given["h"], A, given.get("b"), options=options
    )
    return torch.cat([solution.z, solution.nu, solution.lam])


@pytest.fixture(scope="module")
def client() -> Client:
    return Client("local")


@pytest.mark.parametrize("is_uneven", [True, False])
@pytest.mark.parametrize("n", [2, 7, 60])
@pytest.mark.parametrize("seed", range(3))
def test_solutions_and_gradients_are_those_of_the_general_path(
    client: Client, n: int, seed: int, is_uneven: bool
) -> None:
    given = knapsack(n, seed, is_uneven=is_uneven)
    weights = torch.randn(3 * n + 1, dtype=F64, generator=torch.Generator().manual_seed(seed))
    found = []
    for options in (BREAKPOINT, CLARABEL):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
        point = solve(leaves, options, client)
        (point @ weights).backward()
        found.append((point.detach(), {name: leaf.grad for name, leaf in leaves.items()}))
    (mine, my_gradients), (theirs, their_gradients) = found
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    for name, gradient in my_gradients.items():
        assert gradient is not None
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-7, atol=1e-7 * n)


def test_auto_takes_it_and_says_so(client: Client) -> None:
    given = knapsack(50, 1)
    problem = argrad.QP(
        Q=diagonal(given["d"]),
        q=given["q"],
        G=bounds(50),
        h=given["h"],
        A=given["a"][None].to_sparse_coo(),
        b=given["b"],
    )
    result = client.solve(problem)
    assert result.report.solver == "breakpoint"
    assert result.report.primal_residual is not None
    assert float(result.report.primal_residual) < 1e-15


def test_central_differences(client: Client) -> None:
    given = knapsack(20, 5)
    g = np.random.default_rng(0)
    weights = torch.from_numpy(g.normal(size=61))
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
    (solve(leaves, BREAKPOINT, client) @ weights).backward()
    for name, tensor in given.items():
        direction = torch.from_numpy(g.normal(size=tuple(tensor.shape)))
        step = 1e-6
        sides = [
            float(solve(given | {name: tensor + sign * step * direction}, BREAKPOINT, client) @ weights)
            for sign in (1, -1)
        ]
        gradient = leaves[name].grad
        assert gradient is not None
        assert float((gradient * direction).sum()) == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-6)


def test_without_an_equality_it_is_a_projection_on_a_box(client: Client) -> None:
    d, q = torch.tensor([1.0, 2, 4], dtype=F64), torch.tensor([-3.0, 1, -1], dtype=F64)
    h = torch.tensor([1.0, 1, 1, 0, 0, 0], dtype=F64)
    point = solve({"d": d, "q": q, "h": h}, BREAKPOINT, client)
    assert point.tolist() == [1, 0, 0.25, 2, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("b", [3.5, -0.5])
def test_a_budget_out_of_reach_is_infeasible(client: Client, b: float) -> None:
    given = {"d": torch.ones(3, dtype=F64), "q": torch.zeros(3, dtype=F64), "a": torch.ones(3, dtype=F64)}
    given |= {"h": torch.tensor([1.0, 1, 1, 0, 0, 0], dtype=F64), "b": torch.tensor([b], dtype=F64)}
    with pytest.raises(SolveError, match="infeasible"):
        solve(given, BREAKPOINT, client)
    with pytest.raises(SolveError, match="infeasible"):
        solve(given, Options(), client)


def test_crossed_bounds_are_infeasible(client: Client) -> None:
    given = {"d": torch.ones(1, dtype=F64), "q": torch.zeros(1, dtype=F64), "h": torch.tensor([-1.0, 0.0], dtype=F64)}
    with pytest.raises(SolveError, match="infeasible"):
        solve(given, BREAKPOINT, client)


def test_a_multiplier_that_is_not_unique_is_left_to_the_general_path(client: Client) -> None:
    """Every variable on a bound: nothing pins ν down."""
    given = {"d": torch.ones(2, dtype=F64), "q": torch.tensor([-5.0, 5.0], dtype=F64), "a": torch.ones(2, dtype=F64)}
    given |= {"h": torch.tensor([1.0, 1, 0, 0], dtype=F64), "b": torch.ones(1, dtype=F64)}
    point = solve(given, Options(), client)
    torch.testing.assert_close(point[:2], torch.tensor([1.0, 0.0], dtype=F64))
    with pytest.raises(ProblemError, match=r"solver\.name: found 'breakpoint' for a problem that is not separable"):
        solve(given, BREAKPOINT, client)


def test_weakly_active_bounds_are_flagged(client: Client) -> None:
    problem = argrad.QP(
        Q=diagonal(torch.ones(2, dtype=F64)),
        q=torch.tensor([-1.0, -0.5], dtype=F64),
        G=bounds(2),
        h=torch.tensor([1.0, 1, 0, 0], dtype=F64),
    )
    result = client.solve(problem, options=BREAKPOINT, upstream={"z": torch.ones(2, dtype=F64)})
    assert [flag.value for flag in result.report.flags[0]] == ["degenerate"]
    assert result.gradients is not None
    assert result.gradients["q"].tolist() == [-1.0, -1.0]


def test_other_problems_are_refused_by_name(client: Client) -> None:
    given = knapsack(4, 0)
    dense_row = torch.ones(1, 4, dtype=F64).to_sparse_coo()
    with pytest.raises(ProblemError, match=r"found 'breakpoint' for a problem that is not separable"):
        argrad.solve_qp(client, diagonal(given["d"]), given["q"], dense_row, given["b"], options=BREAKPOINT)
