"""`argrad serve`: the application under uvicorn, on a socket of our own, with signals of our own."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI

from argrad._version import __version__
from argrad.errors import ArgradError
from argrad_service import engine as default_engine
from argrad_service.app import choose_device, create_app
from argrad_service.engine.threads import threads, use_threads
from argrad_service.http.doors import Doors
from argrad_service.http.health import Readiness
from argrad_service.http.keys import reload_keys
from argrad_service.http.logs import Forwarded, Logger, make_logger
from argrad_service.http.protocol import GuardedProtocol
from argrad_service.keyring import Keyring
from argrad_service.listening import ServeError, allow_files, listening
from argrad_service.settings import Settings, default_text, flag, load_settings, variable
from argrad_service.workers import Channel, Supervisor
from argrad_service.working import Engine

_BACKLOG = 2048
_FLUSH_S = 2
"""Seconds in which callers that were handed back take their reply; then their connections are broken."""
_FORCED_S = 0.5
"""Seconds that the application has to end after a second signal."""
_OTHER_FILES = 256
"""Files that are open beside connections."""

PROCESS_ENVIRONMENT = {
    # Large bodies and solver work come and go: keep their pages instead of faulting them in for every call.
    "MALLOC_MMAP_THRESHOLD_": str(1024**3),
    "MALLOC_TRIM_THRESHOLD_": str(2 * 1024**3),
    "MALLOC_TOP_PAD_": str(64 * 1024**2),
    # Threads that spin after an operation take the processor from the event loop.
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""What must be in the environment before the process starts; what is set already is left alone."""


def serve_command(argv: Sequence[str]) -> int:
    """Run the service until a signal ends it.

    Starts itself anew, once, where `PROCESS_ENVIRONMENT` is not complete.

    Args:
        argv: Flags, without the name of the program.

    Returns:
        Exit status: 0 after a signal, 1 if the address cannot be had, 2 for wrong flags or settings.
    """
    given = vars(_parser().parse_args(argv))
    try:
        settings = load_settings(**{name: text for name, text in given.items() if text is not None})
    except ArgradError as error:
        print(f"argrad serve: {error}", file=sys.stderr)
        return 2
    missing = {name: text for name, text in PROCESS_ENVIRONMENT.items() if name not in os.environ}
    if missing and sys.platform == "linux":
        os.execve(sys.executable, [sys.executable, "-m", "argrad_service", *argv], os.environ | missing)  # noqa: S606
    try:
        serve(settings)
    except ArgradError as error:
        print(f"argrad serve: {error}", file=sys.stderr)
        return 1
    return 0


def serve(settings: Settings, engine: Engine = default_engine) -> None:
    """Run the service, in this process or in several workers of it, until a signal ends it.

    Args:
        settings: All that an operator may choose.
        engine: Solves and differentiates; workers have the default one.

    Raises:
        ServeError: the address or the device cannot be had.
    """
    log = make_logger(settings)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ServeError(f"{variable('device')} is cuda, and torch {torch.__version__} finds no GPU here")
    if settings.torch_threads:
        use_threads(settings.torch_threads)
    if not (settings.is_loopback or settings.has_keys):
        log.warning("no authentication", host=settings.host, advice="whoever reaches this address can use the service")
    allow_files(settings.max_connections + _OTHER_FILES, log)
    with listening(settings) as (listeners, address):
        device = f"{choose_device(settings)}, {threads()} threads"
        banner = f"argrad {__version__} on {address} ({device})"
        if settings.workers > 1:
            banner = banner.replace(" threads)", f" threads, {settings.workers} workers)")
        if settings.uds is None:
            banner += f"\n  documentation: {address}/docs"
        if settings.workers == 1:
            app = create_app(settings, engine=engine, log=log)
            _run(app, settings, listeners, functools.partial(print, banner, flush=True), log)
        elif not Supervisor(settings, log, listeners, _work, banner).run():
            raise ServeError("workers end before they accept connections; what they say is above")


def _work(settings: Settings, listeners: list[socket.socket], channel: Channel, number: int) -> None:
    """What a worker process does."""
    os.setpgid(0, 0)  # Ctrl-C at a terminal is for the process that watches: it tells us once
    log = make_logger(settings).bind(worker=number)
    use_threads(settings.torch_threads)
    app = create_app(settings, log=log)
    app.state.metrics_of_all = channel.metrics_of_all
    channel.answer(app.state.metrics.render)
    _run(app, settings, listeners, channel.say_started, log)


def _run(
    app: FastAPI, settings: Settings, listeners: list[socket.socket], announce: Callable[[], None], log: Logger
) -> None:
    """Serve an application on bound sockets until a signal ends it."""
    config = uvicorn.Config(
        app,
        http=GuardedProtocol.with_bounds(
            header_timeout_s=settings.header_timeout_s,
            reply_timeout_s=settings.reply_timeout_s,
            max_connections=settings.max_connections,
        ),
        loop="auto",
        lifespan="on",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=settings.shutdown_timeout_s + 2 * _FLUSH_S,
    )
    with _stdlib_logs(log):
        _Server(config, app, settings, announce, log).run(sockets=listeners)


class _Server(uvicorn.Server):
    """Stops in steps: readiness turns false, admission ends, calls finish or are handed back. A second signal ends all.

    Args:
        config: Of uvicorn.
        app: Made by `create_app`.
        settings: Say how long each step takes.
        announce: Called as soon as connections are accepted.
        log: Told of the steps.
    """

    def __init__(
        self, config: uvicorn.Config, app: FastAPI, settings: Settings, announce: Callable[[], None], log: Logger
    ) -> None:
        super().__init__(config)
        self._readiness: Readiness = app.state.readiness
        self._doors: Doors = app.state.doors
        self._keyring: Keyring | None = app.state.keyring
        self._settings, self._announce, self._log = settings, announce, log
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then say so: whoever waits for that line can connect."""
        self._loop = loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        await super().startup(sockets)
        self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the handler's signature
        """First signal: finish what is under way. Second: end."""
        if self._readiness.phase == "stopping":
            self.should_exit = self.force_exit = True
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._doors.hand_back)
            return
        self._readiness.phase = "stopping"
        delay_s = self._settings.drain_delay_s
        if self._loop is None or not delay_s:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._loop.call_later, delay_s, self._stop)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End admission, close the listeners and idle connections, and wait for the others, but not for ever."""
        self._doors.close()
        loop, finish_s = asyncio.get_running_loop(), self._settings.shutdown_timeout_s
        timers = [
            loop.call_later(finish_s, self._doors.hand_back),
            loop.call_later(finish_s + _FLUSH_S, self._break_connections),
        ]
        try:
            await super().shutdown(sockets)
            if self.force_exit:  # uvicorn leaves the application out then, and its end would be a traceback
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.lifespan.shutdown(), _FORCED_S)
        finally:
            for timer in timers:
                timer.cancel()

    def _stop(self) -> None:
        self.should_exit = True

    def _break_connections(self) -> None:
        """Break with callers that neither take their reply nor leave."""
        for connection in list(self.server_state.connections):
            transport: asyncio.Transport = connection.transport
            transport.abort()

    def _reload(self) -> None:
        if self._keyring is not None:
            reload_keys(self._keyring, self._log)


@contextlib.contextmanager
def _stdlib_logs(log: Logger) -> Iterator[None]:
    """Hand uvicorn's own warnings to our logger while the service runs."""
    uvicorn_log, handler = logging.getLogger("uvicorn"), Forwarded(log)
    uvicorn_log.addHandler(handler)
    uvicorn_log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        uvicorn_log.removeHandler(handler)


def _parser() -> argparse.ArgumentParser:
    """One flag a setting; values are checked by the settings themselves."""
    parser = argparse.ArgumentParser(
        prog="argrad serve",
        description="Serve gradients of optimisation problems. Each flag is also a variable, such as ARGRAD_PORT.",
        allow_abbrev=False,
    )
    for name, field in Settings.model_fields.items():
        text = f"{field.description} [{variable(name)}, default {default_text(name)}]".replace("%", "%%")
        is_switch: dict[str, Any] = {"nargs": "?", "const": "true"} if field.annotation is bool else {}
        metavar = _metavar(field.annotation, name)
        parser.add_argument(flag(name), dest=name, metavar=metavar, help=text, **is_switch)
    return parser


def _metavar(annotation: Any, name: str) -> str:
    choices = getattr(annotation, "__args__", ())
    if choices and all(isinstance(choice, str) for choice in choices):
        return "|".join(choices)
    return name.rpartition("_")[2].upper() or name.upper()
