"""One HTTP/1.1 connection over a socket: requests go out without copies, replies come in one buffer.

A small call is mostly overhead, and half of a client's was in httpcore and h11. httptools (llhttp, in C) reads the head
of a reply and chunked bodies; a body of known length is received straight into its place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import ssl
import time
from collections.abc import Iterator, Sequence

import httptools
import httpx

from argrad.transport.address import Address
from argrad.transport.bodies import Outgoing
from argrad.transport.exchange import Answer, Deadline

_RECEIVED_BYTES = 64 * 1024
_MOST_HEAD_BYTES = 256 * 1024
_MOST_BUFFERS = min(os.sysconf("SC_IOV_MAX"), 512) if "SC_IOV_MAX" in os.sysconf_names else 16
_LEAST_WAIT_S = 1e-3  # 0 would mean: do not wait
_SMALL_BYTES = 64 * 1024
"""A request up to here is one write: two would wake the service twice."""

_VANISHED_S = 30
"""Seconds after which a peer that acknowledges nothing is taken to be gone: no power, or no line."""


def _keepalive() -> list[tuple[int, int, int]]:
    """Socket options by which the kernel notices a peer that vanished while a call waits, where it can."""
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    seconds = {"TCP_KEEPIDLE": _VANISHED_S // 2, "TCP_KEEPINTVL": _VANISHED_S // 6, "TCP_KEEPCNT": 3}
    milliseconds = {"TCP_USER_TIMEOUT": 1000 * _VANISHED_S}
    for name, value in (seconds | milliseconds).items():
        if hasattr(socket, name):
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return options


KEEPALIVE = _keepalive()


class _Head:
    """What httptools tells of a reply."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.pieces: list[bytes] = []
        self.is_read = self.is_complete = self.is_followed = False
        self.is_kept_alive, self.status_code = False, 0
        self._parser = httptools.HttpResponseParser(self)
        self.feed = self._parser.feed_data

    def on_message_begin(self) -> None:
        self.is_followed = self.is_read
        if not self.is_followed:
            self.headers.clear()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.is_followed:
            self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if not self.is_followed:
            self.status_code = int(self._parser.get_status_code())
            self.is_kept_alive = bool(self._parser.should_keep_alive())
            self.is_read = not 100 <= self.status_code < 200  # an interim reply is not the reply

    def on_body(self, piece: bytes) -> None:
        if not self.is_followed:
            self.pieces.append(piece)

    def on_message_complete(self) -> None:
        self.is_complete = self.is_read

    @property
    def is_reusable(self) -> bool:
        """Whether the connection may carry another call; not if more came than was asked for."""
        return self.is_kept_alive and not self.is_followed

    @property
    def length(self) -> int | None:
        """Content-Length of a body that is not chunked."""
        text = self.headers.get("content-length", "")
        return int(text) if text.isdigit() and "transfer-encoding" not in self.headers else None


class Connection:
    """A connection that carries one call at a time; the caller sees to that.

    Args:
        address: Of the service; without a proxy.
        context: For `https`.
        timeout_s: Seconds to connect in, TLS included; None for no limit.

    Raises:
        httpx.ConnectError: nobody answers.
        httpx.ConnectTimeout: not in time.
    """

    def __init__(self, address: Address, context: ssl.SSLContext | None, timeout_s: float | None) -> None:
        with _mapped(httpx.ConnectError, httpx.ConnectTimeout):
            self._socket = _connect(address, context, timeout_s)
        self._is_tls = context is not None
        self.used_at = time.monotonic()
        self.is_reusable = False

    def is_stale(self) -> bool:
        """Whether an idle connection was closed by the service, which may do so at any time."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def exchange(self, request: Outgoing, deadline: Deadline) -> Answer:
        """Send a request and read its reply to the end.

        Raises:
            httpx.TransportError: the connection broke, or what came back is no reply.
            DeadlineExceededError: the deadline passed.
        """
        self.is_reusable = False
        failure: httpx.TransportError | None = None
        try:
            with _mapped(httpx.WriteError, httpx.WriteTimeout):
                self._send(request, deadline)
        except httpx.WriteError as error:
            failure = error  # a service that refuses early closes its end, and its reply may be here to be read
        try:
            with _mapped(httpx.ReadError, httpx.ReadTimeout):
                answer = self._receive(deadline)
        except (httpx.ReadError, httpx.RemoteProtocolError) as error:
            raise failure or error from None
        self.is_reusable = self.is_reusable and failure is None
        self.used_at = time.monotonic()
        return answer

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _send(self, request: Outgoing, deadline: Deadline) -> None:
        head = request.head()
        self._wait_at_most(deadline)
        if len(head) + request.body.size <= _SMALL_BYTES:
            self._socket.sendall(b"".join([head, *request.body.buffers]))
            return
        buffers = [memoryview(head), *request.body.views()]
        while buffers:
            self._wait_at_most(deadline)
            # TLS has no sendmsg.
            sent = self._socket.send(buffers[0]) if self._is_tls else self._socket.sendmsg(buffers[:_MOST_BUFFERS])
            buffers = _after(buffers, sent)

    def _receive(self, deadline: Deadline) -> Answer:
        head, size = _Head(), 0
        while not head.is_read:
            data = self._next(deadline)
            size += len(data)
            if not data or size > _MOST_HEAD_BYTES + _RECEIVED_BYTES:
                found = f"after {size} bytes" if not data else "or its head was too long"
                raise httpx.RemoteProtocolError(f"the reply was cut off {found}, within its head")
            _feed(head, data)
        body = self._known(head, head.length, deadline) if head.length is not None else self._unknown(head, deadline)
        return Answer(head.status_code, head.headers, body)

    def _known(self, head: _Head, length: int, deadline: Deadline) -> bytearray:
        """A body of known length; the parser has seen its beginning, and is not needed for the rest."""
        first = b"".join(head.pieces)
        if len(first) == length:
            self.is_reusable = head.is_reusable
            return bytearray(first)
        body, filled = bytearray(length), len(first)
        body[:filled] = first
        view = memoryview(body)
        while filled < length:
            self._wait_at_most(deadline)
            received = self._socket.recv_into(view[filled:])
            if not received:
                raise httpx.RemoteProtocolError(f"the reply was cut off after {filled} of {length} bytes")
            filled += received
        self.is_reusable = head.is_reusable
        return body

    def _unknown(self, head: _Head, deadline: Deadline) -> bytearray:
        """A chunked body, or one that ends with the connection, as proxies may send."""
        is_chunked = "transfer-encoding" in head.headers
        while not head.is_complete:
            data = self._next(deadline)
            if not data:
                if is_chunked:
                    raise httpx.RemoteProtocolError("the reply was cut off within a chunk")
                return bytearray(b"".join(head.pieces))
            _feed(head, data)
        self.is_reusable = head.is_reusable
        return bytearray(b"".join(head.pieces))

    def _next(self, deadline: Deadline) -> bytes:
        self._wait_at_most(deadline)
        return self._socket.recv(_RECEIVED_BYTES)

    def _wait_at_most(self, deadline: Deadline) -> None:
        deadline.check()
        remaining_s = deadline.remaining()
        self._socket.settimeout(None if remaining_s is None else max(remaining_s, _LEAST_WAIT_S))


def _connect(address: Address, context: ssl.SSLContext | None, timeout_s: float | None) -> socket.socket:
    if address.uds is not None:
        plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            plain.settimeout(timeout_s)
            plain.connect(address.uds)
        except BaseException:
            plain.close()
            raise
        return plain
    host, port = address.base.host, address.base.port or (443 if context is not None else 80)
    plain = socket.create_connection((host, port), timeout_s)
    try:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in KEEPALIVE:
            plain.setsockopt(*option)
        return plain if context is None else context.wrap_socket(plain, server_hostname=host)
    except BaseException:
        plain.close()
        raise


def _feed(head: _Head, data: bytes) -> None:
    try:
        head.feed(data)
    except httptools.HttpParserError as error:
        raise httpx.RemoteProtocolError(f"the reply is not HTTP: {error}") from error


def _after(buffers: Sequence[memoryview], sent: int) -> list[memoryview]:
    """What is left of buffers once so many bytes of them were sent."""
    for i, buffer in enumerate(buffers):
        if sent < len(buffer):
            return [buffer[sent:], *buffers[i + 1 :]]
        sent -= len(buffer)
    return []


@contextlib.contextmanager
def _mapped(error: type[httpx.TransportError], timeout: type[httpx.TransportError]) -> Iterator[None]:
    """The socket's exceptions as httpx's."""
    try:
        yield
    except TimeoutError as caught:
        if caught.errno == errno.ETIMEDOUT:  # the kernel's, of a peer that vanished, and not ours
            raise error(str(caught)) from caught
        raise timeout(str(caught) or "timed out") from caught
    except (OSError, ssl.SSLError) as caught:
        raise error(str(caught)) from caught
