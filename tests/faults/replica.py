"""A service in a process of its own, which is killed and started again."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
import time
from pathlib import Path

from tests.conftest import free_port, running_service


class Replica:
    """A service that can die and be started again at the same port.

    Args:
        directory: Gets its logs.
        name: Of the logs.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.pids: list[int] = []
        self.exits: list[int] = []
        self.ready_at = 0.0
        self._directory, self._name = directory, name
        self._stack = contextlib.ExitStack()
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        log = self._directory / f"{self._name}-{len(self.pids)}.txt"
        _, self._process = self._stack.enter_context(running_service(log, port=self.port))
        self.ready_at = time.monotonic()
        self.pids.append(self._process.pid)

    def end(self, how: signal.Signals) -> None:
        """Send it a signal, and wait until it has ended."""
        assert self._process is not None
        self._process.send_signal(how)
        self.exits.append(self._process.wait(60))

    def restart(self, how: signal.Signals) -> None:
        """End it now, and start it again meanwhile."""
        self.end(how)
        self._thread = threading.Thread(target=self.start)
        self._thread.start()

    def is_back(self) -> None:
        """Wait until it is ready again."""
        assert self._thread is not None
        self._thread.join(120)
        assert not self._thread.is_alive()
        assert len(self.pids) == len(self.exits) + 1

    def close(self) -> None:
        """End it for good."""
        if self._thread is not None:
            self._thread.join(120)
        self._stack.close()
