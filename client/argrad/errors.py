"""Every exception that argrad raises, sorted by what the caller can do about it.

ArgradError
├── ProblemError            fix the input: a field is wrong (422; also raised before anything is sent)
├── SolveError              the solver said no: infeasible, unbounded, non-convex, not converged
├── GradientError           no gradient exists at this solution, or a second derivative was asked for
├── MissingExtraError       install the extra that the message names, here or where the service runs (501)
├── ForkedError             start worker processes with `spawn`
├── ConnectionFailedError   nobody answers: check the address, or wait and call again
├── DeadlineExceededError   raise the deadline, or make the problem smaller (504, or the client's own clock)
└── ServiceError            the service answered, but not with a result
├── AuthenticationError     send an API key (401)
├── StateGoneError          send problem and solution again (409; the client does so by itself)
├── ProblemGoneError        register the parameters again (409; the client does so by itself)
├── PayloadTooLargeError    send less, or raise the server's limit (413)
├── OverloadedError         wait `retry_after_s`, then call again (429)
├── UnavailableError        the service is starting or stopping: call again (503)
├── ProtocolError           client and service do not understand each other (400, 404, 405, 406, 415)
└── InternalServiceError    a defect of the service; its log has `request_id` (500)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any


class ArgradError(Exception):
    """Base class of every exception that argrad raises on purpose."""


class ProblemError(ArgradError, ValueError):
    """A field of the call is wrong; nothing was solved.

    Args:
        field: Dotted name of the offending field, such as `problem.Q`.
        found: What was there, in words.
        wanted: What would have been accepted, in words.
    """

    def __init__(self, field: str, found: str, wanted: str) -> None:
        super().__init__(f"{field}: found {found}, wanted {wanted}")
        self.field, self.found, self.wanted = field, found, wanted

    def __reduce__(self) -> tuple[type[ProblemError], tuple[str, str, str]]:
        return type(self), (self.field, self.found, self.wanted)


class SolveError(ArgradError):
    """At least one problem of the batch has no usable solution.

    Args:
        statuses: Status of every problem of the batch (see `argrad.Status`).
        indices: Positions in the batch of the problems that failed.
    """

    def __init__(self, statuses: Sequence[str], indices: Sequence[int]) -> None:
        shown = ", ".join(f"{i}: {statuses[i]}" for i in indices[:8])
        more = f", and {len(indices) - 8} more" if len(indices) > 8 else ""
        super().__init__(
            f"{len(indices)} of {len(statuses)} problems have no solution ({shown}{more}); "
            "on_failure='nan' or 'zero_grad' lets the rest of the batch go on"
        )
        self.statuses, self.indices = tuple(statuses), tuple(indices)

    def __reduce__(self) -> tuple[type[SolveError], tuple[tuple[str, ...], tuple[int, ...]]]:
        return type(self), (self.statuses, self.indices)


class GradientError(ArgradError):
    """No gradient exists where one was asked for; `indices` names the problems of the batch."""

    def __init__(self, message: str, indices: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.message, self.indices = message, tuple(indices)

    def __reduce__(self) -> tuple[type[GradientError], tuple[str, tuple[int, ...]]]:
        return type(self), (self.message, self.indices)


class MissingExtraError(ArgradError, ImportError):
    """The call needs packages that only an extra installs.

    Args:
        what: What needs them.
        extra: Its name.
        is_remote: Whether they are missing where the service runs.
    """

    def __init__(self, what: str, extra: str, *, is_remote: bool = False) -> None:
        where = " where the service runs" if is_remote else ""
        super().__init__(f"{what} needs packages that are not installed{where}: pip install 'argrad[{extra}]'")
        self.what, self.extra, self.is_remote = what, extra, is_remote

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return functools.partial(type(self), is_remote=self.is_remote), (self.what, self.extra)


class ForkedError(ArgradError, RuntimeError):
    """What is used lives in threads of the parent process, which a fork does not copy."""


class ConnectionFailedError(ArgradError, ConnectionError):
    """The service could not be reached, or the connection broke, on every attempt."""


class DeadlineExceededError(ArgradError, TimeoutError):
    """The deadline of the call passed before its result was there."""


class ServiceError(ArgradError):
    """The service answered with an error.

    Args:
        message: The service's own words.
        status_code: HTTP status.
        type: Problem type of the RFC 9457 body, such as `state-gone`.
        request_id: Identifies the call in the service's log.
        retry_after_s: Seconds to wait before the next attempt, where the service said so.
    """

    def __init__(
        self,
        message: str,
        *,
        status_code: int,
        type: str = "about:blank",
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(f"{message} (HTTP {status_code}, request {request_id or 'unknown'})")
        self.message = message
        self.status_code = status_code
        self.type = type
        self.request_id = request_id
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_service_error, (type(self), self.message, self.__dict__.copy())


def _rebuild_service_error(cls: type[ServiceError], message: str, fields: dict[str, object]) -> ServiceError:
    error = cls(message, status_code=0)
    error.__dict__.update(fields)
    error.args = (f"{message} (HTTP {error.status_code}, request {error.request_id or 'unknown'})",)
    return error


class AuthenticationError(ServiceError):
    """401: no API key, or one that the service does not know."""


class StateGoneError(ServiceError):
    """409 `state-gone`: the token is lost, foreign, forged or expired; send problem and solution."""


class ProblemGoneError(ServiceError):
    """409 `problem-gone`: nothing is registered under that digest, or no more; register it again."""


class PayloadTooLargeError(ServiceError):
    """413: body, JSON, work space or reply is over a limit of the service."""


class OverloadedError(ServiceError):
    """429: the queue is full; `retry_after_s` says when to come back."""


class UnavailableError(ServiceError):
    """503: the service is not ready."""


class ProtocolError(ServiceError):
    """400, 404, 405, 406, 415, or a reply that cannot be read: the two sides do not fit."""


class InternalServiceError(ServiceError):
    """500: a defect of the service; its log has the request id."""
