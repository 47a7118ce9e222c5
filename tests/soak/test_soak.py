"""What `make soak` judges by, and a short run of its traffic."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from tests.soak.__main__ import LEAK_BLOCKS_PER_CALL, LEAK_BYTES_PER_CALL, RESIDENT_BYTES_PER_CALL, Soak
from tests.soak.traffic import Caller, Seen
from tests.soak.trend import Trend, trend_of

MIB = 2.0**20


def memory(growth: float, *, noise: float = 4 * MIB, seed: int = 0) -> list[float]:
    """Resident bytes of 600 samples whose noise is a walk that is drawn back, as an allocator's is."""
    random, value, values = np.random.default_rng(seed), 0.0, []
    for i in range(600):
        value = 0.8 * value + random.normal(0, noise / 2)
        values.append(500 * MIB + growth * i / 600 + value)
    return values


def judged(calls: int = 50_000, **trends: Trend) -> Soak:
    flat = Trend(10.0, 0.0, -1.0, 1.0)
    names = ("resident", "in_use", "blocks", "descriptors", "threads", "p99_ms")
    return Soak(seen=Seen(), calls=calls, **(dict.fromkeys(names, flat) | trends))


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_leak(seed: int):
    noise = trend_of(memory(0.0, seed=seed))
    assert judged(resident=noise, in_use=noise, blocks=noise).complaints() == []


@pytest.mark.parametrize("seed", range(5))
def test_a_few_hundred_bytes_a_call_are_a_leak(seed: int):
    run = judged(in_use=trend_of(memory(3 * LEAK_BYTES_PER_CALL * 50_000, seed=seed)))
    assert run.leaks
    assert "memory in use grows by" in run.complaints()[0]


def test_a_few_blocks_a_call_are_a_leak():
    assert judged(blocks=trend_of(memory(3 * LEAK_BLOCKS_PER_CALL * 50_000, noise=1000))).leaks


def test_resident_memory_is_judged_too():
    run = judged(resident=trend_of(memory(3 * RESIDENT_BYTES_PER_CALL * 50_000, noise=MIB / 10)))
    assert not run.leaks
    assert run.complaints()[0].startswith("resident memory grows by 30")


def test_a_p99_that_grows_is_seen_and_a_machine_that_is_taken_for_a_while_is_not():
    rising = [10.0 + 0.3 * i for i in range(40)]
    assert judged(p99_ms=trend_of(rising)).complaints() == ["the p99 of a solve grew by 12.0 ms"]
    disturbed = [10.0 + (i % 3) for i in range(32)] + [60.0] * 6 + [10.0, 11.0]
    assert judged(p99_ms=trend_of(disturbed)).complaints() == []


def test_the_interval_holds_the_growth():
    trend = trend_of(memory(30 * MIB))
    assert trend.low < 30 * MIB < trend.high
    assert trend.high - trend.low < 15 * MIB


def test_what_never_changes_does_not_grow():
    assert trend_of([4.0] * 100) == Trend(4.0, 0.0, 0.0, 0.0)


def test_too_few_values_are_refused():
    with pytest.raises(ValueError, match="39 values, wanted 40 or more"):
        trend_of([1.0] * 39)


@pytest.mark.slow
def test_the_traffic_calls_in_every_way_and_finds_nothing_wrong(service_url: str):
    seen, stop = Seen(), threading.Event()
    caller = Caller(service_url, 0, seen, stop)
    caller.start()
    for _ in range(300):
        if len(seen.calls) == 10:
            break
        stop.wait(0.1)
    stop.set()
    caller.join(30)
    assert seen.wrong == []
    assert len(seen.calls) == 10, seen.calls
    assert seen.latencies_s
