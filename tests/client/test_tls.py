"""`https` over the clients' own connections: a service behind what ends TLS, with a certificate made for the test."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import uvloop

import argrad
from argrad.errors import ConnectionFailedError
from argrad.problems import QP
from argrad.transport.address import parse_address

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="openssl, which makes the certificate, is absent"
)

D = torch.float64


@dataclass
class Terminator:
    """Ends TLS in front of a service, as Caddy does.

    Args:
        upstream: Host and port of the service.
        context: Of the certificate.
        accepted: Connections on which TLS began.
    """

    upstream: tuple[str, int]
    context: ssl.SSLContext
    accepted: int = 0
    _open: list[socket.socket] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        for each in (self._listening, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                plain, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=[plain], daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        """Bytes both ways, by one thread: an SSL socket is not to be used by two."""
        try:
            outer = self.context.wrap_socket(plain, server_side=True)
        except OSError:
            plain.close()
            return
        self.accepted += 1
        inner = socket.create_connection(self.upstream)
        self._open += [outer, inner]
        outer.settimeout(0.002)
        inner.settimeout(0.002)
        with contextlib.suppress(OSError):
            while True:
                for source, sink in ((outer, inner), (inner, outer)):
                    with contextlib.suppress(TimeoutError):
                        data = source.recv(1 << 16)
                        if not data:
                            return
                        sink.settimeout(10)
                        sink.sendall(data)
                        sink.settimeout(0.002)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost that vouches for itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    made, key = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
            *("-keyout", str(key), "-out", str(made)),
        ],
        check=True,
        capture_output=True,
    )
    return made, key


@pytest.fixture
def front(service_url: str, certificate: tuple[Path, Path]) -> Iterator[Terminator]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    base = parse_address(service_url).base
    terminator = Terminator((base.host, base.port or 80), context)
    yield terminator
    terminator.close()


def problem(batch: int, n: int) -> QP:
    torch.manual_seed(batch)
    return QP(Q=torch.eye(n, dtype=D).expand(batch, n, n).contiguous(), q=torch.randn(batch, n, dtype=D))


def same(result: argrad.SolveResult, stated: QP) -> bool:
    return torch.allclose(result.solution["z"], -stated.q, atol=1e-12)


Runner = Callable[[Coroutine[Any, Any, None]], None]


def with_uvloop(work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)


SMALL, LARGE = problem(2, 3), problem(40, 100)  # 3.2 MB up: many records of TLS


@pytest.mark.parametrize("run", [asyncio.run, with_uvloop], ids=["asyncio", "uvloop"])
def test_tasks_call_over_https_on_connections_that_are_kept(
    run: Runner, front: Terminator, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))

    async def work() -> None:
        async with argrad.AsyncClient(f"https://localhost:{front.port}", timeout_s=20) as client:
            for stated in (SMALL, LARGE, SMALL):
                assert same(await client.solve(stated), stated)
            assert front.accepted == 1
            results = await asyncio.gather(*(client.solve(stated) for stated in (SMALL, LARGE, SMALL)))
            assert all(same(*pair) for pair in zip(results, (SMALL, LARGE, SMALL), strict=True))
            assert front.accepted == 3

    run(work())


def test_threads_call_over_https_on_connections_that_are_kept(
    front: Terminator, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    with argrad.Client(f"https://localhost:{front.port}", timeout_s=20) as client:
        for stated in (SMALL, LARGE, SMALL):
            assert same(client.solve(stated), stated)
        q = torch.zeros(2, dtype=D, requires_grad=True)
        z = argrad.solve_qp(client, Q=torch.eye(2, dtype=D), q=q).z
        z.sum().backward()
        assert q.grad is not None
        assert q.grad.tolist() == [-1.0, -1.0]
    assert front.accepted == 1


def test_a_certificate_that_nobody_vouches_for_is_refused_at_once(front: Terminator) -> None:
    began = time.monotonic()
    url = f"https://localhost:{front.port}"
    with argrad.Client(url) as client, pytest.raises(ConnectionFailedError, match="CERTIFICATE_VERIFY_FAILED"):
        client.solve(SMALL)

    async def work() -> None:
        async with argrad.AsyncClient(url) as client:
            await client.solve(SMALL)

    with pytest.raises(ConnectionFailedError, match="CERTIFICATE_VERIFY_FAILED"):
        asyncio.run(work())
    assert time.monotonic() - began < 5
    assert front.accepted == 0
