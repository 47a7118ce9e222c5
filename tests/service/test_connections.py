"""Connections that are slow on purpose, too many, or no HTTP: the service answers on, and closes them in time."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from argrad_service.http.protocol import GuardedProtocol
from tests.service.support import make_app, serving, simplex

pytestmark = pytest.mark.slow

HEADER_TIMEOUT_S = 3.0
POST = b"POST /v1/solve HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n"
SLOW = b"GET /v1/solvers HTTP/1.1\r\nhost: localhost\r\nx-slow: "


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def connect(url: str, stack: contextlib.ExitStack) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return stack.enter_context(socket.create_connection((host, int(port)), timeout=30))


def rest(connection: socket.socket) -> bytes:
    """What comes until the other end closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def check_problem(reply: bytes, status: int) -> None:
    head, _, body = reply.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    assert lines[0].startswith(f"http/1.1 {status} "), reply[:200]
    document = json.loads(body)
    assert document["status"] == status
    assert {
        "content-type: application/problem+json",
        f"x-request-id: {document['request_id']}",
        "connection: close",
        "x-content-type-options: nosniff",
    } <= set(lines)
    assert b"Traceback" not in body


def test_a_thousand_slow_heads_hold_nobody_up_and_are_closed_in_time(stack: contextlib.ExitStack):
    protocol = GuardedProtocol.with_bounds(header_timeout_s=HEADER_TIMEOUT_S, max_connections=300)
    with serving(make_app(), http=protocol, backlog=2048) as url:
        began = time.monotonic()
        slow = [connect(url, stack) for _ in range(1000)]
        for connection in slow:
            with contextlib.suppress(OSError):  # closed by now, to make room
                connection.sendall(SLOW)
        with httpx.Client(base_url=url, trust_env=False, timeout=20) as client:
            for _ in range(5):
                reply = client.post("/v1/solve", json={"problem": simplex()})
                assert reply.json()["status"] == "optimal"
        for connection in slow:
            assert rest(connection) == b""
        assert time.monotonic() - began < HEADER_TIMEOUT_S + 20
        assert not protocol._idle or len(protocol._idle) <= 1


def test_who_waits_longest_goes_first_and_who_is_busy_stays(stack: contextlib.ExitStack):
    protocol = GuardedProtocol.with_bounds(max_connections=3)
    with serving(make_app(), http=protocol) as url:
        time.sleep(0.2)  # the connection of `serving` has gone
        busy = []
        for _ in range(2):
            busy.append(connect(url, stack))
            busy[-1].sendall(POST)
        time.sleep(0.2)
        idle = connect(url, stack)
        time.sleep(0.2)
        newer = connect(url, stack)
        assert rest(idle) == b"", "made room"
        newer.sendall(
            b"POST /v1/solve HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n"
        )
        time.sleep(0.2)
        refused = rest(connect(url, stack))
        check_problem(refused, 429)
        assert b"retry-after: 1" in refused.lower()
        for connection in (*busy, newer):
            connection.sendall(b"{}")
            assert connection.recv(65536).startswith(b"HTTP/1.1 422 ")


def test_a_caller_that_takes_no_reply_is_left(stack: contextlib.ExitStack):
    protocol = GuardedProtocol.with_bounds(reply_timeout_s=0.5)
    with serving(make_app(), http=protocol) as url:
        host, port = url.removeprefix("http://").split(":")
        deaf = stack.enter_context(socket.socket())
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((host, int(port)))
        deaf.settimeout(30)
        request = b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n"
        deaf.sendall(request * 200)  # some 20 MB of replies, none of which is read
        until = time.monotonic() + 20
        while time.monotonic() < until:
            with httpx.Client(base_url=url, trust_env=False) as client:
                assert client.get("/health/live").status_code == 200
            try:
                deaf.send(b"\r\n")
            except OSError:
                break
            time.sleep(0.1)
        else:
            pytest.fail("the connection was not broken")


@pytest.mark.parametrize(
    "junk",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT example.org:443 HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /a HTTP/1.1\r\nhost: localhost\r\nbad header\r\n\r\n",
        b"POST /v1/solve HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/solve HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
    ],
    ids=repr,
)
def test_what_is_no_request_gets_a_problem_document(junk: bytes, junk_url: str, stack: contextlib.ExitStack):
    connection = connect(junk_url, stack)
    connection.sendall(junk)
    connection.shutdown(socket.SHUT_WR)
    check_problem(rest(connection), 400)


@pytest.fixture(scope="module")
def junk_url() -> Iterator[str]:
    with serving(make_app(), http=GuardedProtocol.with_bounds()) as url:
        yield url


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ("GET /v1/solve HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n", 405),
        ("OPTIONS * HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n", 404),
        ("GET /nowhere HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n", 404),
        ("GET /health/live HTTP/1.1\r\nconnection: close\r\n\r\n", 403),
        ("GET /nowhere HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: close\r\n\r\n", 404),
        ("PUT /v1/problems/x HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n", 422),
    ],
)
def test_every_refusal_is_a_problem_document(lines: str, status: int, junk_url: str, stack: contextlib.ExitStack):
    connection = connect(junk_url, stack)
    connection.sendall(lines.encode())
    check_problem(rest(connection), status)
