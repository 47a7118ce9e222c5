"""Models that hold a layer, under torch.compile: one graph, and the numbers of eager mode."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import argrad
from argrad import Client, Options, SolveError, compiled
from argrad.handles import look_up
from tests.client.support import D, Recorder, assert_close, draw, infeasible, simplex

BACKENDS = [
    pytest.param("aot_eager", marks=pytest.mark.slow),
    pytest.param(
        "inductor",
        marks=[pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")],
    ),
]


@pytest.fixture(autouse=True)
def fresh_compiler(request: pytest.FixtureRequest) -> Iterator[None]:
    """Importing the compiler takes seconds, which the fast tests do without."""
    if request.node.get_closest_marker("slow") is None:
        yield
        return
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def draw_scores() -> Tensor:
    return torch.tensor([[2.0, 1.5, 0.2, -1.0], [0.1, 0.0, -0.2, 3.0]], dtype=D)


def run(model: Callable[..., Any], inputs: dict[str, Tensor], pull: Callable[[Any], Tensor] = lambda out: out) -> Any:
    """The solution and the gradient of each input."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    out = pull(model(**leaves))
    (out * torch.arange(1.0, out.numel() + 1, dtype=D).reshape(out.shape)).sum().backward()  # type: ignore[no-untyped-call]
    return [out.detach(), *(leaf.grad for leaf in leaves.values())]


def assert_same(model: Callable[..., Any], inputs: dict[str, Tensor], backend: str = "aot_eager", **more: Any) -> None:
    wanted = run(model, inputs, **more)
    found = run(torch.compile(model, backend=backend, fullgraph=True), inputs, **more)
    for one, other in zip(found, wanted, strict=True):
        if other is None:
            assert one is None or not one.any()
        else:
            assert_close(one, other)


class Model(nn.Module):
    """A layer between others."""

    def __init__(self, client: Client) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.layer, self.after = (
            nn.Linear(3, 2, dtype=D),
            argrad.nn.QPLayer(client),
            nn.Linear(2, 1, dtype=D),
        )
        self.problem = {name: nn.Buffer(tensor) for name, tensor in simplex().items() if name != "q"}

    def forward(self, x: Tensor) -> Tensor:
        data = self.problem
        z = self.layer(data["Q"], self.before(x), data["G"], data["h"], data["A"], data["b"])
        return self.after(torch.tanh(z))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # inductor's own imports
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_in_one_graph_trains_as_in_eager_mode(local: Client, backend: str) -> None:
    x = torch.linspace(-1, 1, 12, dtype=D).reshape(4, 3)
    models = [Model(local), Model(local)]
    forwards: list[Any] = [models[0], torch.compile(models[1], backend=backend, fullgraph=True)]
    for model, forward in zip(models, forwards, strict=True):
        descent = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            descent.zero_grad()
            forward(x).square().sum().backward()
            descent.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_close(one, other)


LAYERS: dict[str, tuple[type[nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "qp": (argrad.nn.QPLayer, simplex),
    "batched qp": (argrad.nn.QPLayer, lambda: draw(1, batch=3, batched="Qq")),
    "bounded qp": (argrad.nn.QPLayer, lambda: {"Q": torch.eye(2, dtype=D), "q": -torch.ones(2, dtype=D),
                                               "lb": torch.zeros(2, dtype=D), "ub": torch.tensor([0.5, 3], dtype=D)}),
    "lp": (argrad.nn.LPLayer, lambda: {"c": torch.tensor([1.0, 2.0], dtype=D), "lb": torch.zeros(2, dtype=D),
                                       "A": torch.ones(1, 2, dtype=D), "b": torch.ones(1, dtype=D)}),
    "box": (argrad.nn.BoxQP, lambda: {"Q": 2 * torch.eye(4, dtype=D), "q": draw_scores(),
                                      "lb": -torch.ones(4, dtype=D)}),
    "simplex": (argrad.nn.SimplexProjection, lambda: {"y": draw_scores()}),
    "sparsemax": (argrad.nn.Sparsemax, lambda: {"y": draw_scores(), "u": torch.full((4,), 0.6, dtype=D)}),
    "softmax": (argrad.nn.Softmax, lambda: {"y": draw_scores(), "A": torch.ones(1, 4, dtype=D),
                                            "b": torch.ones(1, dtype=D)}),
    "total variation": (argrad.nn.TotalVariation, lambda: {"y": draw_scores(),
                                                           "D": argrad.nn.differences(4, dtype=D)}),
    "energy": (argrad.nn.EnergySchedule, lambda: {"demand": draw_scores(), "ramp": torch.tensor(0.7, dtype=D)}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_one_graph(local: Client, name: str) -> None:
    kind, inputs = LAYERS[name]
    assert_same(kind(local), inputs())


@pytest.mark.slow
def test_top_k_with_numbers_for_tensors(local: Client) -> None:
    layer = argrad.nn.TopK(local)
    assert_same(lambda c: layer(c, 2, tau=0.5), {"c": draw_scores()})


@pytest.mark.slow
def test_all_blocks_are_differentiable_in_a_graph(local: Client) -> None:
    layer = argrad.nn.QPLayer(local, return_duals=True)
    assert_same(layer, draw(2, batch=2), pull=lambda out: torch.cat([out.z, out.nu, out.lam, out.s], dim=-1))
    assert_same(layer, draw(2, batch=2), pull=lambda out: out.z)


@pytest.mark.slow
def test_a_two_sided_problem_in_a_graph(local: Client) -> None:
    def solve(q: Tensor, l: Tensor, u: Tensor) -> Tensor:
        eye = torch.eye(3, dtype=D)
        return argrad.solve_two_sided_qp(local, eye, q, eye, l, u, gradients="full").x

    inputs = {"q": torch.tensor([2.0, -2.0, 0.1], dtype=D), "l": -torch.ones(3, dtype=D), "u": torch.ones(3, dtype=D)}
    assert_same(solve, inputs)


@pytest.mark.slow
def test_batches_of_any_size_pass_through_one_graph(local: Client) -> None:
    layer = argrad.nn.SimplexProjection(local)
    traces: list[int] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        traces.append(1)
        return graph.forward

    model = torch.compile(layer, backend=count, fullgraph=True, dynamic=True)
    for size in (3, 5, 8):
        y = torch.linspace(0, 1, 4 * size, dtype=D).reshape(size, 4)
        assert_close(model(y), layer(y))
    assert len(traces) == 1


@pytest.mark.slow
def test_the_backward_pass_goes_by_the_token_and_lets_the_state_go(recorder: Recorder, recorded: Client) -> None:
    model = torch.compile(argrad.nn.QPLayer(recorded), backend="aot_eager", fullgraph=True)
    run(model, simplex())
    (_, solve, _, call), (_, vjp, tensors, back) = recorder.exchanges
    assert solve.keep_state
    assert vjp.state is not None
    assert set(tensors) == {"upstream.z"}
    assert (call.request_id, call.affinity) == (back.request_id, back.affinity)
    gc.collect()
    run(model, simplex())
    assert vjp.state in recorder.released


@pytest.mark.slow
def test_a_lost_state_costs_a_graph_time_only(recorder: Recorder, recorded: Client) -> None:
    layer = argrad.nn.QPLayer(recorded)
    wanted = run(layer, simplex())
    recorder.before = lambda name, _: recorder.forget_states() if name == "vjp" else None
    for one, other in zip(run(torch.compile(layer, backend="aot_eager"), simplex()), wanted, strict=True):
        assert_close(one, other)


@pytest.mark.slow
def test_no_state_is_kept_where_nothing_requires_a_gradient(recorder: Recorder, recorded: Client) -> None:
    model = torch.compile(argrad.nn.QPLayer(recorded), backend="aot_eager", fullgraph=True)
    assert_close(model(**simplex()), torch.tensor([0.25, 0.75], dtype=D))
    with torch.no_grad():
        model(**{name: tensor.requires_grad_() for name, tensor in simplex().items()})
    assert [request.keep_state for _, request, *_ in recorder.exchanges] == [False, False]


@pytest.mark.slow
@pytest.mark.parametrize("on_failure", ["nan", "zero_grad"])
def test_failures_in_a_graph_are_those_of_eager_mode(local: Client, on_failure: Any) -> None:
    layer = argrad.nn.QPLayer(local, on_failure=on_failure)
    wanted, found = (
        run(model, infeasible()) for model in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True))
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.slow
def test_what_raises_in_eager_mode_raises_in_a_graph(local: Client) -> None:
    model = torch.compile(argrad.nn.QPLayer(local), backend="aot_eager", fullgraph=True)
    with pytest.raises(SolveError, match="infeasible"):
        model(**infeasible())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch 2.11, of the eager layer
def test_a_problem_that_travels_as_a_sparse_one_is_dense_in_a_graph(recorder: Recorder, recorded: Client) -> None:
    y = torch.linspace(0, 1, 300, dtype=D)
    assert_same(argrad.nn.SimplexProjection(recorded), {"y": y})
    assert [request.problem.kind for name, request, *_ in recorder.exchanges if name == "solve"] == ["sparse_qp", "qp"]


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("kind", ["qp", "bounded", "qp_two_sided"])
def test_the_fake_operators_have_the_shapes_of_the_real_ones(local: Client, kind: str, batch: int | None) -> None:
    parameters = draw(0, batch=batch, batched="q")
    if kind == "bounded":
        parameters |= {"lb": -torch.ones(4, dtype=D)}
    if kind == "qp_two_sided":
        given = parameters
        parameters = {"P": given["Q"], "q": given["q"], "A": given["G"], "u": given["h"]}
    wire = "qp_two_sided" if kind == "qp_two_sided" else "qp"
    settings = (local.handle, wire, ",".join(parameters), "q", Options().text, "raise", None)

    def both(tensors: list[Tensor]) -> list[Tensor]:
        out = torch.ops.argrad.solve(tensors, *settings, None, None)
        blocks, rest = out[:-2], out[-2:]
        cotangents = [torch.ones_like(blocks[0]), *(None for _ in blocks[1:])]
        return [*out, *torch.ops.argrad.adjoint(tensors, blocks, cotangents, *rest, *settings)]

    real = both(list(parameters.values()))
    with FakeTensorMode() as mode:
        fake = both([mode.from_tensor(tensor) for tensor in parameters.values()])
    for one, other in zip(fake, real, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def test_a_graph_outlives_neither_its_client_nor_its_process() -> None:
    client = Client("http://127.0.0.1:1")
    handle = client.handle
    assert look_up(handle, Client) is client
    with pytest.raises(RuntimeError, match="a Client that is not there any more"):
        look_up("-1", Client)
    del client
    gc.collect()
    with pytest.raises(RuntimeError, match="compile it anew"):
        look_up(handle, Client)


def test_options_come_back_from_their_text() -> None:
    options = Options(solver="admm", tolerance=1e-6, max_iterations=7, solver_options={"rho": 0.5}, method="altdiff")
    assert Options.from_text(options.text) == options


def test_a_token_too_long_for_the_ticket_is_let_go(local: Client) -> None:
    record = compiled._record((local.handle, "qp", "q", "q", Options().text, "raise", None), argrad.backend.Call())
    record.state = compiled.State(local, "x" * 600)
    ticket = compiled._ticket(record)
    assert ticket.shape == (compiled.TICKET_BYTES,)
    assert b"xxx" not in ticket.numpy().tobytes()
