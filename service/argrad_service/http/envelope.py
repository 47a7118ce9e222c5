"""What surrounds every request: its id, its log line, its metrics, its headers, and an answer to what nobody caught."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from argrad_service.http.cors import Cors
from argrad_service.http.guard import Guard
from argrad_service.http.health import Readiness
from argrad_service.http.logs import Logger
from argrad_service.http.metrics import Metrics
from argrad_service.http.problems import KINDS, BadRequest, Forbidden, Unauthorized, describe
from argrad_service.http.record import Record
from argrad_service.scheduling import Stopping

if TYPE_CHECKING:
    from argrad_service.http.tracing import Tracing

REQUEST_ID = "X-Request-ID"
_REQUEST_ID_BYTES = b"x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:+/=@-]{1,128}", re.ASCII)
FIXED_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_CLOSE = (b"connection", b"close")
_QUIET = frozenset({"/health/live", "/health/ready", "/metrics"})
_UNMATCHED = "unmatched"
_REFUSED = frozenset({KINDS[Unauthorized].type, KINDS[Forbidden].type})
CLIENT_CLOSED = 499


class Envelope:
    """Pure ASGI middleware, the outermost of ours.

    Args:
        app: What it surrounds.
        metrics: Counts the request.
        log: Gets a line for it.
        guard: Decides whether it goes on.
        cors: Lets pages of other origins read the reply.
        readiness: While it says that the service stops, each reply is the last on its connection.
        tracing: Exports its spans, where that is asked for.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        log: Logger,
        guard: Guard,
        cors: Cors,
        readiness: Readiness,
        tracing: Tracing | None = None,
    ) -> None:
        self._app, self._metrics, self._log, self._tracing = app, metrics, log, tracing
        self._guard, self._cors, self._readiness = guard, cors, readiness

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        record, malformed = _open_record(headers)
        record.attach(scope)
        status = 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                # Nobody below sets these: appended, they are there once.
                more = [(b"x-request-id", record.request_id.encode()), *FIXED_HEADERS, *self._cors.headers(headers)]
                if self._readiness.phase == "stopping":
                    more.append(_CLOSE)
                if record.stages_ms:
                    more.append((b"server-timing", record.server_timing().encode()))
                message["headers"] = [*message["headers"], *more]
            await send(message)

        try:
            serve = await self._gate(scope, headers, record, malformed)
            await serve(scope, receive, send_marked)
        except asyncio.CancelledError:  # the event loop ends; nobody else cancels a request
            if not status:
                await _refusing(Stopping(), record)(scope, receive, send_marked)
        except Exception as error:
            self._log.error("defect", request_id=record.request_id, route=_route(scope), exc_info=error)
            if status:
                raise  # half a reply went out: the server must break the connection
            await _refusing(error, record)(scope, receive, send_marked)
        finally:
            self._note(scope, status or CLIENT_CLOSED, record)

    async def _gate(
        self, scope: Scope, headers: Mapping[bytes, bytes], record: Record, malformed: BadRequest | None
    ) -> ASGIApp:
        """Who answers: the application, or what has no need of it."""
        preflight = self._cors.preflight(scope["method"], headers)
        if preflight is not None:
            return preflight
        refusal: Exception | None = self._guard.refusal(scope, headers, record) or malformed
        if refusal is None and self._guard.is_counting:
            refusal = await self._guard.excess(scope, record)
        return self._app if refusal is None else _refusing(refusal, record)

    def _note(self, scope: Scope, status: int, record: Record) -> None:
        route = _route(scope)
        self._metrics.count(route, status, record)
        is_quiet = route in _QUIET
        trace_id: str | None = None
        if self._tracing is not None and not is_quiet:
            headers = dict(scope["headers"])
            trace_id = self._tracing.record(scope["method"], route, status, headers, record)
        level = logging.DEBUG if is_quiet and status < 400 else logging.INFO
        if not self._log.is_enabled_for(level):
            return
        line = _line(scope, route, status, record)
        if trace_id is not None:
            line["trace_id"] = trace_id
        self._log.log(level, "request", **line)


def _line(scope: Scope, route: str, status: int, record: Record) -> dict[str, Any]:
    """What the log says of a request."""
    line: dict[str, Any] = {
        "method": scope["method"],
        "route": route,
        "status": status,
        "ms": round(record.elapsed_ms, 3),
        "request_id": record.request_id,
    }
    if record.key is not None:
        line["key"] = record.key
    if route == _UNMATCHED:
        line["path"] = _path(scope, is_whole=record.problem_type not in _REFUSED)
    if record.stages_ms:
        line |= {f"{stage}_ms": round(ms, 3) for stage, ms in record.stages_ms.items()}
        line |= {"bytes_in": record.request_bytes, "bytes_out": record.reply_bytes}
    if record.problem_type is not None:
        line |= {"type": record.problem_type, "detail": record.detail}
    return line


def _route(scope: Scope) -> str:
    """The route's template: a path may hold a state token, and any number of values."""
    return getattr(scope.get("route"), "path", _UNMATCHED)


def _refusing(error: Exception, record: Record) -> ASGIApp:
    """What an exception says on the wire, and in the log."""
    problem = describe(error)
    record.problem_type, record.detail = problem.kind.type, problem.detail
    return problem.response(record.request_id)


def _open_record(headers: Mapping[bytes, bytes]) -> tuple[Record, BadRequest | None]:
    """Notes on a new request, and what is wrong with its id."""
    given = headers.get(_REQUEST_ID_BYTES)
    if given is None:
        return Record(secrets.token_hex(8)), None
    request_id = given.decode("latin-1")
    if _REQUEST_ID.fullmatch(request_id):
        return Record(request_id), None
    wanted = "at most 128 letters, digits and . _ : + / = @ -"
    return Record(secrets.token_hex(8)), BadRequest(REQUEST_ID, repr(request_id)[:80], wanted)


def _path(scope: Scope, *, is_whole: bool) -> str:
    """The path of a request without a route, or its first two parts: the third may be a state token."""
    raw: bytes = scope.get("raw_path") or b""
    return (raw if is_whole else b"/".join(raw.split(b"/")[:3]))[:200].decode("ascii", "replace")
