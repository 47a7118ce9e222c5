"""One piece of work for a solver thread, and the caller who waits for it on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class DeadlinePassed(Exception):  # noqa: N818 - a verdict, not a defect
    """The deadline of the call came before its result."""


class CallerGone(Exception):  # noqa: N818 - a verdict, not a defect
    """Nobody waits for the result any more."""


class SolverCrashed(RuntimeError):  # noqa: N818 - named as its siblings
    """The solver thread ended while it worked on this call."""


class Unfinished(Exception):  # noqa: N818 - a verdict, not a defect
    """Raised by work that has done a piece of itself and wants another turn, after whatever waits by then."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Share(Generic[T]):
    """What work says of itself that may be done together with other work.

    Args:
        key: Work of equal keys may be done together.
        flops: What it adds to the cost of a batch.
        nbytes: What it adds to the memory of a batch.
        item: Whatever `together` wants to know of this work.
        together: Called with all jobs of a batch, and with who tells whether none of their callers waits any more.
            Returns for each job, in order, its result, the exception that is its result, or None where it has seen
            that nobody wants it. An exception that it raises lets each job be done alone.
    """

    key: Hashable
    flops: float
    nbytes: int
    item: Any
    together: Callable[[Sequence[Job[T]], Callable[[], bool]], Sequence[T | Exception | None]]


class Job(Generic[T]):
    """Work in a queue, with the future that its caller awaits; made on the event loop that awaits it.

    Args:
        work: Called with this job on a solver thread; asks `should_stop` between two iterations.
        deadline: Clock reading after which nobody wants the result.
        is_backward: Whether it belongs to a backward pass.
        clock: Monotonic seconds.
        share: How it may be done together with other work; None for work that is done alone.
    """

    def __init__(
        self,
        work: Callable[[Job[T]], T],
        *,
        deadline: float,
        is_backward: bool,
        clock: Callable[[], float],
        share: Share[T] | None = None,
    ) -> None:
        self.deadline, self.is_backward, self.share = deadline, is_backward, share
        self.future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.submitted_at = self._waits_since = clock()
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
        self._work = self.share = None  # the tensors of a job that still stands in the queue
        if not self.future.done():
            self.future.set_exception(reason)

    def refuse(self, reason: Exception) -> None:
        """Answer the caller of work that will not be done; on any thread."""
        self._work = self.share = None
        self._answer(None, reason)

    def leave_queue(self) -> None:
        """Note how long it waited, this time and before: a large call comes back for each of its slices."""
        self.queued_s += self._clock() - self._waits_since

    def wait_again(self) -> None:
        """Note that it goes back to the queue."""
        self._waits_since = self._clock()

    def run(self, stopped: tuple[type[BaseException], ...]) -> bool:
        """Do the work and answer the caller, whatever happens. Solver thread only.

        Args:
            stopped: Exceptions by which work says that it ended because `should_stop` said so.

        Returns:
            Whether it is over; False for work that wants another turn.

        Raises:
            BaseException: what is not an `Exception` ends the thread, after the caller was answered.
        """
        work, self._work = self._work, None
        result: T | None = None
        failure: BaseException | None = SolverCrashed("the solver thread ended during this call")
        is_over = True
        try:
            if work is None or self.should_stop():
                failure = DeadlinePassed()
            else:
                result = work(self)
                failure = None
        except Unfinished:
            self._work, is_over = work, False
        except stopped:
            failure = DeadlinePassed()
        except Exception as error:
            failure = error
        finally:
            del work
            if is_over:
                self.share = None
                self._answer(result, failure)
        return is_over

    def settle(self, outcome: T | Exception | None) -> None:
        """Answer the caller with a result, an exception, or, where nobody wants it, with the deadline. Event loop."""
        if outcome is None:
            self._resolve(None, DeadlinePassed())
        elif isinstance(outcome, Exception):
            self._resolve(None, outcome)
        else:
            self._resolve(outcome, None)

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
