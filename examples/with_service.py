"""Run a command that needs the service, starting one for it if none answers.

    python examples/with_service.py COMMAND [ARGUMENTS]          use the service at ARGRAD_URL if it is ready
    python examples/with_service.py --fresh COMMAND [ARGUMENTS]  always start one of its own, on a free port

The command finds the address in ARGRAD_URL. A service that was started here is stopped when the command ends.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import httpx

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0


def configured_url() -> str:
    """The address that ARGRAD_URL names, or else that of a service started with the present settings."""
    host, port = os.environ.get("ARGRAD_HOST", "127.0.0.1"), os.environ.get("ARGRAD_PORT", "8000")
    return os.environ.get("ARGRAD_URL", f"http://{host}:{port}")


def is_ready(url: str) -> bool:
    """Whether a service answers there and takes requests."""
    try:
        return httpx.get(f"{url}/health/ready", timeout=2.0, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def free_port() -> int:
    """A TCP port of 127.0.0.1 on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started_service(port: int) -> Iterator[str]:
    """Serve on 127.0.0.1 while the body runs; yields the address.

    Raises:
        RuntimeError: with the last lines of the service's log, if it ended or was not ready in time.
    """
    url = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).with_name("argrad")), "serve", "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not is_ready(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    tail = log.read().decode(errors="replace").splitlines()[-8:]
                    raise RuntimeError("the service did not become ready:\n" + "\n".join(tail))
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def run(command: list[str], url: str) -> int:
    """Run the command with ARGRAD_URL set; returns its exit status."""
    return subprocess.run(command, env={**os.environ, "ARGRAD_URL": url}, check=False).returncode


def main(arguments: list[str]) -> int:
    """Find or start a service, run the command, and return its exit status."""
    is_fresh = arguments[:1] == ["--fresh"]
    command = arguments[1:] if is_fresh else arguments
    if not command:
        print(__doc__, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _exit_on_signal)
    url = configured_url()
    if not is_fresh and is_ready(url):
        return run(command, url)
    if not is_fresh and "ARGRAD_URL" in os.environ:
        print(f"no service is ready at ARGRAD_URL={url}", file=sys.stderr)
        return 1
    port = free_port() if is_fresh else int(os.environ.get("ARGRAD_PORT", "8000"))
    with started_service(port) as own_url:
        print(f"started a service at {own_url}", file=sys.stderr)
        return run(command, own_url)


def _exit_on_signal(number: int, _frame: FrameType | None) -> NoReturn:
    # As an exception it passes through the `finally` that stops the service.
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
