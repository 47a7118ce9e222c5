"""The short way of small problems beside the long one: the same to the last bit, or not taken."""

from __future__ import annotations

import gc
import weakref
from dataclasses import fields

import pytest
import torch
from torch import Tensor

import argrad
from argrad.problems import QP
from argrad_service import engine
from argrad_service.engine import shortcut
from argrad_service.engine.crossovers import choose
from argrad_service.engine.data import stack
from argrad_service.engine.options import SolverOptions
from argrad_service.engine.outcome import Outcome
from argrad_service.engine.registry import PIVOTING


@pytest.fixture(autouse=True)
def solver() -> None:
    """One solver takes this way: once is enough."""


def draw(batch: int, n: int, m: int, p: int = 0, *, shared: str = "", seed: int = 0) -> QP:
    """Q is not symmetric."""
    generator = torch.Generator().manual_seed(seed)

    def normal(name: str, *shape: int) -> Tensor:
        return torch.randn(*(() if name in shared else (batch,)), *shape, dtype=torch.float64, generator=generator)

    L, skew, G, A, inside = normal("Q", n, n), normal("Q", n, n), normal("G", m, n), normal("A", p, n), normal("z", n)
    Q = L @ L.mT + 0.1 * torch.eye(n, dtype=torch.float64) + skew - skew.mT
    h = (G @ inside.unsqueeze(-1)).squeeze(-1) + torch.rand(batch, m, dtype=torch.float64, generator=generator)
    equalities = {"A": A, "b": (A @ inside.unsqueeze(-1)).squeeze(-1)} if p else {}
    return QP(Q=Q, q=2 * normal("q", n), **({"G": G, "h": h} if m else {}), **equalities)


def the_long_way(problem: QP, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    with monkeypatch.context() as patched:
        patched.setattr(shortcut, "NAMES", ())
        return engine.solve(problem)


@pytest.mark.parametrize(
    ("n", "m", "p"), [(1, 1, 0), (2, 3, 0), (3, 0, 1), (4, 0, 0), (5, 10, 2), (10, 10, 0), (12, 48, 0)]
)
@pytest.mark.parametrize("shared", ["", "Q", "QGA"], ids=["batched", "shared Q", "shared matrices"])
@pytest.mark.parametrize("batch", [1, 37])
def test_it_leads_to_the_same_outcome(
    n: int, m: int, p: int, shared: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = draw(batch, n, m, p, shared=shared, seed=n + m + p)
    short, long = shortcut.solve(problem, SolverOptions()), the_long_way(problem, monkeypatch)
    assert short is not None
    for field in fields(short):
        one, other = getattr(short, field.name), getattr(long, field.name)
        if isinstance(one, Tensor):
            assert torch.equal(one, other), field.name
        elif field.name in ("status", "flags", "solver"):
            assert one == other, field.name
    for name, block in short.solution.blocks().items():
        assert torch.equal(block, long.solution.blocks()[name]), name
    upstream = {"z": torch.ones(batch, n, dtype=torch.float64)}
    for one, other in zip(
        engine.vjp(short, upstream).adjoint.blocks().values(),
        engine.vjp(long, upstream).adjoint.blocks().values(),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_a_problem_has_the_same_result_in_any_company() -> None:
    problem = draw(21, 5, 10)
    whole = shortcut.solve(problem, SolverOptions())
    assert whole is not None
    for start, stop in [(0, 2), (3, 12), (13, 21)]:
        part = QP(**{name: tensor[start:stop] for name, tensor in problem.parameters().items()})
        some = shortcut.solve(part, SolverOptions())
        assert some is not None
        for name, block in some.solution.blocks().items():
            assert torch.equal(block, whole.solution.blocks()[name][start:stop]), name


@pytest.mark.parametrize(
    "change",
    [
        {"h": float("inf")},
        {"q": float("nan")},
        {"Q": float("nan")},
        {"G": float("-inf")},
        {"Q": -1e3},
    ],
    ids=["a row that does not bind", "NaN", "NaN in a matrix", "infinite", "not convex"],
)
def test_where_a_problem_needs_more_the_long_way_is_taken(change: dict[str, float]) -> None:
    parameters = {name: tensor.clone() for name, tensor in draw(9, 4, 3).parameters().items()}
    for name, value in change.items():
        parameters[name][4].fill_(value) if name != "Q" else parameters[name][4].diagonal().fill_(value)
    assert shortcut.solve(QP(**parameters), SolverOptions()) is None


def test_what_is_large_or_float32_or_has_an_entropy_does_not_take_it() -> None:
    small = draw(3, 4, 3).parameters()
    assert shortcut.solve(draw(2, 13, 3), SolverOptions()) is None
    assert shortcut.solve(draw(2, 4, 49), SolverOptions()) is None
    assert shortcut.solve(QP(**{name: tensor.float() for name, tensor in small.items()}), SolverOptions()) is None
    assert shortcut.solve(QP(**small, entropy=torch.tensor(1.0, dtype=torch.float64)), SolverOptions()) is None
    assert (
        shortcut.solve(QP(**{name: tensor for name, tensor in small.items() if name != "Q"}), SolverOptions()) is None
    )


@pytest.mark.parametrize("n", [1, 5, 12])
@pytest.mark.parametrize("m", [0, 1, 12, 48])
@pytest.mark.parametrize("p", [0, 1])
def test_auto_takes_the_solver_whose_way_this_is(n: int, m: int, p: int) -> None:
    if p < n or m == 0:
        assert choose(stack(draw(2, n, m, p)), lambda _: True) == PIVOTING


@pytest.mark.parametrize(("n", "m", "p"), [(5, 10, 0), (6, 4, 2), (3, 0, 0), (10, 10, 0)])
def test_gradients_at_once_are_those_of_the_adjoint(n: int, m: int, p: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = argrad.nn.QPLayer("local")
    problem = draw(50, n, m, p, seed=1)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in problem.parameters().items()}
    weights = torch.randn(50, n, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    taken: list[object] = []

    def gradients() -> list[Tensor]:
        z = layer(*(leaves.get(name) for name in ("Q", "q", "G", "h", "A", "b")))
        return list(torch.autograd.grad((z * weights).sum(), list(leaves.values())))

    from argrad_service.engine.backward import kkt

    at_once = kkt.gradients

    def noted(*arguments: object) -> object:
        taken.append(at_once(*arguments))  # type: ignore[arg-type]
        return taken[-1]

    monkeypatch.setattr(kkt, "gradients", noted)
    quick = gradients()
    assert taken[0] is not None
    monkeypatch.setattr(kkt, "gradients", lambda *_: None)
    for name, one, other in zip(leaves, quick, gradients(), strict=True):
        assert torch.equal(one, other), name


def test_a_cotangent_that_is_not_finite_is_refused_all_the_same() -> None:
    layer = argrad.nn.QPLayer("local")
    problem = draw(4, 3, 2)
    leaves = [problem.parameters()[name].clone().requires_grad_() for name in ("Q", "q", "G", "h")]
    weights = torch.ones(4, 3, dtype=torch.float64)
    weights[2, 1] = float("nan")
    with pytest.raises(argrad.ProblemError, match=r"upstream\.z"):
        torch.autograd.grad((layer(*leaves) * weights).sum(), leaves)


def test_a_solution_changed_in_place_is_not_differentiated() -> None:
    layer = argrad.nn.QPLayer("local")
    problem = draw(4, 3, 2)
    leaves = [problem.parameters()[name].clone().requires_grad_() for name in ("Q", "q", "G", "h")]
    z = layer(*leaves)
    loss = (z * 2).sum()
    with torch.no_grad():
        z.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_solve_is_freed_with_its_solution() -> None:
    """Not by the collector of cycles, which lets many steps' memory pile up."""
    layer = argrad.nn.QPLayer("local")
    leaves = [draw(4, 3, 2).parameters()[name].clone().requires_grad_() for name in ("Q", "q", "G", "h")]
    gc.disable()
    try:
        z = layer(*leaves)
        assert z.grad_fn is not None
        function = weakref.ref(z.grad_fn)
        assert function() is not None
        del z
        assert function() is None
    finally:
        gc.enable()
