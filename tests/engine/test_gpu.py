"""The engine on CUDA gives what it gives on the CPU."""

from __future__ import annotations

import pytest
import torch

from argrad.problems import Status
from argrad_service import engine
from tests.engine.qps import draw
from tests.engine.test_grid import CASES, Case
from tests.engine.test_hard_cases import FAILURES, batch_of, regular

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; runs where torch sees one"),
]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_solutions_and_adjoints_equal_those_of_the_cpu(case: Case) -> None:
    problem = draw(case, 0).problem
    there, here = engine.solve(problem, device=CUDA), engine.solve(problem, device=CPU)
    assert there.status == here.status
    assert there.flags == here.flags
    assert there.solution.z.device.type == "cuda"
    weights = {name: torch.ones_like(block) for name, block in here.solution.blocks().items()}
    pulled_there = engine.vjp(there, {k: w.cuda() for k, w in weights.items()}).adjoint
    pulled_here = engine.vjp(here, weights).adjoint
    for name, block in here.solution.blocks().items():
        torch.testing.assert_close(there.solution.blocks()[name].cpu(), block, rtol=1e-8, atol=1e-8 * case.size)
    for name, block in pulled_here.blocks().items():
        size = float(block.abs().max()) if block.numel() else 1.0
        torch.testing.assert_close(pulled_there.blocks()[name].cpu(), block, rtol=1e-7, atol=1e-8 * max(1.0, size))


@pytest.mark.parametrize("status", FAILURES)
def test_failures_are_recognised_and_harm_no_batchmate(status: Status) -> None:
    good = [regular(seed) for seed in range(10, 14)]
    mixed = engine.solve(batch_of(*good[:2], FAILURES[status](), *good[2:]), device=CUDA)
    assert mixed.status == (Status.OPTIMAL,) * 2 + (status,) + (Status.OPTIMAL,) * 2


def test_tangents_equal_those_of_the_cpu() -> None:
    problem = draw(CASES[4], 1).problem
    tangents = {name: torch.ones_like(t) for name, t in problem.parameters().items()}
    there = engine.jvp(engine.solve(problem, device=CUDA), {k: t.cuda() for k, t in tangents.items()}).solution
    here = engine.jvp(engine.solve(problem, device=CPU), tangents).solution
    for name, block in here.blocks().items():
        torch.testing.assert_close(there.blocks()[name].cpu(), block, rtol=1e-8, atol=1e-8)
