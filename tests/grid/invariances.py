"""What a problem may be given as without a change of its solution and its gradients."""

from __future__ import annotations

import numpy as np
import torch

from argrad.problems import QP
from tests.grid.cases import has_two_sides
from tests.grid.closeness import close
from tests.grid.run import Run, single
from tests.grid.situations import BATCH

SCALE = 3.5
"""Factor by which an objective is scaled."""

FAR = 100.0
"""Slack of a row that says nothing."""


def check_singles(run: Run) -> None:
    """A batch is a loop over its problems, each without a batch dimension."""
    for i in range(BATCH):
        alone = run.solve(single(run.problem, i))
        assert alone.status[0] == run.forward.status[i]
        back = run.vjp(alone, {name: g[i : i + 1] for name, g in run.upstream.items()})
        if run.drawn.is_unique or run.exactness.is_exact:
            assert back.gradient_status[0] == run.backward.gradient_status[i] or i not in run.differentiated
        if i in run.drawn.solvable:
            same(run, i, alone.solution.blocks(), back.adjoint.blocks(), run.upstream, at=0)


def check_permuted(run: Run) -> None:
    """The order of the constraints says nothing."""
    rng = np.random.default_rng(2)
    blocks = in_float64(run.problem)
    orders = {"lam": rng.permutation(run.problem.m), "nu": rng.permutation(run.problem.p)}
    for matrix, vector, order in (("G", "h", orders["lam"]), ("A", "b", orders["nu"])):
        if matrix in blocks:
            blocks[matrix], blocks[vector] = blocks[matrix][..., order, :], blocks[vector][..., order]
    orders |= {"s": orders["lam"], "mu": orders["lam"]}
    upstream = {name: g[:, orders[name]] if name in orders else g for name, g in run.upstream.items()}
    forward = run.solve(QP(**blocks))
    assert forward.status == run.forward.status
    back = run.vjp(forward, upstream).adjoint.blocks()
    restore = {name: np.argsort(order) for name, order in orders.items()}
    for i in run.drawn.solvable:
        found, adjoint = (
            {name: block[:, restore[name]] if name in restore else block for name, block in given.items()}
            for given in (forward.solution.blocks(), back)
        )
        same(run, i, found, adjoint, run.upstream, at=i)


def check_scaled(run: Run) -> None:
    """An objective of another size has the same solution, multipliers of that size, and a smaller ∂q."""
    blocks = in_float64(run.problem)
    scaled = {name: SCALE * block if name in ("Q", "q", "entropy") else block for name, block in blocks.items()}
    forward = run.solve(QP(**scaled))
    assert forward.status == run.forward.status
    upstream = {"z": run.upstream["z"]}
    back = run.vjp(forward, upstream).adjoint.blocks()
    found = forward.solution.blocks()
    found = found | {"nu": found["nu"] / SCALE, "lam": found["lam"] / SCALE}
    for i in run.drawn.solvable:
        same(run, i, found, back | {"z": back["z"] * SCALE}, upstream, at=i)


def check_slack(run: Run) -> None:
    """A row that is far from the solution changes nothing."""
    drawn, problem = run.drawn, run.problem
    blocks = in_float64(problem)
    row = torch.from_numpy(np.random.default_rng(3).integers(-8, 9, problem.n) / 4)
    if run.case.situation == "unbounded":
        row[-1] = 0.0
    is_shared = "G" in blocks and blocks["G"].ndim == 2
    more = row.expand(1, -1) if is_shared else row.expand(BATCH, 1, -1)
    room = (torch.from_numpy(drawn.z) @ row + FAR).unsqueeze(-1)
    blocks["G"] = torch.cat([blocks["G"], more], dim=-2) if "G" in blocks else more
    blocks["h"] = torch.cat([blocks["h"], room], dim=-1) if "h" in blocks else room
    forward = run.solve(QP(**blocks))
    assert forward.status == run.forward.status
    m = problem.m
    wide = {
        name: torch.cat([g, g.new_zeros(BATCH, 1)], dim=1) if name in ("lam", "s") else g
        for name, g in run.upstream.items()
    }
    back = run.vjp(forward, wide).adjoint.blocks()
    found = forward.solution.blocks()
    for i in drawn.solvable:
        if drawn.is_unique:
            assert abs(float(found["lam"][i, m])) <= 1e-8
            assert abs(float(back["mu"][i, m])) <= run.gradient_error or i not in run.differentiated
        cut = [
            {name: b[:, :m] if name in ("lam", "s", "mu") else b for name, b in given.items()}
            for given in (found, back)
        ]
        same(run, i, *cut, run.upstream, at=i)


def same(
    run: Run,
    i: int,
    found: dict[str, torch.Tensor],
    adjoint: dict[str, torch.Tensor],
    upstream: dict[str, torch.Tensor],
    at: int,
) -> None:
    """What was found at position `at` is the i-th problem's solution and adjoint, as far as they are unique."""
    if not run.drawn.is_unique:
        return
    solution = run.forward.solution.blocks()
    mine = run.backward if upstream is run.upstream else run.vjp(run.forward, upstream)
    unique = run.drawn.has_unique_multipliers
    slack = run.slack
    for name in ("z", "nu", "lam", "s") if unique else ("z", "s"):
        close(found[name][at], solution[name][i].numpy(), slack, name)
    if i not in run.differentiated or has_two_sides(run.case):
        return
    for name in ("z", "nu", "mu") if unique else ("z",):
        close(adjoint[name][at], mine.adjoint.blocks()[name][i].numpy(), 2 * run.gradient_error, f"adjoint {name}")


def in_float64(problem: QP) -> dict[str, torch.Tensor]:
    """The parameters as the engine takes them: what a test does to them must not be rounded to float32."""
    return {name: block.double() for name, block in problem.parameters().items()}
