"""`pivoting` as a GPU runs it, in plain torch; the code asks nothing of the device, so it is tested here on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from argrad.problems import QP, Status
from argrad_service.engine import Stopped, vjp
from argrad_service.engine.data import stack
from argrad_service.engine.forward.masked_pivoting import solve_masked
from argrad_service.engine.options import SolverOptions
from argrad_service.engine.outcome import Forward
from argrad_service.engine.solution import conclude
from tests.engine.qps import draw, oracle_adjoint
from tests.engine.test_grid import CASES, Case

F64 = torch.float64
FEW_ROWS = [case for case in CASES if case.rank is None and case.m <= case.n - case.p]


def solved(problem: QP) -> tuple[Forward, torch.Tensor]:
    data, options = stack(problem), SolverOptions()
    point, rest = solve_masked(data, options)
    return conclude(problem, data, point, options, solver="pivoting"), rest


@pytest.mark.parametrize("case", FEW_ROWS, ids=lambda case: case.name)
def test_solutions_and_adjoints_are_exact(case: Case) -> None:
    known = draw(case, 3)
    forward, rest = solved(known.problem)
    assert len(rest) == 0
    assert set(forward.status) == {Status.OPTIMAL}
    for name in ("z", "nu", "lam"):
        np.testing.assert_allclose(getattr(forward.solution, name), getattr(known, name), rtol=1e-8, atol=1e-9)
    g = np.random.default_rng(0).normal(size=known.z.shape)
    adjoint = vjp(forward, {"z": torch.from_numpy(g)}).adjoint
    for i in range(len(g)):
        expected = oracle_adjoint(known.problem, i, known.lam[i] > 0, {"z": g[i]})
        for found, wanted in zip((adjoint.z, adjoint.nu, adjoint.mu), expected, strict=True):
            np.testing.assert_allclose(found[i], wanted, rtol=1e-7, atol=1e-8)


def test_what_it_cannot_decide_is_left_and_harms_no_batchmate() -> None:
    Q, q = torch.eye(3, dtype=F64).repeat(4, 1, 1), torch.ones(4, 3, dtype=F64)
    G = torch.eye(3, dtype=F64)[:2].repeat(4, 1, 1)
    h = torch.full((4, 2), -2.0, dtype=F64)
    Q[0, 0, 0] = -1.0  # not convex
    Q[1, 2, 2] = 0.0  # singular
    G[2, 1], h[2] = -G[2, 0], torch.tensor([-1.0, -1.0], dtype=F64)  # infeasible
    forward, rest = solved(QP(Q=Q, q=q, G=G, h=h))
    assert rest.tolist() == [1, 2]
    assert forward.status[0] == Status.NONCONVEX
    assert forward.status[3] == Status.OPTIMAL
    torch.testing.assert_close(forward.solution.z[3], torch.tensor([-2.0, -2.0, -1.0], dtype=F64))
    torch.testing.assert_close(forward.solution.lam[3], torch.tensor([1.0, 1.0], dtype=F64))


def test_it_stops_for_a_caller_that_gives_up() -> None:
    data = stack(draw(FEW_ROWS[-1], 0).problem)
    with pytest.raises(Stopped):
        solve_masked(data, SolverOptions(should_stop=lambda: True))
