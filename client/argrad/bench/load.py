"""Closed and open loops: who begins a step when, and what is counted of it.

In an open loop a latency begins at the moment at which the step was due. If the service stalls, the steps that were due
meanwhile wait, and their wait counts; a clock that began when a step could be sent would not see it (coordinated
omission).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import selectors
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from argrad.bench.batches import Batches
from argrad.bench.connection import Line
from argrad.bench.histogram import Histogram
from argrad.bench.plan import Plan
from argrad.bench.steps import Taken
from argrad.errors import ArgradError, ServiceError

_PAUSE_S = 0.1
"""What a caller in a closed loop waits after a failure for which the service names no time."""

WAITING = "waiting to be sent"
REST = "client and wire"
INTERRUPTED = "interrupted"


class Taker(Protocol):
    """Takes steps; `argrad.bench.steps.Stepper` is one."""

    def line(self) -> Line:
        """A connection of one caller."""
        ...

    async def take(self, number: int, line: Line) -> Taken:
        """Take one step, or raise."""
        ...


@dataclass
class Tally:
    """What came of the steps that were begun while it was measured; in an open loop some were due before.

    Args:
        latencies: From the moment at which a step was due to its last reply.
        stages_ms: Sums, by stage; those of the service, and `WAITING` and `REST`.
        statuses: Problems by status.
        errors: Steps that failed, by kind.
        calls: Exchanges with the service.
        resent: Steps whose state was gone.
        unsent: Open loop: steps that were due by the end and never begun, since too many were in flight.
        ended: Steps that ended well before the measurement did.
        measured_s: Seconds that were measured.
        client_s: Processor seconds of this process meanwhile.
        is_interrupted: Whether somebody ended it before its time.
        batches: What the service solved together meanwhile, whoever called; None if it does not say.
    """

    latencies: Histogram = field(default_factory=Histogram)
    stages_ms: dict[str, float] = field(default_factory=dict)
    statuses: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    resent: int = 0
    unsent: int = 0
    ended: int = 0
    measured_s: float = 0.0
    client_s: float = 0.0
    is_interrupted: bool = False
    batches: Batches | None = None


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Seconds from the start at which steps are due: Poisson, without end."""
    random, at = np.random.default_rng(seed), 0.0
    while True:
        for gap in random.exponential(1.0 / rate, 1024):
            at += float(gap)
            yield at


def measure(plan: Plan, taker: Taker, scrape: Callable[[], Batches | None]) -> Tally:
    """Load a service as planned; Ctrl-C ends it, and what was counted until then comes back.

    Args:
        plan: The load.
        taker: Takes the steps.
        scrape: Asked, in a thread, as the measurement begins and as it ends.
    """
    # epoll counts in milliseconds, select in microseconds; in an open loop a step is due at a moment.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        return runner.run(_Load(plan, taker).run(scrape))


class _Load:
    """One measurement."""

    def __init__(self, plan: Plan, taker: Taker) -> None:
        self._plan, self._taker = plan, taker
        self._tally, self._numbers = Tally(), itertools.count()
        self._over = asyncio.Event()
        self._first = self._last = 0.0
        self._idle: list[Line] = []

    async def run(self, scrape: Callable[[], Batches | None]) -> Tally:
        plan, tally = self._plan, self._tally
        began = time.perf_counter()
        self._first = began + plan.warmup_s
        self._last = self._first + plan.duration_s
        due = None if plan.rate is None else (began + at for at in arrivals(plan.rate, plan.seed))
        with self._ended_by_a_signal():
            callers = [asyncio.create_task(self._call(due)) for _ in range(plan.connections)]
            await self._until(self._first)
            before, cpu_s = asyncio.create_task(asyncio.to_thread(scrape)), time.process_time()
            await self._until(self._last)
            tally.client_s = time.process_time() - cpu_s
            tally.measured_s = max(0.0, min(time.perf_counter(), self._last) - self._first)
            after = asyncio.create_task(asyncio.to_thread(scrape))
            # Steps under way are part of what was measured; each has a deadline.
            everyone = asyncio.gather(*callers)
            over = asyncio.create_task(self._over.wait())
            over.add_done_callback(lambda _: everyone.cancel())
            with contextlib.suppress(asyncio.CancelledError):
                await everyone
            over.cancel()
            for line in self._idle:
                line.close()
        tally.batches = _difference(await before, await after)
        return tally

    async def _call(self, due: Iterator[float] | None) -> None:
        """One caller of a closed loop, or one of those who share the steps of an open one."""
        if due is None:
            while (now := time.perf_counter()) < self._last:
                await asyncio.sleep(min(await self._step(now), self._last - now))
            return
        for at in due:
            if at >= self._last:
                return
            await asyncio.sleep(at - time.perf_counter())
            if time.perf_counter() < self._last:
                await self._step(at)
            else:
                self._tally.unsent += 1

    async def _step(self, due_at: float) -> float:
        """Take a step that was due then, and count it; returns for how long to pause."""
        begun_at = time.perf_counter()
        is_measured = begun_at >= self._first
        # The connection that was used last: as many are open as steps are under way, not as there are callers.
        line = self._idle.pop() if self._idle else self._taker.line()
        try:
            taken = await self._taker.take(next(self._numbers), line)
        except ArgradError as error:
            self._tally.errors[kind_of(error)] += is_measured
            retry_after_s = error.retry_after_s if isinstance(error, ServiceError) else None
            return _PAUSE_S if retry_after_s is None else retry_after_s
        except asyncio.CancelledError:
            self._tally.errors[INTERRUPTED] += is_measured
            raise
        finally:
            self._idle.append(line)
        if self._first <= taken.finished_at < self._last:
            self._tally.ended += 1
            self._tally.calls += taken.calls
        if is_measured:
            self._count(taken, due_at, begun_at)
        return 0.0

    def _count(self, taken: Taken, due_at: float, begun_at: float) -> None:
        tally, latency_s = self._tally, taken.finished_at - due_at
        tally.latencies.add(latency_s)
        tally.statuses.update(taken.statuses)
        tally.resent += taken.resent
        stages_ms = dict(taken.stages_ms)
        if self._plan.rate is not None:
            stages_ms[WAITING] = 1e3 * (begun_at - due_at)
        stages_ms[REST] = 1e3 * latency_s - sum(stages_ms.values())
        for name, ms in stages_ms.items():
            tally.stages_ms[name] = tally.stages_ms.get(name, 0.0) + ms

    async def _until(self, moment: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), max(0.0, moment - time.perf_counter()))

    @contextlib.contextmanager
    def _ended_by_a_signal(self) -> Iterator[None]:
        """Let Ctrl-C end the measurement in good order, where this is the thread that gets it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    def _interrupt(self) -> None:
        self._tally.is_interrupted = True
        self._over.set()


def kind_of(error: ArgradError) -> str:
    """What a failure is counted as: HTTP status and problem type, or the name of the exception."""
    return f"{error.status_code} {error.type}" if isinstance(error, ServiceError) else type(error).__name__


def _difference(before: Batches | None, after: Batches | None) -> Batches | None:
    return None if before is None or after is None else after.since(before)
