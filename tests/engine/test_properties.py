"""What must hold for every problem, whatever its numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from argrad.problems import QP, Status
from argrad_service import engine
from tests.engine.qps import Case, Known, draw

pytestmark = pytest.mark.slow

ANY_SOLVER = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the solver is the same for all examples
)
SEEDS = st.integers(0, 10_000)
SHAPES = st.tuples(st.integers(1, 8), st.integers(0, 12), st.integers(0, 3)).filter(lambda s: s[2] < s[0])


def regular(shape: tuple[int, int, int], seed: int) -> Known:
    n, m, p = shape
    return draw(Case("property", n, m, p, batch=3), seed)


@ANY_SOLVER
@given(SHAPES, SEEDS)
def test_a_batch_is_its_problems_one_at_a_time(shape: tuple[int, int, int], seed: int) -> None:
    known = regular(shape, seed)
    together = engine.solve(known.problem)
    pulled = engine.vjp(together, {"z": torch.ones_like(together.solution.z)}).adjoint
    for i in range(3):
        alone = engine.solve(QP(**{k: t[i] for k, t in known.problem.parameters().items()}))
        assert alone.status == (Status.OPTIMAL,)
        assert alone.iterations.tolist() == [together.iterations.tolist()[i]]
        for name, block in alone.solution.blocks().items():
            torch.testing.assert_close(block[0], together.solution.blocks()[name][i], rtol=1e-9, atol=1e-9)
        adjoint = engine.vjp(alone, {"z": torch.ones_like(alone.solution.z)}).adjoint
        for name, block in adjoint.blocks().items():
            torch.testing.assert_close(block[0], pulled.blocks()[name][i], rtol=1e-8, atol=1e-8)


@ANY_SOLVER
@given(SHAPES, SEEDS, st.floats(1e-3, 1e3))
def test_scaling_the_objective_scales_the_multipliers(shape: tuple[int, int, int], seed: int, factor: float) -> None:
    known = regular(shape, seed)
    parts = known.problem.parameters()
    forward = engine.solve(QP(**{**parts, "Q": factor * parts["Q"], "q": factor * parts["q"]}))
    np.testing.assert_allclose(forward.solution.z.numpy(), known.z, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(forward.solution.lam.numpy() / factor, known.lam, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(forward.solution.nu.numpy() / factor, known.nu, rtol=1e-7, atol=1e-7)


@ANY_SOLVER
@given(SHAPES.filter(lambda s: s[1] > 0), SEEDS)
def test_permuting_and_repeating_loose_rows_changes_nothing(shape: tuple[int, int, int], seed: int) -> None:
    known = regular(shape, seed)
    parts = known.problem.parameters()
    order = np.random.default_rng(seed).permutation(shape[1])
    # Behind the permuted rows, a looser copy of each: the solution stays clear of all of them.
    G = torch.cat([parts["G"][:, order.copy()], parts["G"]], dim=1)
    h = torch.cat([parts["h"][:, order.copy()], parts["h"] + 1], dim=1)
    forward = engine.solve(QP(**{**parts, "G": G, "h": h}))
    np.testing.assert_allclose(forward.solution.z.numpy(), known.z, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(forward.solution.lam[:, : shape[1]].numpy(), known.lam[:, order], rtol=1e-7, atol=1e-7)
    assert float(forward.solution.lam[:, shape[1] :].abs().max()) == 0.0
