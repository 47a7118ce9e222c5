"""The proxy itself: what it leaves alone, and that each fault is what a client then sees."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.faults.proxy import Fault, FaultProxy, Phase

REPLY = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n0123456789"
REQUEST = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 8\r\n\r\nabcdefgh"


class Server:
    """Notes what it gets, connection by connection, and answers each whole request with the same reply."""

    def __init__(self, reply: bytes = REPLY) -> None:
        self.reply = reply
        self.got: list[bytearray] = []
        self.ends: list[str] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = ("127.0.0.1", self._socket.getsockname()[1])
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self.got.append(bytearray())
                threading.Thread(target=self._talk, args=(connection, self.got[-1]), daemon=True).start()

    def _talk(self, connection: socket.socket, got: bytearray) -> None:
        with connection:
            try:
                while piece := connection.recv(65536):
                    got += piece
                    while len(got) >= len(REQUEST) and len(got) % len(REQUEST) == 0:
                        connection.sendall(self.reply)
                        break
                self.ends.append("closed")
            except ConnectionResetError:
                self.ends.append("reset")

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def proxy(server: Server) -> Iterator[FaultProxy]:
    with FaultProxy(server.address) as proxy:
        yield proxy


def talk(proxy: FaultProxy, *, timeout_s: float = 5.0) -> tuple[bytes, str]:
    """Send one request; what came back until the end or the whole reply, and how it ended."""
    data = b""
    try:
        with socket.create_connection(("127.0.0.1", proxy.port), timeout_s) as connection:
            connection.sendall(REQUEST)
            while len(data) < len(REPLY):
                piece = connection.recv(65536)
                if not piece:
                    return data, "closed"
                data += piece
    except ConnectionResetError:
        return data, "reset"
    except TimeoutError:
        return data, "nothing more"
    return data, "whole"


def wait_until(is_so: Callable[[], bool], timeout_s: float = 5.0) -> None:
    until = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < until, "it did not come to be"
        time.sleep(0.002)


def test_nothing_is_changed_without_a_plan(server: Server, proxy: FaultProxy) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port), 5) as connection:
        for i in range(3):
            connection.sendall(REQUEST)
            data = b""
            while len(data) < len(REPLY):
                data += connection.recv(len(REPLY) - len(data))
            assert data == REPLY
            wait_until(lambda i=i: bytes(server.got[0]) == REQUEST * (i + 1))  # type: ignore[misc]
    assert proxy.requests == ["POST /echo"] * 3
    assert (proxy.connections, len(server.got)) == (1, 1)
    assert not proxy.fired


@pytest.mark.parametrize(
    ("phase", "arrives", "comes_back"),
    [
        (Phase.CONNECT, b"", b""),
        (Phase.REQUEST_HEAD, REQUEST[: (len(REQUEST) - 8) // 2], b""),
        (Phase.REQUEST_BODY, REQUEST[:-4], b""),
        (Phase.BEFORE_REPLY, REQUEST, b""),
        (Phase.REPLY_HEAD, REQUEST, REPLY[: (len(REPLY) - 10) // 2]),
        (Phase.REPLY_BODY, REQUEST, REPLY[:-5]),
    ],
)
@pytest.mark.parametrize("action", ["reset", "close"])
def test_a_connection_ends_in_every_phase(
    server: Server, proxy: FaultProxy, phase: Phase, arrives: bytes, comes_back: bytes, action: str
) -> None:
    proxy.plan(Fault(action, phase))  # type: ignore[arg-type]
    data, end = talk(proxy)
    # What was sent before a reset may be lost with it.
    assert data == comes_back or (action == "reset" and comes_back.startswith(data))
    assert end == "reset" or (action == "close" and end == "closed")
    assert [fired.fault.phase for fired in proxy.fired] == [phase]
    wait_until(lambda: b"".join(bytes(got) for got in server.got) == arrives)
    assert talk(proxy) == (REPLY, "whole")


def test_garbage_takes_the_place_of_the_rest(proxy: FaultProxy) -> None:
    proxy.plan(Fault("garbage", Phase.REPLY_BODY))
    data, end = talk(proxy)
    assert data.startswith(REPLY[:-5])
    assert len(data) >= len(REPLY)
    assert end in ("closed", "whole")
    assert data[: len(REPLY)] != REPLY


def test_a_stall_lasts_until_the_client_leaves(server: Server, proxy: FaultProxy) -> None:
    proxy.plan(Fault("stall", Phase.REPLY_BODY))
    assert talk(proxy, timeout_s=0.2) == (REPLY[:-5], "nothing more")
    wait_until(lambda: bool(server.ends))


@pytest.mark.parametrize(
    "fault", [Fault("delay", seconds=0.15), Fault("throttle", Phase.REQUEST_HEAD, bytes_per_s=600.0)], ids=str
)
def test_slow_ones_pass_everything(proxy: FaultProxy, fault: Fault) -> None:
    proxy.plan(fault)
    began = time.monotonic()
    assert talk(proxy) == (REPLY, "whole")
    assert time.monotonic() - began >= 0.14
    assert len(proxy.fired) == 1


def test_a_reply_becomes_chunked_and_is_cut(proxy: FaultProxy) -> None:
    proxy.plan(Fault("cut_chunk"))
    with socket.create_connection(("127.0.0.1", proxy.port), 5) as connection:
        connection.sendall(REQUEST)
        data = b"".join(iter(lambda: connection.recv(65536), b""))
    assert data == b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\na\r\n01234"
    assert len(proxy.fired) == 1


def test_refused_and_accepted_again(proxy: FaultProxy) -> None:
    port = proxy.port
    with socket.create_connection(("127.0.0.1", port), 5) as standing:
        while not proxy.open_connections:
            time.sleep(0.001)
        proxy.refuse()
        with pytest.raises(ConnectionResetError):
            standing.recv(1)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 5)
    proxy.accept()
    assert proxy.port == port
    assert talk(proxy) == (REPLY, "whole")


@pytest.mark.parametrize("is_http", [True, False])
def test_a_service_that_hangs(server: Server, is_http: bool) -> None:
    with FaultProxy(server.address, is_http=is_http) as proxy:
        proxy.stall()
        assert talk(proxy, timeout_s=0.1) == (b"", "nothing more")
        proxy.resume()
        assert talk(proxy) == (REPLY, "whole")
        proxy.latency_s = 0.05
        began = time.monotonic()
        assert talk(proxy) == (REPLY, "whole")
        assert time.monotonic() - began >= 0.09
