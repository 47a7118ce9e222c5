"""The drop-in for qpth: its signature, its conventions, and qpth itself beside it where that is installed."""

from __future__ import annotations

import inspect
import pickle
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import argrad
import argrad.compat.qpth.qp
from argrad.client import Client
from argrad.compat.qpth import QPFunction, QPSolvers, SpQPFunction
from argrad.defaults import default_client
from tests.client.support import Recorder, assert_close, draw, infeasible

D = torch.float64
PEERS = Path(__file__).parents[2] / ".cache" / "peers"
NAMES = ("Q", "p", "G", "h", "A", "b")
NONE = torch.Tensor()  # what qpth's users write for no constraints: empty, and float32


def coefficients(seed: int = 1, *, batch: int | None = 3, batched: str = "QqGhAb", **sizes: int) -> list[Tensor]:
    """Q, p, G, h, A, b with a known active set."""
    drawn = draw(seed, batch=batch, batched=batched, **sizes)
    return [drawn.get(name, NONE) for name in ("Q", "q", "G", "h", "A", "b")]


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone().requires_grad_(t.numel() > 0) for t in tensors]


def test_the_signature_is_qpths() -> None:
    defaults = {name: p.default for name, p in inspect.signature(QPFunction).parameters.items()}
    assert list(defaults)[:6] == ["eps", "verbose", "notImprovedLim", "maxIter", "solver", "check_Q_spd"]
    assert list(defaults.values())[:6] == [1e-12, 0, 3, 20, QPSolvers.PDIPM_BATCHED, True]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(inspect.signature(QPFunction).parameters.values())[6:])
    assert [solver.name for solver in QPSolvers] == ["PDIPM_BATCHED", "CVXPY"]


@pytest.mark.parametrize("verbose", [False, True, 0, -1])
@pytest.mark.parametrize("solver", QPSolvers)
def test_positional_arguments(verbose: Any, solver: QPSolvers, capsys: pytest.CaptureFixture[str]) -> None:
    z = QPFunction(1e-12, verbose, 3, 20, solver, True)(*coefficients())
    assert z.shape == (3, 4)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("batched", ["", "q", "Qq", "Gh", "QqGhAb"])
def test_the_result_always_has_a_batch(batched: str) -> None:
    tensors = coefficients(batch=3 if batched else None, batched=batched)
    z = QPFunction()(*tensors)
    assert z.shape == (3 if batched else 1, 4)
    each = [argrad.solve_qp(Client("local"), *(t[i] if n in batched else t for n, t in zip("QqGhAb", tensors))).z  # noqa: B905
            for i in range(len(z))]  # fmt: skip
    assert_close(z, torch.stack(each), 1e-10)


def test_a_batch_of_one_keeps_it() -> None:
    assert QPFunction()(*(t.unsqueeze(0) for t in coefficients(batch=None))).shape == (1, 4)


@pytest.mark.parametrize("absent", ["equalities", "inequalities", "both"])
@pytest.mark.parametrize("empty", [NONE, torch.zeros(0, 4), torch.zeros(3, 0, 4), None], ids=["1d", "2d", "3d", "None"])
@pytest.mark.parametrize("dtype", [torch.float32, D], ids=["float32", "float64"])
def test_absent_constraints_are_empty_tensors(absent: str, empty: Tensor | None, dtype: torch.dtype) -> None:
    tensors: list[Any] = [t.to(dtype) for t in coefficients()]
    wanted: list[Any] = list(tensors)
    for positions in ({"equalities": (4, 5), "inequalities": (2, 3), "both": (2, 3, 4, 5)}[absent],):
        for i in positions:
            tensors[i], wanted[i] = empty, None
    Q, p = tensors[:2]
    tensors[:2] = leaves([Q, p])
    z = QPFunction(verbose=False)(*tensors)
    assert z.dtype == dtype
    assert_close(z, argrad.solve_qp(Client("local"), *wanted).z, 1e-6)
    z.sum().backward()
    assert tensors[1].grad is not None


@pytest.mark.parametrize(("batch", "batched"), [(None, ""), (3, "q"), (2, "QqGhAb"), (2, "Ghb")])
def test_gradients(batch: int | None, batched: str) -> None:
    tensors = leaves(coefficients(batch=batch, batched=batched, n=3, m=2))
    assert gradcheck(QPFunction(), tensors, atol=1e-7)
    assert gradgradcheck(QPFunction(), tensors, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, D], ids=["float32", "float64"])
def test_shared_coefficients_get_the_sum_and_on_request_the_mean(dtype: torch.dtype) -> None:
    shared = [t.to(dtype) for t in coefficients(batch=3, batched="q")]
    weights = torch.linspace(-1, 1, 12, dtype=dtype).reshape(3, 4)
    grads = {}
    for scale in ("sum", "mean"):
        tensors = leaves(shared)
        (QPFunction(shared_gradients=scale)(*tensors) * weights).sum().backward()  # type: ignore[arg-type]
        grads[scale] = [t.grad for t in tensors]
        assert all(t.grad is not None and t.grad.dtype == dtype for t in tensors)
    for name, summed, mean in zip(NAMES, grads["sum"], grads["mean"], strict=True):
        assert_close(mean, summed if name == "p" else summed / 3, 1e-5 if dtype != D else 1e-12)  # type: ignore[arg-type,operator]


def test_the_mean_twice() -> None:
    """The old scale is an operation of autograd like any other."""
    tensors = leaves(coefficients(batch=2, batched="q", n=3, m=2))
    given = [tensors[1]]
    rest = [t.detach() for t in tensors]

    def of_p(p: Tensor) -> Tensor:
        return QPFunction(shared_gradients="mean")(rest[0], p, *rest[2:])

    assert gradcheck(of_p, given, atol=1e-7)
    (first,) = torch.autograd.grad((of_p(tensors[1]) ** 2).sum(), tensors[1], create_graph=True)
    first.sum().backward()
    mapped = torch.func.vmap(lambda p: QPFunction(shared_gradients="mean", check_Q_spd=False)(rest[0], p, *rest[2:]))
    assert mapped(torch.stack([rest[1]] * 2)).shape == (2, 2, 3)


class TestRefusals:
    @pytest.mark.parametrize("batch", [None, 3])
    def test_q_that_is_not_positive_definite(self, batch: int | None) -> None:
        tensors = coefficients(batch=batch)
        tensors[0] = tensors[0].clone()
        (tensors[0] if batch is None else tensors[0][1]).sub_(10 * torch.eye(4, dtype=D))
        with pytest.raises(RuntimeError, match=r"^Q is not SPD\.$"):
            QPFunction()(*tensors)
        with pytest.raises(argrad.SolveError, match="nonconvex"):
            QPFunction(check_Q_spd=False)(*tensors)

    def test_semidefinite_q_without_the_check(self) -> None:
        Q, p, G, h, *_ = coefficients(batch=None)
        Q = torch.zeros_like(Q)
        G, h = torch.cat([torch.eye(4, dtype=D), -torch.eye(4, dtype=D)]), torch.ones(8, dtype=D)
        with pytest.raises(RuntimeError, match="SPD"):
            QPFunction()(Q, p, G, h, NONE, NONE)
        assert_close(QPFunction(check_Q_spd=False)(Q, p, G, h, NONE, NONE)[0], -p.sign(), 1e-9)

    def test_infeasible_problems(self) -> None:
        given = infeasible()
        tensors = [given["Q"], given["q"], given["G"], given["h"], NONE, NONE]
        with pytest.raises(argrad.SolveError, match="1: infeasible"):
            QPFunction()(*tensors)
        z = QPFunction(on_failure="nan")(*tensors)
        assert z.isnan().all(-1).tolist() == [False, True, False]

    def test_shapes_and_arguments(self) -> None:
        Q, p, *rest = coefficients(batch=None)
        with pytest.raises(argrad.ProblemError, match=r"problem.Q: found shape \(4, 3\), wanted"):
            QPFunction()(Q[:, :3], p, *rest)
        with pytest.raises(argrad.ProblemError, match=r"problem\.G: found shape \(3, 4\), wanted \(2, 4\)"):
            QPFunction()(Q, p, rest[0], rest[1][:2], *rest[2:])
        with pytest.raises(argrad.ProblemError, match="solver: found 3, wanted a member of QPSolvers"):
            QPFunction(solver=3)  # type: ignore[arg-type]
        with pytest.raises(argrad.ProblemError, match="shared_gradients: found 'max', wanted one of sum, mean"):
            QPFunction(shared_gradients="max")  # type: ignore[arg-type]


def stored(matrix: Tensor) -> Tensor:
    """Indices of the entries that are not zero in some problem of the batch."""
    return (matrix != 0).any(0).nonzero().mT


def sparse_problem(batch: int, n: int, m: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Patterns by qpth's names, and Q, p, G, h, A, b as dense batches: Q tridiagonal, G bidiagonal, A in two places."""
    generator = torch.Generator().manual_seed(n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=D)

    side = torch.diag_embed(normal(batch, n - 1), 1)
    Q = torch.diag_embed(5 + normal(batch, n).abs()) + side + side.mT
    G = (torch.diag_embed(normal(batch, n)) + torch.diag_embed(normal(batch, n - 1), -1))[:, :m]
    A = torch.zeros(batch, 1, n, dtype=D)
    A[:, 0, 0], A[:, 0, n - 1] = 1.0, 2.0
    z = normal(batch, n)
    h = (G @ z.unsqueeze(-1)).squeeze(-1) + 0.1 * normal(batch, m).abs()
    dense = [Q, 3 * normal(batch, n), G, h, A, (A @ z.unsqueeze(-1)).squeeze(-1)]
    return {"Qi": stored(Q), "Gi": stored(G), "Ai": stored(A)}, dense


class TestSparse:
    def test_the_signature_is_qpths(self) -> None:
        names = list(inspect.signature(SpQPFunction).parameters)[:10]
        assert names == ["Qi", "Qsz", "Gi", "Gsz", "Ai", "Asz", "eps", "verbose", "notImprovedLim", "maxIter"]
        named = argrad.compat.qpth.qp  # as in `import qpth`
        assert (named.SpQPFunction, named.QPFunction) == (SpQPFunction, QPFunction)

    @pytest.mark.parametrize("n", [6, 220], ids=["as a dense batch", "one sparse problem after the other"])
    def test_it_agrees_with_the_dense_layer(self, n: int) -> None:
        indices, dense = sparse_problem(3, n, n - 2)
        tensors = leaves(dense)
        given = [tensors[0][(..., *indices["Qi"])], tensors[1], tensors[2][(..., *indices["Gi"])], tensors[3]]
        given += [tensors[4][(..., *indices["Ai"])], tensors[5]]
        values = [t.detach().requires_grad_() for t in given]
        layer = SpQPFunction(indices["Qi"], (n, n), indices["Gi"], (n - 2, n), indices["Ai"], (1, n), verbose=-1)
        z, wanted = layer(*values), QPFunction()(*tensors)
        weights = torch.linspace(-1, 1, 3 * n, dtype=D).reshape(3, n)
        (z * weights).sum().backward()
        (wanted * weights).sum().backward()
        assert_close(z, wanted, 1e-9)
        for name, value, full in zip(NAMES, values, tensors, strict=True):
            where = indices.get(f"{name}i")
            reference = full.grad if where is None else full.grad[(..., *where)]  # type: ignore[index]
            assert_close(value.grad, reference, 1e-8)  # type: ignore[arg-type]

    def test_gradcheck_with_shared_values_and_an_entry_named_twice(self) -> None:
        indices, (Q, p, G, h, _, _) = sparse_problem(2, 4, 3)
        twice = torch.cat([indices["Gi"], indices["Gi"][:, :1]], dim=1)
        Gv = G[(..., *twice)].clone()
        Gv[:, 0] *= 0.25
        Gv[:, -1] *= 0.75
        none = torch.empty(2, 0, dtype=torch.int64)
        layer = SpQPFunction(indices["Qi"], (4, 4), twice, (3, 4), none, (0, 4))
        given = leaves([Q[0][tuple(indices["Qi"])], p, Gv, h])
        assert_close(layer(*given, NONE, NONE), QPFunction()(Q[0], p, G, h, NONE, NONE), 1e-10)
        assert gradcheck(lambda *tensors: layer(*tensors, NONE, NONE), given, atol=1e-7)

    def test_refusals(self) -> None:
        indices, dense = sparse_problem(2, 4, 3)
        none = torch.empty(2, 0, dtype=torch.int64)
        with pytest.raises(argrad.ProblemError, match="Gi: found row 2, wanted rows from 0 to 1, as Gsz says"):
            SpQPFunction(indices["Qi"], (4, 4), indices["Gi"], (2, 4), none, (0, 4))
        with pytest.raises(argrad.ProblemError, match=r"Qi: found shape \(2, 10\) of torch.float64"):
            SpQPFunction(indices["Qi"].double(), (4, 4), indices["Gi"], (3, 4), none, (0, 4))
        layer = SpQPFunction(indices["Qi"], (4, 4), indices["Gi"], (3, 4), none, (0, 4))
        with pytest.raises(argrad.ProblemError, match=r"Qv: found shape \(2, 4, 4\), wanted \(10,\) or \(nBatch, 10\)"):
            layer(dense[0], *dense[1:4], NONE, NONE)


class TestWhoSolves:
    def test_in_process_by_default(self) -> None:
        assert repr(default_client()) == "argrad.Client('local')"
        assert default_client() is default_client()

    def test_argument_then_configuration_then_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ARGRAD_URL", "http://environment:1")
        assert repr(default_client()) == "argrad.Client('http://environment:1')"
        argrad.configure(url="http://configured:2")
        assert repr(default_client()) == "argrad.Client('http://configured:2')"
        assert repr(default_client("http://argument:3")) == "argrad.Client('http://argument:3')"
        argrad.configure()
        assert repr(default_client()) == "argrad.Client('http://environment:1')"

    def test_the_key_is_the_configured_one_then_the_environments(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ARGRAD_API_KEY", "theirs")
        theirs = default_client("http://host:1")
        argrad.configure(url="http://host:1", api_key="mine")
        keys = [client._settings[1].get_secret_value() for client in (theirs, default_client())]  # type: ignore[union-attr]
        assert keys == ["theirs", "mine"]

    def test_a_wrong_address_changes_nothing(self) -> None:
        argrad.configure(url="http://host:1")
        with pytest.raises(argrad.ProblemError):
            argrad.configure(url="nowhere")
        assert repr(default_client()) == "argrad.Client('http://host:1')"

    @pytest.mark.parametrize("way", ["argument", "configured", "environment"])
    def test_through_http(self, service_url: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = QPFunction(url=service_url if way == "argument" else None)
        if way == "configured":
            argrad.configure(url=service_url)
        elif way == "environment":
            monkeypatch.setenv("ARGRAD_URL", service_url)
        tensors = leaves(coefficients(batch=2, n=3, m=2))
        assert gradcheck(layer, tensors, atol=1e-7, fast_mode=True)
        assert gradgradcheck(layer, tensors, atol=1e-6, fast_mode=True)

    def test_a_client_and_the_options_that_travel(self, recorder: Recorder) -> None:
        layer = QPFunction(eps=1e-4, maxIter=300, solver="pdipm", url=Client(recorder), timeout_s=9.0)
        layer(*coefficients())
        _, request, _, call = recorder.exchanges[0]
        assert (request.solver.name, request.solver.tolerance, request.solver.max_iterations) == ("pdipm", 1e-4, 300)
        assert call.timeout_s == 9.0
        QPFunction(url=Client(recorder))(*coefficients())
        _, request, _, _ = recorder.exchanges[1]
        assert (request.solver.name, request.solver.tolerance, request.solver.max_iterations) == ("auto", 1e-8, 100)

    def test_it_pickles(self) -> None:
        again = pickle.loads(pickle.dumps(QPFunction(shared_gradients="mean")))
        assert_close(again(*coefficients()), QPFunction()(*coefficients()))


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


class OptNet(nn.Module):
    """OptNet's layer: Q = LLᵀ + εI and G learned, h = Gz₀ + s₀ so that z₀ is feasible; nothing but p is batched."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.L = nn.Parameter(torch.tril(torch.rand(n, n)))
        self.G = nn.Parameter(torch.empty(m, n).uniform_(-1, 1))
        self.z0, self.s0 = nn.Parameter(torch.zeros(n)), nn.Parameter(torch.ones(m))

    def forward(self, p: Tensor) -> Tensor:
        L = torch.tril(self.L)
        Q = L @ L.mT + 1e-4 * torch.eye(len(L))
        none = torch.Tensor()
        return QPFunction(verbose=-1)(Q, p, self.G, self.G @ self.z0 + self.s0, none, none)


def test_a_network_in_float32_trains() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), OptNet(5, 6), nn.Linear(5, 1))
    x = torch.randn(32, 4)
    target = x.abs().sum(-1, keepdim=True)
    optimiser, losses = torch.optim.Adam(network.parameters(), lr=0.03), []
    for _ in range(25):
        loss = (network(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_sudoku_relaxed() -> None:
    """4×4: each cell one digit, each digit once a row, column and box; the rows of A are dependent, and z is exact."""
    solution = torch.tensor([[1, 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 1]]) - 1
    cube = nn.functional.one_hot(solution, 4).to(D)
    rows = []
    for i in range(4):
        for j in range(4):
            for mask in ((i, j, slice(None)), (i, slice(None), j), (slice(None), i, j)):
                row = torch.zeros(4, 4, 4, dtype=D)
                row[mask] = 1
                rows.append(row.flatten())
            row = torch.zeros(4, 4, 4, dtype=D)
            row[2 * (i // 2) : 2 * (i // 2) + 2, 2 * (i % 2) : 2 * (i % 2) + 2, j] = 1
            rows.append(row.flatten())
    A = torch.stack(rows)
    given = cube * (torch.arange(16).reshape(4, 4, 1) % 3 > 0)
    p = (-given.flatten()).requires_grad_()
    z = QPFunction(verbose=0)(0.1 * torch.eye(64, dtype=D), p, -torch.eye(64, dtype=D), torch.zeros(64, dtype=D),
                              A, torch.ones(len(A), dtype=D))  # fmt: skip
    assert z.shape == (1, 64)
    assert (A @ z[0] - 1).abs().max() < 1e-9
    assert z.min() > -1e-9
    z.square().sum().backward()
    assert torch.isfinite(p.grad).all()  # type: ignore[arg-type]


@pytest.fixture
def qpth(monkeypatch: pytest.MonkeyPatch) -> Any:
    """qpth itself, with cvxpy, which it imports for a solver that is not used here, replaced by nothing."""
    if not (PEERS / "qpth").is_dir():
        pytest.skip("qpth is not installed; ends with `make bench`, which puts it into .cache/peers")
    monkeypatch.syspath_prepend(PEERS)
    if "cvxpy" not in sys.modules:
        monkeypatch.setitem(sys.modules, "cvxpy", types.ModuleType("cvxpy"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from qpth import qp
    return qp


@pytest.mark.parametrize(("batched", "p"), [("QqGhAb", 1), ("q", 1), ("qh", 0), ("", 1), ("Gh", 0)])
def test_beside_qpth(qpth: Any, batched: str, p: int) -> None:
    """The same solutions, and with the old scale the same gradients; by default shared ones are nBatch times that."""
    tensors = coefficients(batch=4 if batched else None, batched=batched, n=6, m=5, p=p)
    weights = torch.randn(4 if batched else 1, 6, dtype=D, generator=torch.Generator().manual_seed(0))
    theirs, found = leaves(tensors), {}
    z = qpth.QPFunction(verbose=-1)(*theirs)
    (z * weights).sum().backward()
    for scale in ("mean", "sum"):
        ours = leaves(tensors)
        ours_z = QPFunction(shared_gradients=scale)(*ours)  # type: ignore[arg-type]
        assert_close(ours_z, z, 1e-6)
        (ours_z * weights).sum().backward()
        found[scale] = [t.grad for t in ours]
    for name, t, mean, summed in zip("QqGhAb", theirs, found["mean"], found["sum"], strict=True):
        if not t.numel():
            assert t.grad is mean is None
            continue
        assert_close(mean, t.grad, 1e-5)  # type: ignore[arg-type]
        assert_close(summed, mean * (1 if name in batched or not batched else 4), 1e-9)  # type: ignore[operator]


def test_refusals_beside_qpth(qpth: Any) -> None:
    tensors = coefficients()
    tensors[0] = -tensors[0]
    for function in (qpth.QPFunction(), QPFunction()):
        with pytest.raises(RuntimeError, match=r"^Q is not SPD\.$"):
            function(*tensors)
