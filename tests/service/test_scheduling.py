from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from argrad_service.scheduling import (
    CallerGone,
    DeadlinePassed,
    Job,
    Overloaded,
    Pending,
    PendingLimits,
    Scheduler,
    SolverCrashed,
    Stopping,
    Unfinished,
)

pytestmark = pytest.mark.anyio

SOON = 5.0
"""Seconds after which a test that waits has failed."""


class StoppedEarly(Exception):  # noqa: N818 - as the engine's own
    """How the work of these tests says that it ended because it was told to."""


@asynccontextmanager
async def scheduling(*, max_queue: int = 16, threads: int = 1) -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(threads=threads, max_queue=max_queue, stopped=(StoppedEarly,))
    scheduler.start()
    try:
        yield scheduler
    finally:
        await asyncio.to_thread(scheduler.stop, SOON)


async def stays() -> None:
    """A caller who never goes."""
    await asyncio.Event().wait()


def deadline(seconds: float = SOON) -> float:
    return time.monotonic() + seconds


def until_stopped(job: Job[None]) -> None:
    """Work that ends only when told to."""
    began = time.monotonic()
    while not job.should_stop():
        assert time.monotonic() < began + SOON
        time.sleep(0.001)
    raise StoppedEarly


class Gate:
    """Work that keeps a solver thread busy until it is opened."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, _: Job[None]) -> None:
        self.entered.set()
        assert self.opened.wait(SOON)

    async def wait_until_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, SOON)


async def test_work_runs_on_another_thread_and_its_result_comes_back():
    async with scheduling() as scheduler:
        job = scheduler.submit(lambda _: threading.current_thread().name, deadline=deadline())
        assert await scheduler.result(job, stays) == "argrad-solver"


async def test_what_work_raises_comes_back_and_the_thread_lives():
    def fail(_: Job[None]) -> None:
        raise ValueError("wrong")

    async with scheduling() as scheduler:
        with pytest.raises(ValueError, match="wrong"):
            await scheduler.result(scheduler.submit(fail, deadline=deadline()), stays)
        assert await scheduler.result(scheduler.submit(lambda _: 7, deadline=deadline()), stays) == 7
        assert scheduler.health().restarts == 0


async def test_backward_goes_before_forward_and_each_in_order():
    order: list[str] = []
    gate = Gate()
    async with scheduling() as scheduler:
        jobs = [scheduler.submit(gate, deadline=deadline())]
        await gate.wait_until_entered()
        jobs += [
            scheduler.submit(lambda _, name=name: order.append(name), deadline=deadline(), is_backward=name[0] == "b")
            for name in ("forward 1", "forward 2", "backward 1", "backward 2")
        ]
        gate.opened.set()
        await asyncio.gather(*(scheduler.result(job, stays) for job in jobs))
    assert order == ["backward 1", "backward 2", "forward 1", "forward 2"]


async def test_a_forward_that_waited_long_is_not_overtaken():
    now, order, gate = 0.0, [], Gate()
    scheduler = Scheduler(threads=1, max_queue=16, clock=lambda: now)
    scheduler.start()
    jobs = [scheduler.submit(gate, deadline=1e9)]
    await gate.wait_until_entered()
    jobs.append(scheduler.submit(lambda _: order.append("old forward"), deadline=1e9))
    now = 1.5
    jobs.append(scheduler.submit(lambda _: order.append("forward"), deadline=1e9))
    jobs.append(scheduler.submit(lambda _: order.append("backward"), deadline=1e9, is_backward=True))
    gate.opened.set()
    await asyncio.gather(*(job.future for job in jobs))
    await asyncio.to_thread(scheduler.stop, SOON)
    assert order == ["old forward", "backward", "forward"]


async def test_a_full_queue_refuses_and_estimates_when_to_come_back():
    now, gate = 0.0, Gate()
    scheduler = Scheduler(threads=1, max_queue=2, clock=lambda: now)
    scheduler.start()
    running = scheduler.submit(gate, deadline=1e9)
    await gate.wait_until_entered()
    now = 4.0  # what the running job will have taken
    gate.opened.set()
    await running.future
    slow = Gate()
    jobs = [scheduler.submit(slow, deadline=1e9)]
    await slow.wait_until_entered()
    jobs += [scheduler.submit(lambda _: None, deadline=1e9) for _ in range(2)]
    waits = []
    for later in (0.0, 0.0, 3.0, 0.0, 7.0):
        now += later
        with pytest.raises(Overloaded, match="2 calls wait for the solver, the limit") as caught:
            scheduler.submit(lambda _: None, deadline=1e9)
        waits.append(caught.value.retry_after_s)
    # A place is free every four seconds: after 4 s, 8 s and, asked 3 s later, 9 s and 13 s more. The job that runs has
    # then run 10 s, longer than the mean: a place every ten seconds, from the 16th on.
    assert waits == [4, 8, 9, 13, 16]
    slow.opened.set()
    await asyncio.gather(*(job.future for job in jobs))
    await asyncio.to_thread(scheduler.stop, SOON)


async def test_callers_who_left_make_room_in_a_full_queue():
    gate = Gate()
    async with scheduling(max_queue=1) as scheduler:
        running = scheduler.submit(gate, deadline=deadline())
        await gate.wait_until_entered()
        left = scheduler.submit(lambda _: None, deadline=deadline())
        left.abandon(CallerGone())
        taken = scheduler.submit(lambda _: 7, deadline=deadline())
        gate.opened.set()
        assert await taken.future == 7
        await running.future
        with pytest.raises(CallerGone):
            await left.future


async def test_a_deadline_answers_at_once_and_stops_the_work():
    async with scheduling() as scheduler:
        began = time.monotonic()
        job = scheduler.submit(until_stopped, deadline=deadline(0.05))
        with pytest.raises(DeadlinePassed):
            await scheduler.result(job, stays)
        assert 0.04 < time.monotonic() - began < 1.0
        assert await scheduler.result(scheduler.submit(lambda _: 7, deadline=deadline()), stays) == 7


async def test_a_deadline_that_passes_in_the_queue_means_that_the_work_never_runs():
    gate, ran = Gate(), []
    async with scheduling() as scheduler:
        running = scheduler.submit(gate, deadline=deadline())
        await gate.wait_until_entered()
        late = scheduler.submit(lambda _: ran.append(1), deadline=deadline(0.02))
        with pytest.raises(DeadlinePassed):
            await scheduler.result(late, stays)
        gate.opened.set()
        await running.future
    assert ran == []


async def test_a_caller_who_goes_stops_the_work():
    gone = asyncio.Event()

    async def goes() -> None:
        await gone.wait()

    async with scheduling() as scheduler:
        job = scheduler.submit(until_stopped, deadline=deadline())
        asyncio.get_running_loop().call_later(0.05, gone.set)
        with pytest.raises(CallerGone):
            await scheduler.result(job, goes)
        assert await scheduler.result(scheduler.submit(lambda _: 7, deadline=deadline()), stays) == 7


async def test_a_wait_that_is_cancelled_stops_the_work():
    async with scheduling() as scheduler:
        job = scheduler.submit(until_stopped, deadline=deadline())
        waiting = asyncio.create_task(scheduler.result(job, stays))
        await asyncio.sleep(0.02)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert job.should_stop()
        assert await scheduler.result(scheduler.submit(lambda _: 7, deadline=deadline()), stays) == 7


async def test_a_crash_of_the_thread_answers_its_caller_and_another_thread_takes_over():
    def crash(_: Job[None]) -> None:
        raise SystemExit("the thread ends")

    async with scheduling() as scheduler:
        job = scheduler.submit(crash, deadline=deadline())
        with pytest.raises(SolverCrashed, match="the solver thread ended during this call"):
            await scheduler.result(job, stays)
        assert await scheduler.result(scheduler.submit(lambda _: 7, deadline=deadline()), stays) == 7
        health = scheduler.health()
        assert (health.alive, health.threads, health.restarts) == (1, 1, 1)
        assert health.last_crash == "SystemExit: the thread ends"


async def test_stopping_answers_whoever_waits_and_takes_no_more():
    gate = Gate()
    scheduler = Scheduler(threads=1, max_queue=4)
    scheduler.start()
    running = scheduler.submit(gate, deadline=deadline())
    await gate.wait_until_entered()
    waiting = scheduler.submit(lambda _: None, deadline=deadline())
    stopping = asyncio.create_task(asyncio.to_thread(scheduler.stop, SOON))
    with pytest.raises(Stopping):
        await waiting.future
    with pytest.raises(Stopping):
        scheduler.submit(lambda _: None, deadline=deadline())
    gate.opened.set()
    await running.future
    await stopping
    assert scheduler.health().alive == 0


async def test_several_threads_solve_at_the_same_time():
    barrier = threading.Barrier(3, timeout=SOON)
    async with scheduling(threads=3) as scheduler:
        jobs = [scheduler.submit(lambda _: barrier.wait(), deadline=deadline()) for _ in range(3)]
        assert sorted([await job.future for job in jobs]) == [0, 1, 2]


async def test_time_in_the_queue_is_noted():
    gate = Gate()
    async with scheduling() as scheduler:
        running = scheduler.submit(gate, deadline=deadline())
        await gate.wait_until_entered()
        job = scheduler.submit(lambda job: job.queued_s, deadline=deadline())
        await asyncio.sleep(0.05)
        gate.opened.set()
        await running.future
        assert 0.04 < await job.future < 1.0


async def test_time_between_slices_counts_as_queued_and_their_own_does_not():
    slices = iter([0.05, 0.05, 0.05])

    def work(job: Job[float]) -> float:
        for seconds in slices:
            time.sleep(seconds)
            raise Unfinished
        return job.queued_s

    async with scheduling() as scheduler:
        assert await scheduler.submit(work, deadline=deadline()).future < 0.05


def test_pending_counts_calls_and_bytes():
    pending = Pending(PendingLimits(calls=2, nbytes=100))
    assert pending.enter()
    assert pending.grow(150), "a call that is alone is bound by the size of a body only"
    assert pending.enter()
    assert not pending.enter()
    assert not pending.grow(1)
    pending.leave(150)
    assert pending.grow(100)
    pending.leave(100)
    assert (pending.calls, pending.nbytes) == (0, 0)
