"""uvicorn's protocol with bounds on the head of a request, and replies in one write.

uvicorn leaves heads open for ever and without end, and writes head and body of a reply one after the other: the first
write wakes the client, which then waits for the second.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from argrad_service.http.envelope import REQUEST_ID
from argrad_service.http.problems import BadRequest, describe

MAX_HEAD_BYTES = 64 * 1024
"""Longest head of a request; 256 released tokens take ten thousand."""


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
    """Closes a connection whose request head takes too long or is too long; idle ones are uvicorn's own matter."""

    header_timeout_s: float = 10.0
    """Seconds; `with_timeout` makes a class with another value."""

    _head_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _is_in_message = False

    @classmethod
    def with_timeout(cls, header_timeout_s: float) -> type[GuardedProtocol]:
        """The protocol with that many seconds."""
        return type("GuardedProtocol", (cls,), {"header_timeout_s": header_timeout_s})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock: nothing has come yet."""
        super().connection_made(OneWrite(transport, self.loop))  # type: ignore[arg-type]
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._stop_clock()
        self._is_in_message = False
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count the bytes of a head that is not complete."""
        super().data_received(data)
        if self._head_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response(f"more than {MAX_HEAD_BYTES} bytes of headers")

    def on_message_begin(self) -> None:
        """Start the clock: the first byte of a request came."""
        if self._head_timer is None:
            self._start_clock()
        self._is_in_message = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Stop the clock: the head is there."""
        self._stop_clock()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Note that the body has come to its end."""
        self._is_in_message = False
        super().on_message_complete()

    def _unset_keepalive_if_required(self) -> None:
        """Let the clock of an idle connection run on while the rest of a body comes that has its reply already.

        uvicorn stops it at every byte, and starts it at a reply alone: such a connection would stay for ever.
        """
        is_answered = self.cycle is not None and self.cycle.response_complete
        if not (self._is_in_message and is_answered):
            super()._unset_keepalive_if_required()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request at all, and close the connection."""
        request_id = secrets.token_hex(8)
        response = describe(BadRequest("request", msg, "HTTP/1.1")).response(request_id)
        response.headers[REQUEST_ID] = request_id
        response.headers["Connection"] = "close"
        head = b"".join(name + b": " + value + b"\r\n" for name, value in response.raw_headers)
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\n" + head + b"\r\n" + bytes(response.body))
        self.transport.close()

    def _start_clock(self) -> None:
        self._head_timer, self._head_bytes = self.loop.call_later(self.header_timeout_s, self.transport.close), 0

    def _stop_clock(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
