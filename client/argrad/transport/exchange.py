"""One call as a sequence of attempts and pauses, without any I/O: the same for the synchronous and the async client.

`exchange` is a generator. It yields a `Send`, which its driver sends, or a `Pause`, which its driver sleeps; it is sent
the `Answer`, or has httpx's exception thrown into it; it returns the answer of the attempt that succeeded.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar, cast

import httpx

from argrad.errors import (
    ArgradError,
    ConnectionFailedError,
    DeadlineExceededError,
    OverloadedError,
    ServiceError,
    UnavailableError,
)
from argrad.transport.failures import TRANSIENT, failure_from_httpx, failure_from_reply, is_misdirected
from argrad.transport.retries import Clock, RetryBudget, RetryPolicy
from argrad.transport.targets import Target, Targets

if TYPE_CHECKING:
    from argrad.transport.bodies import Outgoing

E = TypeVar("E")
R = TypeVar("R")
T = TypeVar("T")

_LOG = logging.getLogger("argrad")
_SAYS_AFTER_S = 2.0
_ASKS_AGAIN_S = (0.05, 0.2)
"""How long who finds the budget of retries empty waits before looking again."""


class Deadline:
    """The moment by which a call has to end.

    Args:
        timeout_s: Seconds from now, or None for no limit.
        clock: Monotonic seconds.
    """

    def __init__(self, timeout_s: float | None, clock: Clock) -> None:
        self.timeout_s, self._clock, self._began = timeout_s, clock, clock()
        self._end = None if timeout_s is None else self._began + timeout_s

    def elapsed(self) -> float:
        """Seconds since the call began."""
        return self._clock() - self._began

    def remaining(self) -> float | None:
        """Seconds left, not below zero; None without a limit."""
        return None if self._end is None else max(0.0, self._end - self._clock())

    def check(self) -> None:
        """Raise once the moment has passed.

        Raises:
            DeadlineExceededError: it has.
        """
        if self.remaining() == 0.0:
            raise DeadlineExceededError(f"no result within {self.timeout_s:g} s")


@dataclass(frozen=True, eq=False)
class Send:
    """Send a request, and read its reply before the deadline."""

    request: Outgoing
    deadline: Deadline


@dataclass(frozen=True)
class Pause:
    """Sleep."""

    seconds: float


@dataclass(eq=False)
class Answer:
    """A reply, read to its end, from which of the client's addresses, and, if it is a result, to what request."""

    status_code: int
    headers: Mapping[str, str]
    body: bytes | bytearray | memoryview
    target: int = 0
    request: Outgoing | None = None


Steps = Generator[Send | Pause, Answer | None, Answer]


@dataclass(eq=False)
class _Round:
    """One attempt at every address that may be well, and what came of it.

    Args:
        number: Counted from zero.
        is_paid: Whether the budget of retries paid for it.
        tried: Addresses.
        retry_after_s: The soonest moment that any of them named.
    """

    number: int = 0
    is_paid: bool = False
    tried: list[Target] = field(default_factory=list)
    retry_after_s: float | None = None

    def note(self, target: Target, failure: ArgradError) -> None:
        """Note that an address failed."""
        self.tried.append(target)
        named = failure.retry_after_s if isinstance(failure, ServiceError) else None
        if named is not None:
            self.retry_after_s = named if self.retry_after_s is None else min(named, self.retry_after_s)


def exchange(
    request: Callable[[Target, float | None], Outgoing],
    *,
    affinity: str | None,
    targets: Targets,
    deadline: Deadline,
    policy: RetryPolicy,
    budget: RetryBudget,
) -> Steps:
    """Make one call: attempts until one succeeds, all under one deadline.

    Tried again: connection errors, replies that were cut off, 429 and 503 (and a proxy's 502), at the next address at
    once, and at all of them again after a pause. Never: anything else.

    Args:
        request: Builds the request of one attempt, given where it goes and the seconds that are left.
        affinity: Ranks the addresses.
        targets: The addresses.
        deadline: Of the whole call.
        policy: How often to retry, and when.
        budget: Shared by all calls of a client.

    Raises:
        ArgradError: the failure of the last attempt.
    """
    ranked = targets.ranked(affinity)
    now = _Round()
    failure: ArgradError | None = None
    while True:
        if failure is not None and deadline.remaining() == 0.0:
            raise failure
        deadline.check()
        target = targets.choose(ranked, now.tried)
        if target is None:
            now = yield from _wait(now, cast("ArgradError", failure), targets, deadline, policy, budget)
            continue
        outgoing = request(target, deadline.remaining())
        try:
            answer = cast("Answer", (yield Send(outgoing, deadline)))
        except httpx.HTTPError as error:
            failure = failure_from_httpx(error, target.way)
            failure.__cause__ = error
            if not isinstance(error, TRANSIENT):
                raise failure from error
            targets.failed(target, is_silent=isinstance(error, httpx.ConnectTimeout))
        else:
            if answer.status_code in (200, 201):
                targets.answered(target)
                budget.answered(is_paid=now.is_paid)
                answer.target, answer.request = target.index, outgoing
                return answer
            where = f"{outgoing.method} {outgoing.url.path} at {target.where}"
            failure = failure_from_reply(answer.status_code, answer.headers, answer.body, where)
            if isinstance(failure, UnavailableError):
                target.has_answered = True
                targets.failed(target, rest_s=failure.retry_after_s)
            else:
                targets.answered(target)
                if not isinstance(failure, OverloadedError):
                    raise failure
        now.note(target, failure)


def _wait(
    past: _Round, failure: ArgradError, targets: Targets, deadline: Deadline, policy: RetryPolicy, budget: RetryBudget
) -> Generator[Pause, object, _Round]:
    """Pause until the next round of attempts.

    Raises:
        ArgradError: the failure, where there is to be no other round.
    """
    elapsed_s = deadline.elapsed()
    if past.number:
        failure.add_note(f"so it was after {past.number + 1} rounds of attempts, {elapsed_s:.1f} s after the first")
    is_unknown = isinstance(failure, ConnectionFailedError) and not targets.have_answered
    if is_unknown and (elapsed_s >= policy.first_contact_s or (len(past.tried) == 1 and is_misdirected(failure))):
        raise failure
    if policy.retries is not None and past.number >= policy.retries:
        raise failure
    if elapsed_s >= _SAYS_AFTER_S and budget.may_say():
        limit = "as long as it takes" if deadline.timeout_s is None else f"for {deadline.remaining():.0f} s more"
        _LOG.warning("a call waits for the service, %s: %s", limit, failure)
    yield _pause(policy.delay(past.number, past.retry_after_s), deadline, failure)
    # A service that names the moment to come back has room then: that costs nothing.
    is_paid = past.retry_after_s is None
    while is_paid and not budget.take():
        yield _pause(random.uniform(*_ASKS_AGAIN_S), deadline, failure)  # noqa: S311 - jitter, not a secret
    return _Round(past.number + 1, is_paid)


def _pause(seconds: float, deadline: Deadline, failure: ArgradError) -> Pause:
    remaining = deadline.remaining()
    if remaining is not None and seconds >= remaining:
        raise failure
    return Pause(seconds)


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
