"""HTTP on a real socket: whatever bytes come, in whatever pieces, the connection ends in time and no reply is a 5xx."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from random import Random
from typing import Any
from urllib.parse import urlsplit

import httptools
import httpx

from argrad_service.http.protocol import GuardedProtocol
from tests.fuzz.calls import LIMITS, PROBLEM
from tests.fuzz.keys import FOREIGN, KEY, KEYS
from tests.fuzz.seeds import seeds
from tests.fuzz.tally import Tally
from tests.service.support import make_app, serving

TIMEOUT_S = 0.3
"""Of heads, bodies and idle connections in this run."""

MOST_S = 30.0
"""A connection that is not closed by then hangs."""

CONNECTIONS = 48
AUTHORIZATIONS = (b"Authorization: Bearer " + KEY.encode(), b"Authorization: Bearer " + FOREIGN.encode())
_LINES = (
    b"Content-Length: 5", b"Content-Length: 0", b"Content-Length: 4294967296", b"Content-Length: -1",
    b"Content-Length: 5, 5", b"Content-Length: 99999999999999999999999", b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: identity", b"Expect: 100-continue",
    b"Upgrade: websocket", b"Connection: upgrade", b"Upgrade: h2c", b"Connection: keep-alive", b"Host: a\x00b",
    b"Host:", b"Host: localhost", b": nothing", b"X" * 9000 + b": y", b"a: " + b"y" * 70_000, b" folded", b"\tfolded",
    b"X\x00: y", b"X: \xff\xfe", b"Content-Type : application/json", b"Content-Encoding: zstd",
)  # fmt: skip
_STARTS = (
    b"GET / HTTP/1.0", b"GET /health/live HTTP/1.1", b"POST /v1/solve HTTP/1.0", b"POST /v1/solve HTTP/2.0",
    b"PRI * HTTP/2.0", b"GET http://elsewhere/health/live HTTP/1.1", b"CONNECT a:1 HTTP/1.1", b"OPTIONS * HTTP/1.1",
    b"GET /%ff%00/../v1 HTTP/1.1", b"GET /" + b"a" * 70_000 + b" HTTP/1.1", b"get /health/live http/1.1",
    b"GET  /health/live  HTTP/1.1", b"\x16\x03\x01\x02\x00", b"GET /v1/problems/%c3%28 HTTP/1.1",
    b"BREW /v1/solve HTTP/1.1", b"DELETE /v1/states/\xff HTTP/1.1", b"GET ? HTTP/1.1",
)  # fmt: skip
_CHUNKS = (
    b"0\r\n\r\n",
    b"FFFFFFFFFFFFFFFFF\r\n",
    b"-1\r\n",
    b"5;ext=\x00\r\nabcde\r\n",
    b"5\r\nabc",
    b"\r\n",
    b"0\r\nTrailer: x\r\n\r\n",
    b"g\r\n",
)


def fuzz_framing(count: int, seed: int, *, with_keys: bool = False) -> Tally:
    """Open so many connections to a service of its own, and send each a stream that is not quite HTTP.

    Args:
        count: Connections.
        seed: Of all chance.
        with_keys: Whether the service asks for keys; a third of the streams has the right one, a third another.
    """
    tally = Tally("framing with keys" if with_keys else "framing")
    keys = {"api_keys": KEYS} if with_keys else {}
    app = make_app(**(LIMITS | keys | {"body_timeout_s": TIMEOUT_S}))
    protocol = GuardedProtocol.with_bounds()
    options: dict[str, Any] = {"http": protocol, "timeout_keep_alive": TIMEOUT_S}
    with serving(app, **options) as url, tally.timed(), _errors_of_the_server() as errors:
        protocol.header_timeout_s = TIMEOUT_S  # not before: a first solve holds the event loop for longer
        port = urlsplit(url).port
        assert port is not None
        random = Random(seed)
        drawn = (random.choice((None, *AUTHORIZATIONS)) if with_keys else None for _ in range(count))
        asyncio.run(_fuzz(tally, port, [_stream(random, authorization) for authorization in drawn], with_keys))
        with httpx.Client(base_url=url, trust_env=False) as client:
            if client.get("/health/ready").status_code != 200:
                tally.find(b"ready", "the service is not ready at the end")
    for words in errors:
        tally.find(words.encode(), words)
    return tally


@contextlib.contextmanager
def _errors_of_the_server() -> Iterator[list[str]]:
    """What uvicorn logs as errors, such as an exception that nobody caught."""
    log, errors = logging.getLogger("uvicorn.error"), list[str]()

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            errors.append(f"{record.getMessage()}: {record.exc_info[1] if record.exc_info else ''}")

    handler, propagate = Keep(logging.ERROR), log.propagate
    log.addHandler(handler)
    log.propagate = False
    try:
        yield errors
    finally:
        log.removeHandler(handler)
        log.propagate = propagate


async def _fuzz(tally: Tally, port: int, streams: list[list[bytes]], with_keys: bool) -> None:
    left = iter(streams)

    async def send_some() -> None:
        for pieces in left:
            await _one(tally, port, pieces, with_keys)

    await asyncio.gather(*(send_some() for _ in range(CONNECTIONS)))


async def _one(tally: Tally, port: int, pieces: list[bytes], with_keys: bool) -> None:
    tally.inputs += 1
    shown, began, received = b"".join(pieces), time.perf_counter(), bytearray()

    async def talk() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            while received_now := await reader.read(1 << 16):
                received.extend(received_now)
        except ConnectionError:
            pass  # closed by the service, while we still wrote
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    try:
        await asyncio.wait_for(talk(), MOST_S)
    except TimeoutError:
        tally.find(shown, f"the connection is open after {MOST_S} s; so far {bytes(received[:300])!r}")
        tally.outcomes["hang"] += 1
        return
    tally.slowest_s = max(tally.slowest_s, time.perf_counter() - began)
    replies = _Replies()
    wrong = replies.read(bytes(received))
    tally.outcomes["+".join(map(str, replies.statuses[:2])) or "closed"] += 1
    tally.behaviours.add(tuple(replies.statuses))
    is_stranger = with_keys and KEY.encode() not in shown
    if is_stranger and b"/health/" not in shown and any(status < 400 for status in replies.statuses):
        wrong = "served without a key"
    if wrong is not None and not shown.lstrip().upper().startswith(b"HEAD"):
        tally.find(shown, f"{wrong}: {bytes(received[:500])!r}")


class _Replies:
    """Reads what came back."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self._wrong: str | None = None
        self._headers: dict[bytes, bytes] = {}
        self._parser = httptools.HttpResponseParser(self)

    def read(self, received: bytes) -> str | None:
        """What is wrong with the replies, if anything."""
        try:
            self._parser.feed_data(received)
        except httptools.HttpParserError as error:
            return f"no reply in HTTP: {error}"
        return self._wrong

    def on_message_begin(self) -> None:
        self._headers = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        self.statuses.append(status)
        if status >= 500 and status not in (501, 504):
            self._wrong = "a defect"
        elif status >= 400 and self._headers.get(b"content-type", b"").decode() != PROBLEM:
            self._wrong = "no problem document"


def _stream(random: Random, authorization: bytes | None) -> list[bytes]:
    """One to three requests on one connection, damaged, in pieces."""
    stream = b"".join(_request(random, authorization) for _ in range(random.choice((1, 1, 1, 2, 3))))
    for _ in range(random.choice((0, 1, 1, 2))):
        stream = _damage(random, stream)
    if random.random() < 0.6 or len(stream) < 2:
        return [stream]
    if random.random() < 0.1 and len(stream) < 600:
        return [stream[at : at + 1] for at in range(len(stream))]
    cuts = sorted(random.sample(range(1, len(stream)), min(len(stream) - 1, random.choice((1, 2, 5)))))
    return [stream[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]


def _request(random: Random, authorization: bytes | None) -> bytes:
    seed = random.choice(seeds())
    start = b"POST /v1/solve HTTP/1.1" if random.random() < 0.8 else random.choice(_STARTS)
    lines = [start, b"Host: localhost", b"Content-Type: " + seed.content_type.encode()]
    if authorization is not None:
        lines.append(authorization)
    if random.random() < 0.5:
        lines.append(b"Connection: close")
    body = seed.body
    if random.random() < 0.3:
        lines.append(b"Transfer-Encoding: chunked")
        half = len(body) // 2
        body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:half], body[half:])) + b"0\r\n\r\n"
        if random.random() < 0.5:
            at = random.randrange(len(body))
            body = body[:at] + random.choice(_CHUNKS) + body[at:]
    else:
        lines.append(b"Content-Length: %d" % len(body))
    if random.random() < 0.4:
        lines.insert(random.randrange(len(lines) + 1), random.choice(_LINES))
    end = b"\r\n" if random.random() < 0.95 else random.choice((b"\n", b"\r", b"\r\n\r\n"))
    return end.join(lines) + end * 2 + body


def _damage(random: Random, stream: bytes) -> bytes:
    at = random.randrange(max(1, min(len(stream), 400)))
    change = random.randrange(5)
    if change == 0:
        return stream[: max(1, at)]
    if change == 1:
        return stream[:at] + stream[at + random.choice((1, 4, 40)) :]
    if change == 2:
        return (
            stream[:at]
            + random.choice((b"\x00", b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\xff", b":", b" "))
            + stream[at:]
        )
    if change == 3:
        return stream + random.choice((b"garbage", b"\r\n\r\n", b"GET", b"\x00" * 100))
    flipped = bytearray(stream)
    flipped[at % len(flipped)] ^= 1 << random.randrange(8)
    return bytes(flipped)
