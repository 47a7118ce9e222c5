"""`torch.func` over solves: grad, vjp, jvp, vmap and their combinations, each against a loop or another derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

import argrad
from argrad import solve_qp, solve_two_sided_qp
from argrad.client import Client
from argrad.folding import Fold
from tests.client.support import NAMES, D, Recorder, assert_close, draw, infeasible

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

V = 3
TOLERANCE = 1e-9
Mode = Any


@pytest.fixture(params=["adjoint", "full"])
def gradients(request: pytest.FixtureRequest) -> Mode:
    return request.param


def loss_of(client: Client, weights: Tensor, **more: Any) -> Callable[..., Tensor]:
    """A scalar that depends on every block of the solution."""

    def loss(*tensors: Tensor) -> Tensor:
        solution = solve_qp(client, *tensors, **more)
        blocks = torch.cat([block.square() if i == 0 else block for i, block in enumerate(solution)], dim=-1)
        return (blocks * weights).sum()

    return loss


def weights_for(parameters: dict[str, Tensor]) -> Tensor:
    size = parameters["q"].shape[-1] + parameters["b"].shape[-1] + 2 * parameters["h"].shape[-1]
    return torch.linspace(-1.0, 1.0, size, dtype=D)


def looped(function: Callable[..., Any], dims: tuple[int | None, ...], tensors: list[Tensor]) -> list[Tensor]:
    """What vmap promises: a stack of single calls."""
    outs = []
    for i in range(V):
        out = function(*(t if d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True)))
        outs.append(out if isinstance(out, tuple) else (out,))
    return [torch.stack(parts) for parts in zip(*outs, strict=True)]


def copies(parameters: dict[str, Tensor], dims: dict[str, int]) -> tuple[list[Tensor], tuple[int | None, ...]]:
    """V slightly different copies of the parameters named in `dims`, along those dimensions."""
    random = torch.Generator().manual_seed(11)
    tensors = []
    for name, tensor in parameters.items():
        if name in dims:
            noise = 0.05 * torch.randn(V, *tensor.shape, dtype=D, generator=random)
            tensor = (tensor + noise).movedim(0, dims[name])
        tensors.append(tensor)
    return tensors, tuple(dims.get(name) for name in parameters)


MIXES = [
    pytest.param(None, "", {"q": 0}, id="one-of-a-single"),
    pytest.param(None, "", {"Q": 2, "G": 1, "b": 0}, id="matrices-of-a-single"),
    pytest.param(2, "q", {"q": 1}, id="a-batched-one"),
    pytest.param(2, "q", {"G": 0}, id="a-shared-one"),
    pytest.param(2, "Gh", {"Q": 1, "h": 0, "b": 1}, id="batched-and-shared"),
]


@pytest.mark.parametrize(("batch", "batched", "dims"), MIXES)
def test_vmap_of_the_solution(local: Client, batch: int | None, batched: str, dims: dict[str, int]) -> None:
    tensors, in_dims = copies(draw(1, batch=batch, batched=batched), dims)

    def solution(*inner: Tensor) -> tuple[Tensor, ...]:
        return tuple(solve_qp(local, *inner))

    for found, wanted in zip(vmap(solution, in_dims)(*tensors), looped(solution, in_dims, tensors), strict=True):
        assert_close(found, wanted, TOLERANCE)


@pytest.mark.parametrize(("batch", "batched", "dims"), MIXES)
def test_vmap_of_grad(local: Client, batch: int | None, batched: str, dims: dict[str, int], gradients: Mode) -> None:
    """Gradients of every parameter, shared ones too: one a copy."""
    parameters = draw(1, batch=batch, batched=batched)
    tensors, in_dims = copies(parameters, dims)
    loss = loss_of(local, weights_for(parameters), gradients=gradients)
    function = grad(loss, argnums=tuple(range(6)))
    for found, wanted in zip(vmap(function, in_dims)(*tensors), looped(function, in_dims, tensors), strict=True):
        assert_close(found, wanted, TOLERANCE)


@pytest.mark.parametrize(("batch", "batched", "dims"), MIXES)
def test_grad_of_vmap(local: Client, batch: int | None, batched: str, dims: dict[str, int], gradients: Mode) -> None:
    """Gradients through a sum over the copies: summed for what they share."""
    parameters = draw(1, batch=batch, batched=batched)
    tensors, in_dims = copies(parameters, dims)
    loss = loss_of(local, weights_for(parameters), gradients=gradients)
    together = grad(lambda *t: vmap(loss, in_dims)(*t).sum(), argnums=tuple(range(6)))(*tensors)
    one_by_one = grad(lambda *t: sum(looped(loss, in_dims, list(t))[0]), argnums=tuple(range(6)))(*tensors)
    for found, wanted in zip(together, one_by_one, strict=True):
        assert_close(found, wanted, TOLERANCE)


@pytest.mark.parametrize(("batch", "batched"), [(None, ""), (2, "qb")], ids=["single", "batch"])
def test_jacobians_agree(local: Client, batch: int | None, batched: str, gradients: Mode) -> None:
    tensors = tuple(draw(1, batch=batch, batched=batched, n=3, m=2).values())

    def solution(*inner: Tensor) -> Tensor:
        return torch.cat(list(solve_qp(local, *inner, gradients=gradients)), dim=-1)

    every = tuple(range(6))
    reverse, forward = jacrev(solution, every)(*tensors), jacfwd(solution, every)(*tensors)
    for name, one, other in zip(NAMES, reverse, forward, strict=True):
        # Forward mode moves single entries of Q; reverse mode knows its symmetric part: so does the map.
        assert_close(one, other, TOLERANCE), name


def test_jacrev_is_one_call_and_its_cotangents_share_the_state(recorder: Recorder, recorded: Client) -> None:
    parameters = draw(1, batch=2, batched="q")
    jacrev(lambda q: solve_qp(recorded, **(parameters | {"q": q})).z)(parameters["q"])
    assert recorder.names == ["solve", "vjp"]
    _, request, tensors, _ = recorder.exchanges[1]
    assert request.state is not None
    assert tensors["upstream.z"].shape == (8, 2, 4)


def test_vmapped_backward_uses_the_state_of_the_folded_solve(recorder: Recorder, recorded: Client) -> None:
    parameters = draw(1, batch=None)
    tensors, in_dims = copies(parameters, {"q": 0})
    vmap(grad(loss_of(recorded, weights_for(parameters)), argnums=1), in_dims)(*tensors)
    assert recorder.names == ["solve", "vjp"]
    (_, _, solved, _), (_, request, pulled, _) = recorder.exchanges
    assert solved["problem.q"].shape == (V, 4)
    assert solved["problem.Q"].shape == (4, 4)
    assert request.state is not None
    assert pulled["upstream.z"].shape == (V, 4)


def test_k_cotangents_of_k_cotangents(local: Client, gradients: Mode) -> None:
    parameters = draw(1, batch=2, batched="qG")
    _, pull = vjp(lambda *t: solve_qp(local, *t, gradients=gradients).z, *parameters.values())
    cotangents = torch.randn(3, 2, 2, 4, dtype=D, generator=torch.Generator().manual_seed(2))
    found = vmap(vmap(pull), in_dims=1, out_dims=1)(cotangents)
    for i in range(3):
        for j in range(2):
            for part, wanted in zip(found, pull(cotangents[i, j]), strict=True):
                assert_close(part[i, j], wanted, TOLERANCE)


def test_copies_of_problems_with_copies_of_cotangents(local: Client, gradients: Mode) -> None:
    parameters = draw(1, batch=2, batched="q")
    tensors, in_dims = copies(parameters, {"G": 0, "b": 0})

    def jacobian(*inner: Tensor) -> tuple[Tensor, ...]:
        return jacrev(lambda *t: solve_qp(local, *t, gradients=gradients).lam, (0, 1, 3))(*inner)

    for found, wanted in zip(vmap(jacobian, in_dims)(*tensors), looped(jacobian, in_dims, tensors), strict=True):
        assert_close(found, wanted, TOLERANCE)


def test_copies_of_copies(local: Client, gradients: Mode) -> None:
    parameters = draw(1, batch=2, batched="q")
    tensors, _ = copies(parameters, {"G": 0})
    b = parameters["b"] + torch.linspace(0, 0.1, V, dtype=D).unsqueeze(-1)
    loss = loss_of(local, weights_for(parameters), gradients=gradients)
    Q, q, G, h, A, _ = tensors

    def inner(G: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return grad(loss, argnums=tuple(range(6)))(Q, q, G, h, A, b)

    found = vmap(vmap(inner, (0, None)), (None, 0))(G, b)
    for i in range(V):
        for j in range(V):
            for part, wanted in zip(found, inner(G[j], b[i]), strict=True):
                assert_close(part[i, j], wanted, TOLERANCE)


@pytest.mark.parametrize(("batch", "batched", "dims"), MIXES)
@pytest.mark.parametrize("moving", ["q", "Gb"], ids=["one-moves", "two-move"])
def test_vmap_of_jvp(local: Client, batch: int | None, batched: str, dims: dict[str, int], moving: str) -> None:
    """Tangents differ between the copies, whether or not their parameters do."""
    parameters = draw(1, batch=batch, batched=batched)
    tensors, in_dims = copies(parameters, dims)
    random = torch.Generator().manual_seed(4)
    tangents = [torch.randn(V, *parameters[name].shape, dtype=D, generator=random) for name in moving]
    positions = [NAMES.index(name) for name in moving]

    def push(*inner: Tensor) -> tuple[Tensor, ...]:
        primals, directions = list(inner[:6]), inner[6:]

        def of_moving(*values: Tensor) -> tuple[Tensor, ...]:
            for position, value in zip(positions, values, strict=True):
                primals[position] = value
            return tuple(solve_qp(local, *primals))

        return jvp(of_moving, tuple(primals[i] for i in positions), directions)[1]

    every, every_dim = [*tensors, *tangents], (*in_dims, *(0 for _ in tangents))
    for found, wanted in zip(vmap(push, every_dim)(*every), looped(push, every_dim, every), strict=True):
        assert_close(found, wanted, TOLERANCE)


def test_directions_of_one_problem_share_its_state(recorder: Recorder, recorded: Client) -> None:
    parameters = draw(1, batch=2, batched="q")
    jacfwd(lambda b: solve_qp(recorded, **(parameters | {"b": b})).z)(parameters["b"])
    assert recorder.names == ["solve", "jvp"]
    assert all(request.state is not None for name, request, *_ in recorder.exchanges if name == "jvp")


def test_jvp_of_vmap(local: Client) -> None:
    parameters = draw(1, batch=None)
    tensors, in_dims = copies(parameters, {"q": 0})
    Q, q, *rest = tensors
    direction = torch.randn(4, 4, dtype=D, generator=torch.Generator().manual_seed(5))

    def together(Q: Tensor) -> Tensor:
        return vmap(lambda *t: solve_qp(local, *t).z, in_dims)(Q, q, *rest)

    found = jvp(together, (Q,), (direction,))[1]
    for i in range(V):
        wanted = jvp(lambda Q, i=i: solve_qp(local, Q, q[i], *rest).z, (Q,), (direction,))[1]  # type: ignore[misc]
        assert_close(found[i], wanted, TOLERANCE)


def test_vjp_and_jvp_are_transposes(local: Client) -> None:
    tensors = tuple(draw(3, batch=2, batched="qh").values())
    random = torch.Generator().manual_seed(6)
    tangents = tuple(torch.randn(t.shape, dtype=D, generator=random) for t in tensors)

    def solution(*inner: Tensor) -> tuple[Tensor, ...]:
        return tuple(solve_qp(local, *inner))

    out, moved = jvp(solution, tensors, tangents)
    cotangents = tuple(torch.randn(t.shape, dtype=D, generator=random) for t in out)
    pulled = vjp(solution, *tensors)[1](cotangents)
    left = sum((c * m).sum() for c, m in zip(cotangents, moved, strict=True))
    right = sum((p * t).sum() for p, t in zip(pulled, tangents, strict=True))
    assert_close(left, right, 1e-10)  # type: ignore[arg-type]


def test_failures_under_vmap(local: Client, gradients: Mode) -> None:
    parameters = infeasible()

    def loss(q: Tensor, h: Tensor, Q: Tensor) -> Tensor:
        z = solve_qp(local, Q, q, parameters["G"], h, on_failure="zero_grad", gradients=gradients).z
        return z.square().sum()

    found = vmap(grad(loss, argnums=(0, 2)), (0, 0, None))(parameters["q"], parameters["h"], parameters["Q"])
    for part in found:
        assert not part[1].any()
        assert part[[0, 2]].flatten(1).any(-1).all()
    with pytest.raises(argrad.SolveError, match="1: infeasible"):
        vmap(lambda q, h: solve_qp(local, parameters["Q"], q, parameters["G"], h).z)(parameters["q"], parameters["h"])


def test_bounds_under_vmap(local: Client) -> None:
    parameters = draw(2, batch=None, m=2)
    lb = torch.tensor([-0.6, -torch.inf, -0.6, -0.6], dtype=D)
    ub = torch.linspace(0.05, 0.5, 4 * V, dtype=D).reshape(V, 4)

    def loss(lb: Tensor, ub: Tensor) -> Tensor:
        solution = solve_qp(local, **parameters, lb=lb, ub=ub)
        return solution.z.square().sum() + solution.lam.sum()

    function = grad(loss, argnums=(0, 1))
    for found, wanted in zip(vmap(function, (None, 0))(lb, ub), looped(function, (None, 0), [lb, ub]), strict=True):
        assert_close(found, wanted, TOLERANCE)


def test_two_sided_rows_under_vmap(local: Client) -> None:
    drawn = draw(4, batch=None, m=3, p=0)
    l = torch.tensor([-0.1, -0.4, -0.2], dtype=D)
    u = torch.linspace(0.0, 0.5, 3 * V, dtype=D).reshape(V, 3)

    def loss(A: Tensor, l: Tensor, u: Tensor) -> Tensor:
        solution = solve_two_sided_qp(local, drawn["Q"], drawn["q"], A, l, u)
        return solution.x.square().sum() + solution.y.sum()

    function, dims = grad(loss, argnums=(0, 1, 2)), (None, None, 0)
    tensors = [drawn["G"], l, u]
    for found, wanted in zip(vmap(function, dims)(*tensors), looped(function, dims, tensors), strict=True):
        assert_close(found, wanted, TOLERANCE)


@pytest.mark.parametrize("batch", [None, 2])
def test_folds_are_undone(batch: int | None) -> None:
    fold = Fold(size=V, batch=batch)
    lead = () if batch is None else (batch,)
    block = torch.arange(V * 2 * 4.0)[: V * (batch or 1) * 4].reshape(V, *lead, 4)
    assert_close(fold.split(fold.block(block.movedim(0, -1), block.ndim - 1)), block)
    many = torch.stack([block, -block], dim=1)
    assert_close(fold.split(fold.cotangent(many, 0)), many)
