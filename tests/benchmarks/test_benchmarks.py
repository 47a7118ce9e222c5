"""The yardsticks of `make bench`: its problems, its reference, its judgement and its tables."""

import dataclasses

import pytest
import torch

from argrad.problems import QP
from benchmarks.contestants import Answer, Engine
from benchmarks.measures import judge, kkt_residual, time_together
from benchmarks.reference import exact
from benchmarks.report import render
from benchmarks.workloads import optnet, two_variables


def test_reference_of_a_problem_solved_by_hand():
    """Projection on z ≥ 0: z = max(−q, 0), λ = max(q, 0)."""
    eye = torch.eye(2, dtype=torch.float64).expand(2, 2, 2)
    q = torch.tensor([[-1.0, 2.0], [-3.0, -0.5]], dtype=torch.float64)
    found = exact(QP(Q=eye, q=q, G=-eye, h=torch.zeros_like(q)), torch.ones_like(q))
    torch.testing.assert_close(found.z, (-q).clamp(min=0))
    torch.testing.assert_close(found.lam, q.clamp(min=0))
    torch.testing.assert_close(found.gradients["h"], torch.tensor([[0.0, -1.0], [0.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(found.margin, torch.tensor([1.0, 0.5], dtype=torch.float64))


def test_gradients_of_the_reference_agree_with_central_differences():
    workload = optnet(8, 6, seed=1)
    parameters = workload.problem.parameters()
    generator = torch.Generator().manual_seed(2)
    along = {k: torch.randn(v.shape, dtype=v.dtype, generator=generator) for k, v in parameters.items()}
    along["Q"] = along["Q"] + along["Q"].mT
    found = exact(workload.problem, workload.grad_z)

    def loss(step: float) -> torch.Tensor:
        moved = QP(**{k: v + step * along[k] for k, v in parameters.items()})
        return (exact(moved, workload.grad_z).z * workload.grad_z).sum(-1)

    step = 1e-6
    difference = (loss(step) - loss(-step)) / (2 * step)
    slope = sum((found.gradients[k] * along[k]).flatten(1).sum(1) for k in along)
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-6)


def test_reference_refuses_a_point_that_is_no_solution():
    """Two rows that contradict each other: z ≤ −1 and z ≥ 0."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    G, h = torch.tensor([[[1.0], [-1.0]]], dtype=torch.float64), torch.tensor([[-1.0, 0.0]], dtype=torch.float64)
    with pytest.raises((ArithmeticError, ValueError)):
        exact(QP(Q=one, q=one[0], G=G, h=h), one[0])


def test_workloads_are_seeded_and_feasible():
    first, again, other = optnet(10, 3, seed=5), optnet(10, 3, seed=5), optnet(10, 3, seed=6)
    assert torch.equal(first.problem.Q, again.problem.Q)
    assert not torch.equal(first.problem.Q, other.problem.Q)
    assert torch.linalg.eigvalsh(first.problem.Q).min() > 0
    assert first.problem.batch_size == 3
    assert two_variables().problem.batch_size is None


@pytest.mark.parametrize("n", [10, 50])
def test_the_engine_is_as_exact_as_the_reference(n):
    workload = optnet(n, 16, seed=3)
    truth = exact(workload.problem, workload.grad_z)
    engine = Engine()
    engine.prepare(workload)
    times = time_together([engine], budget_s=0, most=1)
    accuracy = judge(workload.problem, engine.answer(), truth)
    assert times["argrad"].repeats == 1
    assert accuracy.kkt_residual <= 1e-8
    assert accuracy.z_worst <= 1e-9
    assert accuracy.gradient_worst <= 1e-6


def test_judgement_sees_what_is_wrong():
    workload = optnet(6, 4, seed=4)
    truth = exact(workload.problem, workload.grad_z)
    right = Answer(z=truth.z, lam=truth.lam, gradients=truth.gradients)
    assert dataclasses.astuple(judge(workload.problem, right, truth))[1:] == (0.0, 0.0, 0.0, 0.0)
    scaled = {name: 1.1 * gradient for name, gradient in truth.gradients.items()}
    wrong = judge(workload.problem, dataclasses.replace(right, gradients=scaled), truth)
    assert 0.05 < wrong.gradient_median <= 0.1
    negative = kkt_residual(workload.problem, truth.z, truth.lam - 1.0)
    assert bool((negative > 0.01).all()), "a negative multiplier is no solution"


def test_tables_show_ratios():
    row = {"kkt_residual": 1e-14, "z_worst": 2e-14, "gradient_worst": 3e-13, "gradient_median": 4e-14}
    own = {"name": "argrad", "forward_ms": 10.0, "backward_ms": 2.0, **row}
    peer = {"name": "qpth", "forward_ms": 29.0, "backward_ms": 1.0, **row}
    step = {"name": "2 variables", "solver": "auto", "engine_ms": 1.0, "in_process_ms": 2.0, "remote_ms": 5.0}
    text = render(
        {
            "commit": "abc",
            "date": "2026-01-01",
            "seed": 7,
            "machine": {"cpu": "cpu", "cores": 2, "torch_threads": 2},
            "versions": {"argrad": "0.1.0", "torch": "2.13.0"},
            "peers": [{"name": "n = m = 10", "contestants": [own, peer]}],
            "remote": [step],
        }
    )
    assert "| n = m = 10 | qpth | 29.0 | 1.00 | 2.50 | 1e-14 | 2e-14 | 3e-13 (4e-14) |" in text
    assert "| 2 variables, auto | 1.00 | 2.00 | 5.00 | 2.50 | 3.00 |" in text
    assert "seed 7" in text
