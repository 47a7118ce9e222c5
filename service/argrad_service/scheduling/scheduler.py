"""The bounded queue in front of the solver threads."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from argrad_service.scheduling.job import CallerGone, DeadlinePassed, Job

T = TypeVar("T")

HEAD_START_S = 1.0
"""A backward pass overtakes the forwards that came up to this long before it: it ends a training step that is under
way, and frees memory. Older forwards keep their place, so that none waits for ever."""

WATCH_AFTER_S = 0.01
"""A call this quick is not watched for its caller's going: the watch costs more than the call."""

_SMOOTHING = 0.2
_MAX_RETRY_AFTER_S = 60


class Overloaded(Exception):  # noqa: N818 - a verdict, not a defect
    """There is no room for another call; `retry_after_s` is an estimate of when there will be."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Stopping(Exception):  # noqa: N818 - a verdict, not a defect
    """The scheduler takes no more work."""


@dataclass(frozen=True)
class SchedulerHealth:
    """State of the solver threads and their queue."""

    threads: int
    alive: int
    restarts: int
    last_crash: str | None
    queued: int
    running: int


class Scheduler:
    """Runs jobs on its own threads, backward before forward, first come first served within each.

    Args:
        threads: Jobs that run at the same time.
        max_queue: Jobs that may wait.
        stopped: Exceptions by which work says that it ended because `should_stop` said so.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        *,
        threads: int,
        max_queue: int,
        stopped: tuple[type[BaseException], ...] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_threads, self._max_queue, self._stopped, self._clock = threads, max_queue, stopped, clock
        self._heap: list[tuple[float, int, Job[Any]]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._threads: set[threading.Thread] = set()
        self._running = self._restarts = 0
        self._last_crash: str | None = None
        self._is_stopping = False
        self._mean_run_s = 0.0

    def start(self) -> None:
        """Start the solver threads."""
        with self._changed:
            for _ in range(self._max_threads):
                self._spawn()

    def stop(self, timeout_s: float) -> None:
        """Take no more work, drop what waits, and give what runs `timeout_s` seconds to end."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
            threads, waiting, self._heap = list(self._threads), self._heap, []
        for _, _, job in waiting:
            job.refuse(Stopping())
        until = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))

    def submit(self, work: Callable[[Job[T]], T], *, deadline: float, is_backward: bool = False) -> Job[T]:
        """Put work into the queue. Event loop only.

        Raises:
            Overloaded: as many jobs wait as may.
            Stopping: the scheduler takes no more work.
        """
        job = Job(work, deadline=deadline, is_backward=is_backward, clock=self._clock)
        rank = job.submitted_at - (HEAD_START_S if is_backward else 0.0)
        with self._changed:
            if self._is_stopping:
                raise Stopping
            if len(self._heap) >= self._max_queue:
                self._drop_abandoned()
            if len(self._heap) >= self._max_queue:
                raise Overloaded(f"{len(self._heap)} calls wait for the solver, the limit", self.retry_after_s())
            heapq.heappush(self._heap, (rank, next(self._order), job))
            self._changed.notify()
        return job

    async def result(self, job: Job[T], caller_gone: Callable[[], Awaitable[None]]) -> T:
        """Wait for a job, for its deadline, or for its caller's going, whichever comes first.

        Args:
            job: From `submit`.
            caller_gone: Returns once the caller has gone.

        Raises:
            DeadlinePassed: the work is told to stop.
            CallerGone: the work is told to stop.
            Exception: whatever the work raised.
        """
        loop = asyncio.get_running_loop()
        watch: asyncio.Task[None] | None = None
        timer: asyncio.TimerHandle

        async def watch_caller() -> None:
            await caller_gone()
            job.abandon(CallerGone())

        def start_watch() -> None:
            nonlocal watch, timer
            left_s = job.deadline - self._clock()
            if left_s > 0:
                watch = loop.create_task(watch_caller())
            timer = loop.call_later(max(0.0, left_s), lambda: job.abandon(DeadlinePassed()))

        timer = loop.call_later(min(WATCH_AFTER_S, max(0.0, job.deadline - self._clock())), start_watch)
        try:
            return await job.future
        finally:
            timer.cancel()
            if watch is not None:
                watch.cancel()
            job.abandon(CallerGone())  # matters only where this very wait was cancelled

    def retry_after_s(self) -> int:
        """Seconds until the queue of this moment is done, by the mean of recent jobs; from 1 to 60."""
        ahead = len(self._heap) + self._running
        return min(_MAX_RETRY_AFTER_S, max(1, math.ceil(ahead * self._mean_run_s / self._max_threads)))

    def health(self) -> SchedulerHealth:
        """State of the solver threads and their queue."""
        with self._changed:
            return SchedulerHealth(
                threads=self._max_threads,
                alive=sum(thread.is_alive() for thread in self._threads),
                restarts=self._restarts,
                last_crash=self._last_crash,
                queued=len(self._heap),
                running=self._running,
            )

    def _spawn(self) -> None:
        thread = threading.Thread(target=self._work_until_stopped, name="argrad-solver", daemon=True)
        self._threads.add(thread)
        thread.start()

    def _work_until_stopped(self) -> None:
        try:
            while (job := self._next()) is not None:
                self._run(job)
                del job  # its tensors, while the thread waits for the next
        except BaseException as error:  # the caller of the job was answered; a new thread takes over
            with self._changed:
                self._restarts += 1
                self._last_crash = f"{type(error).__name__}: {error}"
                self._threads.discard(threading.current_thread())
                if not self._is_stopping:
                    self._spawn()

    def _next(self) -> Job[Any] | None:
        with self._changed:
            while not self._heap and not self._is_stopping:
                self._changed.wait()
            if self._is_stopping:
                return None
            self._running += 1
            return heapq.heappop(self._heap)[2]

    def _run(self, job: Job[Any]) -> None:
        began = self._clock()
        try:
            job.run(self._stopped)
        finally:
            with self._changed:
                self._running -= 1
                took = self._clock() - began
                self._mean_run_s += (took - self._mean_run_s) * (_SMOOTHING if self._mean_run_s else 1.0)

    def _drop_abandoned(self) -> None:
        """Make room: callers that left or ran out of time still stand in the queue."""
        self._heap = [entry for entry in self._heap if not entry[2].should_stop()]
        heapq.heapify(self._heap)
