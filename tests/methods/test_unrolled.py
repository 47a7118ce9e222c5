"""`unrolled`: automatic differentiation of iterations, truncated, in segments, against central differences."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from argrad.errors import ProblemError
from argrad.problems import QP, Flag, Status
from argrad_service import engine
from argrad_service.engine import Backward, Forward, SolverOptions
from tests.engine.qps import Case, draw
from tests.solvers.linear import directions, draw_lp, form, inner, slope

pytestmark = pytest.mark.slow

D = torch.float64

EXACT: dict[str, tuple[dict[str, object], float]] = {
    "pgd": ({"polish": False}, 1e-11),
    "barrier": ({"polish": False, "epsilon": 1e-9}, 1e-8),
}
"""Own options and tolerance with which a solver ends close to the solution."""


def solve(problem: QP, solver: str, own: Mapping[str, object] | None = None, tolerance: float | None = None) -> Forward:
    exact, tight = EXACT[solver]
    options = SolverOptions(tolerance=tolerance or tight, own=exact if own is None else own)
    return engine.solve(problem, solver=solver, options=options)


def cotangents(problem: QP, names: tuple[str, ...], k: int | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    sizes = {"z": problem.n, "nu": problem.p, "lam": problem.m, "s": problem.m}
    front = (problem.batch_size or 1,) if k is None else (k, problem.batch_size or 1)
    return {name: torch.randn(*front, sizes[name], generator=generator, dtype=D) for name in names}


def error(found: Backward, reference: Backward) -> float:
    """Largest over the batch of ‖Δ‖ / ‖reference‖, all blocks of the adjoint together."""
    mine, theirs = (
        torch.cat([back.adjoint.z, back.adjoint.nu, back.adjoint.mu], dim=-1) for back in (found, reference)
    )
    return float(((mine - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())


QPS = [Case("both", 8, 12, 2), Case("shared", 5, 10, 0, shared=frozenset("QGA")), Case("single", 6, 8, 1, batch=1)]


@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize("case", QPS, ids=lambda case: case.name)
@pytest.mark.parametrize("names", [("z",), ("z", "nu", "lam", "s")], ids=["z", "all"])
def test_after_enough_iterations_it_agrees_with_kkt(solver: str, case: Case, names: tuple[str, ...]):
    problem = draw(case, seed=4).problem
    upstream = cotangents(problem, names, k=2)
    reference = engine.vjp(engine.solve(problem), upstream, method="kkt")
    found = engine.vjp(solve(problem, solver), upstream, method="unrolled")
    assert set(found.gradient_status) == {"ok"}
    assert error(found, reference) < 1e-6
    assert found.flags == ((),) * case.batch
    assert (found.measures["unrolled_distance"] == 0).all()


def test_the_closed_forms_of_projections_are_differentiated():
    eye = torch.eye(4, dtype=D)
    generator = torch.Generator().manual_seed(8)
    root = torch.randn(4, 4, generator=generator, dtype=D)
    problem = QP(
        Q=root @ root.mT + eye,
        q=3 * torch.randn(3, 4, generator=generator, dtype=D),
        G=-eye,
        h=torch.zeros(4, dtype=D),
        A=torch.ones(1, 4, dtype=D),
        b=torch.ones(1, dtype=D),
    )
    upstream = cotangents(problem, ("z", "lam"))
    reference = engine.vjp(engine.solve(problem), upstream)
    assert error(engine.vjp(solve(problem, "pgd"), upstream, method="unrolled"), reference) < 1e-6


@pytest.mark.parametrize("case", QPS, ids=lambda case: case.name)
def test_admm_agrees_with_kkt_after_enough_iterations_of_constant_penalties(case: Case):
    problem = draw(case, seed=5).problem
    upstream = cotangents(problem, ("z", "nu", "lam", "s"))
    reference = engine.vjp(engine.solve(problem), upstream, method="kkt")
    forward = engine.solve(problem, solver="admm", options=SolverOptions(own={"rho": 5.0}))
    few, many = (
        engine.vjp(forward, upstream, method="unrolled", options={"iterations": count}) for count in (10, 1000)
    )
    assert error(many, reference) < 1e-6 < 1e-2 < error(few, reference)
    assert many.measures["unrolled_distance"].max() < 1e-8 < few.measures["unrolled_distance"].max()
    assert many.flags == ((),) * case.batch
    assert few.flags == ((Flag.TRUNCATED,),) * case.batch


@pytest.mark.parametrize("last", [None, 10, 2])
def test_lps_through_the_barrier_agree_with_the_vertex(last: int | None):
    problem = draw_lp(8, 20, 2).problem
    upstream = cotangents(problem, ("z",))
    reference = engine.vjp(engine.solve(problem, solver="pdipm"), upstream, method="kkt")
    found = engine.vjp(solve(problem, "barrier"), upstream, method="unrolled", options={"last": last})
    assert error(found, reference) < 1e-6


NAMES = ("q", "h", "b")


@pytest.mark.parametrize(
    ("solver", "own", "tolerance"),
    [
        ("pgd", {"polish": False}, 3e-2),
        ("pgd", {"polish": False, "accelerated": False, "step": 1.5}, 1e-2),
        ("barrier", {"polish": False, "epsilon": 1e-2}, 1e-1),
    ],
    ids=["accelerated", "plain", "barrier"],
)
def test_vectors_have_the_derivative_of_the_iterate_itself(solver: str, own: dict[str, object], tolerance: float):
    problem = draw(Case("both", 8, 12, 2), seed=5).problem
    upstream = cotangents(problem, ("z", "lam"))
    forward = solve(problem, solver, own, tolerance)
    assert set(forward.status) == {Status.OPTIMAL}
    back = engine.vjp(forward, upstream, method="unrolled")

    def value(problem: QP) -> Tensor:
        found = solve(problem, solver, own, tolerance).solution
        return (upstream["z"] * found.z).sum() + (upstream["lam"] * found.lam).sum()

    along = directions(problem, NAMES)
    reference = slope(value, problem, along, 1e-7)
    assert inner(form(forward, back, NAMES), along) == pytest.approx(reference, rel=1e-5)
    assert all(flags == (Flag.TRUNCATED,) for flags in back.flags)
    assert (back.measures["adjoint_residual"] > 1e-6).all()


def test_matrices_have_it_in_the_limit():
    problem = draw(Case("both", 6, 8, 1), seed=5).problem
    g = cotangents(problem, ("z",))["z"]
    names = ("Q", "G", "A")
    along = directions(problem, names)
    reference = slope(lambda moved: (g * engine.solve(moved).solution.z).sum(), problem, along)
    errors = []
    for tolerance in (1e-3, 1e-6, 1e-10):
        forward = solve(problem, "pgd", {"polish": False}, tolerance)
        formed = form(forward, engine.vjp(forward, {"z": g}, method="unrolled"), names)
        errors.append(abs(inner(formed, along) / reference - 1))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6


@pytest.mark.parametrize("solver", EXACT)
def test_truncation_approaches_the_whole(solver: str):
    problem = draw(Case("both", 8, 12, 2), seed=4).problem
    upstream = cotangents(problem, ("z",))
    forward = solve(problem, solver)
    whole = engine.vjp(forward, upstream, method="unrolled")
    found = [engine.vjp(forward, upstream, method="unrolled", options={"last": k}) for k in (1, 4, 60)]
    errors = [error(one, whole) for one in found]
    assert errors[0] > errors[2]
    if solver == "barrier":  # Newton's method forgets where it came from
        assert errors[1] < 1e-6
    else:
        assert Flag.TRUNCATED in found[0].flags[0]
        assert errors[2] < 1e-3


@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize("segment", [1, 7, 1000])
def test_segments_change_nothing(solver: str, segment: int):
    problem = draw(Case("both", 8, 12, 2), seed=4).problem
    upstream = cotangents(problem, ("z", "lam"), k=3)
    forward = solve(problem, solver)
    whole = engine.vjp(forward, upstream, method="unrolled")
    assert error(engine.vjp(forward, upstream, method="unrolled", options={"segment": segment}), whole) < 1e-9


class Held:
    """Bytes of the tensors that autograd graphs hold, now and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> list[Tensor]:
        class Box(list[Tensor]):
            __slots__ = ("__weakref__",)

        # Detached: an output that a graph saves would hold the graph that saves it.
        box, size = Box([tensor.detach()]), tensor.numel() * tensor.element_size()
        weakref.finalize(box, self.release, size)
        self.now += size
        self.most = max(self.most, self.now)
        return box

    def release(self, size: int) -> None:
        self.now -= size


def peak(forward: Forward, options: dict[str, int]) -> int:
    held = Held()
    upstream = {"z": torch.ones_like(forward.solution.z)}
    with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda box: box[0]):
        engine.vjp(forward, upstream, method="unrolled", options=options)
    return held.most


def test_memory_is_flat_in_the_number_of_iterations_when_truncated():
    problem = draw(Case("both", 8, 12, 2), seed=4).problem
    few, many = (solve(problem, "pgd", {"polish": False}, tolerance) for tolerance in (1e-3, 1e-11))
    assert many.measures["steps"].max() > 3 * few.measures["steps"].max()
    truncated = [peak(forward, {"last": 5, "segment": 5}) for forward in (few, many)]
    assert truncated[0] == truncated[1] > 0
    whole = [peak(forward, {"segment": 100_000}) for forward in (few, many)]
    assert whole[1] > 3 * whole[0] > 3 * truncated[0]
    assert peak(many, {"segment": 5}) == pytest.approx(truncated[1], rel=0.25)
    by_root = peak(many, {})
    assert by_root < whole[1] / 4
    lp = solve(draw_lp(8, 20, 2).problem, "barrier")
    assert peak(lp, {}) < peak(lp, {"segment": 100_000}) / 4


@pytest.mark.parametrize("solver", EXACT)
def test_a_failed_problem_is_nan_and_harms_no_batchmate(solver: str):
    eye = torch.eye(2, dtype=D)
    h = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, -2.0, 0.0], [2.0, 1.0, 0.0, 0.0]], dtype=D)
    problem = QP(Q=eye, q=torch.tensor([-3.0, -0.4], dtype=D), G=torch.cat([eye, -eye]), h=h)
    upstream = {"z": torch.ones(3, 2, dtype=D)}
    forward = solve(problem, solver)
    back = engine.vjp(forward, upstream, method="unrolled")
    assert back.gradient_status == ("ok", "infeasible", "ok")
    assert back.adjoint.z[1].isnan().all()
    for i in (0, 2):
        alone = solve(QP(**problem.parameters() | {"h": h[i]}), solver)
        one = engine.vjp(alone, {"z": torch.ones(1, 2, dtype=D)}, method="unrolled")
        torch.testing.assert_close(one.adjoint.z[0], back.adjoint.z[i], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(one.adjoint.mu[0], back.adjoint.mu[i], rtol=1e-12, atol=1e-12)


def test_a_batch_is_a_loop_of_singles():
    problem = draw_lp(8, 20, 2).problem
    upstream = cotangents(problem, ("z",))
    together = engine.vjp(solve(problem, "barrier"), upstream, method="unrolled")
    for i in range(3):
        one = QP(**{name: block[i] for name, block in problem.parameters().items()})
        alone = engine.vjp(solve(one, "barrier"), {"z": upstream["z"][i : i + 1]}, method="unrolled")
        torch.testing.assert_close(alone.adjoint.mu[0], together.adjoint.mu[i], rtol=1e-8, atol=1e-8)


def test_an_edge_of_solutions_has_the_derivative_of_its_iterate():
    eye = torch.eye(2, dtype=D)
    problem = QP(q=torch.tensor([0.0, 1.0], dtype=D), G=torch.cat([eye, -eye]), h=torch.tensor([1.0, 1, 0, 0]).to(D))
    forward = solve(problem, "barrier", {"polish": False, "epsilon": 1e-4}, 1e-4)
    back = engine.vjp(forward, {"z": torch.ones(1, 2, dtype=D)}, method="unrolled")
    assert back.gradient_status == ("ok",)
    assert back.flags == ((Flag.TRUNCATED,),)
    # The analytic centre of the edge: half the sum of the first variable's bounds.
    assert (-back.adjoint.mu[0, [0, 2]]).tolist() == pytest.approx([0.5, -0.5], abs=1e-6)


def test_solvers_that_cannot_be_unrolled_say_which_methods_work():
    forward = engine.solve(draw(QPS[0], seed=4).problem, solver="pdipm")
    with pytest.raises(ProblemError, match=r"differentiation.method: found 'unrolled', wanted one of auto, kkt"):
        engine.vjp(forward, {"z": torch.ones_like(forward.solution.z)}, method="unrolled")
