"""Linear programs and problems with entropy: layers, autograd, transforms, and both wire forms through a service."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import httpx
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import argrad
from argrad import QP, solve_lp, solve_qp
from argrad.client import Client
from argrad.nn import LPLayer, Softmax
from tests.client.support import D, assert_close

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def remote(service_url: str) -> Iterator[Client]:
    with Client(service_url) as client:
        yield client


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def vertex() -> dict[str, Tensor]:
    """Two LPs with shared rows in three variables, one of them an equality, each at a vertex of its own."""
    G, A = normal(1, 5, 3), normal(2, 1, 3)
    lam = torch.tensor([[1.0, 2, 0, 0, 0], [0, 0, 0.5, 1.5, 0]], dtype=D)
    z = normal(3, 2, 3)
    s = torch.where(lam > 0, 0.0, 1.0)
    return {"c": -lam @ G, "G": G, "h": z @ G.mT + s, "A": A, "b": z @ A.mT}


class TestLinear:
    @pytest.mark.parametrize("where", ["local", "remote"])
    def test_gradcheck(self, where: str, request: pytest.FixtureRequest) -> None:
        client: Client = request.getfixturevalue(where)
        inputs = tuple(t.clone().requires_grad_() for t in vertex().values())
        assert gradcheck(lambda *t: solve_lp(client, *t), inputs, check_forward_ad=True, fast_mode=True, atol=1e-7)

    def test_the_gradient_of_the_costs_is_zero_exactly(self, local: Client) -> None:
        given = {name: t.clone().requires_grad_() for name, t in vertex().items()}
        z = LPLayer(local)(given["c"], given["G"], given["h"], given["A"], given["b"])
        z.sum().backward()
        assert bool((given["c"].grad == 0).all())  # type: ignore[union-attr]
        assert all(bool((given[name].grad != 0).any()) for name in "GhAb")  # type: ignore[union-attr]

    def test_bounds_and_duals(self, local: Client) -> None:
        c = torch.tensor([1.0, -2.0], dtype=D)
        one = torch.ones(2, dtype=D, requires_grad=True)
        solution = LPLayer(local, return_duals=True)(c, lb=-one, ub=one)
        assert_close(solution.z, torch.tensor([-1.0, 1.0], dtype=D))
        assert_close(solution.lam_lb, torch.tensor([1.0, 0.0], dtype=D))
        assert_close(solution.lam_ub, torch.tensor([0.0, 2.0], dtype=D))
        (gradient,) = torch.autograd.grad(solution.z.sum(), one)
        assert_close(gradient, torch.tensor([-1.0, 1.0], dtype=D))

    def test_vmap(self, local: Client) -> None:
        c, rows = vertex()["c"], torch.eye(3, dtype=D)
        one = torch.ones(3, dtype=D)
        stacked = torch.func.vmap(lambda t: solve_lp(local, t, torch.cat([rows, -rows]), one.repeat(2)).z)(c)
        assert_close(stacked, -c.sign())

    def test_without_a_unique_solution_the_backward_says_so(self, local: Client) -> None:
        one = torch.ones(2, dtype=D, requires_grad=True)
        z = solve_lp(local, torch.tensor([0.0, 1.0], dtype=D), lb=-one, ub=one).z
        assert float(z[1].detach()) == -1.0
        with pytest.raises(argrad.GradientError, match="nonunique"):
            z.sum().backward()

    def test_a_client_solves_it_as_a_problem(self, remote: Client) -> None:
        given = vertex()
        problem = QP(q=given["c"], **{name: given[name] for name in "GhAb"})
        result = remote.solve(problem, upstream={"z": torch.ones(2, 3, dtype=D)})
        assert set(result.gradients or {}) == {"q", "G", "h", "A", "b"}
        assert bool(((result.gradients or {})["q"] == 0).all())

    def test_layers_pickle_and_copy(self, local: Client) -> None:
        for layer in (LPLayer(local), Softmax(local)):
            assert copy.deepcopy(layer).client is local
            assert "local" in repr(pickle.loads(pickle.dumps(layer)))


class TestEntropy:
    @pytest.mark.parametrize("tau", [1.0, 0.1, 0.02])
    def test_softmax_is_softmax(self, local: Client, tau: float) -> None:
        y, weight = normal(4, 3, 20).requires_grad_(), normal(5, 3, 20)
        A, b = torch.ones(1, 20, dtype=D), torch.ones(1, dtype=D)
        t = torch.tensor(tau, dtype=D, requires_grad=True)
        x, reference = Softmax(local)(y, A, b, tau=t), torch.softmax(y / t, -1)
        torch.testing.assert_close(x, reference, rtol=1e-11, atol=0)
        for found, wanted in zip(
            *(torch.autograd.grad((v * weight).sum(), (y, t)) for v in (x, reference)), strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-13)
        assert_close(Softmax(local)(y, A, b, tau=tau), x, 0.0)

    @pytest.mark.parametrize("bounds", [False, True], ids=["rows", "bounds"])
    @pytest.mark.parametrize("has_Q", [False, True], ids=["linear", "quadratic"])
    @pytest.mark.parametrize("where", ["local", "remote"])
    def test_gradcheck(self, where: str, has_Q: bool, bounds: bool, request: pytest.FixtureRequest) -> None:
        client: Client = request.getfixturevalue(where)
        n = 4
        inside = torch.softmax(normal(6, 2, n), -1)
        root, G, A = normal(7, n, n), normal(8, 2, n), torch.ones(1, n, dtype=D)
        given = {
            "q": normal(9, 2, n),
            "G": G,
            "h": inside @ G.mT + 0.01,
            "A": A,
            "b": inside @ A.mT,
            "entropy": torch.tensor([0.2, 0.5], dtype=D),
        }
        fixed: dict[str, Tensor | None] = {} if has_Q else {"Q": None}
        if has_Q:
            given["Q"] = root.mT @ root
        if bounds:
            given |= {"lb": torch.full((n,), 0.02, dtype=D), "ub": torch.full((n,), 0.9, dtype=D)}
        inputs = tuple(t.clone().requires_grad_() for t in given.values())

        def solve(*tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(solve_qp(client, **(fixed | dict(zip(given, tensors, strict=True)))))  # type: ignore[arg-type]

        assert gradcheck(solve, inputs, check_forward_ad=True, fast_mode=True, atol=1e-6)

    @pytest.mark.parametrize("gradients", ["adjoint", "full"])
    def test_a_shared_entropy_gets_the_sum_and_full_is_adjoint(
        self, local: Client, gradients: argrad.wire.messages.Gradients
    ) -> None:
        y, one = -normal(10, 3, 5), torch.ones(1, dtype=D)
        shared = torch.tensor(0.3, dtype=D, requires_grad=True)
        own = torch.full((3,), 0.3, dtype=D, requires_grad=True)
        found = []
        for tau in (shared, own):
            z = solve_qp(local, None, y, A=torch.ones(1, 5, dtype=D), b=one, entropy=tau, gradients=gradients).z
            found.append(torch.autograd.grad(z[:, 0].sum(), tau)[0])
        assert_close(found[0], found[1].sum())

    def test_transforms(self, local: Client) -> None:
        q, A, one = -normal(11, 4), torch.ones(1, 4, dtype=D), torch.ones(1, dtype=D)

        def first(q: Tensor, tau: Tensor) -> Tensor:
            return solve_qp(local, None, q, A=A, b=one, entropy=tau).z

        taus = torch.tensor([0.5, 1.0, 2.0], dtype=D)
        assert_close(torch.func.vmap(first, in_dims=(None, 0))(q, taus), torch.softmax(-q / taus.unsqueeze(-1), -1))
        slope = torch.func.vmap(torch.func.jacrev(first, argnums=1), in_dims=(None, 0))(q, taus)
        wanted = torch.func.vmap(torch.func.jacrev(lambda t: torch.softmax(-q / t, -1)))(taus)
        assert_close(slope, wanted, 1e-10)
        assert_close(torch.func.jacfwd(first, argnums=1)(q, taus[0]), wanted[0], 1e-10)

    def test_a_second_derivative_is_refused(self, local: Client) -> None:
        y = normal(12, 4).requires_grad_()
        x = Softmax(local)(y, torch.ones(1, 4, dtype=D), torch.ones(1, dtype=D))
        (gradient,) = torch.autograd.grad(x[0], y, create_graph=True)
        with pytest.raises(argrad.GradientError, match="first derivatives of problems with entropy"):
            torch.autograd.grad(gradient.sum(), y)

    def test_float32(self, local: Client) -> None:
        y, A = normal(13, 2, 6).float().requires_grad_(), torch.ones(1, 6)
        t = torch.tensor(0.02, requires_grad=True)
        x = Softmax(local)(y, A, torch.ones(1), tau=t)
        assert x.dtype == torch.float32
        gradients = torch.autograd.grad(x[:, 0].sum(), (y, t))
        leaves = y.detach().double().requires_grad_(), t.detach().double().requires_grad_()
        reference = torch.autograd.grad(torch.softmax(leaves[0] / leaves[1], -1)[:, 0].sum(), leaves)
        for found, wanted in zip(gradients, reference, strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)

    def test_an_unsuitable_entropy_is_named(self, local: Client) -> None:
        with pytest.raises(argrad.ProblemError, match=r"problem\.entropy: found 0\.0, wanted finite numbers > 0"):
            solve_qp(local, None, torch.zeros(2, dtype=D), entropy=0.0)

    def test_states_and_derivatives_of_a_client(self, remote: Client) -> None:
        problem = QP(
            q=-normal(14, 2, 4),
            A=torch.ones(1, 4, dtype=D),
            b=torch.ones(1, dtype=D),
            entropy=0.5 * torch.ones(2, dtype=D),
        )
        result = remote.solve(problem)
        back = remote.vjp(result, {"z": normal(15, 2, 4)}, wrt=["entropy"])
        assert back.gradients is not None
        assert back.gradients["entropy"].shape == (2,)
        moved = remote.jvp(result, {"entropy": torch.ones(2, dtype=D)})
        assert_close((moved.tangents["z"] * normal(15, 2, 4)).sum(-1), back.gradients["entropy"], 1e-10)


def test_json(service_url: str) -> None:
    """A scalar entropy is a bare number, and so is its gradient."""
    problem = {"q": [0.0, 1.0], "A": [[1.0, 1.0]], "b": [1.0], "entropy": 0.5}
    with httpx.Client(base_url=service_url, trust_env=False) as http:
        body = {"problem": problem, "upstream": {"z": [1.0, 0.0]}, "wrt": ["entropy"]}
        reply = http.post("/v1/solve", json=body).json()
        assert reply["status"] == "optimal"
        assert reply["solution"]["z"] == pytest.approx(torch.softmax(torch.tensor([0.0, -2.0], dtype=D), -1).tolist())
        assert reply["gradients"]["entropy"] == pytest.approx(-0.41997434161, rel=1e-9)
        refused = http.post("/v1/solve", json={"problem": problem | {"entropy": -1}})
        assert refused.status_code == 422
        assert refused.json()["field"] == "problem.entropy"
        assert http.post("/v1/solve", json={"problem": problem | {"entropy": "warm"}}).status_code == 422
        linear = http.post("/v1/solve", json={"problem": {"q": [1.0], "G": [[-1.0]], "h": [2.0]}}).json()
        assert linear["solution"]["z"] == [-2.0]
