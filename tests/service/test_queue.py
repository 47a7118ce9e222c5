"""What goes together, in which order and why: with a clock of the tests' own, and then with threads."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from argrad_service.scheduling import (
    Budget,
    CallerGone,
    DeadlinePassed,
    Job,
    Queue,
    Scheduler,
    Share,
    SolverCrashed,
    Unfinished,
)
from argrad_service.scheduling.scheduler import GATHERING_S, QUIET_TURNS
from tests.service.support import wait_until
from tests.service.test_scheduling import SOON, Gate, StoppedEarly, deadline, stays

pytestmark = pytest.mark.anyio

WIDE = Budget(flops=1e9, nbytes=1 << 30)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def share(key: str = "k", *, flops: float = 1.0, nbytes: int = 1, together: Callable[..., Any] | None = None) -> Any:
    return Share(key=key, flops=flops, nbytes=nbytes, item=None, together=together or (lambda jobs, _: [7] * len(jobs)))


class Waiting:
    """A queue whose jobs have names."""

    def __init__(self, budget: Budget | None = WIDE) -> None:
        self.clock, self.queue, self.names = Clock(), Queue(budget), {}

    def push(self, name: str, share: Any = None, *, is_backward: bool = False, left_s: float = 60.0) -> Job[Any]:
        until = self.clock.now + left_s
        job: Job[Any] = Job(lambda _: None, deadline=until, is_backward=is_backward, clock=self.clock, share=share)
        self.names[job] = name
        self.queue.push(job, self.clock.now)
        return job

    def take(self, *, was_idle: bool = False) -> tuple[list[str], str] | None:
        batch = self.queue.take(was_idle=was_idle)
        return None if batch is None else ([self.names[job] for job in batch.jobs], batch.reason)


async def test_what_is_alike_goes_together_and_the_rest_in_its_turn():
    waiting = Waiting()
    for name in ("a1", "b1", "a2", "c", "b2", "a3"):
        waiting.push(name, None if name == "c" else share(name[0]))
    assert len(waiting.queue) == 6
    assert waiting.take(was_idle=True) == (["a1", "a2", "a3"], "idle")
    assert waiting.take() == (["b1", "b2"], "freed")
    assert waiting.take() == (["c"], "alone")
    assert waiting.take() is None
    assert len(waiting.queue) == 0


@pytest.mark.parametrize("cost", [{"flops": 4e8}, {"nbytes": 400 << 20}], ids=["flops", "bytes"])
async def test_a_batch_ends_with_its_budget(cost: dict[str, Any]):
    waiting = Waiting()
    for name in ("1", "2", "3"):
        waiting.push(name, share(**cost))
    assert waiting.take() == (["1", "2"], "budget")
    assert waiting.take() == (["3"], "freed")


async def test_what_alone_is_over_the_budget_goes_all_the_same():
    waiting = Waiting()
    waiting.push("large", share(flops=5e9))
    waiting.push("small", share())
    assert waiting.take() == (["large"], "budget")
    assert waiting.take() == (["small"], "freed")


async def test_backward_goes_first_until_a_forward_has_waited_long():
    waiting = Waiting()
    waiting.push("old forward", share())
    waiting.clock.now += 1.5
    waiting.push("young forward", share("other"))
    waiting.push("backward", is_backward=True)
    assert waiting.take() == (["old forward"], "freed")
    assert waiting.take() == (["backward"], "alone")
    assert waiting.take() == (["young forward"], "freed")


async def test_callers_who_left_and_late_work_are_dropped_when_a_batch_is_formed():
    waiting = Waiting()
    waiting.push("first", share())
    gone, late = waiting.push("gone", share()), waiting.push("late", share(), left_s=1.0)
    waiting.push("last", share())
    gone.abandon(CallerGone())
    waiting.clock.now += 2.0
    assert waiting.take() == (["first", "last"], "freed")
    assert waiting.queue.dropped == 2
    await asyncio.sleep(0)
    assert isinstance(late.future.exception(), DeadlinePassed)
    assert isinstance(gone.future.exception(), CallerGone)


async def test_without_a_budget_nothing_goes_together():
    waiting = Waiting(None)
    for name in ("1", "2"):
        waiting.push(name, share())
    assert [waiting.take(), waiting.take()] == [(["1"], "alone"), (["2"], "alone")]


async def test_time_in_the_queue_is_noted_for_each_of_a_batch():
    waiting = Waiting()
    first = waiting.push("1", share())
    waiting.clock.now += 2.0
    second = waiting.push("2", share())
    waiting.clock.now += 1.0
    waiting.take()
    assert (first.queued_s, second.queued_s) == (3.0, 1.0)


class Busy:
    """A scheduler whose thread is busy until `free` is awaited, so that what is submitted meanwhile accumulates."""

    async def __aenter__(self) -> Busy:
        self.scheduler = Scheduler(threads=1, max_queue=64, stopped=(StoppedEarly,), budget=WIDE)
        self.scheduler.start()
        self._gate = Gate()
        self._first = self.scheduler.submit(self._gate, deadline=deadline())
        await self._gate.wait_until_entered()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._gate.opened.set()
        await asyncio.to_thread(self.scheduler.stop, SOON)

    async def free(self) -> None:
        self._gate.opened.set()
        await self._first.future

    def submit(self, work: Callable[[Job[Any]], Any], share: Any) -> Job[Any]:
        return self.scheduler.submit(work, deadline=deadline(), share=share)


def solo(value: object) -> Callable[[Job[Any]], Any]:
    return lambda _: value


async def test_under_concurrency_batches_hold_more_than_one_call_and_say_why_they_went():
    sizes: list[int] = []

    def together(jobs: Sequence[Job[Any]], _: object) -> list[int]:
        sizes.append(len(jobs))
        return list(range(len(jobs)))

    async with Busy() as busy:
        jobs = [busy.submit(solo(-1), share(together=together)) for _ in range(20)]
        await busy.free()
        assert [await busy.scheduler.result(job, stays) for job in jobs] == list(range(20))
        tally = busy.scheduler.tally()
    assert sizes == [20]
    assert tally.released == {"idle": 0, "freed": 1, "budget": 0, "alone": 1}
    assert tally.calls / tally.batches > 1


async def test_who_comes_alone_goes_alone_and_at_once():
    scheduler = Scheduler(threads=1, max_queue=4, budget=WIDE)
    scheduler.start()
    for _ in range(3):
        assert await scheduler.result(scheduler.submit(solo(1), deadline=deadline(), share=share()), stays) == 1
    assert scheduler.tally().sizes[0] == 3
    assert scheduler.tally().released["idle"] + scheduler.tally().released["freed"] == 3
    await asyncio.to_thread(scheduler.stop, SOON)


async def test_a_batch_that_fails_is_done_one_by_one_and_harms_nobody():
    def fail(*_: object) -> list[Any]:
        raise ValueError("the batch")

    def wrong(_: Job[Any]) -> None:
        raise ValueError("mine alone")

    async with Busy() as busy:
        jobs = [busy.submit(work, share(together=fail)) for work in (solo(1), wrong, solo(3))]
        await busy.free()
        first, second, third = await asyncio.gather(*(job.future for job in jobs), return_exceptions=True)
    assert (first, str(second), third) == (1, "mine alone", 3)


async def test_each_of_a_batch_gets_its_own_result_or_its_own_error():
    async with Busy() as busy:
        wrong = ValueError("mine alone")
        shared = share(together=lambda *_: [1, wrong, None])
        jobs = [busy.submit(solo(0), shared) for _ in range(3)]
        await busy.free()
        found = await asyncio.gather(*(job.future for job in jobs), return_exceptions=True)
    assert found[:2] == [1, wrong]
    assert isinstance(found[2], DeadlinePassed)


async def test_a_batch_stops_once_all_its_callers_have_left_and_not_before():
    entered = threading.Event()

    def together(jobs: Sequence[Job[Any]], should_stop: Callable[[], bool]) -> list[Any]:
        assert not should_stop()
        entered.set()
        assert seen.wait(SOON)
        assert not should_stop()
        seen_one.set()
        while not should_stop():
            pass
        raise StoppedEarly

    seen, seen_one = threading.Event(), threading.Event()
    async with Busy() as busy:
        jobs = [busy.submit(solo(0), share(together=together)) for _ in range(2)]
        await busy.free()
        assert await asyncio.to_thread(entered.wait, SOON)
        jobs[0].abandon(CallerGone())
        seen.set()
        assert await asyncio.to_thread(seen_one.wait, SOON)
        jobs[1].abandon(CallerGone())
        taken = busy.scheduler.submit(solo(7), deadline=deadline())
        assert await taken.future == 7
        for job in jobs:
            assert isinstance(job.future.exception(), CallerGone)


async def test_a_crash_of_the_thread_answers_a_whole_batch():
    def crash(*_: object) -> list[Any]:
        raise SystemExit("the thread ends")

    async with Busy() as busy:
        jobs = [busy.submit(solo(0), share(together=crash)) for _ in range(3)]
        await busy.free()
        found = await asyncio.gather(*(job.future for job in jobs), return_exceptions=True)
        assert [type(error) for error in found] == [SolverCrashed] * 3
        assert await busy.submit(solo(7), share()).future == 7
        # the thread answers before it counts
        await asyncio.to_thread(wait_until, lambda: busy.scheduler.health().running == 0)


async def test_a_crash_while_a_batch_is_done_one_by_one_leaves_the_others_to_the_next_thread():
    def fail(*_: object) -> list[Any]:
        raise ValueError("the batch")

    def crash(_: Job[Any]) -> None:
        raise SystemExit("the thread ends")

    async with Busy() as busy:
        jobs = [busy.submit(work, share(together=fail)) for work in (crash, solo(2), solo(3))]
        await busy.free()
        found = await asyncio.gather(*(job.future for job in jobs), return_exceptions=True)
        assert isinstance(found[0], SolverCrashed)
        assert found[1:] == [2, 3]


async def test_unfinished_work_gets_another_turn_after_what_waits_by_then():
    order: list[str] = []

    def in_two(_: Job[Any]) -> str:
        order.append("piece")
        if order.count("piece") < 3:
            raise Unfinished
        return "done"

    async with Busy() as busy:
        large = busy.scheduler.submit(in_two, deadline=deadline())
        small = busy.scheduler.submit(lambda _: order.append("small"), deadline=deadline())
        await busy.free()
        assert await large.future == "done"
        await small.future
    assert order == ["piece", "small", "piece", "piece"]


class Sizes:
    """Sizes of the batches that a scheduler makes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, threads: int = 1) -> None:
        self.found: list[int] = []
        self.scheduler = Scheduler(threads=threads, max_queue=16, budget=WIDE, clock=clock)

    def submit(self) -> Job[int]:
        return self.scheduler.submit(self._alone, deadline=1e9, share=share(together=self._together))

    async def __aenter__(self) -> Sizes:
        self.scheduler.start()
        await asyncio.sleep(0.05)  # until the threads wait
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.scheduler.stop, SOON)

    def _together(self, jobs: Sequence[Job[int]], should_stop: Callable[[], bool]) -> list[int]:
        assert not should_stop()
        self.found.append(len(jobs))
        return [0] * len(jobs)

    def _alone(self, job: Job[int]) -> int:
        assert job.share is not None
        self.found.append(1)
        return 0


async def test_what_one_turn_of_the_loop_brings_goes_together_to_an_idle_thread() -> None:
    async with Sizes(threads=2) as sizes:
        for calls in (5, 1):
            await asyncio.gather(*(job.future for job in [sizes.submit() for _ in range(calls)]))
            await asyncio.sleep(0.05)
    assert sizes.found == [5, 1]


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_who_had_company_waits_for_the_turns_of_the_loop_that_bring_more() -> None:
    async with Sizes(Clock()) as sizes:
        await asyncio.gather(*(job.future for job in (sizes.submit(), sizes.submit())))
        for calls in (4, 1):
            jobs = [sizes.submit()]
            for _ in range(calls - 1):
                await turns(QUIET_TURNS - 1)
                jobs.append(sizes.submit())
            await asyncio.gather(*(job.future for job in jobs))
            await asyncio.sleep(0.05)
    assert sizes.found == [2, 4, 1]


async def test_who_had_no_company_goes_at_once() -> None:
    async with Sizes(Clock()) as sizes:
        for _ in range(2):
            first = sizes.submit()
            await turns(1)
            assert not sizes.scheduler.is_gathering
            await first.future
    assert sizes.found == [1, 1]


async def test_gathering_ends_however_many_come() -> None:
    clock = Clock()
    async with Sizes(clock) as sizes:
        await asyncio.gather(*(job.future for job in (sizes.submit(), sizes.submit())))
        jobs = [sizes.submit()]
        for _ in range(10):
            await turns(1)
            if not sizes.scheduler.is_gathering:
                break
            clock.now += GATHERING_S / 4
            jobs.append(sizes.submit())
        await asyncio.gather(*(job.future for job in jobs))
    assert sizes.found == [2, len(jobs)]
    assert 4 <= len(jobs) <= 7
