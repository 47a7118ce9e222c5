"""Services to be measured, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from argrad.transport.address import parse_address
from examples.with_service import free_port

SERVE = ("-m", "argrad_service")
IDENTITY = ("-m", "benchmarks.serving.identity")
"""The service whose solver does nothing."""

_START_TIMEOUT_S = 120.0


@contextmanager
def serving(module: Sequence[str] = SERVE, *, uds: Path | None = None, **settings: str) -> Iterator[str]:
    """`running`, of which the body only needs the address."""
    with running(module, uds=uds, **settings) as (url, _):
        yield url


@contextmanager
def running(module: Sequence[str] = SERVE, *, uds: Path | None = None, **settings: str) -> Iterator[tuple[str, int]]:
    """Serve while the body runs; yields the address, and the process id.

    Args:
        module: What Python runs.
        uds: Path of a unix socket to serve on; a free TCP port otherwise.
        settings: Variables of the service.

    Raises:
        RuntimeError: with the last words of its log, if it ended or was not ready in time.
    """
    if uds is None:
        port = free_port()
        url, where = f"http://127.0.0.1:{port}", {"ARGRAD_PORT": str(port)}
    else:
        url, where = f"http+unix://{uds}", {"ARGRAD_UDS": str(uds)}
    environment = os.environ | {"ARGRAD_LOG_LEVEL": "warning"} | where | settings
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([sys.executable, *module], env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + _START_TIMEOUT_S
            while not _is_ready(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError("no service: " + log.read().decode(errors="replace")[-600:])
                time.sleep(0.1)
            yield url, process.pid
        finally:
            process.terminate()
            process.wait(20)


def plain_client(url: str) -> httpx.Client:
    """A client of plain HTTP; it appends paths to the address."""
    address = parse_address(url)
    transport = httpx.HTTPTransport(uds=address.uds)
    return httpx.Client(transport=transport, base_url=address.base, timeout=10.0, trust_env=False)


def _is_ready(url: str) -> bool:
    try:
        with plain_client(url) as client:
            return client.get("/health/ready").status_code == 200
    except httpx.TransportError:
        return False
