"""One request and its reply on their way through a `FaultProxy`, and what may happen to them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from tests.faults.proxy import FaultProxy

PIECE_BYTES = 64 * 1024
_TICKS_PER_S = 20

Action = Literal["reset", "close", "stall", "delay", "throttle", "garbage", "cut_chunk"]


class Phase(StrEnum):
    """Where in an exchange a fault acts."""

    CONNECT = "connect"  # the connection stands, and nothing was read from it
    REQUEST_HEAD = "request head"
    REQUEST_BODY = "request body"
    BEFORE_REPLY = "before the reply"  # the service has answered, and nothing of it was passed on
    REPLY_HEAD = "reply head"
    REPLY_BODY = "reply body"


@dataclass(frozen=True)
class Fault:
    """What happens, once.

    Args:
        action: `reset` (RST), `close` (FIN), `stall` (nothing more passes until the client leaves), `delay` (nothing
            passes for `seconds`), `throttle` (from here on so many `bytes_per_s`), `garbage` (random bytes in the place
            of what is left, then FIN), `cut_chunk` (the reply becomes a chunked one that ends within a chunk).
        phase: Where.
        fraction: How much of the phase passes before.
        seconds: Of `delay`.
        bytes_per_s: Of `throttle`.
    """

    action: Action
    phase: Phase = Phase.BEFORE_REPLY
    fraction: float = 0.5
    seconds: float = 0.2
    bytes_per_s: float = 100_000.0


@dataclass(frozen=True)
class Fired:
    """A fault that acted, and in which request: `POST /v1/solve`, or nothing before there was one."""

    fault: Fault
    request: str


class End(Exception):  # noqa: N818 - not an error: the connection has ended, as planned or because a peer left
    """This connection is over."""


class Exchange:
    """One request and its reply on their way through."""

    def __init__(
        self,
        proxy: FaultProxy,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        down: Any,
        up: Any,
        fault: Fault | None,
    ) -> None:
        self._proxy, self._reader, self._writer, self._down, self._up = proxy, reader, writer, down, up
        self._fault, self._request = fault, ""
        self._bytes_per_s: float | None = None

    async def at_connect(self) -> None:
        """The fault, if it acts before anything is read."""
        if self._fault is not None and self._fault.phase is Phase.CONNECT:
            await self._act(self._writer)

    async def run(self, first: bytes) -> None:
        """Pass the request on, and its reply back.

        Args:
            first: The byte that is read.
        """
        head = first + await self._reader.readuntil(b"\r\n\r\n")
        self._request = b" ".join(head.split(b" ", 2)[:2]).decode("latin-1")
        self._proxy.requests.append(self._request)
        with contextlib.suppress(OSError):  # a service that refuses early does not read on: its reply may be there
            await self._head(head, self._up, Phase.REQUEST_HEAD)
            length = int(_header(head, b"content-length") or 0)
            await self._body(self._reader, self._up, length, Phase.REQUEST_BODY)
        first = await first_byte(self._down, self._reader)
        if self._fault is not None and self._fault.phase is Phase.BEFORE_REPLY and self._fault.action != "cut_chunk":
            await self._act(self._writer)
        reply = first + await self._down.readuntil(b"\r\n\r\n")
        if self._fault is not None and self._fault.action == "cut_chunk":
            await self._cut_chunk(reply)
        await self._head(reply, self._writer, Phase.REPLY_HEAD)
        await self._reply_body(reply)
        if b"close" in (_header(reply, b"connection") or b"").lower():
            raise End

    async def _reply_body(self, head: bytes) -> None:
        if b"chunked" not in (_header(head, b"transfer-encoding") or b"").lower():
            await self._body(self._down, self._writer, int(_header(head, b"content-length") or 0), Phase.REPLY_BODY)
            return
        size = 1
        while size:
            line = await self._down.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            await self._pass(line, self._writer)
            await self._body(self._down, self._writer, size + 2, Phase.REPLY_BODY)

    async def _head(self, head: bytes, sink: asyncio.StreamWriter, phase: Phase) -> None:
        if self._fault is None or self._fault.phase is not phase:
            await self._pass(head, sink)
            return
        middle = int(self._fault.fraction * len(head))
        await self._pass(head[:middle], sink)
        await self._act(sink)
        await self._pass(head[middle:], sink)

    async def _body(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, length: int, phase: Phase) -> None:
        acts_at = (
            length if self._fault is None or self._fault.phase is not phase else int(self._fault.fraction * length)
        )
        await self._copy(source, sink, acts_at)
        if acts_at < length:
            await self._act(sink)
            await self._copy(source, sink, length - acts_at)

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, length: int) -> None:
        while length:
            piece = await source.read(min(length, PIECE_BYTES))
            if not piece:
                raise End
            await self._pass(piece, sink)
            length -= len(piece)

    async def _pass(self, data: bytes, sink: asyncio.StreamWriter) -> None:
        await self._proxy.gate()
        while data:
            size = len(data)
            if self._bytes_per_s is not None:
                size = max(1, int(self._bytes_per_s / _TICKS_PER_S))
                await asyncio.sleep(1 / _TICKS_PER_S)
            sink.write(data[:size])
            await sink.drain()
            data = data[size:]

    async def _act(self, sink: asyncio.StreamWriter) -> None:
        """Let the fault happen; returns where the exchange goes on after it."""
        fault = self._fault
        assert fault is not None
        self._fault = None
        self._proxy.fired.append(Fired(fault, self._request))
        if fault.action == "delay":
            await asyncio.sleep(fault.seconds)
        elif fault.action == "throttle":
            self._bytes_per_s = fault.bytes_per_s
        elif fault.action == "stall":
            while await self._reader.read(PIECE_BYTES):
                pass
            raise End
        elif fault.action == "garbage":
            sink.write(self._proxy.garbage(4096))
            await sink.drain()
            raise End
        else:
            if fault.action == "reset":
                reset(self._writer)
            raise End

    async def _cut_chunk(self, head: bytes) -> None:
        length = int(_header(head, b"content-length") or 0)
        body = await self._down.readexactly(length)
        lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"content-length")]
        lines.insert(1, b"Transfer-Encoding: chunked")
        self._writer.write(b"\r\n".join(lines) + b"%x\r\n" % length + body[: length // 2])
        await self._writer.drain()
        fault = self._fault
        assert fault is not None
        self._proxy.fired.append(Fired(fault, self._request))
        raise End


async def first_byte(wanted: asyncio.StreamReader, other: asyncio.StreamReader) -> bytes:
    """The next byte of a stream, unless the peer at the other end, of whom nothing is expected, leaves or speaks."""
    reads = [asyncio.ensure_future(stream.read(1)) for stream in (wanted, other)]
    try:
        await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)
        if not reads[0].done() or not (data := reads[0].result()):
            raise End
        return data
    finally:
        for each in reads:
            each.cancel()
        await asyncio.gather(*reads, return_exceptions=True)


def _header(head: bytes, name: bytes) -> bytes | None:
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.strip().lower() == name:
            return value.strip()
    return None


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN."""
    connection: Any = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
