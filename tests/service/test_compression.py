"""Bodies compressed with zstd: what comes in, what goes out, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import torch

from argrad.errors import MissingExtraError
from argrad.problems.content import digest
from argrad.wire import (
    JSON,
    LEAST_BYTES,
    SAFETENSORS,
    TooLargeError,
    UnreadableBodyError,
    compress,
    decode,
    decompress,
    encode,
    load_zstd,
)
from argrad.wire.messages import (
    JvpRequest,
    RegisterRequest,
    SolveReply,
    SolveRequest,
    TensorMap,
    VjpRequest,
)
from argrad_service.http import compressed
from argrad_service.http.body import INLINE_BYTES
from argrad_service.http.compressed import read_compressed
from argrad_service.http.problems import BadRequest
from argrad_service.scheduling import CallerGone, Overloaded
from tests.service.support import D, make_app, projection, running_app, simplex
from tests.service.test_bad_input import check_alive, check_problem
from tests.wire.test_compression import SKIPPABLE, bomb, frame

pytestmark = pytest.mark.anyio

LIMITS = {"max_json_bytes": 200_000, "max_body_bytes": 4 << 20}
POINTS = tuple((-1.0 - i, 2.0 + i) for i in range(2000))
LARGE = projection(*POINTS)
POINT = {"solution.z": -LARGE["problem.q"].clamp(max=0.0), "solution.lam": LARGE["problem.q"].clamp(min=0.0)}
FIXED = {"problem.Q": torch.eye(60, dtype=D)}
DIGEST = digest("qp", {"Q": FIXED["problem.Q"]})
ZSTD = {"content-encoding": "zstd"}


def squeeze(body: bytes) -> bytes:
    return b"".join(compress([body], len(body)))


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def server(anyio_backend: str) -> AsyncIterator[httpx.AsyncClient]:
    """One application for all, so that each test shows that those before it did no harm."""
    async with running_app(make_app(**LIMITS)) as client:
        yield client


CALLS: dict[str, tuple[str, str, Any, TensorMap]] = {
    "solve": ("POST", "/v1/solve", SolveRequest(keep_state=False), LARGE),
    "vjp": ("POST", "/v1/vjp", VjpRequest(), LARGE | POINT | {"upstream.z": torch.ones(2000, 2, dtype=D)}),
    "jvp": ("POST", "/v1/jvp", JvpRequest(), LARGE | POINT | {"tangents.q": torch.ones(2000, 2, dtype=D)}),
    "register": ("PUT", f"/v1/problems/{DIGEST}", RegisterRequest(), FIXED),
}


async def raw(client: httpx.AsyncClient, path: str, content: Any, **headers: str) -> tuple[httpx.Headers, bytes]:
    """Headers of a reply, and its body as it went over the wire."""
    async with client.stream("POST", path, content=content, headers=headers) as response:
        assert response.status_code == 200
        return response.headers, b"".join([piece async for piece in response.aiter_raw()])


@pytest.mark.parametrize("source", [SAFETENSORS, JSON])
@pytest.mark.parametrize("name", CALLS)
async def test_a_compressed_body_is_the_body(server: httpx.AsyncClient, name: str, source: str) -> None:
    method, path, document, tensors = CALLS[name]
    body = b"".join(encode(document, tensors, source))
    small = squeeze(body)
    assert len(small) < len(body) / 2
    headers = {"content-type": source, "accept": JSON, "accept-encoding": "identity"}
    plain = await server.request(method, path, content=body, headers=headers)
    squeezed = await server.request(method, path, content=small, headers=headers | {"content-encoding": "Zstd"})
    assert squeezed.status_code in (200, 201), squeezed.text
    found, wanted = squeezed.json(), plain.json()
    found.pop("timings_ms", None), wanted.pop("timings_ms", None)
    assert found == wanted


async def test_a_body_may_come_in_pieces_of_any_size(server: httpx.AsyncClient) -> None:
    body = squeeze(b"".join(encode(SolveRequest(keep_state=False), LARGE, SAFETENSORS)))

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(body), 97):
            yield body[at : at + 97]

    headers, reply = await raw(
        server, "/v1/solve", pieces(), **{"content-type": SAFETENSORS, "accept-encoding": "identity", **ZSTD}
    )
    _, tensors = decode(SolveReply, bytearray(reply), headers["content-type"])
    torch.testing.assert_close(tensors["solution.z"], POINT["solution.z"])


@pytest.mark.parametrize(
    ("asked", "is_compressed"),
    [
        ("zstd", True),
        ("gzip, ZSTD;q=0.5", True),
        ("identity", False),
        ("gzip, deflate, br", False),
        ("*", False),
        ("*;q=1, zstd;q=0", False),
        ("", False),
    ],
)
async def test_a_reply_is_compressed_for_who_names_zstd(
    server: httpx.AsyncClient, asked: str, is_compressed: bool
) -> None:
    body = b"".join(encode(SolveRequest(keep_state=False), LARGE, SAFETENSORS))
    headers, reply = await raw(server, "/v1/solve", body, **{"content-type": SAFETENSORS, "accept-encoding": asked})
    assert headers.get("content-encoding") == ("zstd" if is_compressed else None)
    assert int(headers["content-length"]) == len(reply)
    content = decompress(reply) if is_compressed else bytearray(reply)
    assert len(content) > LEAST_BYTES
    _, tensors = decode(SolveReply, content, headers["content-type"])
    torch.testing.assert_close(tensors["solution.z"], POINT["solution.z"])


async def test_a_small_reply_and_an_error_are_never_compressed(server: httpx.AsyncClient) -> None:
    for document, status in (({"problem": simplex()}, 200), ({"problem": {}}, 422)):
        response = await server.post("/v1/solve", json=document, headers={"accept-encoding": "zstd"})
        assert response.status_code == status
        assert "content-encoding" not in response.headers


async def test_a_reply_that_would_not_be_shorter_goes_as_it_is(
    server: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argrad_service.http.replies.compress", lambda buffers, size: [bytes(size)])
    body = b"".join(encode(SolveRequest(keep_state=False), LARGE, SAFETENSORS))
    headers, _ = await raw(server, "/v1/solve", body, **{"content-type": SAFETENSORS, "accept-encoding": "zstd"})
    assert "content-encoding" not in headers


BODY = b"".join(encode(SolveRequest(), LARGE, SAFETENSORS))
SMALL = squeeze(BODY)
WANTED = "one whole frame of zstd, without a dictionary, with a window of at most 8 MiB"
ROWS: dict[str, tuple[str, bytes, tuple[int, str, str, str]]] = {
    "nothing": (SAFETENSORS, b"", (400, "bad-request", "0 bytes that do not begin as a frame", WANTED)),
    "no frame": (SAFETENSORS, BODY, (400, "bad-request", "that do not begin as a frame of zstd", WANTED)),
    "gzip": (SAFETENSORS, b"\x1f\x8b" + bytes(30), (400, "bad-request", "32 bytes that do not begin", WANTED)),
    "a head alone": (SAFETENSORS, SMALL[:12], (400, "bad-request", "cut off after 0 bytes", WANTED)),
    "cut short": (SAFETENSORS, SMALL[:-5], (400, "bad-request", "cut off after", WANTED)),
    "a wrong checksum": (SAFETENSORS, SMALL[:-1] + b"\0", (400, "bad-request", "a corrupt one", WANTED)),
    "corrupt": (SAFETENSORS, SMALL[:40] + bytes(40) + SMALL[80:], (400, "bad-request", "a corrupt one", WANTED)),
    "garbage behind": (SAFETENSORS, SMALL + b"\0", (400, "bad-request", "bytes after the end", WANTED)),
    "two frames": (SAFETENSORS, SMALL + SMALL, (400, "bad-request", "bytes after the end", WANTED)),
    "a skippable frame": (SAFETENSORS, SKIPPABLE + SMALL, (400, "bad-request", "bytes after the end", WANTED)),
    "a large window": (
        SAFETENSORS,
        frame(bytes(17 << 20), announced=False, window_log=24),
        (400, "bad-request", "one that needs more memory", WANTED),
    ),
    "a bomb": (
        SAFETENSORS,
        bomb(1 << 30),
        (413, "too-large", "more than 4194304 bytes, decompressed", "at most 4194304 bytes (ARGRAD_MAX_BODY_BYTES)"),
    ),
    "a bomb that says so": (
        SAFETENSORS,
        bomb(1 << 30, announced=1 << 30),
        (413, "too-large", "1073741824 bytes, decompressed", "at most 4194304 bytes (ARGRAD_MAX_BODY_BYTES)"),
    ),
    "a bomb that lies": (
        SAFETENSORS,
        bomb(1 << 30, announced=1 << 20),
        (400, "bad-request", "a corrupt one", WANTED),
    ),
    "a bomb of JSON": (
        JSON,
        bomb(1 << 30),
        (413, "too-large", "more than 200000 bytes, decompressed", "at most 200000 bytes (ARGRAD_MAX_JSON_BYTES"),
    ),
    "too many bytes as they come": (
        JSON,
        b"\0" * 200_001,
        (413, "too-large", "200001 bytes", "at most 200000 bytes (ARGRAD_MAX_JSON_BYTES"),
    ),
}


@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("row", ROWS)
async def test_a_frame_that_is_wrong_or_too_large(server: httpx.AsyncClient, row: str, is_chunked: bool) -> None:
    content_type, body, wanted = ROWS[row]

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(body), 50_000):
            yield body[at : at + 50_000]

    content = pieces() if is_chunked else body
    response = await server.post("/v1/solve", content=content, headers={"content-type": content_type, **ZSTD})
    status, kind, found, limit = wanted
    if is_chunked and row == "too many bytes as they come":
        found = "more than 200000 bytes"
    check_problem(response, status, kind, "body", found, limit)
    await check_alive(server)


async def test_json_of_brackets_hides_in_no_frame(server: httpx.AsyncClient) -> None:
    body = squeeze(b'{"q": ' + b"[" * 30_000)
    response = await server.post("/v1/solve", content=body, headers={"content-type": JSON, **ZSTD})
    check_problem(response, 413, "too-large", "body", "30001 brackets in JSON", "at most 20000")


async def test_without_the_package_it_is_a_501(server: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise MissingExtraError("compression with zstd", "zstd")

    monkeypatch.setattr("argrad.wire.compression.load_zstd", missing)
    response = await server.post("/v1/solve", content=SMALL, headers={"content-type": SAFETENSORS, **ZSTD})
    assert response.status_code == 501
    assert (response.json()["what"], response.json()["extra"]) == ("compression with zstd", "zstd")
    await check_alive(server)


class Incoming:
    """A body that is read by itself: pieces as they arrive, and what is noted on the way."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces, self.received = pieces, 0
        self.reserved: list[int] = []
        self.threaded: list[Callable[[], None]] = []

    async def receive(self) -> Any:
        self.received += 1
        if self.received > len(self.pieces):
            return {"type": "http.disconnect"}
        body = self.pieces[self.received - 1]
        return {"type": "http.request", "body": body, "more_body": self.received < len(self.pieces)}

    async def in_thread(self, work: Callable[[], None]) -> None:
        self.threaded.append(work)
        await asyncio.to_thread(work)

    async def read(self, max_bytes: int = 64 << 20, length: int | None = None) -> bytes:
        body = await read_compressed(
            self.receive,
            None if length is None else str(length),
            max_bytes=max_bytes,
            limit=f"at most {max_bytes} bytes",
            reserve=self.reserved.append,
            in_thread=self.in_thread,
        )
        return bytes(body)


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "unannounced"])
async def test_what_is_counted_is_what_is_decompressed(announced: bool) -> None:
    content = bytes(9 << 20)
    data = frame(content, announced=announced)
    incoming = Incoming(data)
    assert await incoming.read(length=len(data)) == content
    assert sum(incoming.reserved) == len(data) + len(content)
    if announced:
        assert incoming.reserved[:2] == [len(data), len(content)], "all of it before any of it is there"
    else:
        assert max(incoming.reserved) <= compressed._STEP_BYTES + (256 << 10)


async def test_what_is_not_granted_is_not_decompressed() -> None:
    incoming = Incoming(bomb(32 << 20))

    def refuse(nbytes: int) -> None:
        incoming.reserved.append(nbytes)
        if sum(incoming.reserved) > 10 << 20:
            raise Overloaded("no room", 1)

    with pytest.raises(Overloaded):
        await read_compressed(
            incoming.receive, None, max_bytes=64 << 20, limit="", reserve=refuse, in_thread=incoming.in_thread
        )
    assert len(incoming.threaded) <= 3


async def test_small_bodies_stay_on_the_event_loop_and_large_ones_leave_it() -> None:
    small, large = Incoming(frame(bytes(INLINE_BYTES))), Incoming(bomb(64 << 20))
    await small.read()
    assert not small.threaded
    assert len(await large.read()) == 64 << 20
    assert len(large.threaded) >= 15, "in steps, between which others have their turn"


async def test_a_bomb_that_streams_in_is_refused_before_its_end() -> None:
    data = bomb(1 << 30)
    incoming = Incoming(*[data[at : at + 500] for at in range(0, len(data), 500)])
    compressed_bytes = len(data)
    with pytest.raises(TooLargeError):
        await incoming.read(max_bytes=compressed_bytes)
    endless = Incoming(*[bytes(1 << 20)] * 100)
    with pytest.raises(UnreadableBodyError):
        await endless.read()
    assert endless.received == 1


@pytest.mark.parametrize("length", [len(SMALL) - 1, len(SMALL) + 1])
async def test_a_content_length_that_lies(length: int) -> None:
    with pytest.raises(BadRequest, match="as Content-Length says"):
        await Incoming(SMALL[:100], SMALL[100:]).read(length=length)


async def test_a_connection_that_breaks() -> None:
    incoming = Incoming(SMALL[:100])
    incoming.pieces = (SMALL[:100], b"")

    async def receive() -> Any:
        message = await Incoming.receive(incoming)
        return message | {"more_body": True} if incoming.received == 1 else {"type": "http.disconnect"}

    incoming.receive = receive  # type: ignore[method-assign]
    with pytest.raises(CallerGone):
        await incoming.read()


def test_the_package_is_there() -> None:
    assert load_zstd().zstd_version_info >= (1, 5)
