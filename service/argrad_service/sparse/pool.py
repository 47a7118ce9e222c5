"""Worker processes: started when first needed, kept while they are small, replaced when they die.

The libraries hold Python's global lock while they set a problem up (OSQP for its whole first factorisation), and an
order of elimination is found under it too. In a process of their own they hold up nobody, can be ended between any two
instructions, and give their memory back.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import select
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from argrad_service.sparse.worker import LENGTH_BYTES, Done

KEPT_BYTES = 256 * 1024**2
"""A worker that still holds more after a task is not kept for the next: allocators rarely give all memory back."""

_POLL_S = 0.02
_CHUNK = 1 << 20
_START = "import sys; sys.path[:] = {path!r}; from argrad_service.sparse.worker import main; main()"


class TaskStopped(Exception):  # noqa: N818 - not an error: the caller asked for it
    """The task was ended because nobody wants its result any more."""


class WorkerFailed(Exception):  # noqa: N818 - says what the worker's traceback said
    """A task raised; the message is the worker's traceback."""


class WorkerPool:
    """Runs tasks, each in a process of its own; may be called from any thread.

    Args:
        processes: Tasks that run at the same time; further ones wait.
    """

    def __init__(self, processes: int) -> None:
        self._free = threading.BoundedSemaphore(processes)
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._pid = os.getpid()

    def run(self, task: Any, should_stop: Callable[[], bool]) -> Any:
        """Run a task and wait for its result.

        Args:
            task: An object with a method `run`, pickled.
            should_stop: Asked every few milliseconds; True ends the process.

        Raises:
            TaskStopped: `should_stop` was true.
            MemoryError: the task ran out of memory, or its process was killed twice.
            WorkerFailed: the task raised.
        """
        if should_stop():
            raise TaskStopped
        message = pickle.dumps(task, protocol=5)
        while not self._free.acquire(timeout=_POLL_S):
            if should_stop():
                raise TaskStopped
        try:
            for _ in range(2):
                done = self._attempt(message, should_stop)
                if done is not None:
                    break
            else:
                raise MemoryError("the process of a sparse problem was killed twice, most likely for its memory")
        finally:
            self._free.release()
        if done.is_out_of_memory:
            raise MemoryError(done.failure)
        if done.failure is not None:
            raise WorkerFailed(done.failure)
        return done.result

    def close(self) -> None:
        """End the processes that wait; those at work end with their tasks' callers."""
        with self._lock:
            idle, self._idle = self._idle, []
        if self._pid == os.getpid():
            for worker in idle:
                worker.end()

    @property
    def idle_pids(self) -> list[int]:
        """Processes that wait for a task."""
        with self._lock:
            return [worker.pid for worker in self._idle]

    def _attempt(self, message: bytes, should_stop: Callable[[], bool]) -> Done | None:
        """One try; None if the process died."""
        worker = self._take()
        done = None
        try:
            done = worker.call(message, should_stop)
        finally:
            if done is None or done.held_bytes > KEPT_BYTES:
                worker.end()
            else:
                with self._lock:
                    self._idle.append(worker)
        return done

    def _take(self) -> _Worker:
        with self._lock:
            if self._pid != os.getpid():
                # A forked child must not talk to its parent's processes.
                self._idle, self._pid = [], os.getpid()
            while self._idle:
                worker = self._idle.pop()
                if worker.is_alive:
                    return worker
                worker.end()
        return _Worker()


class _Worker:
    """One process and its pipes."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", _START.format(path=sys.path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)  # noqa: S603

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def call(self, message: bytes, should_stop: Callable[[], bool]) -> Done | None:
        """Send a task and wait; None if the process dies."""
        try:
            self._write(len(message).to_bytes(LENGTH_BYTES, "little"))
            for start in range(0, len(message), _CHUNK):
                self._write(memoryview(message)[start : start + _CHUNK])
            head = self._read(LENGTH_BYTES, should_stop)
            body = self._read(int.from_bytes(head, "little"), should_stop)
        except (BrokenPipeError, EOFError):
            return None
        done: Done = pickle.loads(body)  # noqa: S301 - from our own child, over a pipe of its own
        return done

    def end(self) -> None:
        """Kill the process, if it is still there, and reap it."""
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._process.wait()

    def _write(self, view: bytes | memoryview) -> None:
        assert self._process.stdin is not None  # noqa: S101 - it is a pipe
        view = memoryview(view)
        while view:
            view = view[self._process.stdin.write(view) or 0 :]

    def _read(self, size: int, should_stop: Callable[[], bool]) -> bytearray:
        assert self._process.stdout is not None  # noqa: S101 - it is a pipe
        source = self._process.stdout.fileno()
        body = bytearray()
        while len(body) < size:
            if not select.select([source], [], [], _POLL_S)[0]:
                if should_stop():
                    raise TaskStopped
                continue
            part = os.read(source, min(_CHUNK, size - len(body)))
            if not part:
                raise EOFError
            body += part
        return body


WORKERS = WorkerPool(max(1, os.cpu_count() or 1))
"""The processes of this process: library state is global to it, and so are they."""

atexit.register(WORKERS.close)
