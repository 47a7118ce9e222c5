"""Reading request bodies: straight into their place, under a cap and a count of what is in memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from starlette.types import Receive

from argrad.wire import TooLargeError
from argrad_service.http.problems import BadRequest
from argrad_service.scheduling import CallerGone

Body = bytearray | memoryview

INLINE_BYTES = 64 * 1024
"""A body up to this size is read and written on the event loop: a change of threads would cost more."""

INLINE_BINARY_BYTES = 512 * 1024
"""The same for a binary body that is not compressed: its tensors stay where they are, and are looked at once."""


async def read_body(
    receive: Receive,
    content_length: str | None,
    *,
    max_bytes: int,
    limit: str,
    reserve: Callable[[int], None],
) -> Body:
    """Read a body to its end.

    Args:
        receive: Of the request.
        content_length: The header, if there is one; else the body is chunked.
        max_bytes: Cap, which holds while streaming too.
        limit: What the cap is called, for the message.
        reserve: Called with each number of bytes before they are kept; may refuse by raising.

    Raises:
        BadRequest: Content-Length is no number, or is not the length of the body.
        TooLargeError: the body is over the cap.
        CallerGone: the connection broke.
    """
    if content_length is None:
        return await _read_chunked(receive, max_bytes, limit, reserve)
    return await _read_known(receive, body_length(content_length), max_bytes, limit, reserve)


async def _read_known(
    receive: Receive, length: int, max_bytes: int, limit: str, reserve: Callable[[int], None]
) -> Body:
    if length > max_bytes:
        raise TooLargeError("body", f"{length} bytes", limit)
    reserve(length)
    # Not bytearray(length): that writes zeros to every page, for a length that may be a lie.
    body = np.empty(length, np.uint8).data
    filled, is_open = 0, True
    while is_open:
        chunk, is_open = await next_chunk(receive)
        end = filled + len(chunk)
        if end > length:
            raise BadRequest("body", f"more than {length} bytes", f"{length} bytes, as Content-Length says")
        body[filled:end] = chunk
        filled = end
    if filled < length:
        raise BadRequest("body", f"{filled} bytes", f"{length} bytes, as Content-Length says")
    return body


async def _read_chunked(receive: Receive, max_bytes: int, limit: str, reserve: Callable[[int], None]) -> Body:
    body, is_open = bytearray(), True
    while is_open:
        chunk, is_open = await next_chunk(receive)
        if len(body) + len(chunk) > max_bytes:
            raise TooLargeError("body", f"more than {max_bytes} bytes", limit)
        reserve(len(chunk))
        body += chunk
    return body


async def next_chunk(receive: Receive) -> tuple[bytes, bool]:
    """The next piece of a body, and whether more may follow.

    Raises:
        CallerGone: the connection broke.
    """
    message = await receive()
    if message["type"] == "http.disconnect":
        raise CallerGone("the connection broke before the end of the body")
    return message.get("body", b""), message.get("more_body", False)


def body_length(header: str) -> int:
    """Read a Content-Length header.

    Raises:
        BadRequest: it is no number.
    """
    if not (header.isascii() and header.isdigit() and len(header) < 20):
        raise BadRequest("Content-Length", repr(header[:40]), "a number of bytes")
    return int(header)
