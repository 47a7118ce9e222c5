"""A pool of connections that sends head and body of a small request in one piece.

httpcore writes them one after the other. The first write wakes the service, which then waits for the second: on
loopback that costs a fifth of a small call.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import httpcore
import httpx

from argrad.transport.address import Address

LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=60.0)
"""Of one pool; an idle connection is closed before the service closes it, which by default it does after 120 s."""

_HELD_BYTES = 64 * 1024

_EXCEPTIONS: Mapping[type[Exception], type[httpx.TransportError]] = {
    httpcore.ConnectTimeout: httpx.ConnectTimeout,
    httpcore.ReadTimeout: httpx.ReadTimeout,
    httpcore.WriteTimeout: httpx.WriteTimeout,
    httpcore.PoolTimeout: httpx.PoolTimeout,
    httpcore.ConnectError: httpx.ConnectError,
    httpcore.ReadError: httpx.ReadError,
    httpcore.WriteError: httpx.WriteError,
    httpcore.ProxyError: httpx.ProxyError,
    httpcore.UnsupportedProtocol: httpx.UnsupportedProtocol,
    httpcore.LocalProtocolError: httpx.LocalProtocolError,
    httpcore.RemoteProtocolError: httpx.RemoteProtocolError,
}


class PooledTransport(httpx.BaseTransport):
    """Connections to one address, kept open between calls; may be used from any thread.

    Args:
        address: Of the service.
    """

    def __init__(self, address: Address) -> None:
        self._pool = httpcore.ConnectionPool(
            ssl_context=httpx.create_ssl_context() if address.base.scheme == "https" else None,
            max_connections=LIMITS.max_connections,
            max_keepalive_connections=LIMITS.max_keepalive_connections,
            keepalive_expiry=LIMITS.keepalive_expiry,
            uds=address.uds,
            network_backend=_Backend(),
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and read the head of its reply."""
        url = request.url
        core = httpcore.Request(
            method=request.method,
            url=httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
            headers=request.headers.raw,
            content=cast("Iterable[bytes]", request.stream),
            extensions=request.extensions,
        )
        with _mapped():
            response = self._pool.handle_request(core)
        stream = _Reply(cast("Iterable[bytes]", response.stream))
        return httpx.Response(response.status, headers=response.headers, stream=stream)

    def close(self) -> None:
        """Close all connections."""
        self._pool.close()


class _Reply(httpx.SyncByteStream):
    """Body of a reply, with httpx's exceptions."""

    def __init__(self, stream: Iterable[bytes]) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        with _mapped():
            yield from self._stream

    def close(self) -> None:
        cast("Any", self._stream).close()


@contextlib.contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except tuple(_EXCEPTIONS) as error:
        raise _EXCEPTIONS[type(error)](str(error)) from error


class _Stream(httpcore.NetworkStream):
    """Holds what is written until there is much of it, or until a reply is waited for."""

    def __init__(self, inner: httpcore.NetworkStream) -> None:
        self._inner, self._held = inner, b""

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        # `buffer` alone where nothing is held: joining would copy a large piece.
        self._held = self._held + buffer if self._held else buffer
        if len(self._held) > _HELD_BYTES:
            self._flush(timeout)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._held:
            # A service that refuses a request early may have closed its end, and its reply is here to be read.
            with contextlib.suppress(httpcore.WriteError):
                self._flush(timeout)
        return self._inner.read(max_bytes, timeout)

    def _flush(self, timeout: float | None) -> None:
        held, self._held = self._held, b""
        self._inner.write(held, timeout)

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class _Backend(httpcore.NetworkBackend):
    """httpcore's own sockets, with `_Stream` around each."""

    def __init__(self) -> None:
        self._inner = httpcore.SyncBackend()

    def connect_tcp(self, *arguments: Any, **more: Any) -> httpcore.NetworkStream:
        return _Stream(self._inner.connect_tcp(*arguments, **more))

    def connect_unix_socket(self, *arguments: Any, **more: Any) -> httpcore.NetworkStream:
        return _Stream(self._inner.connect_unix_socket(*arguments, **more))

    def sleep(self, seconds: float) -> None:
        self._inner.sleep(seconds)
