"""Several worker processes behind one listening socket: started, watched, replaced, stopped and summed up here.

Workers have no affinity: a call goes to whichever accepts its connection, and a token that another one signed costs
what any lost token costs. Replicas behind a proxy that hashes `Argrad-Affinity` keep callers at their state.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from pydantic import ByteSize

from argrad_service.engine.threads import threads
from argrad_service.http.logs import Logger
from argrad_service.settings import Settings
from argrad_service.totals import Totals

_STARTED, _METRICS = b"started", b"metrics"
_FIRST_DELAY_S, _MAX_DELAY_S = 0.5, 15.0
_STEADY_S = 30.0
"""A worker that has lived as long is replaced without delay."""
_MAX_FAILED_STARTS = 5
"""As many workers in a row that end before they accept connections end the service."""
_ANSWER_S = 2.0
_GRACE_S = 15.0
"""Seconds beyond their own deadlines after which workers that do not end are killed."""
_COUNTS = ("max_queue", "max_pending", "max_connections")
_BYTES = ("batch_bytes", "max_pending_bytes", "state_budget_bytes", "problem_budget_bytes")

Work = Callable[[Settings, list[socket.socket], "Channel", int], None]


def divided(settings: Settings) -> Settings:
    """What one worker may take: its part of counts, budgets and threads."""
    parts = settings.workers
    count = settings.torch_threads or threads()
    counts = {name: math.ceil(getattr(settings, name) / parts) for name in _COUNTS}
    budgets = {name: ByteSize(int(getattr(settings, name)) // parts) for name in _BYTES}
    return settings.model_copy(update={"torch_threads": max(1, count // parts), **counts, **budgets})


@dataclass(frozen=True)
class Channel:
    """A worker's two lines to the process that watches it.

    Args:
        ask: Takes questions of the worker.
        told: Brings questions to it.
    """

    ask: Connection
    told: Connection
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __getstate__(self) -> tuple[Connection, Connection]:
        return self.ask, self.told

    def __setstate__(self, state: tuple[Connection, Connection]) -> None:
        for name, value in (("ask", state[0]), ("told", state[1]), ("_lock", threading.Lock())):
            object.__setattr__(self, name, value)

    def say_started(self) -> None:
        """Say that connections are accepted."""
        with self._lock, contextlib.suppress(OSError):
            self.ask.send_bytes(_STARTED)

    def metrics_of_all(self) -> bytes:
        """Metrics of all workers; blocks."""
        with self._lock:
            self.ask.send_bytes(_METRICS)
            return self.ask.recv_bytes()

    def answer(self, render: Callable[[], bytes]) -> None:
        """Answer questions for metrics from a thread of its own, and end this process in order if nobody asks more."""

        def run() -> None:
            with contextlib.suppress(EOFError, OSError):
                while True:
                    self.told.recv_bytes()
                    self.told.send_bytes(render())
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=run, name="argrad-worker-metrics", daemon=True).start()


@dataclass
class _Worker:
    process: BaseProcess
    asks: Connection
    tell: Connection
    began: float
    is_started: bool = False


class Supervisor:
    """Keeps `settings.workers` processes at work until a signal ends them.

    Args:
        settings: Of the whole service.
        log: Told of ends and starts.
        listeners: Bound sockets, which every worker accepts from.
        work: What a worker does; a function of a module, which a new process can import.
        banner: Printed when all workers accept connections for the first time.
    """

    def __init__(
        self, settings: Settings, log: Logger, listeners: Sequence[socket.socket], work: Work, banner: str
    ) -> None:
        self._settings, self._share, self._log = settings, divided(settings), log
        self._listeners, self._work, self._banner = list(listeners), work, banner
        self._spawn = multiprocessing.get_context("spawn")  # not fork: a forked child hangs in torch
        self._workers: dict[int, _Worker] = {}
        self._due: dict[int, float] = dict.fromkeys(range(settings.workers), 0.0)
        self._failed_starts = self._restarts = 0
        self._kill_at = math.inf
        self._is_stopping = self._has_failed = False
        self._totals = Totals()

    def run(self) -> bool:
        """Run until a signal has ended all workers; False where they could not be started."""
        waker, woken = socket.socketpair()
        waker.setblocking(False)
        handled = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = {number: signal.signal(number, self._ignore) for number in handled}
        wakeup = signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        try:
            while self._workers or not self._is_stopping:
                self._start_due()
                self._wait(woken)
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            waker.close()
            woken.close()
        return not self._has_failed

    def _ignore(self, number: int, frame: FrameType | None) -> None:
        """Signals are read where they can be dealt with: their numbers come through the socket."""

    def _wait(self, woken: socket.socket) -> None:
        """Wait for whatever comes next, and deal with it."""
        sentinels = {worker.process.sentinel: number for number, worker in self._workers.items()}
        asks = {worker.asks: number for number, worker in self._workers.items() if not worker.asks.closed}
        next_at = min([self._kill_at, *self._due.values()])
        timeout_s = None if next_at == math.inf else max(0.0, next_at - time.monotonic())
        for ready in wait([woken, *sentinels, *asks], timeout_s):
            if ready is woken:
                for number in woken.recv(64):
                    self._signalled(number)
            elif isinstance(ready, Connection):
                self._answer(asks[ready])
            elif isinstance(ready, int):
                self._ended(sentinels[ready])
        if time.monotonic() >= self._kill_at:
            self._kill_at = math.inf
            for worker in self._workers.values():
                worker.process.kill()

    def _start_due(self) -> None:
        for number, due in list(self._due.items()):
            if due > time.monotonic() or self._is_stopping:
                continue
            del self._due[number]
            asks, ask = self._spawn.Pipe()
            tell, told = self._spawn.Pipe()
            arguments = (self._share, self._listeners, Channel(ask, told), number)
            process = self._spawn.Process(target=self._work, args=arguments, name=f"argrad-worker-{number}")
            process.start()
            ask.close()
            told.close()
            self._workers[number] = _Worker(process, asks, tell, time.monotonic())

    def _signalled(self, number: int) -> None:
        if number != signal.SIGHUP:
            number = signal.SIGTERM
            if not self._is_stopping:
                self._stop()
        for worker in self._workers.values():
            if worker.is_started or number == signal.SIGTERM:
                _kill(worker.process, number)

    def _stop(self) -> None:
        self._is_stopping = True
        self._due.clear()
        wait_s = self._settings.drain_delay_s + self._settings.shutdown_timeout_s + _GRACE_S
        self._kill_at = time.monotonic() + wait_s

    def _ended(self, number: int) -> None:
        """A worker is no more: unless all are to end, another one takes its place after a while."""
        worker = self._workers.pop(number)
        worker.process.join()
        worker.asks.close()
        worker.tell.close()
        self._totals.retire(number)
        lived_s = time.monotonic() - worker.began
        self._failed_starts = 0 if worker.is_started else self._failed_starts + 1
        if self._is_stopping:
            return
        code = worker.process.exitcode
        self._log.error("worker ended", worker=number, exit_code=code, seconds=round(lived_s, 1))
        if self._failed_starts >= _MAX_FAILED_STARTS:
            self._log.error("workers do not start", in_a_row=self._failed_starts)
            self._has_failed = True
            self._signalled(signal.SIGTERM)
            return
        self._restarts += 1
        exponent = max(0, self._failed_starts - 1)
        delay_s = 0.0 if lived_s > _STEADY_S else min(_MAX_DELAY_S, _FIRST_DELAY_S * 2.0**exponent)
        self._due[number] = time.monotonic() + delay_s

    def _answer(self, number: int) -> None:
        worker = self._workers.get(number)
        if worker is None:
            return
        with contextlib.suppress(EOFError, OSError):  # it ends: its sentinel says so next
            if worker.asks.recv_bytes() == _METRICS:
                worker.asks.send_bytes(self._metrics())
                return
            worker.is_started = True
            if self._banner and all(w.is_started for w in self._workers.values()) and not self._due:
                print(self._banner, flush=True)
                self._banner = ""
            return
        worker.asks.close()

    def _metrics(self) -> bytes:
        """Ask every worker; one that does not answer in time stands with what it said last."""
        for number, worker in self._workers.items():
            with contextlib.suppress(EOFError, OSError):
                while worker.tell.poll(0):  # an answer that came too late for an earlier question
                    self._totals.note(number, worker.tell.recv_bytes().decode())
                worker.tell.send_bytes(_METRICS)
                if worker.tell.poll(_ANSWER_S):
                    self._totals.note(number, worker.tell.recv_bytes().decode())
        alive = GaugeMetricFamily("argrad_workers_alive", "Worker processes that accept connections.")
        alive.add_metric([], sum(worker.is_started for worker in self._workers.values()))
        restarts = CounterMetricFamily("argrad_worker_restarts", "Worker processes that ended and were replaced.")
        restarts.add_metric([], self._restarts)
        return self._totals.render([alive, restarts])


def _kill(process: BaseProcess, number: int) -> None:
    if process.pid is not None and process.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
