"""`Idempotency-Key`: the same POST twice does the work once, and both get its reply."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Awaitable, Callable

import orjson
from starlette.responses import Response

from argrad_service.http.body import Body
from argrad_service.http.problems import BadRequest
from argrad_service.http.replies import BufferedReply
from argrad_service.state import MAX_REPLY_BYTES, IdempotencyInProgress, IdempotencyMismatch, Shared

HEADER = "Idempotency-Key"
REPLAYED = "Idempotent-Replayed"
_KEY = re.compile(r"[\x21-\x7e]{1,255}", re.ASCII)


class Once:
    """Serves calls that name a key.

    Args:
        shared: Knows the keys.
    """

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self.counts: Counter[str] = Counter()

    async def serve(
        self, key: str, owner: str, fingerprint: bytes, work: Callable[[], Awaitable[BufferedReply]]
    ) -> Response:
        """Do the work of a key, or answer as whoever did it.

        Only good replies are kept, of at most 256 KiB: after any other the work is done again.

        Args:
            key: Of the call, as `check_key` has found it.
            owner: Whose key it is.
            fingerprint: Of the request.
            work: Serves the call.

        Raises:
            IdempotencyInProgress: the same call is being served.
            IdempotencyMismatch: the key stands for another request.
            Exception: what the work raises.
        """
        try:
            claim = await self._shared.claim(owner, key, fingerprint)
        except (IdempotencyInProgress, IdempotencyMismatch) as error:
            self.counts["mismatch" if isinstance(error, IdempotencyMismatch) else "in-progress"] += 1
            raise
        self.counts["replayed" if isinstance(claim, bytes) else "new"] += 1
        if isinstance(claim, bytes):
            return _replay(claim)
        is_kept = False
        try:
            reply = await work()
            if reply.nbytes <= MAX_REPLY_BYTES:
                await self._shared.finish(claim, _record(reply))
                is_kept = True
        finally:
            if not is_kept:
                self._shared.abandon(claim)
        return reply


def check_key(key: str) -> None:
    """Refuse what is no key.

    Raises:
        BadRequest: it is empty, too long, or has other characters than printable ASCII.
    """
    if not _KEY.fullmatch(key):
        raise BadRequest(HEADER, repr(key)[:80], "1 to 255 printable ASCII characters, without spaces")


def fingerprint_of(path: str, forms: tuple[str, ...], body: Body) -> bytes:
    """What makes two requests the same: route, format of body and reply, and every byte of the body, decompressed."""
    digest = hashlib.sha256("\n".join((path, *forms, "")).encode())
    digest.update(body)
    return digest.digest()


def _record(reply: BufferedReply) -> bytes:
    """A reply as it is kept: its headers as a line of JSON, then its body."""
    headers = {name.decode(): value.decode() for name, value in reply.raw_headers}
    return orjson.dumps(headers) + b"\n" + reply.whole()


def _replay(record: bytes) -> Response:
    head, _, body = record.partition(b"\n")
    response = Response(body)
    headers = {**orjson.loads(head), REPLAYED: "true"}
    response.raw_headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    return response
