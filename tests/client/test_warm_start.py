"""Solves that begin at the last solution: fewer iterations, the same answer."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import Tensor

import argrad
from argrad import QP, AsyncClient, Client, Options, ProblemError, WarmStart
from argrad.backend import Call
from argrad.nn import QPLayer
from argrad.wire.messages import SolveRequest, WarmStartDocument
from tests.client.support import D, Recorder, assert_close, draw, infeasible

PDIPM = Options(solver="pdipm")


def iterations(recorder: Recorder) -> list[int]:
    """Iterations of each solve so far, the most of its batch."""
    return [int(out["report.iterations"].max()) for out in recorder.replies]


class Counting(Recorder):
    """A recorder that keeps replies too."""

    def __init__(self) -> None:
        super().__init__()
        self.replies: list[dict[str, Tensor]] = []

    def solve(self, request: object, tensors: dict[str, Tensor], call: object) -> object:
        reply, out = super().solve(request, tensors, call)  # type: ignore[arg-type]
        self.replies.append(out)
        return reply, out


@pytest.fixture
def counting() -> Counting:
    return Counting()


def starts(recorder: Recorder) -> list[str]:
    """How each solve began: cold, by token, or by tensors."""
    kinds = []
    for name, request, tensors, _ in recorder.exchanges:
        if name == "solve":
            sent = any(key.startswith("warm_start.") for key in tensors)
            kinds.append("tensors" if sent else "cold" if request.warm_start is None else "token")
    return kinds


@pytest.mark.parametrize("solver", ["pdipm", "admm", "osqp"])
def test_the_last_solution_saves_iterations_and_changes_nothing_else(counting: Counting, solver: str) -> None:
    client = Client(counting)
    layer = QPLayer(client, solver=solver, warm_start=True, max_iterations=5000)
    given = draw(0, batch=4, n=20, m=15)
    for scale in (1.0, 1.001):
        q = (scale * given["q"]).requires_grad_()
        z = layer(**(given | {"q": q}))
        z.square().sum().backward()
        alone = (scale * given["q"]).requires_grad_()
        wanted = argrad.solve_qp(client, **(given | {"q": alone}), options=layer.options).z
        wanted.square().sum().backward()
        assert_close(z, wanted, 1e-7)
        assert_close(q.grad, alone.grad, 1e-6)  # type: ignore[arg-type]
    cold, _, warm, _ = iterations(counting)
    # The exact finish ends `admm` after its first iteration here, wherever that begins.
    assert warm <= cold if solver == "admm" else warm < cold
    assert starts(counting) == ["cold", "cold", "token", "cold"]


def test_a_result_is_a_warm_start(counting: Counting) -> None:
    client, problem = Client(counting), QP(**draw(1, batch=3))
    first = client.solve(problem, options=PDIPM)
    again = client.solve(problem, options=PDIPM, warm_start=first)
    assert_close(again.solution["z"], first.solution["z"], 1e-9)
    client.solve(problem, options=PDIPM, warm_start={k: v for k, v in first.solution.items() if k != "s"})
    assert starts(counting) == ["cold", "token", "tensors"]
    assert iterations(counting)[1] == iterations(counting)[2] < iterations(counting)[0]


def test_a_lost_token_becomes_tensors(counting: Counting) -> None:
    client, problem = Client(counting), QP(**draw(1, batch=3))
    first = client.solve(problem, options=PDIPM)
    counting.forget_states()
    client.solve(problem, options=PDIPM, warm_start=first)
    assert starts(counting) == ["cold", "token", "tensors"]
    assert iterations(counting)[1] < iterations(counting)[0]


def test_a_token_of_other_sizes_is_refused(recorded: Client) -> None:
    first = recorded.solve(QP(**draw(1, batch=3)), options=PDIPM)
    with pytest.raises(ProblemError, match=r"warm_start\.state.*a batch of 3 with blocks of"):
        recorded.solve(QP(**draw(1, batch=2)), options=PDIPM, warm_start=first)


def test_a_token_beside_tensors_is_refused(recorded: Client) -> None:
    problem = draw(1, batch=3)
    first = recorded.solve(QP(**problem), options=PDIPM)
    request = SolveRequest(warm_start=WarmStartDocument(state=first.state))
    tensors = {f"problem.{name}": t for name, t in problem.items()} | {"warm_start.z": first.solution["z"]}
    with pytest.raises(ProblemError, match=r"warm_start\.state: found a token beside tensors, wanted one of the two"):
        recorded._backend.solve(request, tensors, Call(timeout_s=5.0))


def test_another_batch_size_begins_anew(counting: Counting) -> None:
    layer = QPLayer(Client(counting), solver="pdipm", warm_start=True)
    for batch in (3, 3, 2, 2, 3):
        layer(**draw(1, batch=batch))
    assert starts(counting) == ["cold", "tensors", "cold", "tensors", "cold"]
    assert layer.warm_start is not None
    layer.warm_start.reset()
    layer(**draw(1, batch=3))
    assert starts(counting)[-1] == "cold"


def test_the_state_of_the_last_solve_alone_is_kept(counting: Counting) -> None:
    layer = QPLayer(Client(counting), solver="pdipm", warm_start=True)
    given = draw(1, batch=3)
    for _ in range(3):
        q = given["q"].clone().requires_grad_()
        layer(**(given | {"q": q})).sum().backward()
    gc.collect()
    layer(**given)
    tokens = [request.warm_start.state for _, request, *_ in counting.exchanges if getattr(request, "warm_start", None)]
    assert len(tokens) == 3
    assert counting.released == tokens[:2]


def test_problems_that_failed_begin_at_zero(counting: Counting) -> None:
    layer = QPLayer(Client(counting), solver="pdipm", on_failure="nan", warm_start=True)
    for needs_grad in (True, False, False):
        given = infeasible()
        z = layer(**(given | {"q": given["q"].requires_grad_(needs_grad)}))
        assert z.isnan().any(-1).tolist() == [False, True, False]
    assert starts(counting) == ["cold", "token", "tensors"]


def test_a_copy_remembers_nothing(local: Client) -> None:
    layer = QPLayer(local, warm_start=True)
    layer(**draw(1, batch=3))
    for other in (copy.deepcopy(layer), copy.copy(layer.warm_start), pickle.loads(pickle.dumps(layer.warm_start))):
        start = getattr(other, "warm_start", other)
        assert isinstance(start, WarmStart)
        assert start._last is None
        assert start.handle != layer.warm_start.handle  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_compiled_layer_begins_warm(counting: Counting) -> None:
    torch._dynamo.reset()
    layer = QPLayer(Client(counting), solver="pdipm", warm_start=True)
    model = torch.compile(layer, backend="aot_eager", fullgraph=True)
    given = draw(1, batch=3)
    for _ in range(2):
        model(**(given | {"q": given["q"].clone().requires_grad_()})).sum().backward()
    assert starts(counting) == ["cold", "token"]
    assert iterations(counting)[1] < iterations(counting)[0]


@pytest.mark.slow
@pytest.mark.anyio
async def test_over_http(service_url: str) -> None:
    problem = QP(**draw(1, batch=3))
    async with AsyncClient(service_url) as client:
        first = await client.solve(problem, options=PDIPM)
        again = await client.solve(problem, options=PDIPM, warm_start=first)
    assert_close(again.solution["z"], first.solution["z"], 1e-9)
    assert int(again.report.iterations.max()) < int(first.report.iterations.max())
    assert again.solution["z"].dtype == D


def test_registered_parameters_remember_where_to_begin(counting: Counting) -> None:
    client, given = Client(counting), draw(3, batch=4, batched="qhb", n=20, m=15)
    handle = client.register(**{name: given[name] for name in ("Q", "G", "A")})
    fixed = dict(handle)
    for scale in (1.0, 1.001, 1.002):
        problem = QP(**(given | fixed | {"q": scale * given["q"]}))
        warm = client.solve(problem, options=PDIPM, warm_start="registered")
        assert_close(warm.solution["z"], client.solve(problem, options=PDIPM).solution["z"], 1e-7)
    first, *others = iterations(counting)
    assert others[1] < first
    assert others[3] < first
    assert others[0] == others[2] == others[4] == first
    smaller = QP(**({name: tensor[:3] for name, tensor in given.items() if name not in fixed} | fixed))
    alone = client.solve(smaller, options=PDIPM).report.iterations
    assert torch.equal(client.solve(smaller, options=PDIPM, warm_start="registered").report.iterations, alone)


def test_a_start_at_the_last_of_registered_parameters_needs_some(counting: Counting) -> None:
    client, problem = Client(counting), QP(**draw(1, batch=3))
    with pytest.raises(ProblemError, match=r"warm_start\.registered: found true, wanted problem\.registered"):
        client.solve(problem, warm_start="registered")
    with pytest.raises(ProblemError, match="warm_start: found str, wanted tensors by name"):
        client.solve(problem, warm_start="last")  # type: ignore[arg-type]
