"""The derivative of a small problem comes with its solution: what is saved, and that nothing else changes."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck
from torch.func import jacrev, vmap

import argrad
from argrad import ahead, solve_lp, solve_qp, solve_two_sided_qp
from argrad.client import Client
from tests.client.support import NAMES, D, FakeService, assert_close, draw, infeasible, simplex

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

Exchanges = list[str]


def over_http(*, prefetch: bool = True) -> tuple[Client, Exchanges]:
    """A client of a service in this process, and the names of what it asked."""
    names: Exchanges = []
    client = Client(
        "http://127.0.0.1:9",
        transport=FakeService().transport,
        observer=lambda seen: names.append(seen.name),
        prefetch=prefetch,
    )
    return client, names


def gradients(client: Client, given: dict[str, Tensor], weights: Tensor | None = None) -> dict[str, Tensor]:
    """Of Σ w z², with respect to every parameter."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
    z = solve_qp(client, **leaves).z
    loss = z.square() if weights is None else weights * z.square()
    loss.sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("batch", "batched"), [(None, ""), (5, "QqGhAb"), (5, "qh"), (1, "q")])
def test_one_exchange_gives_the_gradients_of_two(batch: int | None, batched: str, dtype: torch.dtype) -> None:
    given = {name: tensor.to(dtype) for name, tensor in draw(3, batch=batch, batched=batched).items()}
    (client, names), (plain, both) = over_http(), over_http(prefetch=False)
    found, wanted = gradients(client, given), gradients(plain, given)
    assert names == ["solve"]
    assert both == ["solve", "vjp"]
    assert found.keys() == wanted.keys() == given.keys()
    for name, gradient in wanted.items():
        assert_close(found[name], gradient, 1e-12 if dtype == D else 1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batched", ["QqGhAb", "q"])
def test_gradcheck(name: str, batched: str) -> None:
    client, names = over_http()
    parameters = draw(6, batch=2, batched=batched)
    leaf = parameters[name].clone().requires_grad_()
    assert gradcheck(lambda t: solve_qp(client, **(parameters | {name: t})).z, (leaf,), atol=1e-7)
    assert set(names) == {"solve"}


def test_bounds_and_two_sided_rows() -> None:
    client, names = over_http()
    q = torch.tensor([[-3.0, 0.5], [0.25, 4.0]], dtype=D, requires_grad=True)
    ub = torch.ones(2, dtype=D, requires_grad=True)
    z = solve_qp(client, torch.eye(2, dtype=D), q, lb=-torch.ones(2, dtype=D), ub=ub).z
    (z * torch.tensor([1.0, 2.0], dtype=D)).sum().backward()
    assert_close(q.grad, torch.tensor([[0.0, -2.0], [-1.0, 0.0]], dtype=D))
    assert_close(ub.grad, torch.tensor([1.0, 0.0], dtype=D))

    u = torch.tensor([1.0], dtype=D, requires_grad=True)
    x = solve_two_sided_qp(client, torch.eye(2, dtype=D), -torch.ones(2, dtype=D), torch.ones(1, 2, dtype=D), u=u).x
    x.sum().backward()
    assert_close(u.grad, torch.ones(1, dtype=D))
    assert names == ["solve", "solve"]


def test_a_loss_of_multipliers_asks() -> None:
    client, names = over_http()
    b = torch.ones(1, dtype=D, requires_grad=True)
    solution = solve_qp(client, **(simplex() | {"b": b}))
    (nu,) = torch.autograd.grad(solution.nu.sum(), b, retain_graph=True)
    (z,) = torch.autograd.grad(solution.z[0], b)
    local = solve_qp(Client("local"), **(simplex() | {"b": b}))
    assert_close(nu, torch.autograd.grad(local.nu.sum(), b)[0])
    assert_close(z, torch.tensor([0.25], dtype=D))
    assert names == ["solve", "vjp"]


def test_second_derivatives() -> None:
    """The first pass takes what came ahead, the second, whose cotangents are of multipliers too, asks."""
    client, names = over_http()
    A = torch.tensor([[1.0, 1.2]], dtype=D, requires_grad=True)

    def penalty(through: Client) -> Tensor:
        z = solve_qp(through, **(simplex() | {"A": A})).z
        (first,) = torch.autograd.grad(z.square().sum(), A, create_graph=True)
        return torch.autograd.grad(first.square().sum(), A)[0]

    found = penalty(client)
    assert found.abs().max() > 0.01
    assert_close(found, penalty(Client("local")))
    assert names[0] == "solve"
    assert set(names[1:]) == {"vjp"}


def test_transforms() -> None:
    client, names = over_http()
    given = simplex()

    def z(q: Tensor) -> Tensor:
        return solve_qp(client, **(given | {"q": q})).z

    wanted = torch.tensor([[-0.25, 0.25], [0.25, -0.25]], dtype=D)
    assert_close(jacrev(z)(given["q"]), wanted)
    many = torch.stack([given["q"], given["q"] + 0.1, given["q"] - 0.1])
    assert_close(vmap(jacrev(z))(many), wanted.expand(3, 2, 2))
    assert names == ["solve", "solve"]


def test_forward_mode_keeps_its_state() -> None:
    client, names = over_http()
    given = simplex()
    with forward_ad.dual_level():
        q = forward_ad.make_dual(given["q"], torch.tensor([1.0, 0.0], dtype=D))
        moved = forward_ad.unpack_dual(solve_qp(client, **(given | {"q": q})).z).tangent
    assert_close(moved, torch.tensor([-0.25, 0.25], dtype=D))
    assert names == ["solve", "jvp"]


@pytest.mark.parametrize("on_failure", ["nan", "zero_grad"])
def test_failed_problems_are_treated_as_ever(on_failure: argrad.OnFailure) -> None:
    found = []
    for client, _ in (over_http(), over_http(prefetch=False)):
        q = infeasible()["q"].requires_grad_()
        z = solve_qp(client, **(infeasible() | {"q": q}), on_failure=on_failure).z
        z.square().sum().backward()
        found.append((z.detach(), q.grad))
    torch.testing.assert_close(*found, equal_nan=True, rtol=1e-12, atol=1e-12)
    with pytest.raises(argrad.SolveError):
        solve_qp(over_http()[0], **(infeasible() | {"q": q}))


def test_what_has_no_gradient_says_so() -> None:
    client, _ = over_http()
    c = torch.tensor([-1.0, -1.0], dtype=D, requires_grad=True)
    lp = solve_lp(client, c, torch.ones(1, 2, dtype=D), torch.ones(1, dtype=D), lb=torch.zeros(2, dtype=D))
    with pytest.raises(argrad.GradientError):
        lp.z[0].backward()


def test_a_cotangent_that_is_not_finite_is_refused() -> None:
    client, _ = over_http()
    z = solve_qp(client, **(simplex() | {"q": torch.ones(2, dtype=D, requires_grad=True)})).z
    with pytest.raises(argrad.ProblemError, match=r"upstream.z"):
        (z * torch.tensor([1.0, float("inf")], dtype=D)).sum().backward()


@pytest.mark.parametrize(
    ("options", "gradients"),
    [
        (argrad.Options(method="unrolled", solver="admm"), "adjoint"),
        (argrad.Options(precision="float32"), "adjoint"),
        (argrad.Options(), "full"),
    ],
)
def test_other_derivatives_are_asked_for_when_wanted(options: argrad.Options, gradients: str) -> None:
    client, names = over_http()
    q = torch.ones(2, dtype=D, requires_grad=True)
    solve_qp(client, **(simplex() | {"q": q}), options=options, gradients=gradients).z[0].backward()
    assert_close(q.grad, torch.tensor([-0.25, 0.25], dtype=D), 1e-6)
    assert names == ["solve", "vjp"]


def test_large_problems_ask_when_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    for most, wanted in ((ahead.MOST_NUMBERS, ["solve"]), (4 * (4 + 4 + 1 + 3 + 3) * 5 - 1, ["solve", "vjp"])):
        monkeypatch.setattr(ahead, "MOST_NUMBERS", most)
        client, names = over_http()
        gradients(client, draw(3, batch=5))
        assert names == wanted


def test_nothing_comes_ahead_where_nothing_is_differentiated() -> None:
    client, names = over_http()
    with torch.no_grad():
        solve_qp(client, **(simplex() | {"q": torch.ones(2, dtype=D, requires_grad=True)}))
    solve_qp(client, **simplex())
    assert names == ["solve", "solve"]


def test_a_pickled_client_still_knows() -> None:
    assert not pickle.loads(pickle.dumps(Client("http://127.0.0.1:9", prefetch=False))).fetches_ahead
    assert pickle.loads(pickle.dumps(Client("http://127.0.0.1:9"))).fetches_ahead
    assert not Client("local").fetches_ahead
