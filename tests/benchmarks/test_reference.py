"""The reference of `make bench`: solved by hand, and against central differences and the recipes."""

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks import workloads
from benchmarks.reference import exact
from benchmarks.reference.active_sets import active_rows
from benchmarks.workloads import Workload

pytestmark = pytest.mark.slow

SMALL = {
    "optnet": workloads.optnet(8, 3, seed=1),
    "more rows than variables": workloads.optnet(5, 4, m=10, seed=1),
    "altdiff": workloads.altdiff(20, 8, 4, seed=1),
    "bpqp": workloads.bpqp(12, 4, seed=1, batch=2),
    "bpqp, half active": workloads.bpqp_active(12, 4, seed=1, batch=2),
    "tv": workloads.total_variation(10, 3, seed=1),
    "lp": workloads.vertex_lp(8, 16, 3, 2, seed=1),
    "sparsemax": workloads.sparsemax(200, seed=1),
    "softmax": workloads.softmax(12, 5, 2, seed=1),
}


def moved(workload: Workload, along: dict[str, torch.Tensor], step: float) -> Workload:
    parameters = {k: v + step * along[k] if k in along else v for k, v in workload.parameters.items()}
    return dataclasses.replace(workload, parameters=parameters)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_of_the_reference_agree_with_central_differences(name):
    workload = SMALL[name]
    generator = torch.Generator().manual_seed(2)
    truth = exact(workload)
    for parameter in workload.wrt:
        value = workload.parameters[parameter]
        along = torch.randn(value.shape, dtype=value.dtype, generator=generator)
        if parameter == "Q":
            along = along + along.mT
        if name == "lp" and parameter in ("b", "h"):
            assert truth.gradients[parameter].abs().max() > 0.01, "a hard-coded zero would not do"

        def loss(step: float, parameter: str = parameter, along: torch.Tensor = along) -> torch.Tensor:
            # The recipe's own solution is no longer the solution: the vertex is found from the moved rows instead.
            other = moved(workload, {parameter: along}, step)
            z = _vertex(other) if workload.kind == "lp" else exact(other).z
            return (z * workload.grad_z).sum()

        step = 1e-6
        slope = (truth.gradients[parameter] * along).sum()
        difference = (loss(step) - loss(-step)) / (2 * step)
        torch.testing.assert_close(slope, difference, rtol=1e-5, atol=1e-6, msg=parameter)


def _vertex(workload: Workload) -> torch.Tensor:
    found = []
    for k, active in enumerate(workload.known["lam"] > 0):
        given = {name: value[k] for name, value in workload.parameters.items()}
        rows, right = torch.cat([given["A"], given["G"][active]]), torch.cat([given["b"], given["h"][active]])
        found.append(torch.linalg.solve(rows, right))
    return torch.stack(found)


@pytest.mark.parametrize("name", ["bpqp, half active", "lp"])
def test_the_reference_finds_the_solution_that_the_recipe_chose(name):
    workload = SMALL[name]
    torch.testing.assert_close(exact(workload).z, workload.known["z"], rtol=1e-9, atol=1e-9)


def test_reference_of_a_problem_solved_by_hand():
    """Projection on z ≥ 0: z = max(−q, 0), and its h moves what is active."""
    eye = torch.eye(2, dtype=torch.float64).expand(2, 2, 2)
    q = torch.tensor([[-1.0, 2.0], [-3.0, -0.5]], dtype=torch.float64)
    parameters = {"Q": eye, "q": q, "G": -eye, "h": torch.zeros_like(q)}
    found = exact(Workload(name="", parameters=parameters, wrt=("q", "h"), grad_z=torch.ones_like(q)))
    torch.testing.assert_close(found.z, (-q).clamp(min=0))
    torch.testing.assert_close(found.gradients["h"], torch.tensor([[0.0, -1.0], [0.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(found.margin, torch.tensor([1.0, 0.5], dtype=torch.float64))
    assert found.active.tolist() == [1.0, 0.0]


def test_reference_refuses_what_has_no_solution():
    """Two rows that contradict each other: z ≤ −1 and z ≥ 0."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    G, h = torch.tensor([[[1.0], [-1.0]]], dtype=torch.float64), torch.tensor([[-1.0, 0.0]], dtype=torch.float64)
    workload = Workload(name="", parameters={"Q": one, "q": one[0], "G": G, "h": h}, wrt=("q",), grad_z=one[0])
    with pytest.raises(ArithmeticError, match="contradict"):
        exact(workload)


def test_a_vertex_that_is_none_is_refused():
    workload = SMALL["lp"]
    worse = moved(workload, {"q": -2.0 * workload.parameters["q"]}, 1.0)
    with pytest.raises(ArithmeticError, match="not solved by the vertex"):
        exact(worse)


@pytest.mark.parametrize(("rank", "rows"), [(8, 8), (4, 8)])
def test_active_rows_satisfy_the_complementarity_problem(rank, rows):
    """By exchange where R has full rank, row by row where it is singular."""
    generator = np.random.default_rng(3)
    V = generator.normal(size=(rank, rows))
    R, c = V.T @ V, V.T @ generator.normal(size=rank) + generator.uniform(size=rows)
    active = active_rows(R, c, rank=rank)
    lam = np.zeros(rows)
    lam[active] = np.linalg.solve(R[np.ix_(active, active)], -c[active])
    slack = c + R @ lam
    assert lam.min() >= -1e-12
    assert slack.min() >= -1e-10
    assert abs(lam @ slack) < 1e-10
