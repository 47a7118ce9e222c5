"""`compression="zstd"`: what is sent and read, and what stays as it is."""

from __future__ import annotations

import pickle
import sys
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

import argrad
from argrad.transport.bodies import decoded
from argrad.transport.calls import HttpOptions
from argrad.transport.exchange import Answer
from argrad.transport.http import HttpBackend
from argrad.transport.retries import RetryPolicy
from argrad.wire import LEAST_BYTES, compress, decompress, load_zstd
from tests.client.support import D, FakeClock, FakeService, problem_reply
from tests.service.support import make_app, serving

URL = "http://127.0.0.1:9"
STRUCTURED = argrad.QP(Q=torch.eye(80, dtype=D), q=torch.linspace(-1, 1, 80, dtype=D).repeat(40, 1))
SMALL = argrad.QP(Q=torch.eye(2, dtype=D), q=torch.ones(2, dtype=D))


class Squeezing(FakeService):
    """A fake service that reads compressed requests, and compresses replies where that is asked for."""

    def __init__(self, *faults: Any, squeeze: Any = compress) -> None:
        super().__init__(*faults)
        self.squeeze = squeeze
        self.bodies: list[tuple[httpx.Headers, bytes]] = []

    def handle(self, request: httpx.Request) -> httpx.Response:
        body = b"".join(bytes(piece) for piece in request.stream)  # type: ignore[union-attr]
        self.bodies.append((request.headers, body))
        assert int(request.headers["content-length"]) == len(body)
        if request.headers.get("content-encoding") == "zstd":
            body = bytes(decompress(body))
        reply = super().handle(httpx.Request(request.method, request.url, headers=request.headers, content=body))
        if reply.status_code != 200 or request.headers["accept-encoding"] != "zstd":
            return reply
        content = b"".join(self.squeeze([reply.content], len(reply.content)))
        # As a stream: httpx would look for a decoder of its own.
        return httpx.Response(
            200,
            headers={**reply.headers, "content-encoding": "zstd", "content-length": str(len(content))},
            stream=httpx.ByteStream(content),
        )


def make_client(service: Squeezing, compression: Any = "zstd") -> argrad.Client:
    clock = FakeClock()
    options = HttpOptions(urls=[URL], clock=clock, policy=RetryPolicy(retries=2), compression=compression)
    return argrad.Client(HttpBackend(options, transport=service.transport, sleep=clock.sleep), register="explicit")


def test_a_large_body_is_compressed_and_a_small_one_is_not() -> None:
    service = Squeezing()
    client = make_client(service)
    found = client.solve(STRUCTURED).solution["z"]
    torch.testing.assert_close(found, -STRUCTURED.q)
    client.solve(SMALL)
    (large, large_body), (small, small_body) = service.bodies
    assert large["content-encoding"] == "zstd"
    assert large["accept-encoding"] == small["accept-encoding"] == "zstd"
    assert "content-encoding" not in small
    assert len(decompress(large_body)) > LEAST_BYTES > len(small_body)
    assert len(large_body) < LEAST_BYTES


def test_nobody_compresses_without_being_told() -> None:
    service = Squeezing()
    make_client(service, None).solve(STRUCTURED)
    headers, body = service.bodies[0]
    assert "content-encoding" not in headers
    assert headers["accept-encoding"] == "identity"
    assert len(body) > LEAST_BYTES


def test_a_body_that_would_not_be_shorter_goes_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("argrad.transport.calls.compress", lambda buffers, size: [bytes(size)])
    service = Squeezing()
    make_client(service).solve(STRUCTURED)
    assert "content-encoding" not in service.bodies[0][0]


def test_what_was_compressed_is_sent_again_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: Any) -> list[bytes]:
        calls.append(arguments)
        return compress(*arguments)

    monkeypatch.setattr("argrad.transport.calls.compress", counted)
    service = Squeezing(httpx.ReadError("broken"), problem_reply(429, "overloaded", {"retry-after": "1"}))
    make_client(service).solve(STRUCTURED)
    assert len(calls) == 1
    assert len({body for _, body in service.bodies}) == 1
    assert [headers["content-encoding"] for headers, _ in service.bodies] == ["zstd"] * 3


def test_a_reply_that_cannot_be_decompressed_is_asked_for_again() -> None:
    pieces = iter((lambda content: content[:-9], lambda content: content + b"!", lambda content: content))

    def broken(buffers: Any, size: int) -> list[bytes]:
        return [next(pieces)(b"".join(compress(buffers, size)))]

    service = Squeezing(squeeze=broken)
    make_client(service).solve(STRUCTURED)
    assert len(service.bodies) == 3


def test_a_reply_that_never_can_be_says_so() -> None:
    service = Squeezing(squeeze=lambda buffers, size: [b"no frame at all"])
    with pytest.raises(argrad.ConnectionFailedError, match=r"cannot be decompressed: body: found 15 bytes that do not"):
        make_client(service).solve(STRUCTURED)


def test_an_error_may_be_compressed_by_a_proxy() -> None:
    problem = problem_reply(422, "invalid", field="problem.q", found="a", wanted="b")
    content = b"".join(compress([problem.content], len(problem.content)))
    answer = decoded(Answer(422, {"content-encoding": "zstd"}, content), "zstd")
    assert bytes(answer.body) == problem.content


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(make_app()) as url:
        yield url


@pytest.mark.parametrize("gradients", ["adjoint", "full"])
def test_the_same_through_a_real_service(url: str, gradients: Any) -> None:
    upstream = {"z": torch.ones_like(STRUCTURED.q)}
    found = []
    for compression in (None, "zstd"):
        with argrad.Client(url, compression=compression) as client, pickle.loads(pickle.dumps(client)) as copied:
            for one in (client, copied):
                solved = one.solve(STRUCTURED, keep_state=True)
                back = one.vjp(solved, upstream, gradients=gradients, wrt=["Q", "q"])
                found.append(
                    {**solved.solution, **{f"grad_{name}": t for name, t in (back.gradients or back.adjoint).items()}}
                )
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(tensor, found[0][name]) for name, tensor in other.items())


def test_registered_parameters_are_compressed_and_their_digest_is_the_same(url: str) -> None:
    fixed = {"Q": torch.eye(100, dtype=D)}
    q = torch.linspace(-1, 1, 100, dtype=D)
    with argrad.Client(url, compression="zstd") as squeezing, argrad.Client(url) as plain:
        first, second = squeezing.register(**fixed), plain.register(**fixed)
        for client, registered in ((squeezing, first), (plain, second)):
            z = client.solve(argrad.QP(q=q, **registered)).solution["z"]
            torch.testing.assert_close(z, -q)


@pytest.mark.anyio
async def test_the_async_client_compresses_in_threads(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set()

    def noted(*arguments: Any) -> list[bytes]:
        threads.add(threading.current_thread())
        return compress(*arguments)

    monkeypatch.setattr("argrad.transport.calls.compress", noted)
    async with argrad.AsyncClient(url, compression="zstd") as client:
        result = await client.solve(STRUCTURED)
        torch.testing.assert_close(result.solution["z"], -STRUCTURED.q)
    assert threads
    assert threading.main_thread() not in threads


@pytest.mark.parametrize("kind", [argrad.Client, argrad.AsyncClient])
def test_another_compression_is_refused(kind: Any) -> None:
    for target in (URL, "local"):
        with pytest.raises(argrad.ProblemError, match="compression: found 'gzip', wanted None or one of zstd"):
            kind(target, compression="gzip")


def test_where_nothing_travels_nothing_is_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("argrad.transport.calls.load_zstd", None)
    result = argrad.Client("local", compression="zstd").solve(STRUCTURED)
    torch.testing.assert_close(result.solution["z"], -STRUCTURED.q)


def test_a_missing_package_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    load_zstd.cache_clear()
    for name in ("backports.zstd", "compression.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr(sys.modules["backports"], "zstd", raising=False)
    try:
        with pytest.raises(argrad.MissingExtraError, match=r"pip install 'argrad\[zstd\]'"):
            argrad.Client(URL, compression="zstd")
    finally:
        load_zstd.cache_clear()
