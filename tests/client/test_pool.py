"""Connections of the synchronous client: what is sent, what a reply may look like, which connections are used again."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import pytest

from argrad.errors import DeadlineExceededError
from argrad.transport.address import Address, parse_address
from argrad.transport.bodies import Outgoing, Upload
from argrad.transport.exchange import Answer, Deadline
from argrad.transport.pool import Pool
from argrad.transport.streams import Streams

REPLY = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
Script = Callable[[socket.socket], None]


class Server:
    """Accepts connections and gives each to the next script, in a thread."""

    def __init__(self, *scripts: Script) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._scripts = scripts
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def _run(self) -> None:
        for script in self._scripts:
            connection, _ = self._socket.accept()
            with connection:
                script(connection)

    def join(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._socket.close()


def read_request(connection: socket.socket) -> bytes:
    """One request: head and a body of its Content-Length."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return data
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def says(*pieces: bytes, seen: list[bytes] | None = None) -> Script:
    """Read a request, send the pieces one after the other, close."""

    def script(connection: socket.socket) -> None:
        request = read_request(connection)
        if seen is not None:
            seen.append(request)
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(0.005)

    return script


def keeps_saying(times: int, reply: bytes = REPLY) -> Script:
    """Answer so many requests on one connection, then close."""

    def script(connection: socket.socket) -> None:
        for _ in range(times):
            read_request(connection)
            connection.sendall(reply)

    return script


class Looped:
    """`Streams`, for tests that wait: on an event loop of its own."""

    def __init__(self, address: Address) -> None:
        self._loop = asyncio.new_event_loop()
        self.streams = Streams(address)

    def exchange(self, request: Outgoing, deadline: Deadline) -> Answer:
        return self._loop.run_until_complete(self.streams.exchange(request, deadline))

    def close(self) -> None:
        self._loop.run_until_complete(self.streams.aclose())
        self._loop.run_until_complete(asyncio.sleep(0.01))
        self._loop.close()


@pytest.fixture(params=[Pool, Looped], ids=["threads", "loop"])
def serving(request: pytest.FixtureRequest) -> Iterator[Callable[..., tuple[Server, Any]]]:
    started: list[tuple[Server, Any]] = []

    def start(*scripts: Script) -> tuple[Server, Any]:
        server = Server(*scripts)
        started.append((server, request.param(parse_address(server.url))))
        return started[-1]

    yield start
    for server, pool in started:
        pool.close()
        server.join()


def call(server: Server, pool: Any, body: Sequence[bytes | memoryview] = (), timeout_s: float | None = 5.0) -> Any:
    deadline = Deadline(timeout_s, time.monotonic)
    size = sum(len(part) for part in body)
    headers = [(b"Host", b"127.0.0.1"), (b"Content-Length", b"%d" % size)]
    timeouts = dict.fromkeys(("connect", "read", "write", "pool"), timeout_s)
    upload = Upload(body, size, deadline)
    return pool.exchange(Outgoing("POST", httpx.URL(f"{server.url}/v1/solve"), headers, upload, timeouts), deadline)


def test_head_and_body_of_a_small_request_arrive_together(serving: Any) -> None:
    seen: list[bytes] = []

    def script(connection: socket.socket) -> None:
        seen.append(connection.recv(65536))  # one segment: the whole request
        connection.sendall(REPLY)

    answer = call(*serving(script), body=[b"he", memoryview(b"llo")])
    assert (answer.status_code, bytes(answer.body), answer.headers["content-length"]) == (200, b"hi", "2")
    assert seen == [b"POST /v1/solve HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\n\r\nhello"]


@pytest.mark.parametrize("sizes", [[3_000_000], [1, 0, 2_000_000, 7], [100] * 2000], ids=["one", "odd", "many"])
def test_a_large_request_arrives_whole(serving: Any, sizes: list[int]) -> None:
    seen: list[bytes] = []
    parts = [bytes([i % 251]) * size for i, size in enumerate(sizes)]
    call(*serving(says(REPLY, seen=seen)), body=[memoryview(part) for part in parts])
    assert seen[0].partition(b"\r\n\r\n")[2] == b"".join(parts)


@pytest.mark.parametrize(
    ("pieces", "wanted"),
    [
        pytest.param([REPLY], b"hi", id="whole"),
        pytest.param([REPLY[:9], REPLY[9:30], REPLY[30:-1], REPLY[-1:]], b"hi", id="in-pieces"),
        pytest.param([b"HTTP/1.1 100 Continue\r\n\r\n", REPLY], b"hi", id="interim"),
        pytest.param([b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + REPLY], b"hi", id="interim-together"),
        pytest.param(
            [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", b"2\r\nde\r\n0\r\n\r\n"],
            b"abcde",
            id="chunked",
        ),
        pytest.param([b"HTTP/1.1 200 OK\r\n\r\nuntil", b" the end"], b"until the end", id="until-it-closes"),
        pytest.param([b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"], b"", id="empty"),
        pytest.param([b"HTTP/1.1 204 No Content\r\n\r\n"], b"", id="no-content"),
        pytest.param([b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n", b"x" * 300_000], b"x" * 300_000, id="long"),
    ],
)
def test_a_reply(serving: Any, pieces: list[bytes], wanted: bytes) -> None:
    assert bytes(call(*serving(says(*pieces))).body) == wanted


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        pytest.param(b"", "cut off after 0 bytes", id="nothing"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Le", "within its head", id="cut-head"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhi", "cut off after 2 of 5 bytes", id="cut-body"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nab", "within a chunk", id="cut-chunk"),
        pytest.param(b"hello\r\n\r\n", "not HTTP", id="not-http"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", "not HTTP", id="two-lengths"
        ),
        pytest.param(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 400_000, "head was too long", id="long-head"),
    ],
)
def test_a_broken_reply(serving: Any, sent: bytes, words: str) -> None:
    server, pool = serving(says(sent))
    with pytest.raises(httpx.RemoteProtocolError, match=words):
        call(server, pool)


def test_an_early_reply_is_read_though_the_request_could_not_be_sent(serving: Any) -> None:
    def refuse(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig")
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 20):  # so that the kernel sends no reset, which would take the reply along
            pass

    answer = call(*serving(refuse), body=[memoryview(bytes(20_000_000))])
    assert (answer.status_code, bytes(answer.body)) == (413, b"big")


def test_a_connection_is_used_again(serving: Any) -> None:
    server, pool = serving(keeps_saying(3))
    assert [bytes(call(server, pool).body) for _ in range(3)] == [b"hi"] * 3


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi", id="close"),
        pytest.param(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", id="http-1.0"),
        pytest.param(REPLY + b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nother", id="more-than-was-asked-for"),
    ],
)
def test_a_connection_that_cannot_be_is_not_used_again(serving: Any, reply: bytes) -> None:
    server, pool = serving(says(reply), says(reply))
    assert [bytes(call(server, pool).body) for _ in range(2)] == [b"hi"] * 2


def test_a_connection_that_the_service_closed_is_replaced_without_a_failed_call(serving: Any) -> None:
    server, pool = serving(keeps_saying(1), keeps_saying(1))
    call(server, pool)
    time.sleep(0.05)
    assert bytes(call(server, pool).body) == b"hi"


@pytest.mark.parametrize("serving", [Pool], indirect=True)
def test_threads_have_connections_of_their_own(serving: Any) -> None:
    both = threading.Barrier(2)

    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(REPLY)

    server, pool = serving(script, script)
    bodies: list[bytes] = []

    def one() -> None:
        both.wait()
        bodies.append(bytes(call(server, pool).body))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bodies == [b"hi"] * 2


def test_a_reply_that_does_not_come_in_time(serving: Any) -> None:
    gone = threading.Event()

    def wait(connection: socket.socket) -> None:
        gone.wait(5)

    server, pool = serving(wait)
    began = time.monotonic()
    with pytest.raises((httpx.ReadTimeout, DeadlineExceededError)):
        call(server, pool, timeout_s=0.05)
    assert time.monotonic() - began < 1
    gone.set()


def test_a_reply_that_trickles_in_ends_at_the_deadline(serving: Any) -> None:
    def trickle(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        try:
            for _ in range(100):
                connection.sendall(b"x")
                time.sleep(0.02)
        except OSError:
            pass

    server, pool = serving(trickle)
    with pytest.raises((httpx.ReadTimeout, DeadlineExceededError)):
        call(server, pool, timeout_s=0.1)


@pytest.mark.parametrize("kind", [Pool, Looped])
def test_nobody_there(kind: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    address = parse_address(f"http://127.0.0.1:{port}")
    deadline = Deadline(1.0, time.monotonic)
    timeouts = {"connect": 1.0}
    request = Outgoing("GET", address.base, [], Upload([], 0, deadline), timeouts)
    pool = kind(address)
    with pytest.raises(httpx.ConnectError):
        pool.exchange(request, deadline)
    pool.close()


@pytest.mark.parametrize("serving", [Pool], indirect=True)
def test_a_peer_that_vanished_is_a_broken_connection(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own timeout, after it asked in vain, is no deadline: the call is tried again."""
    server, pool = serving(says(b""))

    def vanished(*_: Any) -> bytes:
        raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")

    monkeypatch.setattr("argrad.transport.connection.Connection._next", vanished)
    with pytest.raises(httpx.ReadError, match="Connection timed out"):
        call(server, pool)


@pytest.mark.parametrize("serving", [Pool], indirect=True)
def test_the_kernel_looks_whether_a_silent_peer_is_there(serving: Any) -> None:
    server, pool = serving(keeps_saying(1))
    call(server, pool)
    (connection,) = pool._idle
    assert connection._socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        assert connection._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000


@pytest.mark.parametrize("make_loop", ["asyncio.new_event_loop", "uvloop.new_event_loop"])
def test_tasks_at_once_and_one_that_is_cancelled(make_loop: str) -> None:
    module, _, name = make_loop.partition(".")
    ended = threading.Event()

    def waits(connection: socket.socket) -> None:
        read_request(connection)
        if not connection.recv(1):  # closed, without a word
            ended.set()

    closed = threading.Event()

    def answers_twice(connection: socket.socket) -> None:
        keeps_saying(2)(connection)
        connection.close()
        closed.set()

    server = Server(waits, answers_twice, keeps_saying(1))
    address = parse_address(server.url)

    def one(streams: Streams) -> Any:
        deadline = Deadline(5.0, time.monotonic)
        body = Upload([bytes(300_000)], 300_000, deadline)
        headers = [(b"Host", b"x"), (b"Content-Length", b"300000")]
        request = Outgoing("POST", address.join("/v1/solve"), headers, body, {"connect": 5.0})
        return streams.exchange(request, deadline)

    async def main() -> None:
        streams = Streams(address)
        left = asyncio.create_task(one(streams))
        await asyncio.sleep(0.05)
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        assert await asyncio.to_thread(ended.wait, 5)
        # The second call takes the connection of the first one again.
        assert [bytes((await one(streams)).body) for _ in range(2)] == [b"hi", b"hi"]
        assert await asyncio.to_thread(closed.wait, 5)
        assert bytes((await one(streams)).body) == b"hi"
        await streams.aclose()

    loop = getattr(pytest.importorskip(module), name)()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()
    server.join()
