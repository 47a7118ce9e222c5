"""Clocks that jump: what expires does so by the service's own clock, and costs a training loop nothing but time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import httpx
import pytest
import torch

import argrad
from argrad.nn import QPLayer
from tests.service.support import D, make_app, serving, simplex

pytestmark = pytest.mark.slow

STEPS = 20
DAY_S = 86_400.0


class Clock:
    """Monotonic seconds that can be made to jump; backwards too, which none should, and virtual machines have."""

    def __init__(self) -> None:
        self.offset_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.offset_s


def train(client: argrad.Client, at: Callable[[int], None] = lambda _: None) -> list[float]:
    """Losses of twenty steps; `at` is called between the forward and the backward pass of each."""
    random = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=random, dtype=D)
    Q, G, h = root @ root.mT + torch.eye(6, dtype=D), -torch.eye(6, dtype=D), torch.zeros(6, dtype=D)
    target = torch.rand(8, 6, generator=random, dtype=D)
    q = torch.randn(8, 6, generator=random, dtype=D).requires_grad_()
    losses = []
    for step in range(STEPS):
        loss = (QPLayer(client)(Q, q, G, h) - target).square().sum()
        at(step)
        (gradient,) = torch.autograd.grad(loss, q)
        q = (q - 0.5 * gradient).detach().requires_grad_()
        losses.append(float(loss.detach()))
    return losses


@pytest.fixture(scope="module")
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def url(clock: Clock) -> Iterator[str]:
    with serving(make_app(clock=clock)) as url:
        yield url


@pytest.fixture(scope="module")
def undisturbed(url: str) -> list[float]:
    with argrad.Client(url, prefetch=False) as client:
        losses = train(client)
    assert losses[-1] < 0.9 * losses[0]
    return losses


def is_there(url: str, token: str) -> bool:
    body = {"state": token, "upstream": {"z": [1, 0]}}
    reply = httpx.post(f"{url}/v1/vjp", json=body, trust_env=False)
    assert reply.status_code in (200, 409), reply.text
    return reply.status_code == 200


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S], ids=["forwards", "backwards"])
def test_a_jump_of_the_service_s_clock_between_forward_and_backward_loses_no_step(
    clock: Clock, url: str, undisturbed: list[float], jump_s: float
):
    token = httpx.post(f"{url}/v1/solve", json={"problem": simplex()}, trust_env=False).json()["state"]
    assert is_there(url, token)

    def jump(step: int) -> None:
        if step in (3, 11):
            clock.offset_s += jump_s

    with argrad.Client(url, prefetch=False) as client:
        losses = train(client, jump)
    torch.testing.assert_close(losses, undisturbed, rtol=1e-9, atol=1e-9)
    if jump_s > 0:
        assert not is_there(url, token), "it fired: what was kept has expired"


def test_a_jump_of_the_time_of_day_changes_nothing(url: str, undisturbed: list[float], monkeypatch: pytest.MonkeyPatch):
    """In this process: of the service, and of its client's deadlines."""
    real, offset, asked = time.time, [0.0], []

    def jumping() -> float:
        asked.append(offset[0])
        return real() + offset[0]

    monkeypatch.setattr(time, "time", jumping)

    def jump(step: int) -> None:
        offset[0] = 10 * DAY_S * (-1) ** step
        time.time()

    with argrad.Client(url, prefetch=False, timeout_s=30.0) as client:
        losses = train(client, jump)
    assert {10 * DAY_S, -10 * DAY_S} <= set(asked)
    torch.testing.assert_close(losses, undisturbed, rtol=1e-9, atol=1e-9)


def test_rates_and_deadlines_outlive_a_jump_of_the_clock_backwards():
    """Nobody is locked out until the clock has caught up, and a deadline is a length of time."""
    clock = Clock()
    with serving(make_app(clock=clock, rate_limit_per_minute=6.0)) as url, httpx.Client(trust_env=False) as client:

        def solve() -> httpx.Response:
            headers = {"argrad-timeout-ms": "20000"}
            return client.post(f"{url}/v1/solve", json={"problem": simplex()}, headers=headers)

        statuses = [solve().status_code for _ in range(8)]
        assert statuses.count(429) >= 1, "the limit is there"
        refused = solve()
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        clock.offset_s -= DAY_S
        assert solve().status_code == 200
        clock.offset_s += DAY_S
        assert solve().status_code == 200
