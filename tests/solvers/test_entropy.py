"""Problems with entropy by `pdipm`: relative accuracy of z, gradients, verdicts; references of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from argrad.errors import ProblemError
from argrad.problems import QP, Flag, Solution, Status, gradients, parse
from argrad_service import engine
from argrad_service.engine import SolverOptions
from argrad_service.engine.data import residuals, stack
from argrad_service.engine.entropy import solve_on_rows
from argrad_service.engine.finish import Guess

pytestmark = pytest.mark.slow

F64 = torch.float64


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=F64)


def draw(
    seed: int, *, n: int = 6, m: int = 3, p: int = 1, batch: int = 3, tau: float = 0.3, rank: int = 0
) -> dict[str, Tensor]:
    """Problems with a point inside: Σ z = 1 and further rows, some of which will be active."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=F64)

    inside = torch.rand(batch, n, generator=random, dtype=F64)
    inside = inside / inside.sum(-1, keepdim=True)
    A = torch.cat([torch.ones(1, n, dtype=F64), normal(p - 1, n)]) if p else torch.zeros(0, n, dtype=F64)
    G, root = normal(m, n), normal(rank, n)
    data = {"q": normal(batch, n), "entropy": tensor(tau)}
    if rank:
        data["Q"] = root.mT @ root + 0.01 * torch.eye(n, dtype=F64)
    if m:
        data |= {"G": G, "h": inside @ G.mT + 0.02 * torch.rand(batch, m, generator=random, dtype=F64)}
    if p:
        data |= {"A": A, "b": inside @ A.mT}
    return data


def solved(problem: QP, **options: Any) -> engine.Forward:
    forward = engine.solve(problem, solver="pdipm", options=SolverOptions(**options))
    assert set(forward.status) == {Status.OPTIMAL}
    return forward


def test_softmax_has_its_relative_accuracy_down_to_underflow() -> None:
    scores = 4 * torch.randn(4, 40, generator=torch.Generator().manual_seed(0), dtype=F64)
    for tau in (10.0, 1.0, 0.1, 0.02, 0.005):
        one = torch.ones(1, dtype=F64)
        problem = QP(q=-scores, A=torch.ones(1, 40, dtype=F64), b=one, entropy=tensor(tau))
        expected = torch.softmax(scores / tau, -1)
        found = solved(problem).solution.z
        is_normal = expected > 1e-300
        torch.testing.assert_close(found[is_normal], expected[is_normal], rtol=1e-11 / min(tau, 1), atol=0)
        assert bool((found[~is_normal] <= 1e-300).all())


@pytest.mark.parametrize("tau", [1.0, 0.1, 0.02])
def test_the_gradient_of_softmax(tau: float) -> None:
    """Where z is wrong by 1e-9 the gradient is 15 % off at τ = 0.02."""
    random = torch.Generator().manual_seed(1)
    scores = torch.randn(3, 30, generator=random, dtype=F64, requires_grad=False)
    weight = torch.randn(3, 30, generator=random, dtype=F64)
    leaves = scores.clone().requires_grad_(), tensor(tau).requires_grad_()
    reference = torch.autograd.grad((torch.softmax(leaves[0] / leaves[1], -1) * weight).sum(), leaves)
    problem = QP(q=-scores, A=torch.ones(1, 30, dtype=F64), b=torch.ones(1, dtype=F64), entropy=tensor(tau))
    forward = solved(problem)
    adjoint = engine.vjp(forward, {"z": weight}).adjoint
    found = gradients(forward.solution, adjoint, wrt=["q", "entropy"], batched=["q"])
    torch.testing.assert_close(-found["q"], reference[0], rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(found["entropy"], reference[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 4], ids=["linear", "quadratic"])
def test_an_underflowed_z_has_no_part_in_anything(rank: int) -> None:
    data = draw(2, tau=1e-3, m=0, rank=rank)
    data["q"][:, 0] = 5.0
    forward = solved(QP(**data))
    z = forward.solution.z
    assert bool((z[:, 0] == 0).all())
    random = torch.Generator().manual_seed(3)
    back = engine.vjp(forward, {"z": torch.randn(z.shape, generator=random, dtype=F64)})
    assert bool((back.adjoint.z[:, 0] == 0).all())
    formed = gradients(forward.solution, back.adjoint, wrt=["entropy", "q"], batched=["q"])
    assert bool(torch.isfinite(formed["entropy"]))
    moved = engine.jvp(forward, {"entropy": tensor(1.0)}).solution
    assert all(bool(torch.isfinite(block).all()) for block in moved.blocks().values())


@pytest.mark.parametrize("rank", [0, 3], ids=["linear", "quadratic"])
@pytest.mark.parametrize("m", [0, 3, 12], ids=["none", "few", "many"])
@pytest.mark.parametrize("p", [0, 1, 2])
def test_optimality(rank: int, m: int, p: int) -> None:
    # Without Σ z = 1 the entries of z go up to e^(‖q‖∞/τ).
    for tau in (1.0, 0.1, 0.01) if p else (1.0, 0.5):
        problem = QP(**draw(4, n=8, m=m, p=p, tau=tau, rank=rank))
        forward = solved(problem)
        for residual in (forward.primal_residual, forward.dual_residual, forward.gap):
            assert float(residual.max()) < 1e-10
        assert bool((forward.solution.lam >= 0).all())
        assert bool((forward.solution.s >= 0).all())
        assert bool((forward.solution.lam * forward.solution.s == 0).all())


@pytest.mark.parametrize("rank", [0, 3], ids=["linear", "quadratic"])
def test_objective_and_solution_against_slsqp(rank: int) -> None:
    data = draw(5, rank=rank)
    forward = solved(QP(**data))
    for i in range(3):
        Q = data.get("Q", torch.zeros(6, 6, dtype=F64)).numpy()
        q, tau = data["q"][i].numpy(), float(data["entropy"])

        def cost(x: Any, Q: Any = Q, q: Any = q, tau: float = tau) -> float:
            y = torch.from_numpy(x).clamp(min=1e-12).numpy()
            return float(0.5 * y @ Q @ y + q @ y + tau * (y * torch.from_numpy(y).log().numpy()).sum())

        rows = [
            {"type": "eq", "fun": lambda x, i=i: data["A"].numpy() @ x - data["b"][i].numpy()},
            {"type": "ineq", "fun": lambda x, i=i: data["h"][i].numpy() - data["G"].numpy() @ x},
        ]
        reference = minimize(cost, forward.solution.z[i].numpy() * 0 + 1 / 6, constraints=rows, bounds=[(0, None)] * 6)
        assert float(forward.objective[i]) <= reference.fun + 1e-7
        torch.testing.assert_close(forward.solution.z[i], torch.from_numpy(reference.x), rtol=0, atol=1e-3)


@pytest.mark.parametrize("block", ["z", "nu", "lam", "s"])
@pytest.mark.parametrize("rank", [0, 3], ids=["linear", "quadratic"])
def test_gradients_against_central_differences(rank: int, block: str) -> None:
    data = draw(6, rank=rank, p=2)
    random = torch.Generator().manual_seed(7)
    forward = solved(QP(**data))
    assert bool((forward.solution.lam > 0).any())
    weight = torch.randn(getattr(forward.solution, block).shape, generator=random, dtype=F64)
    adjoint = engine.vjp(forward, {block: weight}).adjoint
    batched = [name for name in data if forward.problem.is_batched(name)]
    formed = gradients(forward.solution, adjoint, wrt=data, batched=batched)
    for name, gradient in formed.items():
        direction = torch.randn(gradient.shape, generator=random, dtype=F64)

        def value(step: float, name: str = name, direction: Tensor = direction) -> float:
            moved = solved(QP(**(data | {name: data[name] + step * direction})))
            return float((getattr(moved.solution, block) * weight).sum())

        expected = (value(1e-6) - value(-1e-6)) / 2e-6
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-6, abs=1e-7), name


@pytest.mark.parametrize("rank", [0, 3], ids=["linear", "quadratic"])
def test_jvp_is_the_transpose_of_vjp(rank: int) -> None:
    data = draw(8, rank=rank, p=2)
    data["entropy"] = tensor([0.2, 0.4, 0.8])
    # Rows that z ≥ 0 implies, whose slacks are differentiated all the same.
    data["G"] = torch.cat([data["G"], -torch.eye(6, dtype=F64)])
    data["h"] = torch.cat([data["h"], torch.zeros(3, 6, dtype=F64)], dim=1)
    random = torch.Generator().manual_seed(9)
    forward = solved(QP(**data))
    torch.testing.assert_close(forward.solution.s[:, 3:], forward.solution.z, rtol=0, atol=0)
    moved = {k: torch.randn(t.shape, generator=random, dtype=F64) for k, t in data.items()}
    weights = {k: torch.randn(t.shape, generator=random, dtype=F64) for k, t in forward.solution.blocks().items()}
    tangents = engine.jvp(forward, moved).solution.blocks()
    adjoint = engine.vjp(forward, weights).adjoint
    batched = [name for name in data if forward.problem.is_batched(name)]
    pulled = gradients(forward.solution, adjoint, wrt=data, batched=batched)
    left = sum(float((tangents[k] * weights[k]).sum()) for k in weights)
    assert left == pytest.approx(sum(float((pulled[k] * moved[k]).sum()) for k in moved), rel=1e-9)


def test_rows_that_only_say_z_is_nonnegative_are_left_out() -> None:
    data = draw(10, tau=0.01)
    lower = {"lb": tensor([0.0, -1.0, -torch.inf, 0.0, 0.0, 0.0])}
    form = parse("qp", data | lower)
    forward = solved(form.problem)
    plain = solved(QP(**data))
    torch.testing.assert_close(forward.solution.z, plain.solution.z, rtol=1e-12, atol=0)
    assert forward.flags == plain.flags == ((),) * 3
    assert bool((forward.solution.lam[:, 3:] == 0).all())


def test_a_lower_bound_above_zero_binds() -> None:
    data = draw(11, m=0, tau=0.05)
    form = parse("qp", data | {"lb": torch.full((6,), 0.05, dtype=F64), "ub": torch.full((6,), 0.5, dtype=F64)})
    solution = form.solution(solved(form.problem).solution)
    assert float(solution["z"].min()) == pytest.approx(0.05, abs=1e-13)
    assert bool((solution["lam_lb"] > 0).any())
    assert bool((solution["lam_ub"] > 0).any())


def test_batch_equals_loop_of_singles_and_permuted_rows_change_nothing() -> None:
    data = draw(12, n=10, m=8, batch=5, tau=0.05)
    data["entropy"] = tensor([0.02, 0.05, 0.1, 0.5, 3.0])
    together = solved(QP(**data)).solution
    shared = {"G": data["G"], "A": data["A"]}
    for i in range(5):
        single = solved(QP(**shared, **{k: t[i] for k, t in data.items() if k not in shared})).solution
        torch.testing.assert_close(single.z[0], together.z[i], rtol=1e-9, atol=0)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    permuted = solved(QP(**(data | {"G": data["G"][order], "h": data["h"][:, order]}))).solution
    torch.testing.assert_close(permuted.z, together.z, rtol=1e-9, atol=0)
    torch.testing.assert_close(permuted.lam, together.lam[:, order], rtol=1e-9, atol=1e-11)


def test_scaling_the_objective_scales_the_multipliers() -> None:
    data = draw(13, rank=3)
    one = solved(QP(**data)).solution
    larger = solved(QP(**(data | {k: 1e3 * data[k] for k in ("Q", "q", "entropy")}))).solution
    torch.testing.assert_close(larger.z, one.z, rtol=1e-10, atol=0)
    torch.testing.assert_close(larger.lam, 1e3 * one.lam, rtol=1e-9, atol=1e-9)


def test_the_entropys_limit_is_the_linear_program() -> None:
    problem = draw(14, n=5, m=2, p=1, batch=8)
    rows = torch.cat([problem["G"], -torch.eye(5, dtype=F64)]), torch.cat([problem["h"], torch.zeros(8, 5)], dim=1)
    linear = engine.solve(QP(q=problem["q"], G=rows[0], h=rows[1], A=problem["A"], b=problem["b"]), solver="pdipm")
    for tau in (1e-2, 1e-3, 1e-4):
        smooth = solved(QP(**(problem | {"entropy": tensor(tau)})), max_iterations=300)
        excess = (problem["q"] * smooth.solution.z).sum(-1) - linear.objective
        assert float(excess.min()) > -1e-9
        assert float(excess.max()) < 2 * tau


def test_a_callers_point_and_a_warm_start() -> None:
    problem = QP(**draw(15, n=10, m=6, tau=0.02, rank=3))
    forward = solved(problem)
    blocks = {k: t + 1e-7 for k, t in forward.solution.blocks().items()}
    point = engine.at_point(problem, Solution(**blocks))
    assert set(point.status) == {Status.OPTIMAL}
    torch.testing.assert_close(point.solution.z, forward.solution.z, rtol=1e-9, atol=0)
    again = engine.solve(problem, solver="pdipm", warm_start=forward.solution)
    assert again.iterations.tolist() == [0, 0, 0]
    torch.testing.assert_close(again.solution.z, forward.solution.z, rtol=1e-10, atol=0)


def test_a_point_with_exact_zeros_is_a_point() -> None:
    problem = QP(q=tensor([0.0, 1.0, 9.0]), A=torch.ones(1, 3, dtype=F64), b=tensor([1.0]), entropy=tensor(0.01))
    forward = solved(problem)
    zeroed = {**forward.solution.blocks(), "z": torch.where(forward.solution.z < 1e-300, 0.0, forward.solution.z)}
    point = engine.at_point(problem, Solution(**zeroed))
    assert point.status == (Status.OPTIMAL,)
    torch.testing.assert_close(point.solution.z, forward.solution.z, rtol=1e-9, atol=0)


def test_verdicts_and_their_batchmates() -> None:
    data = draw(16, m=0, batch=3)
    data |= {"G": torch.ones(1, 6, dtype=F64), "h": tensor([[2.0], [0.5], [2.0]])}
    forward = engine.solve(QP(**data), solver="pdipm")
    assert forward.status == (Status.OPTIMAL, Status.INFEASIBLE, Status.OPTIMAL)
    assert engine.vjp(forward, {"z": torch.ones(3, 6, dtype=F64)}).gradient_status == ("ok", "infeasible", "ok")
    single = solved(QP(**{k: (t[0] if k in ("q", "h", "b") else t) for k, t in data.items()}))
    torch.testing.assert_close(forward.solution.z[0], single.solution.z[0], rtol=1e-12, atol=0)


def test_z_below_zero_alone_makes_a_problem_infeasible() -> None:
    problem = QP(q=tensor([1.0, 1.0]), A=tensor([[1.0, 0.0]]), b=tensor([-1.0]), entropy=tensor(0.1))
    assert engine.solve(problem).status == (Status.INFEASIBLE,)


def test_what_is_not_convex_is_said_to_be_so() -> None:
    data = draw(17) | {"Q": -torch.eye(6, dtype=F64)}
    assert set(engine.solve(QP(**data)).status) == {Status.NONCONVEX}


def test_weakly_active_and_dependent_rows() -> None:
    q, A, b = tensor([0.0, 0.0]), torch.ones(1, 2, dtype=F64), tensor([1.0])
    weak = solved(QP(q=q, A=A, b=b, G=tensor([[1.0, 0.0]]), h=tensor([0.5]), entropy=tensor(1.0)))
    assert weak.flags == ((Flag.DEGENERATE,),)
    back = engine.vjp(weak, {"z": tensor([[1.0, 0.0]])})
    # The row dropped: that of softmax.
    torch.testing.assert_close(back.adjoint.z, tensor([[-0.25, 0.25]]), rtol=1e-12, atol=0)
    twice = solved(QP(q=q, A=A.repeat(2, 1), b=b.repeat(2), entropy=tensor(1.0)))
    assert twice.flags == ((Flag.DEPENDENT,),)
    back = engine.vjp(twice, {"z": tensor([[1.0, 0.0]])})
    torch.testing.assert_close(back.adjoint.z, tensor([[-0.25, 0.25]]), rtol=1e-12, atol=0)
    assert engine.vjp(twice, {"nu": tensor([[1.0, 0.0]])}).gradient_status == ("dependent",)


def test_the_iteration_limit_is_kept() -> None:
    problem = QP(**draw(18, n=20, m=10, tau=1e-3))
    forward = engine.solve(problem, options=SolverOptions(max_iterations=2))
    assert Status.MAX_ITERATIONS in forward.status
    assert int(forward.iterations.max()) <= 2


@pytest.mark.parametrize(
    ("value", "found"),
    [(0.0, "0.0"), (-1.0, "-1.0"), (torch.inf, "inf"), (torch.nan, "nan"), ([1.0, 0.0], r"0.0 at \[1\]")],
)
def test_an_entropy_must_be_positive_and_finite(value: Any, found: str) -> None:
    with pytest.raises(ProblemError, match=rf"problem\.entropy: found {found}, wanted finite numbers > 0"):
        parse("qp", {"q": torch.zeros(2, 3, dtype=F64), "entropy": tensor(value)})


def test_its_shape_is_that_of_the_batch() -> None:
    with pytest.raises(ProblemError, match=r"problem\.entropy: found shape \(2, 1\), wanted \(\) or \(B,\)"):
        QP(q=torch.zeros(2, 3, dtype=F64), entropy=torch.ones(2, 1, dtype=F64))
    with pytest.raises(ProblemError, match=r"problem\.entropy: found a batch of 3"):
        QP(q=torch.zeros(2, 3, dtype=F64), entropy=torch.ones(3, dtype=F64))
    assert QP(q=torch.zeros(3, dtype=F64), entropy=torch.ones(3, dtype=F64)).batch_size == 3


def test_solvers_that_cannot_are_refused() -> None:
    with pytest.raises(ProblemError, match=r"solver\.name: found 'pivoting', which takes no entropy"):
        engine.solve(QP(**draw(1)), solver="pivoting", device=torch.device("cpu"))
    assert engine.solve(QP(**draw(1))).solver == "pdipm"


@pytest.mark.parametrize("scale", [0.0, 1e-310, 1e-200, 1.0, 1e200])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(("p", "tau"), [(1, 0.05), (0, 0.05), (0, 1.0)])
def test_equations_that_do_not_hold_never_count_as_solved(scale: float, rank: int, p: int, tau: float) -> None:
    """From where every entry has underflowed Newton's method once stopped at once, with a residual of 0.9."""
    random = torch.Generator().manual_seed(2)
    data = stack(QP(**draw(2, m=0, p=p, rank=rank, tau=tau)))
    z = scale * torch.rand(data.q.shape, generator=random, dtype=F64)
    active = torch.ones(data.d.shape, dtype=torch.bool)
    for force in (0.0, 1e3, 1e5):
        y = force * torch.randn(data.d.shape, generator=random, dtype=F64)
        found, multipliers, is_solved = solve_on_rows(data, Guess(active=active, z=z, y=y))
        judged = residuals(data, found, multipliers).scaled
        assert bool((judged[is_solved] <= 1e-9).all())
        if scale == 1.0 and force == 0.0 and p:
            assert bool(is_solved.all())
