"""One call as a sequence of attempts and pauses, without any I/O: the same for the synchronous and the async client.

`exchange` is a generator. It yields a `Send`, which its driver sends, or a `Pause`, which its driver sleeps; it is sent
the `Answer`, or has httpx's exception thrown into it; it returns the answer of the attempt that succeeded.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Awaitable, Callable, Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

import httpx

from argrad.errors import ArgradError, DeadlineExceededError, OverloadedError, UnavailableError
from argrad.transport.failures import TRANSIENT, failure_from_httpx, failure_from_reply

if TYPE_CHECKING:
    from argrad.transport.bodies import Outgoing

E = TypeVar("E")
R = TypeVar("R")
T = TypeVar("T")

Clock = Callable[[], float]


class Deadline:
    """The moment by which a call has to end.

    Args:
        timeout_s: Seconds from now, or None for no limit.
        clock: Monotonic seconds.
    """

    def __init__(self, timeout_s: float | None, clock: Clock) -> None:
        self.timeout_s, self._clock = timeout_s, clock
        self._end = None if timeout_s is None else clock() + timeout_s

    def remaining(self) -> float | None:
        """Seconds left, not below zero; None without a limit."""
        return None if self._end is None else max(0.0, self._end - self._clock())

    def check(self, why: BaseException | None = None) -> None:
        """Raise once the moment has passed.

        Raises:
            DeadlineExceededError: it has; `why` becomes its cause.
        """
        if self.remaining() == 0.0:
            raise DeadlineExceededError(f"no result within {self.timeout_s:g} s") from why


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """When to try again, and how long to wait before.

    Args:
        retries: Further attempts after the first.
        first_delay_s: Wait before the first retry; doubles with each, and is then drawn from its upper half.
        max_delay_s: Bound on that wait; a longer Retry-After is honoured all the same.
    """

    retries: int = 5
    first_delay_s: float = 0.1
    max_delay_s: float = 5.0

    def delay(self, attempt: int, retry_after_s: float | None) -> float:
        """Seconds to wait after attempt number `attempt`, counted from zero."""
        longest = min(self.max_delay_s, self.first_delay_s * 2.0**attempt)
        drawn = longest * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret
        return drawn if retry_after_s is None else retry_after_s + drawn * 0.1


class RetryBudget:
    """Bounds the retries of all calls together, so that a service in trouble is not asked twice as often.

    Each retry costs one; each call that succeeds earns a tenth.

    Args:
        capacity: Retries that may follow each other while nothing succeeds.
    """

    _EARNED = 0.1

    def __init__(self, capacity: float = 20.0) -> None:
        self._capacity = self._left = capacity
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Pay for one retry; False if the budget is spent."""
        with self._lock:
            if self._left < 1.0:
                return False
            self._left -= 1.0
            return True

    def earn(self) -> None:
        """Note that a call succeeded."""
        with self._lock:
            self._left = min(self._capacity, self._left + self._EARNED)


@dataclass(frozen=True, eq=False)
class Send:
    """Send a request, and read its reply before the deadline."""

    request: Outgoing
    deadline: Deadline


@dataclass(frozen=True)
class Pause:
    """Sleep."""

    seconds: float


@dataclass(frozen=True, eq=False)
class Answer:
    """A reply, read to its end."""

    status_code: int
    headers: Mapping[str, str]
    body: bytes | bytearray | memoryview


Steps = Generator[Send | Pause, Answer | None, Answer]


def exchange(
    request: Callable[[float | None], Outgoing],
    *,
    where: str,
    deadline: Deadline,
    policy: RetryPolicy,
    budget: RetryBudget,
) -> Steps:
    """Make one call: attempts until one succeeds, all under one deadline.

    Tried again: connection errors, replies that were cut off, 429 and 503 (and a proxy's 502). Never: anything else.

    Args:
        request: Builds the request of one attempt, given the seconds that are left.
        where: Address of the service, for messages.
        deadline: Of the whole call.
        policy: How often to retry, and when.
        budget: Shared by all calls of a client.

    Raises:
        ArgradError: the failure of the last attempt.
    """
    failure: ArgradError | None = None
    for attempt in range(policy.retries + 1):
        deadline.check(failure)
        try:
            answer = cast("Answer", (yield Send(request(deadline.remaining()), deadline)))
        except httpx.HTTPError as error:
            failure = failure_from_httpx(error, where)
            failure.__cause__ = error
            is_transient = isinstance(error, TRANSIENT)
        else:
            if answer.status_code in (200, 201):
                budget.earn()
                return answer
            failure = failure_from_reply(answer.status_code, answer.headers, answer.body)
            is_transient = isinstance(failure, OverloadedError | UnavailableError)
        delay = policy.delay(attempt, getattr(failure, "retry_after_s", None))
        remaining = deadline.remaining()
        is_in_time = remaining is None or delay < remaining
        if not (is_transient and attempt < policy.retries and is_in_time and budget.take()):
            raise failure
        yield Pause(delay)
    raise AssertionError("the last attempt returns or raises")


def drive(steps: Generator[E, R, T], perform: Callable[[E], R], failures: tuple[type[Exception], ...]) -> T:
    """Run a generator of effects to its end.

    Args:
        steps: Yields effects, is sent their outcomes, returns the result.
        perform: Carries one effect out.
        failures: Exceptions of `perform` that are thrown into the generator.
    """
    try:
        effect = next(steps)
        while True:
            try:
                outcome = perform(effect)
            except failures as error:
                effect = steps.throw(error)
            else:
                effect = steps.send(outcome)
    except StopIteration as stop:
        result: T = stop.value
        return result


async def drive_async(
    steps: Generator[E, R, T], perform: Callable[[E], Awaitable[R]], failures: tuple[type[Exception], ...]
) -> T:
    """`drive` with a `perform` that is awaited."""
    try:
        effect = next(steps)
        while True:
            try:
                outcome = await perform(effect)
            except failures as error:
                effect = steps.throw(error)
            else:
                effect = steps.send(outcome)
    except StopIteration as stop:
        result: T = stop.value
        return result
