"""Reading request bodies that are compressed: decompressed as they arrive, in steps, under the cap of any body."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.types import Receive

from argrad.wire import Decompression, TooLargeError
from argrad_service.http.body import INLINE_BYTES, Body, body_length, next_chunk
from argrad_service.http.problems import BadRequest

_STAGED_BYTES = 1024**2
"""Compressed bytes that are gathered before they are decompressed together."""

_STEP_BYTES = 4 * 1024**2
"""Bytes that a turn of a thread decompresses; other bodies wait no longer, and a caller who left is noticed."""

InThread = Callable[[Callable[[], None]], Awaitable[None]]


async def read_compressed(
    receive: Receive,
    content_length: str | None,
    *,
    max_bytes: int,
    limit: str,
    reserve: Callable[[int], None],
    in_thread: InThread,
) -> Body:
    """Read a body that is compressed with zstd to its end.

    Args:
        receive: Of the request.
        content_length: The header, if there is one: bytes before decompression.
        max_bytes: Cap on the body, before and after decompression.
        limit: What the cap is called, for the message.
        reserve: Called with each number of bytes before they are kept; counts what is decompressed, and what is staged.
        in_thread: Runs a step that is not small.

    Raises:
        BadRequest: Content-Length is no number, or is not the length of the body.
        UnreadableBodyError: the body is not one whole frame.
        TooLargeError: the body is over the cap.
        CallerGone: the connection broke.
        MissingExtraError: zstd is not installed.
    """
    content = Decompression(max_bytes, limit)
    length = max_bytes if content_length is None else body_length(content_length)
    if length > max_bytes:
        raise TooLargeError("body", f"{length} bytes", limit)
    reserve(min(length, _STAGED_BYTES))
    staged, arrived, reserved, is_open = bytearray(), 0, 0, True
    while is_open:
        chunk, is_open = await next_chunk(receive)
        arrived += len(chunk)
        if arrived > length:
            if content_length is None:
                raise TooLargeError("body", f"more than {max_bytes} bytes", limit)
            raise BadRequest("body", f"more than {length} bytes", f"{length} bytes, as Content-Length says")
        staged += chunk
        if is_open and len(staged) < _STAGED_BYTES:
            continue
        content.feed(bytes(staged))
        is_small = arrived <= INLINE_BYTES
        staged.clear()
        while True:
            reserve(content.held - reserved)
            reserved = content.held
            if content.is_hungry:
                break
            if is_small:
                content.step(INLINE_BYTES)
            else:
                await in_thread(lambda: content.step(_STEP_BYTES))
            is_small = False
    if content_length is not None and arrived < length:
        raise BadRequest("body", f"{arrived} bytes", f"{length} bytes, as Content-Length says")
    return content.finish()
