"""uvicorn's protocol with bounds on the head of a request, replies in one write, and bodies beside an `Upgrade`.

uvicorn leaves heads open for ever and without end, and writes head and body of a reply one after the other: the first
write wakes the client, which then waits for the second. It loses the body of a request that offers another protocol, as
Java's `HttpClient` does on every plain connection (`Upgrade: h2c`).
"""

from __future__ import annotations

import asyncio
import secrets
from typing import Any, ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from argrad_service.http.envelope import FIXED_HEADERS, REQUEST_ID
from argrad_service.http.problems import BadRequest, describe
from argrad_service.scheduling import Overloaded

MAX_HEAD_BYTES = 64 * 1024
"""Longest head of a request; 256 released tokens take ten thousand."""
MAX_SHOWN = 200
"""Most characters of the parser's complaint, which may quote the target of the request."""


class OneWrite:
    """A transport that holds the head of a reply back until its body comes, or the loop's next turn.

    Args:
        transport: Writes.
        loop: Its event loop.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._held = b""

    def write(self, data: bytes | memoryview) -> None:
        """Write, or hold back what looks like a head."""
        if self._transport.is_closing():  # nobody reads it, and uvloop would raise
            self._held = b""
        elif self._held:
            held, self._held = self._held, b""
            self._transport.writelines([held, data])
        elif isinstance(data, bytes) and data.startswith(b"HTTP/1.1 ") and data.endswith(b"\r\n\r\n"):
            self._held = data
            self._loop.call_soon(self._flush)
        else:
            self._transport.write(data)

    def close(self) -> None:
        """Write what is held, and close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._held:
            held, self._held = self._held, b""
            if not self._transport.is_closing():
                self._transport.write(held)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class GuardedProtocol(HttpToolsProtocol):
    """Closes connections that take too long over a head or a reply, send too long a head, or are too many."""

    header_timeout_s: float = 10.0
    """Seconds; `with_bounds` makes a class with other values."""
    reply_timeout_s: float = 60.0
    max_connections: int | None = None

    _idle: ClassVar[dict[GuardedProtocol, None]] = {}
    _head_timer: asyncio.TimerHandle | None = None
    _reply_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _is_in_message = False
    _is_again = False

    @classmethod
    def with_bounds(
        cls, *, header_timeout_s: float = 10.0, reply_timeout_s: float = 60.0, max_connections: int | None = None
    ) -> type[GuardedProtocol]:
        """The protocol of one server.

        Args:
            header_timeout_s: Seconds that the head of a request may take.
            reply_timeout_s: Seconds for which a reply may wait for its caller to take it.
            max_connections: Connections that may be open; None is no bound.
        """
        bounds: dict[str, Any] = {
            "header_timeout_s": header_timeout_s,
            "reply_timeout_s": reply_timeout_s,
            "max_connections": max_connections,
            "_idle": {},  # who waits for a request, longest first
        }
        return type("GuardedProtocol", (cls,), bounds)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock: nothing has come yet."""
        super().connection_made(OneWrite(transport, self.loop))  # type: ignore[arg-type]
        self._start_clock()
        self._idle[self] = None
        if self.max_connections is not None and len(self.connections) > self.max_connections:
            self._make_room(self.max_connections)

    def _make_room(self, limit: int) -> None:
        """Close the connection that has waited longest for a request: who is slow on purpose goes before who is new."""
        longest = next(iter(self._idle))
        del self._idle[longest]
        if longest is self:  # every other one has a request under way
            self._send_problem(Overloaded(f"{limit} connections are open, the limit (ARGRAD_MAX_CONNECTIONS)", 1))
        else:
            longest.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._idle.pop(self, None)
        self._stop_clock()
        self._stop_reply_clock()
        self._is_in_message = False
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, and count the bytes of a head that is not complete."""
        self._unset_keepalive_if_required()
        self._parse(data)
        if self._head_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response(f"more than {MAX_HEAD_BYTES} bytes of headers")

    def _parse(self, data: bytes) -> None:
        """Feed the parser; one that stops for an offer of another protocol is replaced by one that goes on."""
        rest = memoryview(data)
        while True:
            try:
                self.parser.feed_data(rest)
            except httptools.HttpParserUpgrade as stop:
                rest = rest[stop.args[0] :]
                self._decline_upgrade()
            except httptools.HttpParserError as error:
                cause = error.__context__ if isinstance(error.__context__, httptools.HttpParserError) else error
                found = str(cause)[:MAX_SHOWN]
                self.logger.warning("Invalid HTTP request received: %s", found)
                self.send_400_response(found)
                return
            else:
                return

    def _decline_upgrade(self) -> None:
        """Take a new parser past the same head, without the offer.

        The old one takes what follows for the other protocol. The new one is told how the body ends, and nothing else.
        """
        kept = [b": ".join(pair) for pair in self.headers if pair[0] in {b"content-length", b"transfer-encoding"}]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it
        self._is_again = True
        try:
            self.parser.feed_data(b"\r\n".join([b"POST / HTTP/1.1", *kept, b"", b""]))
        finally:
            self._is_again = False

    def on_url(self, url: bytes) -> None:
        """Note a part of the target."""
        if not self._is_again:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note a header."""
        if not self._is_again:
            super().on_header(name, value)

    def on_message_begin(self) -> None:
        """Start the clock: the first byte of a request came."""
        if self._is_again:
            return
        if self._head_timer is None:
            self._start_clock()
        self._is_in_message = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Stop the clock: the head is there."""
        if self._is_again:
            return
        self._stop_clock()
        self._idle.pop(self, None)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Note that the body has come to its end, unless the parser says so because it stops for an upgrade."""
        if self.parser.should_upgrade():
            return
        self._is_in_message = False
        super().on_message_complete()

    def _unset_keepalive_if_required(self) -> None:
        """Let the clock of an idle connection run on while the rest of a body comes that has its reply already.

        uvicorn stops it at every byte, and starts it at a reply alone: such a connection would stay for ever.
        """
        is_answered = self.cycle is not None and self.cycle.response_complete
        if not (self._is_in_message and is_answered):
            super()._unset_keepalive_if_required()

    def on_response_complete(self) -> None:
        """Count the connection among those that wait for a request, unless one waits already."""
        super().on_response_complete()
        if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
            self._idle[self] = None

    def pause_writing(self) -> None:
        """Start the clock: the caller does not take its reply as fast as it is written."""
        super().pause_writing()
        self._stop_reply_clock()
        self._reply_timer = self.loop.call_later(self.reply_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the clock: what was written is under way."""
        self._stop_reply_clock()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request at all, and close the connection."""
        self._send_problem(BadRequest("request", msg, "HTTP/1.1"))

    def _send_problem(self, error: Exception) -> None:
        """Answer outside of any request, and close the connection."""
        request_id = secrets.token_hex(8)
        response = describe(error).response(request_id)
        response.headers[REQUEST_ID] = request_id
        response.headers["Connection"] = "close"
        lines = [name + b": " + value for name, value in (*response.raw_headers, *FIXED_HEADERS)]
        self.transport.write(STATUS_LINE[response.status_code] + b"\r\n".join(lines) + b"\r\n\r\n")
        self.transport.write(bytes(response.body))
        self.transport.close()

    def _stop_reply_clock(self) -> None:
        if self._reply_timer is not None:
            self._reply_timer.cancel()
            self._reply_timer = None

    def _start_clock(self) -> None:
        self._head_timer, self._head_bytes = self.loop.call_later(self.header_timeout_s, self.transport.close), 0

    def _stop_clock(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
