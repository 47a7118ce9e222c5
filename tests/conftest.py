"""Fixtures that several areas share."""

from __future__ import annotations

import contextlib
import os

# Before torch is imported: threads of OpenMP that wait in a spin take the cores from the services the tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.redis_server import RedisServer, running_redis

START_TIMEOUT_S = 110.0
"""A first start compiles every kernel, which takes most of a minute of one core."""


@contextlib.contextmanager
def running_service(
    log: Path, *flags: str, port: int | None = None, **environment: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A real service in a process of its own; ready when the block begins.

    Args:
        log: File that gets its output.
        flags: Of `argrad serve`.
        port: Where it listens; a free port by default.
        environment: Further variables.
    """
    port = free_port() if port is None else port
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ARGRAD_")}
    command = [sys.executable, "-m", "argrad_service", "--port", str(port), *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=clean | environment, stdout=output, stderr=subprocess.STDOUT)
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_until_ready(url, process, log)
            yield url, process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    with httpx.Client(trust_env=False) as client:
        while time.monotonic() < until:
            if process.poll() is not None:
                pytest.fail(f"the service ended with {process.returncode}:\n{log.read_text()}")
            with contextlib.suppress(httpx.TransportError):
                if client.get(f"{url}/health/ready").status_code == 200:
                    return
            time.sleep(0.05)
    pytest.fail(f"the service was not ready after {START_TIMEOUT_S} s:\n{log.read_text()}")


@pytest.fixture(scope="session")
def service_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real service with default settings, shared by the whole run."""
    with running_service(tmp_path_factory.mktemp("service") / "log.txt") as (url, _):
        yield url


@pytest.fixture(scope="session")
def redis_session() -> Iterator[RedisServer]:
    """A real Redis server, shared by the whole run."""
    with running_redis(free_port()) as server:
        yield server


@pytest.fixture
def redis_server(redis_session: RedisServer) -> Iterator[RedisServer]:
    """The same, running and empty, whatever the test before did to it."""
    redis_session.reset()
    yield redis_session
    redis_session.reset()
