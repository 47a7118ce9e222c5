"""Certificates of infeasibility: against an LP solver, and at a cost that does not grow with the cube of the rows."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from argrad.problems import QP, Status
from argrad_service import engine
from argrad_service.engine.data import Data
from argrad_service.engine.forward.certificates import is_infeasible
from argrad_service.engine.options import Stopped, never_stop

D = torch.float64


def draw(seed: int, batch: int, n: int, m: int, p: int) -> Data:
    """Random rows, of which about half of the problems contradict one another."""
    rng = np.random.default_rng([seed, n, m, p])
    C, d = (torch.from_numpy(rng.normal(size=shape)) for shape in ((batch, p + m, n), (batch, p + m)))
    return Data(Q=torch.zeros(1, n, n, dtype=D), q=torch.zeros(batch, n, dtype=D), C=C, d=d, p=p)


@pytest.mark.parametrize(("n", "m", "p"), [(5, 10, 2), (10, 20, 0), (10, 5, 8), (3, 30, 1), (20, 42, 0)])
def test_verdicts_are_an_lp_solvers(n: int, m: int, p: int):
    data = draw(0, 24, n, m, p)
    wanted = []
    for C, d in zip(data.C.numpy(), data.d.numpy(), strict=True):
        equalities = {"A_eq": C[:p], "b_eq": d[:p]} if p else {}
        found = linprog(np.zeros(n), A_ub=C[p:], b_ub=d[p:], bounds=(None, None), **equalities)
        wanted.append(found.status == 2)
    assert is_infeasible(data, never_stop).tolist() == wanted


def test_scaling_rows_changes_nothing():
    data = draw(1, 16, 6, 12, 1)
    scale = torch.logspace(-6, 6, data.d.shape[1], dtype=D)
    scaled = Data(Q=data.Q, q=data.q, C=data.C * scale[:, None], d=data.d * scale, p=1)
    assert torch.equal(is_infeasible(scaled, never_stop), is_infeasible(data, never_stop))


@pytest.mark.parametrize(("h", "verdict"), [(-1e-5, True), (0.0, False), (1e-5, False)])
def test_a_narrow_gap_and_a_point_are_told_apart(h: float, verdict: bool):
    C = torch.tensor([[[1.0, 0.5], [-1.0, -0.5], [0.3, 1.0]]], dtype=D)
    d = torch.tensor([[1.0, -1.0 + h, 5.0]], dtype=D)
    data = Data(Q=torch.zeros(1, 2, 2, dtype=D), q=torch.zeros(1, 2, dtype=D), C=C, d=d, p=0)
    assert is_infeasible(data, never_stop).tolist() == [verdict]


def test_it_can_be_stopped():
    with pytest.raises(Stopped):
        is_infeasible(draw(0, 4, 5, 10, 2), lambda: True)


def test_many_rows_that_contradict_one_another_take_no_minutes():
    """The finish tried sets of hundreds of rows, at the cube of their number: 38 s and 600 MB for this problem."""
    rng = np.random.default_rng(0)
    n, m = 50, 2000
    G, h = torch.from_numpy(rng.normal(size=(m, n))), torch.from_numpy(rng.normal(size=m) - 3.0)
    problem = QP(Q=torch.eye(n, dtype=D), q=torch.zeros(n, dtype=D), G=G, h=h)
    began = time.perf_counter()
    assert engine.solve(problem, solver="pdipm").status == (Status.INFEASIBLE,)
    assert time.perf_counter() - began < 5
