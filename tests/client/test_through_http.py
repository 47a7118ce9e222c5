"""The whole line: autograd, client, HTTP, service, engine, and back; one real server in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import jacrev
from torch.utils.data import DataLoader, Dataset

import argrad
from argrad import solve_qp
from argrad.backend import Call
from argrad.client import Client
from argrad.nn import QPLayer
from argrad.wire.messages import VjpRequest
from tests.client.support import NAMES, D, assert_close, draw, infeasible, simplex
from tests.conftest import free_port, running_service

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


@pytest.fixture(scope="module")
def remote(service_url: str) -> Iterator[Client]:
    """Asks for every derivative; those that come with the solution have `test_ahead`."""
    with Client(service_url, prefetch=False) as client:
        yield client


@pytest.mark.parametrize("batched", ["QqGhAb", "q", "Ghb"], ids=["all-batched", "one-batched", "mixed"])
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(remote: Client, name: str, batched: str) -> None:
    """Each parameter by itself, every block of the solution, in reverse mode; the others as they are."""
    parameters = draw(1, batch=2, batched=batched, n=3, m=2)
    leaf = parameters[name].clone().requires_grad_()
    assert gradcheck(lambda t: solve_qp(remote, **(parameters | {name: t})), (leaf,), atol=1e-7)


@pytest.mark.parametrize("gradients", ["adjoint", "full"])
def test_gradcheck_forward_mode_and_all_at_once(remote: Client, gradients: argrad.wire.messages.Gradients) -> None:
    parameters = draw(2, batch=2, batched="qh", n=3, m=2)
    inputs = tuple(t.clone().requires_grad_() for t in parameters.values())
    assert gradcheck(
        lambda *t: solve_qp(remote, *t, gradients=gradients), inputs, check_forward_ad=True, fast_mode=True, atol=1e-7
    )


def test_remote_and_local_agree_to_the_last_bit_but_rounding(remote: Client, local: Client) -> None:
    grads = []
    for client in (remote, local):
        given = {name: t.clone().requires_grad_() for name, t in draw(3, batch=5, batched="qb").items()}
        solution = solve_qp(client, **given)
        sum(block.square().sum() for block in solution).backward()  # type: ignore[union-attr]
        grads.append([*(block.detach() for block in solution), *(t.grad for t in given.values())])
    for one, other in zip(*grads, strict=True):
        assert_close(one, other, 1e-12)  # type: ignore[arg-type]


def test_float32_travels_as_float32(remote: Client) -> None:
    given = {name: t.float().requires_grad_() for name, t in simplex().items()}
    solution = solve_qp(remote, **given)
    solution.z[0].backward()
    assert {t.dtype for t in solution} == {torch.float32}
    assert given["q"].grad is not None
    assert_close(given["q"].grad, torch.tensor([-0.25, 0.25]), 1e-6)


def test_failures_travel(remote: Client) -> None:
    with pytest.raises(argrad.SolveError, match="1: infeasible"):
        solve_qp(remote, **infeasible())
    q = infeasible()["q"].requires_grad_()
    solve_qp(remote, **(infeasible() | {"q": q}), on_failure="zero_grad").z.sum().backward()
    assert q.grad is not None
    assert q.grad.any(-1).tolist() == [True, False, True]


def test_errors_of_the_service_are_typed(remote: Client, service_url: str) -> None:
    options = argrad.Options(solver="nobody")
    with pytest.raises(argrad.ProblemError, match=r"solver.name: found 'nobody', wanted") as caught:
        solve_qp(remote, **simplex(), options=options)
    assert caught.value.field == "solver.name"
    with (
        Client(f"{service_url}/elsewhere") as lost,
        pytest.raises(argrad.ProtocolError, match="There is no such route"),
    ):
        lost.solvers()


def test_a_deadline_that_is_too_short(remote: Client) -> None:
    """First-order steps to the last digit take seconds; the fast solvers could be done in time."""
    parameters = draw(1, batch=64, batched="QqGhAb", n=60, m=60, p=5)
    slow = argrad.Options(solver="admm", solver_options={"polish": False}, tolerance=1e-12, max_iterations=10_000)
    with pytest.raises(argrad.DeadlineExceededError):
        solve_qp(remote, **parameters, options=slow, timeout_s=0.02)
    assert solve_qp(remote, **simplex()).z[0] == pytest.approx(0.25)


def test_jacobians(remote: Client) -> None:
    parameters = simplex()
    found = jacrev(lambda q: solve_qp(remote, **(parameters | {"q": q})).z)(parameters["q"])
    assert_close(found, torch.tensor([[-0.25, 0.25], [0.25, -0.25]], dtype=D))


def test_released_states_are_freed(service_url: str) -> None:
    """One is released by hand, one by the end of its graph; either is gone once another call was made."""
    remote = Client(service_url, prefetch=False)
    q = torch.ones(2, dtype=D, requires_grad=True)
    result = remote.solve(argrad.QP(**simplex()))
    remote.release(result)
    solve_qp(remote, **(simplex() | {"q": q})).z.sum().backward()
    (token,) = remote._released
    assert result.state is not None
    remote.solve(argrad.QP(**simplex()), keep_state=False)
    for state in (result.state, token):
        with pytest.raises(argrad.StateGoneError):
            remote._backend.vjp(VjpRequest(state=state), {"upstream.z": torch.ones(2, dtype=D)}, Call())


class Projections(Dataset[Tensor]):
    """Items that are solved in the worker that is asked for them."""

    def __init__(self, client: Client) -> None:
        self.layer = QPLayer(client)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Tensor:
        q = torch.tensor([float(i), 1.0], dtype=D)
        return self.layer(torch.eye(2, dtype=D), q)  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_data_loader_workers(remote: Client, method: str) -> None:
    """The client was used before the workers are forked: each reopens its own connections."""
    assert solve_qp(remote, **simplex()).z[0] == pytest.approx(0.25)
    loader = DataLoader(Projections(remote), batch_size=3, num_workers=2, multiprocessing_context=method)
    assert torch.cat(list(loader))[:, 0].tolist() == [0.0, -1.0, -2.0, -3.0, -4.0, -5.0]
    assert solve_qp(remote, **simplex()).z[0] == pytest.approx(0.25)


def test_the_engine_in_a_forked_worker_names_spawn(local: Client) -> None:
    loader = DataLoader(Projections(local), batch_size=3, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(argrad.ForkedError, match="'spawn' start method"):
        next(iter(loader))


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [False, True])
def test_the_service_is_killed_between_forward_and_backward(tmp_path: Path, *, prefetch: bool) -> None:
    """The same port, another signing key, nothing in memory: the step completes, and with the same gradient.

    Without `prefetch` the backward pass must ask, and sends what the service has lost.
    """
    port = free_port()
    given = {name: t.requires_grad_() for name, t in draw(5, batch=3, batched="q").items()}
    with running_service(tmp_path / "first.txt", port=port) as (url, process):
        client = Client(url, prefetch=prefetch)
        loss = solve_qp(client, **given).z.square().sum()
        wanted = torch.autograd.grad(loss, list(given.values()), retain_graph=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with running_service(tmp_path / "second.txt", port=port):
        found = torch.autograd.grad(loss, list(given.values()))
    client.close()
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, 1e-10)


@pytest.mark.slow
def test_the_service_comes_back_while_the_client_retries(tmp_path: Path) -> None:
    port = free_port()
    code = f"""
import threading, time, torch, argrad
client = argrad.Client("http://127.0.0.1:{port}", retries=100)
one = torch.ones(1, dtype=torch.float64)
print(client.solve(argrad.QP(Q=one[None], q=one)).solution["z"].item())
"""
    with (tmp_path / "child.txt").open("wb") as log:
        child = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=subprocess.STDOUT)
        with running_service(tmp_path / "late.txt", port=port):
            child.wait(60)
    *warnings, found = (tmp_path / "child.txt").read_text().splitlines()
    assert found == "-1.0"
    assert all("a call waits for the service" in warning for warning in warnings)
