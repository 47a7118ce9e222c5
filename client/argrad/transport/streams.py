"""Connections for callers on an event loop: what `connection` and `pool` are for those that wait.

Half of what a small call cost such a caller was in anyio, httpcore and h11. asyncio hands over what arrives; the same
parser reads heads, and a body of known length goes straight into its place.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import ssl
import time
from typing import Any

import httpx

from argrad.transport.address import Address
from argrad.transport.bodies import Outgoing
from argrad.transport.connection import KEEPALIVE, SMALL_BYTES, mapped
from argrad.transport.exchange import Answer, Deadline
from argrad.transport.head import MOST_HEAD_BYTES, Head
from argrad.transport.pool import LIMITS

_PIECE_BYTES = 256 * 1024
"""asyncio copies what the socket does not take at once: no more than this."""


class Stream(asyncio.Protocol):
    """A connection that carries one call at a time; the caller sees to that."""

    def __init__(self) -> None:
        self.used_at, self.is_reusable = time.monotonic(), False
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._answer: asyncio.Future[Answer] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._is_broken = False
        self._head, self._size = Head(), 0
        self._body, self._filled = bytearray(), 0

    def is_stale(self) -> bool:
        """Whether an idle connection was closed by the service, or belongs to another loop."""
        if self._is_broken or self._transport.is_closing() or self._loop is not asyncio.get_running_loop():
            return True
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(poll.poll(0))

    async def exchange(self, request: Outgoing, deadline: Deadline) -> Answer:
        """Send a request and read its reply to the end.

        Raises:
            httpx.TransportError: the connection broke, the deadline passed, or what came back is no reply.
        """
        deadline.check()
        self.is_reusable = False
        self._head, self._size = Head(), 0
        self._body, self._filled = bytearray(), 0
        self._answer = self._loop.create_future()
        is_sent = False
        try:
            async with asyncio.timeout(deadline.remaining()):
                is_sent = await self._send(request)
                answer = await self._answer
        except TimeoutError:
            error = httpx.ReadTimeout if is_sent else httpx.WriteTimeout
            raise error("timed out") from None
        finally:
            self._answer.cancel()
            self._answer = None
        self.is_reusable = self.is_reusable and is_sent
        self.used_at = time.monotonic()
        return answer

    def close(self) -> None:
        """Close at once: nothing that is still to be sent is wanted any more."""
        if not self._loop.is_closed():
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = transport

    def pause_writing(self) -> None:
        """The socket takes no more for now."""
        self._drained = self._loop.create_future()

    def resume_writing(self) -> None:
        """The socket takes more."""
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None

    def data_received(self, data: bytes) -> None:
        """Take a piece of the reply."""
        if self._answer is None or self._answer.done():
            self._is_broken = True  # more than was asked for
            self.is_reusable = False
            return
        try:
            self._take(data)
        except httpx.RemoteProtocolError as error:
            self._fail(error)

    def eof_received(self) -> None:
        """The service sends no more: that may be the end of a body of unknown length."""
        self._is_broken = True
        head = self._head if self._answer is not None else None
        if head is None:
            return
        if head.is_read and head.length is None and "transfer-encoding" not in head.headers:
            self._finish(bytearray(b"".join(head.pieces)), is_reusable=False)
        elif not head.is_read:
            self._fail(httpx.RemoteProtocolError(f"the reply was cut off after {self._size} bytes, within its head"))
        elif head.length is not None:
            found = f"after {self._filled} of {head.length} bytes"
            self._fail(httpx.RemoteProtocolError(f"the reply was cut off {found}"))
        else:
            self._fail(httpx.RemoteProtocolError("the reply was cut off within a chunk"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing can come or go any more."""
        self.resume_writing()
        if exc is None:
            self.eof_received()
        self._is_broken = True
        self._fail(httpx.ReadError(str(exc)))

    async def _send(self, request: Outgoing) -> bool:
        """Send a request; False where its reply came before that was done."""
        head = request.head()
        if len(head) + request.body.size <= SMALL_BYTES:
            self._transport.write(b"".join([head, *request.body.buffers]))
            return True
        for view in [memoryview(head), *request.body.views()]:
            for start in range(0, len(view), _PIECE_BYTES):
                if self._drained is not None and self._answer is not None:
                    either: list[asyncio.Future[Any]] = [self._drained, self._answer]
                    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if self._answer is None or self._answer.done():
                    return False
                self._transport.write(view[start : start + _PIECE_BYTES])
        return True

    def _take(self, data: bytes) -> None:
        head = self._head
        if head.is_read and head.length is not None:
            self._fill(data)
            return
        self._size += len(data)
        head.feed(data)
        if not head.is_read:
            if self._size > MOST_HEAD_BYTES:
                found = "or its head was too long"
                raise httpx.RemoteProtocolError(f"the reply was cut off {found}, within its head")
        elif head.length is not None:
            self._body = bytearray(head.length)
            self._fill(b"".join(head.pieces))
        elif head.is_complete:
            self._finish(bytearray(b"".join(head.pieces)), is_reusable=head.is_reusable)

    def _fill(self, piece: bytes) -> None:
        """Put a piece of a body of known length into its place."""
        room, length = len(self._body) - self._filled, len(piece)
        self._body[self._filled : self._filled + min(room, length)] = piece if length <= room else piece[:room]
        self._filled += min(room, length)
        if self._filled == len(self._body):
            self._finish(self._body, is_reusable=self._head.is_reusable and length <= room)

    def _finish(self, body: bytearray, *, is_reusable: bool) -> None:
        if self._answer is not None and not self._answer.done():
            self.is_reusable = is_reusable
            self._answer.set_result(Answer(self._head.status_code, self._head.headers, body))

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


class Streams:
    """Connections to one address, for the tasks of one event loop.

    Args:
        address: Of the service; without a proxy.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._context: ssl.SSLContext | None = address.tls()
        self._room = asyncio.Semaphore(LIMITS.max_connections or 100)
        self._idle: list[Stream] = []
        self._is_closed = False

    async def exchange(self, request: Outgoing, deadline: Deadline) -> Answer:
        """Send a request and read its reply.

        Raises:
            httpx.TransportError: there is no connection, it broke, or what came back is no reply.
            DeadlineExceededError: the deadline passed.
        """
        await self._enter(deadline)
        try:
            stream = self._take() or await self._connect(request.timeouts["connect"])
            try:
                return await stream.exchange(request, deadline)
            finally:
                self._put_back(stream)
        finally:
            self._room.release()

    async def aclose(self) -> None:
        """Close what is idle, and what is not as soon as its call ends."""
        self._is_closed = True
        idle, self._idle = self._idle, []
        for stream in idle:
            stream.close()

    async def _enter(self, deadline: Deadline) -> None:
        if not self._room.locked():
            await self._room.acquire()  # does not wait
            return
        try:
            async with asyncio.timeout(deadline.remaining()):
                await self._room.acquire()
        except TimeoutError:
            raise httpx.PoolTimeout("no connection was free") from None

    def _take(self) -> Stream | None:
        """The idle connection that was used last, if the service has not closed it."""
        while self._idle:
            stream = self._idle.pop()
            if time.monotonic() - stream.used_at < (LIMITS.keepalive_expiry or 0.0) and not stream.is_stale():
                return stream
            stream.close()
        return None

    def _put_back(self, stream: Stream) -> None:
        surplus: Stream | None = stream
        if stream.is_reusable and not self._is_closed:
            self._idle.append(stream)
            # The one that has waited longest goes.
            surplus = self._idle.pop(0) if len(self._idle) > (LIMITS.max_keepalive_connections or 0) else None
        if surplus is not None:
            surplus.close()

    async def _connect(self, timeout_s: float | None) -> Stream:
        address, loop = self._address, asyncio.get_running_loop()
        with mapped(httpx.ConnectError, httpx.ConnectTimeout):
            async with asyncio.timeout(timeout_s):
                if address.uds is not None:
                    return (await loop.create_unix_connection(Stream, address.uds))[1]
                host, port = address.base.host, address.base.port or (443 if self._context is not None else 80)
                transport, stream = await loop.create_connection(Stream, host, port, ssl=self._context)
                # Through a copy of its descriptor: what uvloop calls its socket takes no options.
                with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as plain:
                    for option in KEEPALIVE:
                        plain.setsockopt(*option)
                return stream
