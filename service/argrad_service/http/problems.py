"""Errors on the wire: RFC 9457 `application/problem+json`, one row a kind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from argrad.errors import GradientError, MissingExtraError, ProblemError
from argrad.wire import NotAcceptableError, TooLargeError, UnreadableBodyError, UnsupportedMediaTypeError
from argrad_service.admission import TooLarge
from argrad_service.http.record import Record
from argrad_service.scheduling import CallerGone, DeadlinePassed, Overloaded, Stopping
from argrad_service.state import IdempotencyInProgress, IdempotencyMismatch, ProblemGone, StateGone

CONTENT_TYPE = "application/problem+json"
_MAX_WORDS = 1000


class BadRequest(Exception):  # noqa: N818 - a verdict, not a defect
    """A header or the framing of the body is wrong."""

    def __init__(self, field: str, found: str, wanted: str) -> None:
        super().__init__(f"{field}: found {found}, wanted {wanted}")
        self.field, self.found, self.wanted = field, found, wanted


class Unauthorized(Exception):  # noqa: N818 - a verdict, not a defect
    """The request has no API key, or one that is not known."""

    def __init__(self, *, is_given: bool) -> None:
        if is_given:
            super().__init__("the Authorization header has no API key that is known here")
        else:
            super().__init__("found no API key, wanted the header Authorization: Bearer KEY")
        self.is_given = is_given


class Forbidden(Exception):  # noqa: N818 - a verdict, not a defect
    """The request came by a name, from a web page or at a port from which nobody may send it."""

    def __init__(self, field: str, found: str, wanted: str) -> None:
        super().__init__(f"{field}: found {found}, wanted {wanted}")
        self.field, self.found, self.wanted = field, found, wanted


class RateLimited(Exception):  # noqa: N818 - a verdict, not a defect
    """The key has made as many calls as it may; `retry_after_s` is when it may make the next."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class BodyTooSlow(Exception):  # noqa: N818 - a verdict, not a defect
    """The body took longer than it may."""


class NotReady(Exception):  # noqa: N818 - a verdict, not a defect
    """The service cannot solve yet, or no more; `checks` says why."""

    def __init__(self, message: str, checks: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        if checks is not None:
            self.checks = checks


@dataclass(frozen=True)
class Kind:
    """One row: HTTP status, problem type, and a title that is the same for every occurrence."""

    status: int
    type: str
    title: str


INTERNAL = Kind(500, "internal", "A defect of the service. Its log has the request id.")
KINDS: dict[type[Exception], Kind] = {
    BadRequest: Kind(400, "bad-request", "The bytes of the request cannot be read."),
    UnreadableBodyError: Kind(400, "bad-request", "The bytes of the request cannot be read."),
    Unauthorized: Kind(401, "unauthorized", "The call needs an API key that is known here."),
    Forbidden: Kind(403, "forbidden", "Nobody may call in this way."),
    NotAcceptableError: Kind(406, "not-acceptable", "No format that the caller accepts can be written."),
    BodyTooSlow: Kind(408, "body-too-slow", "The body took longer than it may."),
    StateGone: Kind(409, "state-gone", "The state token names no state. Send problem and solution instead."),
    ProblemGone: Kind(409, "problem-gone", "No problem is registered under that digest. Register it again."),
    IdempotencyInProgress: Kind(409, "idempotency-in-progress", "A call with that Idempotency-Key is being served."),
    TooLargeError: Kind(413, "too-large", "Something is over a limit of this service."),
    TooLarge: Kind(413, "too-large", "Something is over a limit of this service."),
    UnsupportedMediaTypeError: Kind(415, "unsupported-media-type", "The format of the body is not understood."),
    ProblemError: Kind(422, "invalid", "The request can be read, but says something wrong."),
    GradientError: Kind(422, "invalid", "The request can be read, but says something wrong."),
    IdempotencyMismatch: Kind(422, "idempotency-mismatch", "The Idempotency-Key was used for another request."),
    Overloaded: Kind(429, "overloaded", "There is no room for another call now."),
    RateLimited: Kind(429, "rate-limited", "The key has made as many calls as it may for now."),
    CallerGone: Kind(499, "client-closed", "The caller left before the reply."),
    MissingExtraError: Kind(501, "not-installed", "What the call asks for is not installed where the service runs."),
    Stopping: Kind(503, "not-ready", "The service is starting or stopping."),
    NotReady: Kind(503, "not-ready", "The service is starting or stopping."),
    DeadlinePassed: Kind(504, "deadline", "The deadline of the call passed before its result was there."),
}
"""Every error that a caller can cause or meet, by exception; anything else is `INTERNAL`."""

_ROUTING = {
    404: Kind(404, "not-found", "There is no such route. /docs lists them."),
    405: Kind(405, "method-not-allowed", "The route exists, with another method."),
}


@dataclass(frozen=True)
class Problem:
    """An error as it goes out.

    Args:
        kind: Row of the table.
        detail: This occurrence, in words.
        members: Further members, such as field, found and wanted.
        headers: Further headers.
    """

    kind: Kind
    detail: str
    members: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)

    def response(self, request_id: str) -> Response:
        """The whole reply."""
        document = {
            "type": self.kind.type,
            "title": self.kind.title,
            "status": self.kind.status,
            "detail": self.detail,
            "request_id": request_id,
            **self.members,
        }
        # The standard library's JSON: a name out of the request may hold what is no Unicode, which orjson refuses.
        body = json.dumps(document, separators=(",", ":")).encode()
        return Response(body, self.kind.status, headers=dict(self.headers), media_type=CONTENT_TYPE)


def describe(error: Exception) -> Problem:
    """Find an exception's row, most specific class first; what is not in the table says nothing of itself."""
    if isinstance(error, HTTPException):
        return _describe_routing(error)
    kind = next((KINDS[cls] for cls in type(error).__mro__ if cls in KINDS), None)
    if kind is None:
        return Problem(INTERNAL, "The service failed; nothing is wrong with the request as far as it knows.")
    members: dict[str, Any] = {
        name: _cut(getattr(error, name))
        for name in ("field", "found", "wanted", "checks", "indices", "what", "extra")
        if hasattr(error, name)
    }
    headers = {}
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = 'Bearer realm="argrad"' + ', error="invalid_token"' * error.is_given
    if isinstance(error, Overloaded | RateLimited | IdempotencyInProgress):
        headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, Stopping):
        headers["Retry-After"] = "1"
    if isinstance(error, BodyTooSlow):
        headers["Connection"] = "close"
    return Problem(kind, _cut(str(error)) or kind.title, members, headers)


def _cut(value: Any) -> Any:
    """Words that quote the request, at a length that a log can take."""
    return f"{value[: _MAX_WORDS - 1]}…" if isinstance(value, str) and len(value) > _MAX_WORDS else value


def _describe_routing(error: HTTPException) -> Problem:
    kind = _ROUTING.get(error.status_code)
    if kind is None:
        phrase = HTTPStatus(error.status_code).phrase
        kind = Kind(error.status_code, phrase.lower().replace(" ", "-"), f"{phrase}.")
    detail = error.detail if kind.status == 405 and error.headers else kind.title
    return Problem(kind, detail, headers=error.headers or {})


async def answer(request: Request, error: Exception) -> Response:
    """Exception handler of the application."""
    if isinstance(error, HTTPException) and error.status_code == 405:
        allowed = _allowed(request)
        error.headers, error.detail = {"Allow": allowed}, f"method: found {request.method}, wanted {allowed}"
    record = Record.of(request.scope)
    problem = describe(error)
    record.problem_type = problem.kind.type
    record.detail = problem.detail
    return problem.response(record.request_id)


def _allowed(request: Request) -> str:
    """Methods of every route that has the request's path; Starlette names those of the first alone."""
    found: set[str] = set()
    for route in request.app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            found |= getattr(route, "methods", None) or set()
    if "GET" in found:
        found.add("HEAD")
    return ", ".join(sorted(found))
