"""What surrounds every request: its id, its log line, its metrics, its headers, and an answer to what nobody caught."""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from argrad_service.http.logs import Logger
from argrad_service.http.metrics import Metrics
from argrad_service.http.problems import BadRequest, describe
from argrad_service.http.record import Record

if TYPE_CHECKING:
    from argrad_service.http.tracing import Tracing

REQUEST_ID = "X-Request-ID"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:+/=@-]{1,128}", re.ASCII)
_FIXED = ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"))
_QUIET = frozenset({"/health/live", "/health/ready", "/metrics"})
_UNMATCHED = "unmatched"
CLIENT_CLOSED = 499


class Envelope:
    """Pure ASGI middleware, the outermost of ours.

    Args:
        app: What it surrounds.
        metrics: Counts the request.
        log: Gets a line for it.
        tracing: Exports its spans, where that is asked for.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, log: Logger, tracing: Tracing | None = None) -> None:
        self._app, self._metrics, self._log, self._tracing = app, metrics, log, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID)
        is_well_formed = given is None or _REQUEST_ID.fullmatch(given) is not None
        record = Record(given if given is not None and is_well_formed else secrets.token_hex(8))
        record.attach(scope)
        status = 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                # Nobody below sets these: appended, they are there once.
                message["headers"] = [*message["headers"], (b"x-request-id", record.request_id.encode()), *_FIXED]
                if record.stages_ms:
                    message["headers"].append((b"server-timing", record.server_timing().encode()))
            await send(message)

        try:
            if is_well_formed:
                await self._app(scope, receive, send_marked)
            else:
                wanted = "at most 128 letters, digits and . _ : + / = @ -"
                await self._refuse(BadRequest(REQUEST_ID, repr(given)[:80], wanted), scope, receive, send_marked)
        except Exception as error:
            self._log.error("defect", request_id=record.request_id, route=_route(scope), exc_info=error)
            if status:
                raise  # half a reply went out: the server must break the connection
            await self._refuse(error, scope, receive, send_marked)
        finally:
            self._note(scope, status or CLIENT_CLOSED, record)

    async def _refuse(self, error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        problem = describe(error)
        record = Record.of(scope)
        record.problem_type, record.detail = problem.kind.type, problem.detail
        await problem.response(record.request_id)(scope, receive, send)

    def _note(self, scope: Scope, status: int, record: Record) -> None:
        route = _route(scope)
        self._metrics.count(route, status, record)
        line: dict[str, Any] = {
            "method": scope["method"],
            "route": route,
            "status": status,
            "ms": round(record.elapsed_ms, 3),
            "request_id": record.request_id,
        }
        if route == _UNMATCHED:
            line["path"] = scope.get("raw_path", b"")[:200].decode("ascii", "replace")
        if record.stages_ms:
            line |= {f"{stage}_ms": round(ms, 3) for stage, ms in record.stages_ms.items()}
            line |= {"bytes_in": record.request_bytes, "bytes_out": record.reply_bytes}
        if record.problem_type is not None:
            line |= {"type": record.problem_type, "detail": record.detail}
        if self._tracing is not None and route not in _QUIET:
            headers = dict(scope["headers"])
            line["trace_id"] = self._tracing.record(scope["method"], route, status, headers, record)
        if route in _QUIET and status < 400:
            self._log.debug("request", **line)
        else:
            self._log.info("request", **line)


def _route(scope: Scope) -> str:
    """The route's template: a path may hold a state token, and any number of values."""
    return getattr(scope.get("route"), "path", _UNMATCHED)
