"""Connections that break anywhere: a call, and a training step, have the result of an undisturbed one."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

import argrad
from argrad.problems.form import Blocks
from tests.client.support import D, assert_close, draw
from tests.faults.proxy import Fault, FaultProxy, Phase

ENDS = [
    *(Fault(action, phase) for action in ("reset", "close") for phase in Phase),  # type: ignore[arg-type]
    Fault("garbage", Phase.REQUEST_BODY),
    Fault("garbage", Phase.REPLY_HEAD, fraction=0.0),
    Fault("garbage", Phase.REPLY_HEAD),
    Fault("cut_chunk", Phase.REPLY_BODY),
]
SLOW = [
    Fault("delay", Phase.REQUEST_BODY, seconds=0.1),
    Fault("delay", Phase.REPLY_BODY, seconds=0.1),
    Fault("throttle", Phase.REQUEST_HEAD, bytes_per_s=300_000.0),
    Fault("throttle", Phase.REPLY_HEAD, bytes_per_s=100_000.0),
]


def name_of(fault: Fault) -> str:
    return f"{fault.action}-{fault.phase}-{fault.fraction:g}".replace(" ", "-")


def problem() -> dict[str, Tensor]:
    return draw(7, batch=4, batched="QqhGAb", n=24, m=12, p=4)


def cotangent() -> Tensor:
    return torch.linspace(-1.0, 1.0, 96, dtype=D).reshape(4, 24)


def step(url: str, **more: Any) -> Blocks:
    """A solve and its backward pass, each an exchange; the solution, and all gradients."""
    given = {name: tensor.requires_grad_() for name, tensor in problem().items()}
    with argrad.Client(url, prefetch=False, **more) as client:
        z = argrad.solve_qp(client, **given).z
        z.backward(cotangent())
    return {"z": z.detach()} | {name: tensor.grad for name, tensor in given.items() if tensor.grad is not None}


@pytest.fixture(scope="module")
def wanted(service_url: str) -> Blocks:
    undisturbed = step(service_url)
    assert len(undisturbed) == 7
    return undisturbed


def check(found: Blocks, wanted: Blocks) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_close(found[name], tensor, 1e-11)


@pytest.mark.parametrize("nth", [0, 1], ids=["forward", "backward"])
@pytest.mark.parametrize("fault", ENDS, ids=name_of)
def test_a_step_whose_connection_breaks(proxy: FaultProxy, wanted: Blocks, fault: Fault, nth: int) -> None:
    proxy.plan(*[None] * nth, fault)
    began = time.monotonic()
    check(step(proxy.url), wanted)
    assert [fired.fault for fired in proxy.fired] == [fault]
    assert proxy.connections == 2
    assert time.monotonic() - began < 2.0


@pytest.mark.parametrize("fault", SLOW, ids=name_of)
def test_a_step_over_a_slow_line(proxy: FaultProxy, wanted: Blocks, fault: Fault) -> None:
    proxy.plan(fault)
    check(step(proxy.url), wanted)
    assert [fired.fault for fired in proxy.fired] == [fault]
    assert (proxy.connections, len(proxy.requests)) == (1, 2)


def test_a_step_over_a_line_that_breaks_again_and_again(proxy: FaultProxy, wanted: Blocks) -> None:
    faults = [Fault("reset", phase) for phase in Phase]
    proxy.plan(*faults)
    check(step(proxy.url), wanted)
    assert len(proxy.fired) == len(faults)


@pytest.mark.parametrize("phase", [Phase.CONNECT, Phase.REQUEST_BODY, Phase.BEFORE_REPLY, Phase.REPLY_BODY])
def test_a_peer_that_falls_silent_costs_the_deadline_and_no_more(proxy: FaultProxy, phase: Phase) -> None:
    proxy.plan(Fault("stall", phase))
    began = time.monotonic()
    with pytest.raises(argrad.DeadlineExceededError):
        step(proxy.url, timeout_s=0.4)
    assert 0.35 < time.monotonic() - began < 1.4
    assert len(proxy.fired) == 1


def test_a_service_that_refuses_is_waited_for(proxy: FaultProxy, wanted: Blocks) -> None:
    """Connections are refused for a second and a half between forward and backward; the step ends soon after."""
    given = {name: tensor.requires_grad_() for name, tensor in problem().items()}
    with argrad.Client(proxy.url, prefetch=False) as client:
        z = argrad.solve_qp(client, **given).z
        proxy.refuse()
        future = client.submit(z.backward, cotangent())
        time.sleep(1.5)
        assert not future.done()
        proxy.accept()
        back_at = time.monotonic()
        future.result(30)
        assert time.monotonic() - back_at < 2.0
    check({"z": z.detach()} | {name: t.grad for name, t in given.items() if t.grad is not None}, wanted)


def test_calls_in_flight_when_the_line_breaks(proxy: FaultProxy, wanted: Blocks) -> None:
    """Thirty-two at once, all cut off before their replies, all there in the end."""
    proxy.plan(*[Fault("reset")] * 32)
    problems = [argrad.QP(**problem()) for _ in range(32)]
    with argrad.Client(proxy.url) as client:
        results = [future.result(60) for future in [client.submit(client.solve, each) for each in problems]]
    for result in results:
        assert_close(result.solution["z"], wanted["z"], 1e-11)
    assert len(proxy.fired) == 32


@pytest.mark.anyio
@pytest.mark.parametrize("nth", [0, 1], ids=["solve", "vjp"])
@pytest.mark.parametrize("fault", ENDS, ids=name_of)
async def test_the_async_client(proxy: FaultProxy, wanted: Blocks, fault: Fault, nth: int) -> None:
    proxy.plan(*[None] * nth, fault)
    async with argrad.AsyncClient(proxy.url) as client:
        result = await client.solve(argrad.QP(**problem()))
        pulled = await client.vjp(result, {"z": cotangent()})
    assert pulled.gradients is not None
    check({"z": result.solution["z"]} | pulled.gradients, wanted)
    assert [fired.fault for fired in proxy.fired] == [fault]


@pytest.mark.anyio
async def test_the_async_client_and_a_silent_peer(proxy: FaultProxy) -> None:
    proxy.plan(Fault("stall"))
    began = time.monotonic()
    async with argrad.AsyncClient(proxy.url) as client:
        with pytest.raises(argrad.DeadlineExceededError):
            await client.solve(argrad.QP(**problem()), timeout_s=0.3)
    assert 0.25 < time.monotonic() - began < 1.3
    assert len(proxy.fired) == 1
