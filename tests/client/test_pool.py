"""The pool of connections: one write a small request, early replies, httpx's exceptions."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import httpcore
import httpx
import pytest

from argrad.transport.address import parse_address
from argrad.transport.pool import _EXCEPTIONS, PooledTransport, _Stream

REPLY = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


class FakeStream(httpcore.NetworkStream):
    """Notes writes; one of them may fail."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.written: list[bytes] = []
        self.failure = failure

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if self.failure is not None:
            raise self.failure
        self.written.append(buffer)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return REPLY


def test_a_small_request_is_one_write() -> None:
    inner = FakeStream()
    stream = _Stream(inner)
    for part in (b"head", b"body"):
        stream.write(part)
    assert inner.written == []
    assert stream.read(100) == REPLY
    assert inner.written == [b"headbody"]
    stream.read(100)
    assert inner.written == [b"headbody"]


def test_a_large_request_is_written_as_it_comes() -> None:
    inner = FakeStream()
    stream = _Stream(inner)
    pieces = [b"head", bytes(256 * 1024), bytes(256 * 1024), b"end"]
    for piece in pieces:
        stream.write(piece)
    assert len(inner.written) == 2
    stream.read(1)
    assert b"".join(inner.written) == b"".join(pieces)


def test_an_early_reply_is_read_though_the_request_could_not_be_written() -> None:
    stream = _Stream(FakeStream(httpcore.WriteError("closed")))
    stream.write(b"head")
    assert stream.read(100) == REPLY


def _leaves(cls: type[Exception]) -> list[type[Exception]]:
    below = [leaf for child in cls.__subclasses__() for leaf in _leaves(child)]
    return below or [cls]


def test_every_exception_of_httpcore_is_mapped() -> None:
    raised = (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError, httpcore.ProxyError)
    leaves = {leaf for cls in raised for leaf in _leaves(cls)} | {httpcore.UnsupportedProtocol}
    assert leaves == set(_EXCEPTIONS)
    assert all(issubclass(ours, httpx.TransportError) for ours in _EXCEPTIONS.values())


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def request(server: socket.socket, **extensions: object) -> tuple[PooledTransport, httpx.Request]:
    url = f"http://127.0.0.1:{server.getsockname()[1]}"
    return PooledTransport(parse_address(url)), httpx.Request("GET", url, extensions=extensions)


def test_a_reply(listener: socket.socket) -> None:
    seen: list[bytes] = []

    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            seen.append(connection.recv(65536))
            connection.sendall(REPLY)

    thread = threading.Thread(target=answer)
    thread.start()
    transport, message = request(listener)
    response = transport.handle_request(message)
    assert (response.status_code, response.read()) == (200, b"hi")
    response.close()
    thread.join()
    transport.close()
    assert seen[0].startswith(b"GET / HTTP/1.1\r\nHost: 127.0.0.1")


@pytest.mark.parametrize(
    ("sent", "wanted"),
    [
        pytest.param(b"", httpx.RemoteProtocolError, id="nothing"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhi", httpx.RemoteProtocolError, id="cut-body"),
        pytest.param(b"hello\r\n\r\n", httpx.RemoteProtocolError, id="not-http"),
    ],
)
def test_a_broken_reply(listener: socket.socket, sent: bytes, wanted: type[Exception]) -> None:
    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(sent)

    thread = threading.Thread(target=answer)
    thread.start()
    transport, message = request(listener)
    with pytest.raises(wanted):
        transport.handle_request(message).read()
    thread.join()
    transport.close()


def test_a_reply_that_does_not_come(listener: socket.socket) -> None:
    transport, message = request(listener, timeout={"connect": 5.0, "read": 0.05, "write": 5.0, "pool": 5.0})
    with pytest.raises(httpx.ReadTimeout):
        transport.handle_request(message)
    transport.close()
