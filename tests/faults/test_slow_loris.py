"""A thousand connections that are all open at once and send a byte now and then: nobody else notices, and they end."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.conftest import running_service
from tests.service.support import simplex, wait_until

pytestmark = pytest.mark.alone

COUNT = 1000
HEADER_TIMEOUT_S = 8.0
HEAD = b"POST /v1/solve HTTP/1.1\r\nhost: localhost\r\nx-slow: "


class Lorises(threading.Thread):
    """Open connections, and send each a byte of a header twice a second, until the other end closes it."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        parts = urlsplit(url)
        self._address = str(parts.hostname), int(parts.port or 80)
        self.open = self.closed = 0
        self.longest_s = 0.0

    def run(self) -> None:
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
            began: dict[socket.socket, float] = {}
            for _ in range(COUNT):
                connection = stack.enter_context(socket.create_connection(self._address, timeout=30))
                connection.sendall(HEAD)
                connection.setblocking(False)
                began[connection] = time.monotonic()
                selector.register(connection, selectors.EVENT_READ)
                self.open += 1
            while began:
                for key, _ in selector.select(0.5):
                    connection = key.fileobj  # type: ignore[assignment]
                    with contextlib.suppress(ConnectionResetError):
                        assert connection.recv(65536) in (b"",), "nothing is answered to half a head"
                    selector.unregister(connection)
                    self.longest_s = max(self.longest_s, time.monotonic() - began.pop(connection))
                    self.closed += 1
                for connection in began:
                    with contextlib.suppress(OSError):
                        connection.send(b"x")


@pytest.mark.slow
@pytest.mark.faults
def test_a_thousand_that_trickle_hold_nobody_up_and_lose_their_connections(tmp_path: Path):
    with running_service(tmp_path / "log.txt", "--header-timeout-s", str(HEADER_TIMEOUT_S)) as (url, process):
        watched = psutil.Process(process.pid)
        with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
            before, took = watched.num_fds(), []
            lorises = Lorises(url)
            lorises.start()
            wait_until(lambda: lorises.open == COUNT and watched.num_fds() >= before + 0.9 * COUNT)
            for _ in range(10):
                began = time.perf_counter()
                assert client.post("/v1/solve", json={"problem": simplex()}).json()["status"] == "optimal"
                took.append(time.perf_counter() - began)
            assert watched.num_fds() >= before + 0.5 * COUNT, "they were there meanwhile"
            lorises.join(HEADER_TIMEOUT_S + 30)
            assert lorises.closed == COUNT
            wait_until(lambda: watched.num_fds() <= before + 2)
    assert sorted(took)[5] < 0.5
    assert lorises.longest_s < HEADER_TIMEOUT_S + 5.0
