"""`argrad serve`: the application under uvicorn, on a socket of our own, with signals of our own."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import socket
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import uvicorn

from argrad._version import __version__
from argrad.errors import ArgradError
from argrad_service import engine as default_engine
from argrad_service.app import choose_device, create_app
from argrad_service.http.health import Readiness
from argrad_service.http.logs import Forwarded, Logger, make_logger
from argrad_service.http.protocol import GuardedProtocol
from argrad_service.settings import Settings, default_text, flag, load_settings, variable
from argrad_service.working import Engine

_BACKLOG = 2048

PROCESS_ENVIRONMENT = {
    # Large bodies and solver work come and go: keep their pages instead of faulting them in for every call.
    "MALLOC_MMAP_THRESHOLD_": str(1024**3),
    "MALLOC_TRIM_THRESHOLD_": str(2 * 1024**3),
    "MALLOC_TOP_PAD_": str(64 * 1024**2),
    # Threads that spin after an operation take the processor from the event loop.
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""What must be in the environment before the process starts; what is set already is left alone."""


class ServeError(ArgradError):
    """The service cannot start; the message says why and what to do."""


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
    """Run the service in this process until a signal ends it.

    Args:
        settings: All that an operator may choose.
        engine: Solves and differentiates.

    Raises:
        ServeError: the address or the device cannot be had.
    """
    log = make_logger(settings)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ServeError(f"{variable('device')} is cuda, and torch {torch.__version__} finds no GPU here")
    if settings.torch_threads:
        torch.set_num_threads(settings.torch_threads)
    if not (settings.is_loopback or settings.has_keys):
        log.warning("no authentication", host=settings.host, advice="whoever reaches this address can use the service")
    with _listening(settings) as (listener, address), _stdlib_logs(log):
        app = create_app(settings, engine=engine, log=log)
        config = uvicorn.Config(
            app,
            http=GuardedProtocol.with_timeout(settings.header_timeout_s),
            loop="auto",
            lifespan="on",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=settings.keep_alive_s,
            timeout_graceful_shutdown=settings.shutdown_timeout_s,
        )
        device = f"{choose_device(settings)}, {torch.get_num_threads()} threads"
        banner = f"argrad {__version__} on {address} ({device})"
        if settings.uds is None:
            banner += f"\n  documentation: {address}/docs"
        _Server(config, app.state.readiness, settings.drain_delay_s, banner).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Says where it is, shows in readiness that it stops, and ends at once at a second signal of either kind."""

    def __init__(self, config: uvicorn.Config, readiness: Readiness, drain_delay_s: float, banner: str) -> None:
        super().__init__(config)
        self._readiness, self._drain_delay_s, self._banner = readiness, drain_delay_s, banner
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then print the address: whoever waits for that line can connect."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        print(self._banner, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the handler's signature
        """First signal: finish what is under way. Second: end."""
        if self._readiness.phase == "stopping":
            self.should_exit = self.force_exit = True
            return
        self._readiness.phase = "stopping"
        if self._loop is None or not self._drain_delay_s:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._loop.call_later, self._drain_delay_s, self._stop)

    def _stop(self) -> None:
        self.should_exit = True


@contextlib.contextmanager
def _listening(settings: Settings) -> Iterator[tuple[socket.socket, str]]:
    """A bound socket, and its address in words."""
    if settings.uds is not None:
        listener = _bind_unix(settings.uds)
        address = f"unix:{settings.uds}"
    else:
        listener = _bind_tcp(settings.host, settings.port)
        host, port = listener.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    try:
        yield listener, address
    finally:
        listener.close()
        if settings.uds is not None:
            settings.uds.unlink(missing_ok=True)


def _bind_tcp(host: str, port: int) -> socket.socket:
    with contextlib.ExitStack() as undo:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, protocol, _, where = found[0]
            listener = undo.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
        except OSError as error:
            advice = f"choose another with {flag('host')} and {flag('port')}"
            raise ServeError(f"cannot listen on {host}:{port} ({error.strerror}); {advice}") from None
        undo.pop_all()
        return listener


def _bind_unix(path: Path) -> socket.socket:
    """Bind a unix socket that only its owner can use, in the place of one that nobody serves any more."""
    if path.exists():
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise ServeError(f"{path} exists and is no socket; choose another path with {flag('uds')}")
        if _is_served(path):
            raise ServeError(f"another process listens on {path}; choose another path with {flag('uds')}")
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # The mode is the umask's at the moment of binding: chmod afterwards would leave a gap.
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise ServeError(f"cannot listen on {path}: {error.strerror}") from None
    finally:
        os.umask(before)
    return listener


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


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
