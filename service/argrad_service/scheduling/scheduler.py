"""The bounded queue in front of the solver threads."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from argrad_service.scheduling.drain import Drain
from argrad_service.scheduling.job import CallerGone, DeadlinePassed, Job, Share, SolverCrashed
from argrad_service.scheduling.queue import Batch, Budget, Queue
from argrad_service.scheduling.tally import Tally

T = TypeVar("T")

WATCH_AFTER_S = 0.01
"""A call this quick is not watched for its caller's going: the watch costs more than the call."""

QUIET_TURNS = 3
"""Turns of the event loop without a new call after which no more are about to come: from a socket that is ready to a
call in the queue it takes three."""

GATHERING_S = 0.005
"""For how long calls are gathered at most, where every turn brings more."""


class Overloaded(Exception):  # noqa: N818 - a verdict, not a defect
    """There is no room for another call; `retry_after_s` is an estimate of when there will be."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Stopping(Exception):  # noqa: N818 - a verdict, not a defect
    """The scheduler takes no more work."""


@dataclass(frozen=True)
class SchedulerHealth:
    """State of the solver threads and their queue.

    Args:
        threads: That there should be.
        alive: That there are.
        restarts: Threads that ended and were replaced.
        last_crash: What ended the last of them.
        queued: Calls that wait.
        running: Calls that are being solved.
        dropped: Calls left out when their turn came, because nobody waited for them any more.
    """

    threads: int
    alive: int
    restarts: int
    last_crash: str | None
    queued: int
    running: int
    dropped: int


class Scheduler:
    """Runs jobs on its own threads, backward before forward, first come first served within each.

    A thread that is idle takes a job at once; while all are busy jobs wait, and the thread that is free next takes all
    those that can be done together with the first. No timer makes a batch larger: who comes alone goes alone. But calls
    that one turn of the event loop brings go together, and where calls had company lately, so do those of the turns
    that follow as long as these bring more: while the loop turns, no thread could run much Python anyway, and each of
    the hundred operations of a small solve would wait for its turn.

    Args:
        threads: Batches that run at the same time.
        max_queue: Jobs that may wait.
        stopped: Exceptions by which work says that it ended because `should_stop` said so.
        clock: Monotonic seconds.
        budget: Of a batch; None does every job alone.
    """

    def __init__(
        self,
        *,
        threads: int,
        max_queue: int,
        stopped: tuple[type[BaseException], ...] = (),
        clock: Callable[[], float] = time.monotonic,
        budget: Budget | None = None,
    ) -> None:
        self._max_threads, self._max_queue, self._stopped, self._clock = threads, max_queue, stopped, clock
        self._queue, self._tally = Queue(budget), Tally()
        self._changed = threading.Condition()
        self._threads: set[threading.Thread] = set()
        self._running = self._restarts = 0
        self._last_crash: str | None = None
        self._is_stopping = self._is_waking = self._had_company = False
        self._submitted = 0
        self._drain = Drain(threads, clock)

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
            threads, waiting = list(self._threads), self._queue.clear()
        for job in waiting:
            job.refuse(Stopping())
        until = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))

    def submit(
        self,
        work: Callable[[Job[T]], T],
        *,
        deadline: float,
        is_backward: bool = False,
        share: Share[T] | None = None,
    ) -> Job[T]:
        """Put work into the queue. Event loop only.

        Args:
            work: Does it alone.
            deadline: Clock reading after which nobody wants the result.
            is_backward: Whether it belongs to a backward pass.
            share: How it may be done together with other work.

        Raises:
            Overloaded: as many jobs wait as may.
            Stopping: the scheduler takes no more work.
        """
        job = Job(work, deadline=deadline, is_backward=is_backward, clock=self._clock, share=share)
        with self._changed:
            if self._is_stopping:
                raise Stopping
            if len(self._queue) >= self._max_queue:
                self._queue.drop_abandoned()
            if len(self._queue) >= self._max_queue:
                raise Overloaded(f"{len(self._queue)} calls wait for the solver, the limit", self.retry_after_s())
            self._queue.push(job, job.submitted_at)
        self._submitted += 1
        if not self._is_waking:
            self._is_waking = True
            asyncio.get_running_loop().call_soon(self._wake, self._submitted, 0, self._clock() + GATHERING_S)
        return job

    @property
    def is_gathering(self) -> bool:
        """Whether idle threads are not told yet of jobs that came. Event loop only."""
        return self._is_waking

    def _wake(self, submitted: int, quiet_turns: int, until: float) -> None:
        """Tell idle threads of the jobs that came, unless calls have company and this turn may bring more of them."""
        quiet_turns = quiet_turns + 1 if submitted == self._submitted else 0
        if self._had_company and quiet_turns < QUIET_TURNS and self._clock() < until:
            asyncio.get_running_loop().call_soon(self._wake, self._submitted, quiet_turns, until)
            return
        self._is_waking = False
        with self._changed:
            self._changed.notify(self._max_threads)

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
        """Seconds after which a caller who is turned away now will find room, as measured; from 1 to 60."""
        with self._changed:
            return self._drain.next_place_s()

    def health(self) -> SchedulerHealth:
        """State of the solver threads and their queue."""
        with self._changed:
            return SchedulerHealth(
                threads=self._max_threads,
                alive=sum(thread.is_alive() for thread in self._threads),
                restarts=self._restarts,
                last_crash=self._last_crash,
                queued=len(self._queue),
                running=self._running,
                dropped=self._queue.dropped,
            )

    def tally(self) -> Tally:
        """Batches so far: how large they were, and why each went."""
        with self._changed:
            return self._tally.copy()

    def _spawn(self) -> None:
        thread = threading.Thread(target=self._work_until_stopped, name="argrad-solver", daemon=True)
        self._threads.add(thread)
        thread.start()

    def _work_until_stopped(self) -> None:
        try:
            while (batch := self._next()) is not None:
                self._run(batch.jobs)
                del batch  # the tensors of its jobs, while the thread waits for the next
        except BaseException as error:  # the callers of the batch were answered; a new thread takes over
            with self._changed:
                self._restarts += 1
                self._last_crash = f"{type(error).__name__}: {error}"
                self._threads.discard(threading.current_thread())
                if not self._is_stopping:
                    self._spawn()

    def _next(self) -> Batch | None:
        was_idle = False
        with self._changed:
            while not self._is_stopping:
                batch = self._queue.take(was_idle=was_idle)
                if batch is not None:
                    self._tally.count(batch)
                    self._running += len(batch.jobs)
                    self._had_company = len(batch.jobs) > 1
                    self._drain.begin(id(batch.jobs), len(batch.jobs))
                    return batch
                was_idle = True
                self._changed.wait()
            return None

    def _run(self, jobs: list[Job[Any]]) -> None:
        alone: list[Job[Any]] = []
        unfinished: list[Job[Any]] = []
        try:
            if len(jobs) == 1 or not self._run_together(jobs):
                alone = jobs[:]
            while alone:
                job = alone.pop(0)
                if not job.run(self._stopped):
                    unfinished.append(job)
        finally:  # where the thread ends, what it has not begun with waits for the next
            with self._changed:
                self._running -= len(jobs)
                self._drain.end(id(jobs))
                for job in (*unfinished, *alone):
                    if self._is_stopping:
                        job.refuse(Stopping())
                    else:
                        job.wait_again()
                        self._queue.push(job, self._clock())
                        self._changed.notify()

    def _run_together(self, jobs: list[Job[Any]]) -> bool:
        """Do jobs together and answer all their callers; False where that fails, and each is to be done alone."""
        share = next((found for job in jobs if (found := job.share) is not None), None)
        outcomes: Sequence[Any] = [None] * len(jobs)
        try:
            if share is not None:  # else all their callers have just left
                outcomes = share.together(jobs, lambda: all(job.should_stop() for job in jobs))
        except self._stopped:
            pass
        except Exception:  # one of them may be what is wrong with all: it answers for itself alone
            return False
        except BaseException:
            self._settle(jobs, [SolverCrashed("the solver thread ended during this call")] * len(jobs))
            raise
        self._settle(jobs, outcomes)
        return True

    def _settle(self, jobs: Sequence[Job[Any]], outcomes: Sequence[Any]) -> None:
        """Answer callers, one visit to each event loop; a closed loop has no callers left."""
        loops: dict[asyncio.AbstractEventLoop, list[tuple[Job[Any], Any]]] = {}
        for job, outcome in zip(jobs, outcomes, strict=True):
            loops.setdefault(job.future.get_loop(), []).append((job, outcome))
        for loop, answers in loops.items():
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_settle_all, answers)


def _settle_all(answers: Sequence[tuple[Job[Any], Any]]) -> None:
    for job, outcome in answers:
        job.settle(outcome)
