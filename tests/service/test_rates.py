from __future__ import annotations

import asyncio

import pytest

from argrad_service.state import MemoryRateCounter


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_counter() -> tuple[MemoryRateCounter, Clock]:
    clock = Clock()
    return MemoryRateCounter(clock=clock), clock


def take(counter: MemoryRateCounter, owner: str = "me", **more: float) -> float:
    return asyncio.run(counter.take(owner, **{"per_minute": 60.0, **more}))


def test_a_burst_is_admitted_and_the_next_call_waits_for_its_share_of_a_minute():
    counter, clock = make_counter()
    assert [take(counter, burst=3) for _ in range(3)] == [0.0] * 3
    assert take(counter, burst=3) == pytest.approx(1.0)
    clock.now += 0.25
    assert take(counter, burst=3) == pytest.approx(0.75)
    clock.now += 0.75
    assert take(counter, burst=3) == 0.0
    assert take(counter, burst=3) == pytest.approx(1.0)


def test_a_minutes_calls_may_come_at_once_by_default():
    counter, _ = make_counter()
    assert [take(counter, per_minute=7.0) for _ in range(7)] == [0.0] * 7
    assert take(counter, per_minute=7.0) == pytest.approx(60 / 7)


def test_rest_fills_the_bucket_and_no_more():
    counter, clock = make_counter()
    clock.now += 1e6
    assert [take(counter, burst=2) > 0 for _ in range(3)] == [False, False, True]


def test_owners_are_counted_apart():
    counter, _ = make_counter()
    assert take(counter, burst=1) == 0.0
    assert take(counter, "you", burst=1) == 0.0
    assert take(counter, burst=1) > 0.0


def test_a_refused_call_costs_nothing():
    counter, clock = make_counter()
    take(counter, burst=1)
    assert [take(counter, burst=1) for _ in range(5)] == [pytest.approx(1.0)] * 5
    clock.now += 1.0
    assert take(counter, burst=1) == 0.0


def test_a_costly_call_counts_as_several_and_one_over_the_burst_as_the_burst():
    counter, clock = make_counter()
    assert take(counter, burst=10, cost=8) == 0.0
    assert take(counter, burst=10, cost=4) == pytest.approx(2.0)
    clock.now += 100.0
    assert take(counter, burst=10, cost=1000) == 0.0
    assert take(counter, burst=10) == pytest.approx(1.0)


def test_a_limit_of_less_than_one_a_minute_still_admits_the_first():
    counter, clock = make_counter()
    assert take(counter, per_minute=0.5) == 0.0
    assert take(counter, per_minute=0.5) == pytest.approx(120.0)
    clock.now += 120.0
    assert take(counter, per_minute=0.5) == 0.0


def test_owners_that_rest_are_forgotten():
    counter, clock = make_counter()

    async def take_many() -> None:
        for i in range(5000):
            clock.now += 2.0
            await counter.take(f"owner {i}", per_minute=60.0, burst=1)

    asyncio.run(take_many())
    assert len(counter._full_at) < 1100
