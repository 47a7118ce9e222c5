"""What must hold of every solver with every method: verdicts, residuals, gradients, agreement."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from argrad.problems import Flag
from argrad_service import engine
from tests.grid import reference
from tests.grid.closeness import close, relative
from tests.grid.run import MATRICES, Run, directions, gradients_of, moved, own
from tests.grid.situations import BATCH


def check_verdicts(run: Run) -> None:
    """Every problem says what it is, its gradient too, and no number stands where there is none."""
    assert run.forward.status == run.drawn.status
    for i in range(BATCH):
        _check_flags(run, i)
        _check_gradient_status(run, i)
        for block in run.forward.solution.blocks().values():
            assert not bool(torch.isnan(block[i]).any())


def _check_flags(run: Run, i: int) -> None:
    drawn, backward = run.drawn, run.backward
    raised = set(run.forward.flags[i]) - {Flag.FALLBACK}
    if i not in drawn.solvable or not drawn.flags:
        assert not raised
    elif "polish" not in run.exactness.own:  # an iterate is not near enough to be recognised as degenerate
        assert raised & drawn.flags, raised
        assert set(backward.flags[i]) & drawn.flags or not run.exactness.is_exact, backward.flags[i]
    is_approximate = not run.exactness.is_exact and not drawn.is_unique
    if backward.gradient_status[i] == "ok" and is_approximate:
        assert set(backward.flags[i]) & {Flag.SMOOTHED, Flag.TRUNCATED, *drawn.flags}
    if run.case.kind == "qp" and run.case.situation in ("regular", "equality-only", "no-constraints"):
        assert Flag.TRUNCATED not in backward.flags[i]


def _check_gradient_status(run: Run, i: int) -> None:
    drawn, found = run.drawn, run.backward.gradient_status[i]
    is_solved, is_exact = i in drawn.solvable, run.exactness.is_exact
    if not is_solved:
        assert found == str(run.forward.status[i])
    elif drawn.is_unique or is_exact:
        assert found == ("ok" if drawn.is_unique else "nonunique")
    for block in run.backward.adjoint.blocks().values():
        assert bool(torch.isfinite(block[i]).all()) == (found == "ok") or block[i].numel() == 0


def check_optimality(run: Run) -> None:
    """KKT residuals are within the tolerance, by a formula of the test's own."""
    solution = run.forward.solution
    for i in run.drawn.solvable:
        point = (solution.z[i].numpy(), solution.nu[i].numpy(), solution.lam[i].numpy())
        assert reference.scaled_residual(run.problem, i, *point) <= run.exactness.tolerance


def check_solution(run: Run) -> None:
    drawn, solution = run.drawn, run.forward.solution
    slack = run.slack
    for i in drawn.solvable:
        value = float(run.forward.objective[i])
        if not drawn.is_unique:
            one = reference._one(run.problem, i)
            assert value == pytest.approx(reference.objective(one, drawn.z[i]), abs=1e-4, rel=1e-5)
            continue
        exact = run.exact[i]
        assert value == pytest.approx(exact.objective, abs=slack, rel=slack)
        close(solution.z[i], exact.z, slack, "z")
        close(solution.s[i], exact.s, slack, "s")
        if drawn.has_unique_multipliers:
            close(solution.nu[i], exact.nu, slack, "nu")
            close(solution.lam[i], exact.lam, slack, "lam")


def check_gradient(run: Run) -> None:
    """Gradients of all parameters, against the dense KKT system of the exact active set."""
    found = gradients_of(run.forward, run.backward)
    adjoint = run.backward.adjoint
    for i in run.differentiated:
        dz, dnu, mu = run.exact_adjoint(i, run.upstream)
        if run.drawn.has_unique_multipliers:
            wanted = reference.gradients(run.exact[i], (dz, dnu, mu))
            assert relative(found[i], wanted) <= run.gradient_error
        else:
            close(adjoint.z[i], dz, run.gradient_error, "d_z")
            G, A = (
                own(run.problem, name, i).double() if getattr(run.problem, name) is not None else None for name in "GA"
            )
            along = sum(M.mT @ y for M, y in ((G, adjoint.mu[i]), (A, adjoint.nu[i])) if M is not None)
            wanted = sum(M.mT.numpy() @ y for M, y in ((G, mu), (A, dnu)) if M is not None)
            close(along, wanted, run.gradient_error, "Aᵀd_ν + Gᵀμ")


def check_differences(run: Run) -> None:
    """The gradient along a random direction against central differences; one-sided ones at weakly active rows."""
    drawn, forward = run.drawn, run.forward
    upstream = {"z": run.upstream["z"]} if not drawn.has_unique_multipliers else run.upstream
    along = directions(run, differentiable(run))
    is_one_sided = bool(drawn.weak.any()) and drawn.has_unique_multipliers
    if is_one_sided:
        weak = torch.from_numpy(drawn.weak)
        along["h"] = torch.where(weak, 50.0, along["h"])
    found = gradients_of(forward, run.backward)
    slope = sum(
        float((torch.from_numpy(found[i][name]) * (to[i] if to.ndim > MATRICES[name] else to)).sum())
        for name, to in along.items()
        for i in run.differentiated
    )

    def loss(step: float) -> float:
        there = run.solve(moved(run.problem, along, step), plainly=True)
        assert all(there.status[i] == "optimal" for i in run.differentiated)
        blocks = there.solution.blocks()
        if drawn.has_unique_multipliers and not is_one_sided:
            assert all(np.array_equal(blocks["lam"][i].numpy() > 0, drawn.active[i]) for i in run.differentiated)
        return sum(float((blocks[name][i] * g[i]).sum()) for name, g in upstream.items() for i in run.differentiated)

    step = 1e-5 / drawn.condition**0.75
    if is_one_sided:
        wanted = (4 * loss(step) - loss(2 * step) - 3 * loss(0.0)) / (2 * step)
    else:
        wanted = (loss(step) - loss(-step)) / (2 * step)
    size = max(
        1.0, abs(wanted), *(float(np.abs(g).max(initial=0.0)) for i in run.differentiated for g in found[i].values())
    )
    assert slope == pytest.approx(wanted, abs=max(2e-5, 10 * run.gradient_error) * size)


def check_agreement(run: Run) -> None:
    """The method says what `kkt` says of the same outcome."""
    reference_of = engine.vjp(run.forward, run.upstream, method="kkt")
    mine, theirs = run.backward.adjoint, reference_of.adjoint
    for i in run.differentiated:
        if not run.drawn.is_unique:
            assert reference_of.gradient_status[i] == "nonunique"
            continue
        close(mine.z[i], theirs.z[i].numpy(), run.gradient_error, "d_z")
        if run.drawn.has_unique_multipliers:
            close(
                torch.cat([mine.nu[i], mine.mu[i]]),
                torch.cat([theirs.nu[i], theirs.mu[i]]).numpy(),
                run.gradient_error,
                "d_y",
            )


def check_transposes(run: Run) -> None:
    """⟨Jv, w⟩ = ⟨v, Jᵀw⟩."""
    along = directions(run, differentiable(run))
    pushed = engine.jvp(run.forward, along, method=run.case.method, options=run.exactness.options)
    assert pushed.gradient_status == run.backward.gradient_status
    found = gradients_of(run.forward, run.backward)
    for i in run.drawn.solvable:
        blocks = pushed.solution.blocks()
        if not run.drawn.is_unique:
            assert bool(torch.isnan(blocks["z"][i]).all())
            continue
        left = sum(float((blocks[name][i] * g[i]).sum()) for name, g in run.upstream.items())
        right = [
            float((torch.from_numpy(found[i][name]) * (to[i] if to.ndim > MATRICES[name] else to)).sum())
            for name, to in along.items()
        ]
        size = max(1.0, *map(abs, right), *(float(np.abs(g).max(initial=0.0)) for g in found[i].values()))
        assert left == pytest.approx(sum(right), abs=1e-8 * run.drawn.condition * size)


def differentiable(run: Run) -> list[str]:
    """Parameters in whose direction the solution is differentiable and the problem stays what it is."""
    names = list(run.problem.parameters())
    if run.case.situation == "redundant-rows":
        return [name for name in names if name not in ("G", "h")]
    if run.case.situation == "weakly-active" and run.case.kind == "lp":
        return ["q"]
    if run.drawn.condition > 1 or run.case.situation == "unbounded" or not run.drawn.is_unique:
        return [name for name in names if name in ("q", "h", "b")]
    return names
