"""Replies as they go out: buffers that are not joined, compressed for those who ask for it."""

from __future__ import annotations

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from argrad.wire import LEAST_BYTES, ZSTD, compress, encode, encoded_size
from argrad.wire.messages import Message, TensorMap
from argrad_service.http.body import INLINE_BINARY_BYTES, INLINE_BYTES

Buffers = list[bytes] | list[bytes | memoryview]


class BufferedReply(Response):
    """A reply of several buffers, of which those that are large are not joined.

    Args:
        buffers: Their concatenation is the body.
        media_type: Of the body, before it was compressed.
        encoding: Of the body, if it has one.
        nbytes: Of the body, where it is known.
    """

    def __init__(
        self, buffers: Buffers, media_type: str, encoding: str | None = None, *, nbytes: int | None = None
    ) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        self.nbytes = encoded_size(buffers) if nbytes is None else nbytes
        # Each buffer is a message of ASGI, and a write: for small ones that takes longer than the copy.
        self._buffers: Buffers = [b"".join(buffers)] if self.nbytes <= INLINE_BINARY_BYTES else _gathered(buffers)
        self.raw_headers = [(b"content-length", b"%d" % self.nbytes), (b"content-type", media_type.encode())]
        if encoding is not None:
            self.raw_headers.append((b"content-encoding", encoding.encode()))

    def whole(self) -> bytes:
        """The body."""
        return b"".join(self._buffers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        """Send head and buffers."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        last = len(self._buffers) - 1
        for i, buffer in enumerate(self._buffers):
            await send({"type": "http.response.body", "body": buffer, "more_body": i < last})


def _gathered(buffers: Buffers) -> list[bytes | memoryview]:
    """The same body with small buffers that follow each other joined."""
    gathered: list[bytes | memoryview] = []
    small: list[bytes | memoryview] = []
    for buffer in buffers:
        if len(buffer) > INLINE_BYTES:
            gathered += [b"".join(small), buffer] if small else [buffer]
            small = []
        else:
            small.append(buffer)
    return [*gathered, b"".join(small)] if small else gathered


def write_reply(document: Message, tensors: TensorMap, media_type: str, encoding: str) -> BufferedReply:
    """Write a reply.

    Args:
        document: Of the reply.
        tensors: Its tensors.
        media_type: Format of the body.
        encoding: What the caller would take; a body that is short, or no shorter for it, goes as it is.

    Raises:
        MissingExtraError: zstd is asked for and not installed.
    """
    buffers = encode(document, tensors, media_type)
    size = encoded_size(buffers)
    if encoding == ZSTD and size >= LEAST_BYTES:
        compressed = compress(buffers, size)
        if encoded_size(compressed) < size:
            return BufferedReply(compressed, media_type, ZSTD)
    return BufferedReply(buffers, media_type, nbytes=size)
