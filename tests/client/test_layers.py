"""Layers that state a QP of their own: against closed forms and optimality conditions, gradients, and through HTTP."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import argrad
from argrad.client import Client
from argrad.nn import BoxQP, EnergySchedule, SimplexProjection, Sparsemax, TopK, TotalVariation, differences
from tests.client.support import D, Recorder, assert_close

pytestmark = pytest.mark.slow

RANDOM = 20
Y = torch.randn(3, 6, dtype=D, generator=torch.Generator().manual_seed(RANDOM))
"""Three vectors that no layer below finds degenerate."""

CASES: list[Any] = [
    pytest.param(SimplexProjection, (Y, torch.tensor(1.5, dtype=D)), id="simplex"),
    pytest.param(SimplexProjection, (Y[0], torch.tensor([0.5, 1.0, 2.0], dtype=D)), id="simplex-radii"),
    pytest.param(Sparsemax, (Y,), id="sparsemax"),
    pytest.param(Sparsemax, (Y, torch.full((6,), 0.4, dtype=D)), id="sparsemax-bounds"),
    pytest.param(BoxQP, (torch.eye(6, dtype=D) + 0.1, Y, torch.full((6,), -0.3, dtype=D), Y.abs() + 0.1), id="box"),
    pytest.param(TotalVariation, (Y, differences(6, dtype=D), torch.tensor(0.4, dtype=D)), id="variation"),
    pytest.param(TotalVariation, (Y[0], differences(6, dtype=D) + 0.1, torch.full((2,), 0.4, dtype=D)), id="weights"),
    pytest.param(EnergySchedule, (Y, torch.tensor(0.3, dtype=D)), id="energy"),
    pytest.param(TopK, (Y, torch.tensor(2.0, dtype=D)), id="top-k"),
]


@pytest.fixture(scope="module")
def remote(service_url: str) -> Iterator[Client]:
    with Client(service_url) as client:
        yield client


def leaves(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.clone().requires_grad_() for t in tensors)


@pytest.mark.parametrize(("layer", "tensors"), CASES)
def test_gradients(local: Client, layer: Callable[..., Any], tensors: tuple[Tensor, ...]) -> None:
    solve = layer(local)
    assert gradcheck(solve, leaves(tensors), atol=1e-6)
    if layer is TopK:
        with pytest.raises(argrad.GradientError, match="only first derivatives of problems with entropy"):
            gradgradcheck(solve, leaves(tensors))
    else:
        assert gradgradcheck(solve, leaves(tensors), atol=1e-5, fast_mode=True)


@pytest.mark.parametrize(("layer", "tensors"), CASES)
def test_through_http(remote: Client, local: Client, layer: Callable[..., Any], tensors: tuple[Tensor, ...]) -> None:
    assert gradcheck(layer(remote), leaves(tensors), atol=1e-6, fast_mode=True)
    assert_close(layer(remote)(*tensors), layer(local)(*tensors), 1e-9)


@pytest.mark.parametrize(("layer", "tensors"), CASES)
def test_batches_are_loops(local: Client, layer: Callable[..., Any], tensors: tuple[Tensor, ...]) -> None:
    together = layer(local)(*tensors)
    others = {BoxQP: [2, 1, 1, 1], TotalVariation: [1, 2, 0], Sparsemax: [1, 1]}
    ranks = others.get(layer, [1, 0])  # type: ignore[call-overload]
    for i, row in enumerate(together):
        one = [t[i] if t.ndim > rank else t for t, rank in zip(tensors, ranks, strict=False)]
        assert_close(layer(local)(*one), row, 1e-9)


@pytest.mark.parametrize(("layer", "tensors"), CASES)
def test_layers_keep_dtype_and_copy(local: Client, layer: Callable[..., Any], tensors: tuple[Tensor, ...]) -> None:
    solve = layer(local, on_failure="nan", return_duals=True)
    again = pickle.loads(pickle.dumps(layer("local")))
    z = again(*(t.float() for t in tensors))
    assert z.dtype == torch.float32
    duals = copy.deepcopy(solve)(*tensors)
    assert duals._fields[:4] == ("z", "nu", "lam", "s")
    assert_close(duals.z[..., : z.shape[-1]], z.double(), 1e-4)
    assert not list(solve.parameters())


class TestProjections:
    def test_simplex_by_sorting(self, local: Client) -> None:
        """The threshold θ of a sorted search: the largest support whose smallest entry stays positive."""
        y = 2 * torch.randn(20, 9, dtype=D, generator=torch.Generator().manual_seed(1))
        for radius in (1.0, 3.0):
            ordered = y.sort(dim=-1, descending=True).values
            thetas = (ordered.cumsum(-1) - radius) / torch.arange(1, 10, dtype=D)
            size = (ordered > thetas).sum(-1, keepdim=True)
            wanted = (y - thetas.gather(-1, size - 1)).clamp(min=0)
            assert_close(SimplexProjection(local)(y, radius), wanted, 1e-9)
            if radius == 1.0:
                assert_close(Sparsemax(local)(y), wanted, 1e-9)

    def test_jacobian_on_the_support(self, local: Client) -> None:
        x = Sparsemax(local)(Y[0])
        support = (x > 1e-9).to(D)
        wanted = torch.diag(support) - torch.outer(support, support) / support.sum()
        assert_close(torch.func.jacrev(Sparsemax(local))(Y[0]), wanted, 1e-9)

    def test_bounds_and_rows(self, local: Client) -> None:
        """At most half of the mass on the first two, and x₄ a little above x₅."""
        G, h = torch.tensor([[1.0, 1, 0, 0, 0, 0]], dtype=D), torch.tensor([0.5], dtype=D)
        A, b = torch.tensor([[0.0, 0, 0, 1, -1, 0]], dtype=D), torch.full((1,), 0.05, dtype=D)
        x = Sparsemax(local)(Y, torch.full((6,), 0.3, dtype=D), G=G, h=h, A=A, b=b.expand(3, 1))
        assert_close(x.sum(-1), torch.ones(3, dtype=D), 1e-9)
        assert x.min() > -1e-9
        assert x.max() < 0.3 + 1e-9
        assert (x @ G.mT).max() < 0.5 + 1e-9
        assert_close(x[:, 3], x[:, 4] + 0.05, 1e-9)
        assert gradcheck(lambda y, h, b: Sparsemax(local)(y, G=G, h=h, A=A, b=b), leaves((Y, h, b)), atol=1e-6)

    def test_bounds_that_leave_no_room(self, local: Client) -> None:
        with pytest.raises(argrad.SolveError, match="infeasible"):
            Sparsemax(local)(Y, torch.full((6,), 0.1, dtype=D))
        with pytest.raises(argrad.SolveError, match="infeasible"):
            SimplexProjection(local)(Y, -1.0)

    def test_box_of_a_diagonal_clips(self, local: Client) -> None:
        lb, ub = torch.full((6,), -0.4, dtype=D), torch.full((6,), 0.5, dtype=D)
        assert_close(BoxQP(local)(torch.eye(6, dtype=D), -Y, lb, ub), Y.clamp(-0.4, 0.5), 1e-10)
        assert_close(BoxQP(local)(2 * torch.eye(6, dtype=D), Y, ub=ub), (-Y / 2).clamp(max=0.5), 1e-10)


class TestTopK:
    @pytest.mark.parametrize("tau", [1.0, 0.1])
    def test_one_is_softmax_where_no_bound_binds(self, local: Client, tau: float) -> None:
        assert_close(TopK(local)(Y, 1, tau=tau), torch.softmax(Y / tau, -1), 1e-8)

    def test_it_tends_to_the_indicator(self, local: Client) -> None:
        x = TopK(local)(Y, 2, tau=0.01)
        wanted = torch.zeros_like(Y).scatter(-1, Y.topk(2).indices, 1.0)
        assert_close(x, wanted, 1e-3)
        assert_close(x.sum(-1), torch.full((3,), 2.0, dtype=D), 1e-9)

    def test_stationarity(self, local: Client) -> None:
        """−c + τ(1 + log x) + ν + λ = 0, λ ≥ 0 where x = 1."""
        solution = TopK(local, return_duals=True)(Y, 3.0, tau=0.3)
        residual = -Y + 0.3 * (1 + solution.z.log()) + solution.nu + solution.lam_ub
        assert residual.abs().max() < 1e-8
        assert (solution.lam_ub * (1 - solution.z)).abs().max() < 1e-8
        assert solution.lam_ub.max() > 0.1

    def test_the_temperature_has_a_gradient(self, local: Client) -> None:
        tau = torch.tensor([0.5, 1.0, 2.0], dtype=D)
        assert gradcheck(lambda tau: TopK(local)(Y, 2, tau=tau), leaves((tau,)), atol=1e-6)


class TestSequences:
    def test_differences(self) -> None:
        assert differences(3).tolist() == [[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]]

    def test_variation_is_optimal(self, local: Client) -> None:
        """x = y − Dᵀv with |v| ≤ w, and v = w sign(Dx) where Dx ≠ 0."""
        matrix, weight = differences(6, dtype=D), 0.5
        solution = TotalVariation(local, return_duals=True)(Y, matrix, weight)
        x, t = solution.z[:, :6], solution.z[:, 6:]
        v = solution.lam[:, :5] - solution.lam[:, 5:]
        assert_close(x, Y - v @ matrix, 1e-9)
        jumps = x @ matrix.mT
        assert_close(t, jumps.abs(), 1e-9)
        assert v.abs().max() < weight + 1e-9
        assert_close(v[jumps.abs() > 1e-6], weight * jumps[jumps.abs() > 1e-6].sign(), 1e-9)
        assert (jumps.abs() < 1e-9).any()

    def test_a_large_weight_leaves_the_mean(self, local: Client) -> None:
        x = TotalVariation(local)(Y, differences(6, dtype=D), 100.0)
        assert_close(x, Y.mean(-1, keepdim=True).expand_as(Y), 1e-9)

    def test_d_is_learned(self, local: Client) -> None:
        """A D that starts at differences denoises better after a few steps."""
        random = torch.Generator().manual_seed(3)
        levels = torch.randint(-2, 3, (8, 3), generator=random).to(D)
        clean = levels.repeat_interleave(4, dim=-1)
        noisy = clean + 0.3 * torch.randn(clean.shape, dtype=D, generator=random)
        layer, matrix = TotalVariation(local), nn.Parameter(differences(12, dtype=D))
        optimiser, losses = torch.optim.Adam([matrix], lr=0.02), []
        for _ in range(15):
            loss = (layer(noisy, matrix, 0.3) - clean).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]

    def test_d_of_another_size_is_refused(self, local: Client) -> None:
        with pytest.raises(argrad.ProblemError, match=r"problem\.Q|problem\.G"):
            TotalVariation(local)(Y, differences(5, dtype=D))

    def test_schedule_follows_what_the_ramp_allows(self, local: Client) -> None:
        slots = torch.arange(24, dtype=D)
        demand = 0.5 + 0.4 * torch.sin(slots / 3) + torch.zeros(2, 1, dtype=D)
        ramp = torch.tensor([0.05, 1.0], dtype=D)
        x = EnergySchedule(local)(demand, ramp)
        assert x[0].diff().abs().max() == pytest.approx(0.05)
        assert_close(x[1], demand[1], 1e-9)
        bounded = EnergySchedule(local)(
            demand, ramp, lb=torch.full((24,), 0.3, dtype=D), ub=torch.full((24,), 0.8, dtype=D)
        )
        assert bounded.min() > 0.3 - 1e-9
        assert bounded.max() < 0.8 + 1e-9
        assert bounded[0].diff().abs().max() < 0.05 + 1e-9

    def test_predict_then_optimise(self, local: Client) -> None:
        """A linear model of demand learns through the schedule."""
        torch.manual_seed(0)
        model, layer = nn.Linear(4, 8, dtype=D), EnergySchedule(local)
        features = torch.randn(16, 4, dtype=D)
        demand = (features @ torch.randn(4, 8, dtype=D)).sigmoid()
        wanted = layer(demand, 0.1)
        optimiser, losses = torch.optim.Adam(model.parameters(), lr=0.05), []
        for _ in range(25):
            loss = (layer(model(features), 0.1) - wanted).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("with_bounds", [False, True])
def test_large_shares_are_solved_as_sparse_problems(local: Client, remote: Client, with_bounds: bool) -> None:
    g = torch.Generator().manual_seed(4)
    n = 300
    y, weights = torch.randn(n, dtype=D, generator=g), torch.randn(n, dtype=D, generator=g)
    u = 0.02 * (torch.rand(n, dtype=D, generator=g) + 0.5) if with_bounds else None
    found = []
    for layer, scores in ((Sparsemax(local), y), (Sparsemax(remote), y), (Sparsemax(local), y[None])):
        given = leaves((scores,) if u is None else (scores, u))
        x = layer(*given)
        x.reshape(n).dot(weights).backward()
        found.append((x.detach().reshape(n), [leaf.grad.reshape(n) for leaf in given if leaf.grad is not None]))
    for point, gradients in found[:2]:
        assert_close(point, found[2][0])
        for mine, dense in zip(gradients, found[2][1], strict=True):
            assert_close(mine, dense)
    assert float(found[0][0].sum()) == pytest.approx(1.0, abs=1e-12)
    theta = SimplexProjection(local)(y, 2.0)
    support = theta > 0
    assert_close(theta[support] - y[support], (theta[support] - y[support])[:1].expand(int(support.sum())))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's forward mode
def test_a_large_share_whose_state_is_lost_has_the_same_derivatives(
    local: Client, recorder: Recorder, recorded: Client
) -> None:
    """Its matrices are none of the operation's parameters, and yet sent again."""
    y = torch.randn(300, dtype=D, generator=torch.Generator().manual_seed(4))
    weights = torch.linspace(-1, 1, 300, dtype=D)
    found = []
    for client in (local, recorded):
        (given,) = leaves((y,))
        x = Sparsemax(client)(given)
        recorder.forget_states()
        x.dot(weights).backward()
        with forward_ad.dual_level():
            dual = Sparsemax(client)(forward_ad.make_dual(y, weights))
            found.append((x.detach(), given.grad, forward_ad.unpack_dual(dual).tangent))
    for mine, theirs in zip(*found, strict=True):
        assert_close(mine, theirs)
    assert recorder.names.count("vjp") == 2


def test_large_shares_may_have_entries_without_a_bound(local: Client) -> None:
    g = torch.Generator().manual_seed(4)
    y, u = torch.randn(300, dtype=D, generator=g), 0.02 * torch.rand(300, dtype=D, generator=g)
    u[::3] = torch.inf
    found = []
    for scores in (y, y[None]):
        given = leaves((scores, u))
        x = Sparsemax(local)(*given).reshape(-1)
        x.dot(y).backward()
        found.append((x.detach(), *(leaf.grad.reshape(-1) for leaf in given if leaf.grad is not None)))
    for mine, dense in zip(*found, strict=True):
        assert_close(mine, dense)


@pytest.mark.parametrize(
    ("y", "u", "message"),
    [
        (torch.ones(300), torch.ones(299), r"problem\.ub: found shape \(299,\), wanted \(300,\)"),
        (torch.ones(300), torch.ones(300, dtype=D), r"problem\.h: found dtype torch\.float64"),
        (torch.full((300,), torch.nan), None, r"problem\.q: found nan at \[0\]"),
        (torch.ones(300), torch.full((300,), -torch.inf), r"problem\.h: found -inf at \[0\]"),
        (torch.ones(300, dtype=torch.float16), None, r"problem\.q: found dtype torch\.float16"),
    ],
    ids=["sizes", "dtypes", "NaN", "minus infinity", "half precision"],
)
def test_what_a_large_share_refuses(local: Client, y: Tensor, u: Tensor | None, message: str) -> None:
    with pytest.raises(argrad.ProblemError, match=message):
        Sparsemax(local)(y, u)
