"""The sockets of the service, bound before anything else is made, and the files that it may open."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from argrad.errors import ArgradError
from argrad_service.http.logs import Logger
from argrad_service.settings import Settings, flag, variable


class ServeError(ArgradError):
    """The service cannot start; the message says why and what to do."""


@contextlib.contextmanager
def listening(settings: Settings) -> Iterator[tuple[list[socket.socket], str]]:
    """Bound sockets, that of the service first, and its address in words."""
    if settings.uds is not None:
        listener = _bind_unix(settings.uds)
        address = f"unix:{settings.uds}"
    else:
        listener = _bind_tcp(settings.host, settings.port)
        host, port = listener.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    listeners = [listener]
    try:
        if settings.metrics_port is not None:
            listeners.append(_bind_tcp(settings.host, settings.metrics_port, "metrics_port"))
        yield listeners, address
    finally:
        for bound in listeners:
            bound.close()
        if settings.uds is not None:
            settings.uds.unlink(missing_ok=True)


def _bind_tcp(host: str, port: int, setting: str = "port") -> socket.socket:
    with contextlib.ExitStack() as undo:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, protocol, _, where = found[0]
            listener = undo.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
        except OSError as error:
            advice = f"choose another with {flag('host')} and {flag(setting)}"
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


def allow_files(wanted: int, log: Logger) -> None:
    """Let this process open as many files as it may have connections, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < wanted:
        log.warning("few files", limit=most, wanted=wanted, advice=f"lower {variable('max_connections')}, or ulimit -n")
