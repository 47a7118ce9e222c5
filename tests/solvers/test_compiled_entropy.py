"""The compiled kernels for problems with entropy: against a reference of the benchmarks, and against batched torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from argrad.problems import QP, Flag, Status, gradients
from argrad_service import engine
from argrad_service.engine import SolverOptions, Stopped
from argrad_service.engine import compiled_entropy as compiled
from argrad_service.engine.data import Data, stack
from argrad_service.engine.finish import Guess
from argrad_service.engine.forward import entropic
from argrad_service.engine.kernels.active_set import DEGENERATE, SOLVED, UNDECIDED
from argrad_service.engine.kernels.entropic_batch import FIRST_STEPS
from benchmarks import workloads
from benchmarks.reference.special import exact_softmax

F64 = torch.float64
CPU = torch.device("cpu")


def draw(seed: int, n: int, m: int, p: int, tau: float, batch: int = 4) -> Data:
    """Problems with a point inside, some of whose rows will be active."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=F64)

    inside = torch.rand(batch, n, generator=random, dtype=F64)
    inside = inside / inside.sum(-1, keepdim=True)
    A, G = torch.cat([torch.ones(1, n, dtype=F64), normal(max(p - 1, 0), n)])[:p], normal(m, n)
    room = 0.02 * torch.rand(batch, m, generator=random, dtype=F64)
    given = {"G": G, "h": inside @ G.mT + room, "A": A, "b": inside @ A.mT}
    given = {name: tensor for name, tensor in given.items() if tensor.numel()}
    return stack(QP(q=normal(batch, n), entropy=torch.tensor(tau, dtype=F64), **given))


def solved(data: Data, warm: Guess | None = None, **options: int) -> compiled.Solved:
    assert compiled.takes(data)
    return compiled.solve_batch(data, SolverOptions(**options), warm)


@pytest.mark.parametrize("seed", range(4))
def test_softmax_and_its_gradient_are_those_of_the_reference(seed: int) -> None:
    workload = workloads.softmax(40, 15, 5, seed=seed)
    given = workload.parameters
    truth = exact_softmax(workload)
    rows = {name: given[name] for name in ("A", "b", "G", "h")}
    forward = engine.solve(QP(q=-given["y"], entropy=torch.tensor(1.0, dtype=F64), **rows), device=CPU)
    assert forward.status == (Status.OPTIMAL,)
    assert isinstance(forward, engine.Forward)
    assert isinstance(forward.factor.factor, compiled.CompiledEntropyFactor)
    torch.testing.assert_close(forward.solution.z, truth.z, rtol=1e-11, atol=0)
    adjoint = engine.vjp(forward, {"z": workload.grad_z}).adjoint
    formed = gradients(forward.solution, adjoint, wrt=["q", "b", "h"], batched=["q", "b", "h"])
    for name, expected in truth.gradients.items():
        found = -formed["q"] if name == "y" else formed[name]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("tau", [1.0, 0.1, 0.02, 0.005])
@pytest.mark.parametrize(
    ("n", "m", "p"),
    [(6, 3, 1), (30, 25, 3), (40, 0, 1), (10, 30, 1), (8, 3, 0), (1, 1, 0)],
    ids=["small", "many active", "softmax", "more rows than variables", "no equality", "one variable"],
)
def test_they_find_what_batched_torch_finds(n: int, m: int, p: int, tau: float) -> None:
    if p == 0 and tau < 1.0:
        pytest.skip("without Σ z = 1 the entries of z go up to e^(‖q‖∞/τ)")
    data = draw(3, n, m, p, tau)
    found, expected = solved(data), entropic._solve_batched(data, SolverOptions(), None)
    assert found.code.tolist() == [SOLVED] * 4
    assert bool(expected.is_exact.all())
    assert torch.equal(found.active, expected.active)
    torch.testing.assert_close(found.z, expected.z, rtol=1e-10 / min(tau, 1), atol=1e-290)
    torch.testing.assert_close(found.y, expected.y, rtol=1e-9, atol=1e-11)


def test_some_need_the_interior_point_method() -> None:
    found = solved(draw(3, 30, 25, 3, 0.1, batch=8))
    assert found.code.tolist() == [SOLVED] * 8
    assert int(found.iterations.max()) > FIRST_STEPS


def test_a_row_is_weakly_active_or_dependent() -> None:
    q, tau = torch.zeros(2, dtype=F64), torch.tensor(1.0, dtype=F64)
    A, b = torch.ones(1, 2, dtype=F64), torch.ones(1, dtype=F64)
    weak = QP(q=q, A=A, b=b, G=torch.tensor([[1.0, 0.0]], dtype=F64), h=torch.tensor([0.5], dtype=F64), entropy=tau)
    assert solved(stack(weak)).code.tolist() == [DEGENERATE]
    assert engine.solve(weak, device=CPU).flags == ((Flag.DEGENERATE,),)
    twice = QP(q=q, A=A.repeat(2, 1), b=b.repeat(2), entropy=tau)
    assert solved(stack(twice)).code.tolist() == [UNDECIDED]
    assert engine.solve(twice, device=CPU).flags == ((Flag.DEPENDENT,),)


def test_one_that_they_leave_open_changes_none_of_its_neighbours() -> None:
    data = draw(5, 12, 6, 2, 0.1)
    h = data.h.clone()
    h[1] = -10.0
    given = {"q": data.q, "A": data.A[0], "b": data.b, "G": data.G[0], "entropy": data.tau}
    forward = engine.solve(QP(h=h, **given), device=CPU)
    assert [str(status) for status in forward.status] == ["optimal", "infeasible", "optimal", "optimal"]
    alone = engine.solve(QP(h=data.h, **given), device=CPU)
    torch.testing.assert_close(forward.solution.z[[0, 2, 3]], alone.solution.z[[0, 2, 3]], rtol=1e-12, atol=0)
    upstream = {"z": torch.ones_like(data.q) * torch.arange(12)}
    back = engine.vjp(forward, upstream)
    assert back.gradient_status[1] != "ok"
    expected = engine.vjp(alone, upstream).adjoint.z
    torch.testing.assert_close(back.adjoint.z[[0, 2, 3]], expected[[0, 2, 3]], rtol=1e-9, atol=1e-12)


def test_a_warm_start_needs_no_iteration() -> None:
    data = draw(6, 20, 10, 2, 0.05)
    first = solved(data)
    again = solved(data, Guess(active=first.active, z=first.z, y=first.y))
    assert again.code.tolist() == [SOLVED] * 4
    assert again.iterations.tolist() == [0] * 4
    torch.testing.assert_close(again.z, first.z, rtol=1e-10, atol=0)


def test_a_batch_equals_its_problems_alone_whoever_shares_the_rows() -> None:
    data = draw(7, 20, 10, 2, 0.1, batch=16)
    together = solved(data)
    for i in (0, 9, 15):
        alone = solved(data.select(torch.tensor([i])))
        assert torch.equal(alone.z[0], together.z[i])
    own = solved(Data(**{**vars(data), "C": data.C.expand(16, -1, -1).contiguous()}))
    assert torch.equal(own.z, together.z)


def test_the_caller_can_stop_and_limit_them() -> None:
    data = draw(8, 20, 10, 1, 1e-3, batch=16)
    with pytest.raises(Stopped):
        compiled.solve_batch(data, SolverOptions(should_stop=lambda: True), None)
    found = solved(data, max_iterations=2)
    assert int(found.iterations.max()) <= 2
    assert set(found.code.tolist()) == {UNDECIDED}


def test_several_cotangents_share_the_factor() -> None:
    data = draw(9, 20, 10, 2, 0.2)
    found = solved(data)
    random = torch.Generator().manual_seed(0)
    k = found.factor.rows.index.shape[1]
    r1 = torch.randn(4, 20, 3, generator=random, dtype=F64)
    r2 = torch.randn(4, k, 3, generator=random, dtype=F64) * found.factor.rows.valid.unsqueeze(-1)
    x, y, error = found.factor.solve(r1, r2)
    assert float(error.max()) < 1e-12
    C = torch.stack([data.C[0][rows] for rows in found.factor.rows.index]) * found.factor.rows.valid.unsqueeze(-1)
    torch.testing.assert_close(C @ x, r2, rtol=1e-9, atol=1e-12)
    pull = x * (data.tau[0] / found.z).unsqueeze(-1) + C.mT @ y
    torch.testing.assert_close(pull, r1, rtol=1e-8, atol=1e-8)


def test_what_is_too_large_for_one_thread_goes_to_torch() -> None:
    small = draw(10, 4, 2, 1, 1.0, batch=1)
    wide = Data(q=torch.zeros(1, 2000), C=torch.zeros(1, 500, 2000), d=torch.zeros(1, 500), Q=small.Q, p=1)
    assert compiled.takes(small)
    assert not compiled.takes(Data(**{**vars(wide), "is_linear": True, "tau": small.tau}))
    assert not compiled.takes(Data(**{**vars(small), "is_linear": False}))


def test_without_numba_torch_solves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    data = draw(11, 8, 4, 1, 0.3)
    monkeypatch.setattr(entropic, "is_there", lambda _: False)
    found, finished = entropic.solve(data, SolverOptions(), None)
    assert finished is None
    torch.testing.assert_close(solved(data).z, found.z, rtol=1e-10, atol=0)
