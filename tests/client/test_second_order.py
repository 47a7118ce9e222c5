"""Derivatives of derivatives: every pair of modes, in this process and through HTTP, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import argrad
from argrad import solve_qp, solve_two_sided_qp
from argrad.client import Client
from argrad.nn import QPLayer
from tests.client.support import NAMES, D, Recorder, assert_close, draw, infeasible, simplex

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

EVERY = tuple(range(6))
REFUSED = "a second derivative was asked for: argrad has only first derivatives of"
CASES = [
    pytest.param(None, "", id="single"),
    pytest.param(3, "QqGhAb", id="all-batched"),
    pytest.param(3, "q", id="one-batched"),
    pytest.param(2, "Ghb", id="mixed"),
]
MODES = [
    pytest.param(lambda f: jacrev(jacrev(f, EVERY), EVERY), id="reverse-over-reverse"),
    pytest.param(lambda f: hessian(f, EVERY), id="forward-over-reverse"),
    pytest.param(lambda f: jacrev(jacfwd(f, EVERY), EVERY), id="reverse-over-forward"),
    pytest.param(lambda f: jacfwd(jacfwd(f, EVERY), EVERY), id="forward-over-forward"),
]


@pytest.fixture(scope="module", params=["local", pytest.param("http", marks=pytest.mark.slow)])
def client(request: pytest.FixtureRequest, local: Client) -> Iterator[Client]:
    if request.param == "local":
        yield local
    else:
        with Client(request.getfixturevalue("service_url")) as remote:
            yield remote


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.clone().requires_grad_() for tensor in tensors)


def loss_of(client: Client, **more: Any) -> Callable[..., Tensor]:
    """A scalar whose gradient depends on every block of the solution."""

    def loss(*tensors: Tensor) -> Tensor:
        blocks = solve_qp(client, *tensors, **more)
        return sum(((i + 1) * block**3 + block).sum() for i, block in enumerate(blocks))  # type: ignore[return-value]

    return loss


@pytest.mark.parametrize("gradients", ["adjoint", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("batch", "batched"), CASES)
def test_every_block_and_parameter(client: Client, batch: int | None, batched: str, gradients: Any) -> None:
    given = leaves(*draw(1, batch=batch, batched=batched, n=3, m=2).values())
    # One random direction in place of each entry, where the path is the same and each entry a round trip.
    fast = gradients == "full" or client._settings[0] != "local"

    def solution(*tensors: Tensor) -> tuple[Tensor, ...]:
        return solve_qp(client, *tensors, gradients=gradients)

    assert gradgradcheck(solution, given, atol=1e-6, check_fwd_over_rev=True, fast_mode=fast)


@pytest.mark.parametrize("name", NAMES)
def test_one_parameter_through_http(service_url: str, name: str) -> None:
    """Entry by entry."""
    parameters = draw(1, batch=2, batched="qh", n=3, m=2)
    with Client(service_url) as remote:
        (leaf,) = leaves(parameters[name])
        assert gradgradcheck(lambda t: solve_qp(remote, **(parameters | {name: t})), (leaf,), atol=1e-6)


@pytest.mark.parametrize("rows", ["G", "A", ""])
def test_absent_rows(local: Client, rows: str) -> None:
    parameters = draw(2, batch=2, m=3 if rows == "G" else 0, p=1 if rows == "A" else 0)

    def solution(*tensors: Tensor) -> list[Tensor]:
        return [block for block in solve_qp(local, **dict(zip(parameters, tensors, strict=True))) if block.numel()]

    assert gradgradcheck(solution, leaves(*parameters.values()), atol=1e-6, check_fwd_over_rev=True)


def test_bounds(local: Client) -> None:
    drawn = draw(3, batch=2, batched="Qq", m=2)
    lb = torch.full((4,), -0.6, dtype=D)
    ub = torch.linspace(0.0, 0.4, 8, dtype=D).reshape(2, 4)

    def solution(*tensors: Tensor) -> tuple[Tensor, ...]:
        *rest, lb, ub = tensors
        return solve_qp(local, *rest, lb=lb, ub=ub)

    assert gradgradcheck(solution, leaves(*drawn.values(), lb, ub), atol=1e-6, check_fwd_over_rev=True)


def test_two_sided_rows(local: Client) -> None:
    """One row at its lower bound, one at its upper, one at none."""
    drawn = draw(4, batch=2, batched="Qq", m=3, p=0)
    l, u = torch.tensor([-0.1, -0.4, -0.2], dtype=D), torch.tensor([0.1, 0.2, 0.5], dtype=D)
    given = leaves(drawn["Q"], drawn["q"], drawn["G"], l, u)
    y = solve_two_sided_qp(local, *given).y
    assert (y > 0).any()
    assert (y < 0).any()
    assert gradgradcheck(lambda *t: solve_two_sided_qp(local, *t), given, atol=1e-6, check_fwd_over_rev=True)


def test_linear_programs(local: Client) -> None:
    """A vertex: z does not feel the objective, but is curved in the rows."""
    G = -torch.eye(3, dtype=D) + 0.1 * torch.randn(3, 3, dtype=D, generator=torch.Generator().manual_seed(0))
    c, h = torch.arange(1.0, 4.0, dtype=D), torch.zeros(3, dtype=D)
    given = leaves(c, G, h, torch.ones(1, 3, dtype=D), torch.ones(1, dtype=D))
    assert gradcheck(lambda *t: solve_qp(local, None, *t), given, atol=1e-6)
    assert gradgradcheck(lambda *t: solve_qp(local, None, *t), given, atol=1e-6, check_fwd_over_rev=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("batch", "batched"), [(None, ""), (2, "qb")], ids=["single", "batch"])
def test_modes_agree(client: Client, mode: Callable[..., Any], batch: int | None, batched: str) -> None:
    tensors = tuple(draw(1, batch=batch, batched=batched, n=3, m=2).values())
    found = mode(loss_of(client))(*tensors)
    given = leaves(*tensors)
    firsts = torch.autograd.grad(loss_of(client)(*given), given, create_graph=True)
    for first, row in zip(firsts, found, strict=True):
        weights = torch.randn(first.shape, dtype=D, generator=torch.Generator().manual_seed(3))
        wanted = torch.autograd.grad(first, given, weights, retain_graph=True)
        for block, part in zip(row, wanted, strict=True):
            assert_close(torch.tensordot(weights, block, dims=weights.ndim), part, 1e-8)


def test_reverse_over_forward_of_autograd(local: Client) -> None:
    tensors = draw(1, batch=2, batched="qb", n=3, m=2).values()
    given, loss = leaves(*tensors), loss_of(local)
    random = torch.Generator().manual_seed(4)
    directions = [torch.randn(t.shape, dtype=D, generator=random) for t in given]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, v) for t, v in zip(given, directions, strict=True)]
        tangent = forward_ad.unpack_dual(loss(*duals)).tangent
        found = torch.autograd.grad(tangent, given)
    firsts = torch.autograd.grad(loss(*given), given, create_graph=True)
    wanted = torch.autograd.grad(firsts, given, directions)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, 1e-9)


def test_against_second_differences_of_the_loss(local: Client) -> None:
    """No first gradient of ours in the reference."""
    parameters = draw(5, batch=2, batched="qh", n=3, m=2)
    random, loss, eps = torch.Generator().manual_seed(5), loss_of(local), 1e-3
    directions = [torch.randn(t.shape, dtype=D, generator=random) for t in parameters.values()]
    directions[0] = directions[0] + directions[0].mT

    def along(step: float) -> Tensor:
        return loss(*(t + step * v for t, v in zip(parameters.values(), directions, strict=True)))

    # Fourth order: what is left of the difference quotient is of the order of eps⁴.
    wanted = (-along(2 * eps) + 16 * along(eps) - 30 * along(0) + 16 * along(-eps) - along(-2 * eps)) / (12 * eps**2)
    given = leaves(*parameters.values())
    firsts = torch.autograd.grad(loss(*given), given, create_graph=True)
    seconds = torch.autograd.grad(firsts, given, directions)
    found = sum((part * v).sum() for part, v in zip(seconds, directions, strict=True))
    assert_close(found, wanted, 1e-6)  # type: ignore[arg-type]


def test_third_derivatives(local: Client) -> None:
    given = leaves(*draw(1, batch=2, batched="qb", n=3, m=2).values())
    loss = loss_of(local)
    assert gradgradcheck(
        lambda *t: torch.autograd.grad(loss(*t), t, create_graph=True), given, atol=1e-5, fast_mode=True
    )


def test_vmap_of_hessians(local: Client) -> None:
    Q, q, G, h, A, b = draw(1, batch=None, n=3, m=2).values()
    qs = q + 0.05 * torch.randn(3, 3, dtype=D, generator=torch.Generator().manual_seed(6))
    loss = loss_of(local)

    def of_q(q: Tensor) -> Tensor:
        return jacrev(jacrev(lambda Q, q: loss(Q, q, G, h, A, b)), argnums=1)(Q, q)  # type: ignore[no-any-return]

    assert_close(vmap(of_q)(qs), torch.stack([of_q(each) for each in qs]), 1e-9)


def test_a_penalty_on_the_gradient_trains_through_the_layer(client: Client) -> None:
    """What a user of double backward does: the norm of an input's gradient in the loss."""
    parameters = simplex()
    (h,) = leaves(parameters.pop("h"))
    layer = QPLayer(client)
    A = torch.tensor([[1.0, 1.2]], dtype=D, requires_grad=True)
    z = layer(**(parameters | {"A": A}), h=h)
    (first,) = torch.autograd.grad(z.square().sum(), A, create_graph=True)
    first.square().sum().backward()
    eps, norms = 1e-5, []
    for step in (eps, -eps):
        (moved,) = leaves(A.detach() + torch.tensor([[step, 0.0]], dtype=D))
        z = layer(**(parameters | {"A": moved}), h=h.detach())
        norms.append(torch.autograd.grad(z.square().sum(), moved)[0].square().sum())
    assert A.grad is not None
    assert abs(A.grad[0, 0].item()) > 0.01
    assert A.grad[0, 0].item() == pytest.approx((norms[0] - norms[1]).item() / (2 * eps), rel=1e-6)


def test_each_derivative_is_one_call_by_the_same_state(recorder: Recorder, recorded: Client) -> None:
    given = leaves(*draw(1, batch=2, batched="q").values())
    loss = solve_qp(recorded, *given).z.square().sum()
    firsts = torch.autograd.grad(loss, given, create_graph=True)
    assert recorder.names == ["solve", "vjp"]
    kept = torch.autograd.grad([first.sum() for first in firsts], given, retain_graph=True)
    # One adjoint of the adjoint's cotangents, one of those that reach the solution.
    assert recorder.names == ["solve", "vjp", "vjp", "vjp"]
    states = {request.state for name, request, *_ in recorder.exchanges if name == "vjp"}
    assert len(states) == 1
    assert None not in states
    recorder.forget_states()
    lost = torch.autograd.grad([first.sum() for first in firsts], given)
    for one, other in zip(kept, lost, strict=True):
        assert_close(other, one, 1e-10)


def test_create_graph_with_nothing_behind_it(local: Client) -> None:
    (q,) = leaves(simplex()["q"])
    (first,) = torch.autograd.grad(solve_qp(local, **(simplex() | {"q": q})).z[0], q, create_graph=True)
    assert first.tolist() == pytest.approx([-0.25, 0.25])


def test_the_solve_as_a_constant(local: Client) -> None:
    """Only its surroundings are differentiated twice."""
    z = solve_qp(local, **simplex()).z
    assert_close(hessian(lambda x: (x**3 * z).sum())(torch.ones(2, dtype=D)), torch.diag(6 * z))


class TestFailures:
    """Problem 1 of three is infeasible."""

    @pytest.mark.parametrize("gradients", ["adjoint", "full"])
    def test_zero_grad_leaves_it_out(self, local: Client, gradients: Any) -> None:
        def penalty(given: tuple[Tensor, ...], **more: Any) -> Tensor:
            loss = solve_qp(local, *given, gradients=gradients, **more).z.square().sum()
            firsts = torch.autograd.grad(loss, given, create_graph=True)
            return sum(first.square().sum() for first in firsts)  # type: ignore[return-value]

        whole = infeasible()
        given = leaves(*whole.values())
        penalty(given, on_failure="zero_grad").backward()
        good = leaves(*(t[[0, 2]] if name in "qh" else t for name, t in whole.items()))
        penalty(good).backward()
        for name, one, other in zip(whole, given, good, strict=True):
            assert one.grad is not None
            if name in "qh":
                assert not one.grad[1].any()
            assert_close(one.grad[[0, 2]] if name in "qh" else one.grad, other.grad)  # type: ignore[arg-type]

    def test_nan_marks_it(self, local: Client) -> None:
        whole = infeasible()
        q, h = leaves(whole["q"], whole["h"])
        loss = (solve_qp(local, **(whole | {"q": q, "h": h}), on_failure="nan").z ** 3).sum()
        firsts = torch.autograd.grad(loss, (q, h), create_graph=True)
        sum(first.square().sum() for first in firsts).backward()  # type: ignore[union-attr]
        assert q.grad is not None
        assert q.grad.isnan().all(-1).tolist() == [False, True, False]

    def test_multipliers_that_are_not_unique(self, local: Client) -> None:
        """Two equal rows hold z₀: its first gradient exists, what the multipliers do does not."""
        G = torch.tensor([[-1.0, 0.0], [-1.0, 0.0]], dtype=D)
        Q, q, G, h = leaves(torch.eye(2, dtype=D), torch.tensor([1.0, 1.0], dtype=D), G, torch.zeros(2, dtype=D))
        loss = solve_qp(local, Q, q, G, h).z.square().sum()
        Q_grad, G_grad = torch.autograd.grad(loss, (Q, G), create_graph=True)
        torch.autograd.grad(Q_grad.sum(), Q, retain_graph=True)
        with pytest.raises(argrad.GradientError, match="dependent"):
            torch.autograd.grad(G_grad.square().sum(), G)


class Renaming(Recorder):
    """Says that another method formed the derivatives."""

    def _pass(self, name: str, *call: Any) -> Any:
        reply, out = super()._pass(name, *call)
        report = reply.report.model_copy(update={"method": "smoothed"})
        return (reply if name == "solve" else reply.model_copy(update={"report": report})), out


@pytest.mark.parametrize("gradients", ["adjoint", "full"])
@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(hessian, id="hessian"),
        pytest.param(lambda f: jacrev(jacrev(f)), id="reverse-over-reverse"),
        pytest.param(lambda f: jacrev(jacfwd(f)), id="reverse-over-forward"),
        pytest.param(lambda f: jacfwd(jacfwd(f)), id="forward-over-forward"),
        pytest.param(lambda f: grad(lambda x: grad(f)(x).sum()), id="grad-of-grad"),
    ],
)
def test_methods_that_are_not_exact_have_none(transform: Callable[..., Any], gradients: Any) -> None:
    client, parameters = Client(Renaming()), simplex()

    def loss(b: Tensor) -> Tensor:
        return solve_qp(client, **(parameters | {"b": b}), gradients=gradients).z.square().sum()

    with pytest.raises(argrad.GradientError, match=f"{REFUSED} the method 'smoothed'"):
        transform(loss)(parameters["b"])


def test_first_derivatives_by_other_methods_are_fine() -> None:
    (b,) = leaves(simplex()["b"])
    z = solve_qp(Client(Renaming()), **(simplex() | {"b": b})).z
    (first,) = torch.autograd.grad(z[0], b, create_graph=True)
    assert first.item() == pytest.approx(0.25)
    with pytest.raises(argrad.GradientError, match=REFUSED):
        first.backward()


def test_by_plain_calls(client: Client) -> None:
    """Two more cotangents at the same point and outer products, as docs/api.md has it for callers without autograd."""
    parameters = draw(1, batch=2, n=3, m=2)
    random = torch.Generator().manual_seed(7)
    result = client.solve(argrad.QP(**parameters))
    upstream = {"z": torch.randn(2, 3, dtype=D, generator=random)}
    first = client.vjp(result, upstream, gradients="adjoint").adjoint
    assert first is not None
    H = {name: torch.randn(t.shape, dtype=D, generator=random) for name, t in parameters.items()}
    H["Q"] = H["Q"] + H["Q"].mT

    def times(matrix: Tensor, vector: Tensor) -> Tensor:
        return (matrix @ vector.unsqueeze(-1)).squeeze(-1)

    z, nu, lam, _ = result.solution.values()
    d_z, d_nu, mu = first["z"], first["nu"], first["mu"]
    along_gradients = {
        "z": times(H["Q"], z) + H["q"] + times(H["A"].mT, nu) + times(H["G"].mT, lam),
        "nu": times(H["A"], z) - H["b"],
        "lam": times(H["G"], z) - H["h"],
    }
    along_point = {
        "z": times(H["Q"], d_z) + times(H["A"].mT, d_nu) + times(H["G"].mT, mu),
        "nu": times(H["A"], d_z),
        "lam": times(H["G"], d_z),
    }
    both = {name: torch.stack([block, along_point[name]]) for name, block in along_gradients.items()}
    second = client.vjp(result, both, gradients="adjoint").adjoint
    assert second is not None
    (w_z, e_z), (w_nu, e_nu), (w_mu, e_mu) = (second[name] for name in ("z", "nu", "mu"))

    def outer(left: Tensor, right: Tensor) -> Tensor:
        return left.unsqueeze(-1) * right.unsqueeze(-2)

    half = outer(w_z, d_z) + outer(e_z, z)
    found = {
        "Q": 0.5 * (half + half.mT),
        "q": e_z,
        "G": outer(w_mu, d_z) + outer(mu, w_z) + outer(e_mu, z) + outer(lam, e_z),
        "h": -e_mu,
        "A": outer(w_nu, d_z) + outer(d_nu, w_z) + outer(e_nu, z) + outer(nu, e_z),
        "b": -e_nu,
    }
    given = leaves(*parameters.values())
    (cotangent,) = leaves(upstream["z"])
    firsts = torch.autograd.grad(solve_qp(client, *given).z, given, cotangent, create_graph=True)
    *wanted, of_upstream = torch.autograd.grad(firsts, (*given, cotangent), [H[name] for name in NAMES])
    assert_close(w_z, of_upstream, 1e-9)
    for name, part in zip(NAMES, wanted, strict=True):
        assert_close(found[name], part, 1e-9)


@pytest.mark.parametrize(("solver", "method"), [("auto", "bpqp"), ("admm", "kkt"), ("osqp", "auto")])
def test_exact_methods_and_other_solvers(local: Client, solver: str, method: str) -> None:
    given = leaves(*draw(1, batch=2, batched="qh", n=3, m=2).values())
    options = argrad.Options(solver=solver, method=method)
    assert gradgradcheck(lambda *t: solve_qp(local, *t, options=options), given, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize(("solver", "method"), [("admm", "altdiff"), ("admm", "folded"), ("admm", "unrolled")])
def test_methods_that_approximate_are_refused(local: Client, solver: str, method: str) -> None:
    given = leaves(*draw(1, batch=2, batched="qh", n=3, m=2).values())
    loss = solve_qp(local, *given, options=argrad.Options(solver=solver, method=method)).z.square().sum()
    firsts = torch.autograd.grad(loss, given, create_graph=True)
    with pytest.raises(argrad.GradientError, match=f"{REFUSED} the method '{method}'"):
        torch.autograd.grad(firsts[0].sum(), given)
