"""Requests before they are sent, their bodies in pieces, and replies into one buffer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import httpx

from argrad.transport.exchange import Answer, Deadline
from argrad.wire import IDENTITY, ZSTD, WireError, decompress

_PIECE_BYTES = 256 * 1024
"""httpcore copies what is left of a buffer after each send: a large one in a piece costs time quadratic in its size."""


class Upload(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A request body that can be sent again.

    Args:
        buffers: Their concatenation is the body; they are not copied.
        size: Its length in bytes.
        deadline: Checked before each piece of a long body.
    """

    def __init__(self, buffers: Sequence[bytes | memoryview], size: int, deadline: Deadline) -> None:
        self.buffers, self.size, self._deadline = buffers, size, deadline

    def views(self) -> list[memoryview]:
        """The body without copies."""
        return [memoryview(buffer) for buffer in self.buffers if len(buffer)]

    def __iter__(self) -> Iterator[bytes]:
        if self.size <= _PIECE_BYTES:
            yield b"".join(self.buffers)
            return
        for buffer in self.buffers:
            view = memoryview(buffer)
            for start in range(0, len(view), _PIECE_BYTES):
                self._deadline.check()
                yield bytes(view[start : start + _PIECE_BYTES])

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece


@dataclass(frozen=True, eq=False)
class Outgoing:
    """A request.

    Args:
        method: `GET`, `POST`, …
        url: Where it goes.
        headers: All of them, `Host` and `Content-Length` included.
        body: May be empty.
        timeouts: httpx's, in seconds: connect, read, write, pool.
        target: Which of the client's addresses that is.
    """

    method: str
    url: httpx.URL
    headers: Sequence[tuple[bytes, bytes]]
    body: Upload
    timeouts: Mapping[str, float | None]
    target: int = 0

    def head(self) -> bytes:
        """Request line and headers, as HTTP/1.1 writes them."""
        lines = [b"%s %s HTTP/1.1" % (self.method.encode("ascii"), self.url.raw_path)]
        lines += [b"%s: %s" % header for header in self.headers]
        return b"\r\n".join([*lines, b"", b""])

    def as_httpx(self) -> httpx.Request:
        """The same for a transport of httpx."""
        extensions = {"timeout": dict(self.timeouts)}
        return httpx.Request(self.method, self.url, headers=[*self.headers], stream=self.body, extensions=extensions)


class Download:
    """A reply's body, gathered in a buffer of its Content-Length.

    Args:
        headers: Of the reply.
        deadline: Checked at each piece, so that a reply that trickles in ends too.
    """

    def __init__(self, headers: Mapping[str, str], deadline: Deadline) -> None:
        length = headers.get("content-length")
        self._wanted = int(length) if length is not None and length.isdigit() else None
        self._buffer = bytearray(self._wanted or 0)
        self._filled = 0
        self._deadline = deadline

    def add(self, piece: bytes) -> None:
        """Append a piece.

        Raises:
            DeadlineExceededError: the deadline passed.
            httpx.RemoteProtocolError: the body is longer than its Content-Length.
        """
        self._deadline.check()
        end = self._filled + len(piece)
        if self._wanted is not None and end > self._wanted:
            raise httpx.RemoteProtocolError(f"the reply is longer than its {self._wanted} bytes")
        self._buffer[self._filled : end] = piece
        self._filled = end

    def finish(self) -> bytearray:
        """The whole body.

        Raises:
            httpx.RemoteProtocolError: the body is shorter than its Content-Length.
        """
        if self._wanted is not None and self._filled < self._wanted:
            raise httpx.RemoteProtocolError(f"the reply was cut off after {self._filled} of {self._wanted} bytes")
        return self._buffer


def decoded(answer: Answer, accepted: str) -> Answer:
    """A reply whose body is not encoded any more.

    Args:
        answer: As it came.
        accepted: The encoding that was asked for.

    Raises:
        httpx.RemoteProtocolError: the body has another encoding, or cannot be decompressed.
    """
    encoding = answer.headers.get("content-encoding", IDENTITY).lower()
    if encoding == IDENTITY:
        return answer
    if encoding != accepted or encoding != ZSTD:
        raise httpx.RemoteProtocolError(f"the reply is encoded as {encoding}")
    try:
        return replace(answer, body=decompress(answer.body))
    except WireError as error:
        raise httpx.RemoteProtocolError(f"the reply cannot be decompressed: {error}") from error
