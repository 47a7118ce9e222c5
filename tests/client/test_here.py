"""Solves in this process, which take no messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import argrad
from argrad.observation import Observation
from argrad_service.local import LocalBackend

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

NAMES = ("solve", "vjp", "jvp")


@pytest.fixture
def exchanged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Messages to the engine in this process."""
    calls: list[str] = []
    for name in NAMES:
        inner = getattr(LocalBackend, name)

        def spied(self: LocalBackend, *arguments: Any, name: str = name, inner: Any = inner) -> Any:
            calls.append(name)
            return inner(self, *arguments)

        monkeypatch.setattr(LocalBackend, name, spied)
    return calls


def problem(batch: int = 3, n: int = 4, m: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    L, G = (torch.randn(batch, rows, n, dtype=torch.float64, generator=generator) for rows in (n, m))
    q = torch.randn(batch, n, dtype=torch.float64, generator=generator)
    given = (L @ L.mT + torch.eye(n, dtype=torch.float64), q, G, torch.ones(batch, m, dtype=torch.float64))
    return [tensor.requires_grad_() for tensor in given]


def test_a_step_takes_no_message_and_gives_what_messages_give(exchanged: list[str]) -> None:
    given, seen = problem(), []
    weights = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
    found = []
    for observer in (None, seen.append):
        client = argrad.Client("local", observer=observer)
        solution = argrad.solve_qp(client, *given)
        loss = (solution.z * weights).sum() + solution.lam.square().sum() + solution.s.sum()
        found.append((*solution, *torch.autograd.grad(loss, given)))
        assert bool(exchanged) == (observer is not None)
    assert [type(each) for each in seen] == [Observation, Observation]
    for direct, by_messages in zip(*found, strict=True):
        assert torch.equal(direct, by_messages)


def test_tangents_and_second_derivatives_take_no_message_either(exchanged: list[str]) -> None:
    client, given = argrad.Client("local"), [tensor.detach() for tensor in problem(batch=2, n=3, m=2)]

    def z(q: Tensor) -> Tensor:
        return argrad.solve_qp(client, given[0], q, *given[2:]).z

    _, tangent = torch.func.jvp(z, (given[1],), (torch.ones_like(given[1]),))
    step = 1e-6
    differences = (z(given[1] + step) - z(given[1] - step)) / (2 * step)
    torch.testing.assert_close(tangent, differences, rtol=1e-6, atol=1e-8)
    assert torch.autograd.gradgradcheck(z, given[1].requires_grad_())
    assert exchanged == []


@pytest.mark.parametrize(
    "options",
    [{"precision": "float32"}, {"gradients": "full"}, {"warm_start": True}],
    ids=lambda each: next(iter(each)),
)
def test_what_is_about_messages_takes_them(options: dict[str, Any], exchanged: list[str]) -> None:
    layer = argrad.nn.QPLayer("local", **options)
    layer(*problem()).sum().backward()
    assert exchanged == ["solve", "vjp"]


def test_registered_parameters_keep_their_factors_under_their_digest(exchanged: list[str]) -> None:
    client, (Q, q, G, h) = argrad.Client("local"), [tensor.detach() for tensor in problem(batch=1)]
    registered = client.register(Q=Q[0], G=G[0])
    argrad.solve_qp(client, q=q, h=h, **registered)
    assert exchanged == ["solve"]


@pytest.mark.parametrize("name", ["Q", "q", "G", "h"])
@pytest.mark.parametrize("n", [4, 16])
def test_a_value_that_is_not_finite_is_named(name: str, n: int) -> None:
    given = dict(zip(("Q", "q", "G", "h"), [tensor.detach() for tensor in problem(n=n)], strict=True))
    at = (1,) * given[name].ndim
    given[name][at] = float("nan")
    with pytest.raises(argrad.ProblemError, match=rf"problem\.{name}: found nan at \[1, 1(, 1)?\]"):
        argrad.solve_qp(argrad.Client("local"), **given)


def test_a_step_holds_nothing_once_its_graph_is_gone() -> None:
    """There is no store, and no token, for what the graph holds itself."""
    backend = argrad.Client("local")._backend
    layer = argrad.nn.QPLayer(argrad.Client(backend))
    assert isinstance(backend, LocalBackend)
    client = argrad.Client("local")
    argrad.solve_qp(client, *problem()).z.sum().backward()
    store: Any = client._backend
    assert store._store.counts().entries == 0
    layer(*problem()).sum().backward()  # a backend that is handed over is spoken to in messages
    assert backend._store.counts().entries == 1


def test_the_deadline_and_failures_are_those_of_any_client() -> None:
    Q, q, G, h = problem()
    with pytest.raises(argrad.DeadlineExceededError, match="1e-09 s"):
        argrad.solve_qp(argrad.Client("local"), Q, q, G, h, timeout_s=1e-9)
    rows = torch.stack([G.detach()[:, 0], -G.detach()[:, 0]], dim=1)
    bounds = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    with pytest.raises(argrad.SolveError, match=r"1 of 3 problems have no solution \(0: infeasible"):
        argrad.solve_qp(argrad.Client("local"), Q, q, rows, bounds)
    z = argrad.solve_qp(argrad.Client("local"), Q, q, rows, bounds, on_failure="nan").z
    assert torch.isnan(z[0]).all()
    z[1:].sum().backward()
    assert Q.grad is not None
    assert torch.isnan(Q.grad[0]).all()
    assert torch.isfinite(Q.grad[1:]).all()
