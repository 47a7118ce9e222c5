"""The backward QP by each of its backends, against the dense oracle, central differences and `kkt`."""

import numpy as np
import pytest
import torch

from argrad.errors import ProblemError
from argrad.problems import QP, Solution
from argrad_service import engine
from argrad_service.engine.backward import by_osqp, equality
from argrad_service.engine.registry import SOLVERS
from tests.engine.qps import Case, draw, oracle_adjoint

BACKENDS = ("direct", "osqp", "admm")

CASES = [
    Case("regular", n=8, m=10, p=3, batch=5),
    Case("shared", n=8, m=10, p=3, batch=5, shared=frozenset("QGA")),
    Case("batch of one", n=7, m=6, p=2, batch=1),
    Case("no inequalities", n=6, m=0, p=2),
    Case("no equalities", n=6, m=8, p=0),
    Case("no constraints", n=6, m=0, p=0),
    Case("many rows", n=5, m=25, p=0),
]


@pytest.fixture(params=BACKENDS)
def options(request):
    return {"backend": request.param}


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def upstream_of(known, rng, count=None, names=("z", "nu", "lam", "s")):
    lead = () if count is None else (count,)
    return {name: torch.from_numpy(rng.normal(size=(*lead, *getattr(known, name).shape))) for name in names}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_adjoint_is_the_oracle_s(case, options):
    known = draw(case, 0)
    forward = engine.solve(known.problem, solver="pdipm")
    upstream = upstream_of(known, np.random.default_rng(1))
    backward = engine.vjp(forward, upstream, method="bpqp", options=options)
    assert set(backward.gradient_status) == {"ok"}
    assert backward.method == "bpqp"
    assert float(backward.measures["backward_residual"].max()) < 1e-10
    assert float(backward.measures["kkt_norm"].max()) < 1e-10
    for i in range(case.batch):
        given = {name: block[i].numpy() for name, block in upstream.items()}
        wanted = np.concatenate(oracle_adjoint(known.problem, i, known.lam[i] > 0, given))
        adjoint = backward.adjoint
        found = np.concatenate([block[i].numpy() for block in (adjoint.z, adjoint.nu, adjoint.mu)])
        assert np.linalg.norm(found - wanted) < 1e-8 * np.linalg.norm(wanted)


def test_singular_hessian_is_definite_on_the_null_space():
    known = draw(Case("singular", n=10, m=12, p=3, rank=6), 2)
    forward = engine.solve(known.problem, solver="pdipm")
    upstream = upstream_of(known, np.random.default_rng(3))
    mine = engine.vjp(forward, upstream, method="bpqp").adjoint
    kkt = engine.vjp(forward, upstream, method="kkt").adjoint
    torch.testing.assert_close(mine.z, kkt.z, rtol=1e-8, atol=1e-9)


def test_several_cotangents_are_those_one_by_one(options):
    known = draw(Case("several", n=8, m=10, p=3, batch=4), 4)
    forward = engine.solve(known.problem, solver="pdipm")
    upstream = upstream_of(known, np.random.default_rng(5), count=3)
    together = engine.vjp(forward, upstream, method="bpqp", options=options).adjoint
    for j in range(3):
        one = engine.vjp(forward, {k: t[j] for k, t in upstream.items()}, method="bpqp", options=options).adjoint
        for name in ("z", "nu", "mu"):
            torch.testing.assert_close(getattr(together, name)[j], getattr(one, name), rtol=1e-8, atol=1e-9)


def test_gradient_at_a_caller_s_point_against_central_differences(options):
    known = draw(Case("caller", n=6, m=7, p=2, batch=2), 6)
    rng = np.random.default_rng(7)
    noise = {name: torch.from_numpy(getattr(known, name) * (1 + 1e-7)) for name in ("z", "nu", "lam", "s")}
    forward = engine.at_point(known.problem, Solution(**noise))
    g = torch.from_numpy(rng.normal(size=known.z.shape))
    adjoint = engine.vjp(forward, {"z": g}, method="bpqp", options=options).adjoint
    step = {name: torch.from_numpy(rng.normal(size=t.shape)) for name, t in known.problem.parameters().items()}
    losses = []
    for sign in (1, -1):
        moved = {name: t + sign * 1e-6 * step[name] for name, t in known.problem.parameters().items()}
        losses.append(float((engine.solve(QP(**moved), solver="pdipm").solution.z * g).sum()))
    z, nu, lam = (torch.from_numpy(t) for t in (known.z, known.nu, known.lam))
    formed = {
        "Q": 0.5 * (adjoint.z[:, :, None] * z[:, None] + z[:, :, None] * adjoint.z[:, None]),
        "q": adjoint.z,
        "G": adjoint.mu[:, :, None] * z[:, None] + lam[:, :, None] * adjoint.z[:, None],
        "h": -adjoint.mu,
        "A": adjoint.nu[:, :, None] * z[:, None] + nu[:, :, None] * adjoint.z[:, None],
        "b": -adjoint.nu,
    }
    slope = sum(float((formed[name] * step[name]).sum()) for name in step)
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-6)


def test_forward_mode_is_the_transpose(options):
    known = draw(Case("transpose", n=7, m=9, p=2), 8)
    forward = engine.solve(known.problem, solver="pdipm")
    rng = np.random.default_rng(9)
    tangent = {"q": torch.from_numpy(rng.normal(size=(3, 7))), "h": torch.from_numpy(rng.normal(size=(3, 9)))}
    tangent["b"] = torch.from_numpy(rng.normal(size=(3, 2)))
    upstream = upstream_of(known, rng, names=("z", "nu", "lam"))
    pushed = engine.jvp(forward, tangent, method="bpqp", options=options)
    assert pushed.method == "bpqp"
    adjoint = engine.vjp(forward, upstream, method="bpqp", options=options).adjoint
    left = sum((getattr(pushed.solution, name) * upstream[name]).sum() for name in upstream)
    right = (adjoint.z * tangent["q"]).sum() - (adjoint.mu * tangent["h"]).sum() - (adjoint.nu * tangent["b"]).sum()
    assert float(left) == pytest.approx(float(right), rel=1e-8)


EYE = torch.eye(2, dtype=torch.float64)


def test_dependent_rows_share_the_multiplier_and_are_not_asked_about(options):
    problem = QP(Q=EYE, q=numbers(-2.0, 1.0), G=numbers([1.0, 0.0], [2.0, 0.0]), h=numbers(0.0, 0.0))
    forward = engine.solve(problem, solver="pdipm")
    assert forward.flags == (("dependent",),)
    upstream = {"z": numbers([1.0, 1.0])}
    mine = engine.vjp(forward, upstream, method="bpqp", options=options)
    kkt = engine.vjp(forward, upstream, method="kkt")
    assert (mine.gradient_status, mine.flags) == (("ok",), (("dependent",),))
    torch.testing.assert_close(mine.adjoint.z, kkt.adjoint.z, rtol=0, atol=1e-9)
    pull = mine.adjoint.mu @ numbers([1.0, 0.0], [2.0, 0.0])
    torch.testing.assert_close(pull, kkt.adjoint.mu @ numbers([1.0, 0.0], [2.0, 0.0]), rtol=0, atol=1e-9)
    refused = engine.vjp(forward, {"lam": numbers([1.0, 0.0])}, method="bpqp", options=options)
    assert refused.gradient_status == ("dependent",)
    assert bool(torch.isnan(refused.adjoint.z).all())


def test_direct_gives_dependent_rows_the_minimum_norm_beside_an_independent_neighbour():
    G = numbers([[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]])
    problem = QP(Q=EYE, q=numbers([-2.0, 1.0], [-2.0, -1.0]), G=G, h=numbers([0.0, 0.0], [0.0, 0.0]))
    forward = engine.solve(problem, solver="pdipm")
    upstream = {"z": numbers([1.0, 1.0], [1.0, 2.0])}
    adjoint = engine.vjp(forward, upstream, method="bpqp").adjoint
    torch.testing.assert_close(adjoint.mu, numbers([-0.5, -0.5], [-1.0, -2.0]), rtol=0, atol=1e-12)
    torch.testing.assert_close(adjoint.z, numbers([0.0, -1.0], [0.0, 0.0]), rtol=0, atol=1e-12)


def test_weakly_active_row_is_dropped_and_flagged(options):
    problem = QP(Q=EYE, q=numbers(0.0, 1.0), G=numbers([1.0, 0.0]), h=numbers(0.0))
    forward = engine.solve(problem, solver="pdipm")
    backward = engine.vjp(forward, {"z": numbers([1.0, 1.0])}, method="bpqp", options=options)
    assert (backward.gradient_status, backward.flags) == (("ok",), (("degenerate",),))
    torch.testing.assert_close(backward.adjoint.z, numbers([-1.0, -1.0]), rtol=0, atol=1e-9)


def test_a_failed_problem_has_no_gradient_and_its_neighbour_has_its_own(options):
    G = numbers([1.0, 0.0], [-1.0, 0.0])
    problem = QP(Q=EYE, q=numbers([1.0, 1.0], [-3.0, 1.0]), G=G, h=numbers([-1.0, -1.0], [1.0, 1.0]))
    forward = engine.solve(problem, solver="pdipm")
    backward = engine.vjp(forward, {"z": numbers([1.0, 1.0], [1.0, 1.0])}, method="bpqp", options=options)
    assert backward.gradient_status == ("infeasible", "ok")
    torch.testing.assert_close(backward.adjoint.z[1], numbers(0.0, -1.0), rtol=0, atol=1e-9)
    assert bool(torch.isnan(backward.adjoint.z[0]).all())


def test_linear_programs_are_for_the_direct_backend(options):
    rows = numbers([1.0, 1.0], [-1.0, 0.0], [0.0, -1.0])
    problem = QP(q=numbers([-1.0, -2.0], [-2.0, -1.0]), G=rows, h=numbers(1.0, 0.0, 0.0))
    forward = engine.solve(problem, solver="pdipm")
    upstream = {"z": numbers([1.0, 3.0], [1.0, 3.0]), "lam": numbers([1.0, 0.0, 2.0], [0.0, 1.0, 2.0])}
    if options["backend"] != "direct":
        with pytest.raises(ProblemError, match="'direct' for a linear program"):
            engine.vjp(forward, upstream, method="bpqp", options=options)
        return
    mine = engine.vjp(forward, upstream, method="bpqp", options=options)
    kkt = engine.vjp(forward, upstream, method="kkt")
    assert mine.gradient_status == ("ok", "ok")
    for name in ("z", "nu", "mu"):
        torch.testing.assert_close(getattr(mine.adjoint, name), getattr(kkt.adjoint, name), rtol=0, atol=1e-10)


def test_solution_that_is_not_unique_has_no_gradient():
    problem = QP(q=numbers(1.0, 1.0), G=-EYE, h=numbers(0.0, 0.0), A=numbers([1.0, 1.0]), b=numbers(1.0))
    forward = engine.solve(problem, solver="pdipm")
    assert engine.vjp(forward, {"z": numbers([1.0, 1.0])}, method="bpqp").gradient_status == ("nonunique",)


def test_what_stays_above_the_tolerance_is_refused(monkeypatch):
    known = draw(Case("refused", n=8, m=10, p=3), 10)
    forward = engine.solve(known.problem, solver="pdipm")
    upstream = upstream_of(known, np.random.default_rng(11), names=("z",))
    few = {"backend": "admm", "rho": 1e-2, "max_iterations": 1}
    backward = engine.vjp(forward, upstream, method="bpqp", options=few)
    assert set(backward.gradient_status) == {"inaccurate"}
    assert float(backward.measures["backward_residual"].min()) > 1e-8
    monkeypatch.setattr(by_osqp, "ROUNDS", 0)
    backward = engine.vjp(forward, upstream, method="bpqp", options={"backend": "osqp"})
    assert set(backward.gradient_status) == {"inaccurate"}
    assert bool(torch.isnan(backward.adjoint.z).all())


def test_zero_cotangents_have_a_zero_adjoint(options):
    known = draw(Case("zero", n=5, m=6, p=1), 12)
    forward = engine.solve(known.problem, solver="pdipm")
    zero = {"z": torch.zeros(3, 5, dtype=torch.float64)}
    backward = engine.vjp(forward, zero, method="bpqp", options=options)
    assert set(backward.gradient_status) == {"ok"}
    assert float(backward.adjoint.z.abs().max()) == 0


def test_a_batch_is_its_singles(options):
    known = draw(Case("singles", n=7, m=9, p=2, batch=4), 13)
    upstream = upstream_of(known, np.random.default_rng(14), names=("z",))
    forward = engine.solve(known.problem, solver="pdipm")
    together = engine.vjp(forward, upstream, method="bpqp", options=options).adjoint
    for i in range(4):
        alone = engine.solve(QP(**{k: t[i] for k, t in known.problem.parameters().items()}), solver="pdipm")
        one = engine.vjp(alone, {"z": upstream["z"][i : i + 1]}, method="bpqp", options=options).adjoint
        torch.testing.assert_close(one.z[0], together.z[i], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_works_with_every_solver(solver):
    if not SOLVERS[solver].is_installed:
        pytest.skip(f"{solver} is not installed: extra {SOLVERS[solver].extra!r}")
    if "qp" not in SOLVERS[solver].kinds:
        pytest.skip(f"{solver} takes no qp")
    assert "bpqp" in SOLVERS[solver].methods
    root = torch.eye(3, dtype=torch.float64)
    problem = QP(Q=root, q=numbers(-2.0, 1.0, 0.5), G=root, h=numbers(1.0, 1.0, 1.0))
    forward = engine.solve(problem, solver=solver)
    adjoint = engine.vjp(forward, {"z": numbers([1.0, 1.0, 1.0])}, method="bpqp").adjoint
    torch.testing.assert_close(adjoint.z, numbers([0.0, -1.0, -1.0]), rtol=0, atol=1e-9)
    torch.testing.assert_close(adjoint.mu, numbers([-1.0, 0.0, 0.0]), rtol=0, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_as_on_the_cpu(options):
    known = draw(Case("cuda", n=8, m=10, p=3, batch=5), 15)
    upstream = upstream_of(known, np.random.default_rng(16))
    found = []
    for device in ("cpu", "cuda"):
        forward = engine.solve(known.problem, solver="pdipm", device=torch.device(device))
        there = {name: block.to(device) for name, block in upstream.items()}
        found.append(engine.vjp(forward, there, method="bpqp", options=options).adjoint)
    for name in ("z", "nu", "mu"):
        torch.testing.assert_close(getattr(found[0], name), getattr(found[1], name).cpu(), rtol=1e-8, atol=1e-9)


def test_null_space_method_on_random_rows_of_every_rank():
    generator = torch.Generator().manual_seed(17)
    for k, rank in ((0, 0), (2, 2), (4, 3), (5, 5), (7, 5)):
        n = 5
        C = torch.randn(1, k, max(rank, 1), generator=generator, dtype=torch.float64)
        C = C @ torch.randn(1, max(rank, 1), n, generator=generator, dtype=torch.float64)
        C = C / torch.linalg.vector_norm(C, dim=2, keepdim=True)
        P = torch.eye(n, dtype=torch.float64)[None]
        valid = torch.ones(1, k, dtype=torch.bool)
        solver = equality.Direct(P, C, valid, torch.tensor([k > rank]))
        r1 = torch.randn(1, n, 2, generator=generator, dtype=torch.float64)
        r2 = C @ torch.randn(1, n, 2, generator=generator, dtype=torch.float64)
        x, y = solver.solve(r1, r2)
        e1, e2 = equality.residual(P, C, x, y, r1, r2)
        assert float(equality.largest(e1)) < 1e-11
        assert float(equality.largest(e2)) < 1e-11
