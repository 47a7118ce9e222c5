"""Many calls in flight from one process, and from several."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import argrad
from argrad.client import Client
from argrad.futures import MAX_IN_FLIGHT
from argrad.nn import QPLayer, SimplexProjection
from tests.client.support import D, Recorder, assert_close, draw, simplex


def meeting(count: int) -> Callable[..., None]:
    """Holds every exchange until so many are under way at once."""
    barrier = threading.Barrier(count, timeout=20)
    return lambda name, _: barrier.wait() and None


def test_layers_run_beside_each_other(recorder: Recorder, recorded: Client) -> None:
    recorder.before = lambda name, request: meet(name, request) if name == "solve" else None
    meet = meeting(4)
    layers = [QPLayer(recorded) for _ in range(4)]
    leaves = [{name: t.clone().requires_grad_() for name, t in draw(i, batch=2).items()} for i in range(4)]
    futures = [recorded.submit(layer, **leaf) for layer, leaf in zip(layers, leaves, strict=True)]
    torch.stack([future.result() for future in futures]).square().sum().backward()
    recorder.before = lambda *_: None
    for leaf in leaves:
        alone = {name: t.detach().clone().requires_grad_() for name, t in leaf.items()}
        layers[0](**alone).square().sum().backward()
        for name, tensor in leaf.items():
            assert_close(tensor.grad, alone[name].grad)  # type: ignore[arg-type]


def test_micro_batches_overlap_with_their_backward(recorder: Recorder, recorded: Client) -> None:
    meets = {"solve": meeting(4), "vjp": meeting(4)}
    recorder.before = lambda name, request: meets[name](name, request) if name in meets else None
    layer = QPLayer(recorded)
    eye, weight = torch.eye(3, dtype=D), torch.full((3,), 0.5, dtype=D, requires_grad=True)
    y = torch.linspace(-1, 1, 12, dtype=D).reshape(4, 3)

    def step(part: Tensor) -> int:
        layer(eye, -part * weight, G=-eye, h=torch.zeros(3, dtype=D)).square().sum().backward()
        return len(part)

    assert list(recorded.map(step, y.split(1))) == [1, 1, 1, 1]
    recorder.before = lambda *_: None
    found, weight.grad = weight.grad, None
    step(y)
    assert_close(found, weight.grad)  # type: ignore[arg-type]


def test_the_mode_of_the_caller_holds(recorded: Client) -> None:
    def modes() -> tuple[bool, bool]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    assert recorded.submit(modes).result() == (True, False)
    with torch.no_grad():
        assert recorded.submit(modes).result() == (False, False)
    with torch.inference_mode():
        assert recorded.submit(modes).result() == (False, True)


def test_exceptions_are_those_of_the_call(recorded: Client) -> None:
    future = recorded.submit(argrad.solve_qp, recorded, **(simplex() | {"h": -torch.ones(2, dtype=D)}))
    with pytest.raises(argrad.SolveError, match="infeasible"):
        future.result()
    with pytest.raises(ZeroDivisionError):
        list(recorded.map(lambda a, b: a / b, [1, 1], [1, 0]))


def test_a_call_within_a_call_cannot_wait_for_ever(recorded: Client) -> None:
    def outer() -> int:
        return recorded.submit(lambda: 7).result(timeout=5)

    assert list(recorded.map(lambda _: outer(), range(2 * MAX_IN_FLIGHT))) == [7] * 2 * MAX_IN_FLIGHT

    def fail() -> None:
        raise KeyError("inner")

    with pytest.raises(KeyError, match="inner"):
        recorded.submit(lambda: recorded.submit(fail).result()).result()


def test_closing_waits_for_what_runs(recorder: Recorder) -> None:
    client, done = Client(recorder), []
    began = threading.Event()

    def slow() -> None:
        began.set()
        client.solve(argrad.QP(**simplex()))
        done.append(True)

    future = client.submit(slow)
    began.wait(5)
    client.close()
    assert future.done()
    assert done == [True]


@pytest.mark.anyio
async def test_32_tasks_of_one_process(recorder: Recorder) -> None:
    inside = most = 0

    class Slow:
        release = staticmethod(recorder.release)

        async def solve(self, request: Any, tensors: Any, call: Any) -> Any:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0.01)
            inside -= 1
            return recorder.solve(request, tensors, call)

    client = argrad.AsyncClient(Slow())  # type: ignore[arg-type]
    q = torch.linspace(-1, 1, 64, dtype=D).reshape(32, 2)
    given = {name: tensor for name, tensor in simplex().items() if name != "q"}
    together = await asyncio.gather(*(client.solve(argrad.QP(q=one, **given)) for one in q))
    alone = Client(recorder).solve(argrad.QP(q=q, **given)).solution["z"]
    assert most == 32
    assert_close(torch.stack([result.solution["z"] for result in together]), alone)


@pytest.mark.slow
@pytest.mark.anyio
async def test_32_tasks_of_one_service(service_url: str) -> None:
    q = torch.linspace(-1, 1, 64, dtype=D).reshape(32, 2)
    given = {name: tensor for name, tensor in simplex().items() if name != "q"}
    async with argrad.AsyncClient(service_url) as client:

        async def differentiate(one: Tensor) -> Tensor:
            result = await client.solve(argrad.QP(q=one, **given))
            pulled = await client.vjp(result, {"z": torch.tensor([1.0, 0.0], dtype=D)}, wrt=["q"])
            return (pulled.gradients or {})["q"]

        found = torch.stack(await asyncio.gather(*(differentiate(one) for one in q)))
    assert_close(found, torch.tensor([-0.25, 0.25], dtype=D).expand(32, 2), 1e-9)


class Layered(nn.Module):
    """A linear map and a projection by a service."""

    def __init__(self, url: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.project = nn.Linear(3, 4, dtype=D), SimplexProjection(url)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.before(x))  # type: ignore[no-any-return]


def descend(model: nn.Module, x: Tensor) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(3):
        optimiser.zero_grad()
        (model(x) * torch.arange(4.0, dtype=D)).mean().backward()
        optimiser.step()


def train_rank(rank: int, url: str, meeting_file: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting_file}", rank=rank, world_size=2)
    model = DistributedDataParallel(Layered(url))
    x = torch.linspace(-1, 1, 24, dtype=D).reshape(8, 3)
    descend(model, x[rank::2])
    if rank == 0:
        torch.save(model.module.before.state_dict(), out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_ranks_over_one_service_train_as_one_process(service_url: str, tmp_path: Path) -> None:
    arguments = (service_url, str(tmp_path / "meeting"), str(tmp_path / "weights.pt"))
    torch.multiprocessing.spawn(train_rank, arguments, nprocs=2)  # type: ignore[no-untyped-call]
    model = Layered(service_url)
    descend(model, torch.linspace(-1, 1, 24, dtype=D).reshape(8, 3))
    found = torch.load(tmp_path / "weights.pt")
    for name, tensor in model.before.state_dict().items():
        assert_close(found[name], tensor, 1e-9)
