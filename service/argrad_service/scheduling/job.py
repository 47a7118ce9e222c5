"""One piece of work for a solver thread, and the caller who waits for it on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class DeadlinePassed(Exception):  # noqa: N818 - a verdict, not a defect
    """The deadline of the call came before its result."""


class CallerGone(Exception):  # noqa: N818 - a verdict, not a defect
    """Nobody waits for the result any more."""


class SolverCrashed(RuntimeError):  # noqa: N818 - named as its siblings
    """The solver thread ended while it worked on this call."""


class Job(Generic[T]):
    """Work in a queue, with the future that its caller awaits; made on the event loop that awaits it.

    Args:
        work: Called with this job on a solver thread; asks `should_stop` between two iterations.
        deadline: Clock reading after which nobody wants the result.
        is_backward: Whether it belongs to a backward pass.
        clock: Monotonic seconds.
    """

    def __init__(
        self, work: Callable[[Job[T]], T], *, deadline: float, is_backward: bool, clock: Callable[[], float]
    ) -> None:
        self.deadline, self.is_backward = deadline, is_backward
        self.future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.submitted_at = clock()
        self.queued_s = 0.0
        self._work: Callable[[Job[T]], T] | None = work
        self._clock = clock
        self._is_abandoned = False

    @property
    def is_expired(self) -> bool:
        """Whether the deadline has passed."""
        return self._clock() >= self.deadline

    def should_stop(self) -> bool:
        """Whether nobody wants the result any more; cheap, and safe on any thread."""
        return self._is_abandoned or self.is_expired

    def abandon(self, reason: Exception) -> None:
        """Answer the caller with `reason` now, unless answered already, and let the work stop. Event loop only."""
        self._is_abandoned = True
        self._work = None  # the tensors of a job that still stands in the queue
        if not self.future.done():
            self.future.set_exception(reason)

    def refuse(self, reason: Exception) -> None:
        """Answer the caller of work that will not be done; on any thread."""
        self._work = None
        self._answer(None, reason)

    def run(self, stopped: tuple[type[BaseException], ...]) -> None:
        """Do the work and answer the caller, whatever happens. Solver thread only.

        Args:
            stopped: Exceptions by which work says that it ended because `should_stop` said so.

        Raises:
            BaseException: what is not an `Exception` ends the thread, after the caller was answered.
        """
        self.queued_s = self._clock() - self.submitted_at
        work, self._work = self._work, None
        result: T | None = None
        failure: BaseException = SolverCrashed("the solver thread ended during this call")
        is_done = False
        try:
            if work is None or self.should_stop():
                failure = DeadlinePassed()
            else:
                result = work(self)
                is_done = True
        except stopped:
            failure = DeadlinePassed()
        except Exception as error:
            failure = error
        finally:
            del work
            self._answer(result, None if is_done else failure)

    def _answer(self, result: T | None, failure: BaseException | None) -> None:
        # A closed loop has no callers left.
        with contextlib.suppress(RuntimeError):
            self.future.get_loop().call_soon_threadsafe(self._resolve, result, failure)

    def _resolve(self, result: T | None, failure: BaseException | None) -> None:
        if self.future.done():
            return
        if failure is not None:
            self.future.set_exception(failure)
        else:
            self.future.set_result(result)  # type: ignore[arg-type]  # no failure: the result is there
