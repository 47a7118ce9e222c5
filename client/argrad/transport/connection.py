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

import httpx

from argrad.transport.address import Address
from argrad.transport.bodies import Outgoing
from argrad.transport.exchange import Answer, Deadline
from argrad.transport.head import MOST_HEAD_BYTES, Head

_RECEIVED_BYTES = 64 * 1024
_MOST_BUFFERS = min(os.sysconf("SC_IOV_MAX"), 512) if "SC_IOV_MAX" in os.sysconf_names else 16
_LEAST_WAIT_S = 1e-3  # 0 would mean: do not wait
SMALL_BYTES = 64 * 1024
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
        with mapped(httpx.ConnectError, httpx.ConnectTimeout):
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
            with mapped(httpx.WriteError, httpx.WriteTimeout):
                self._send(request, deadline)
        except httpx.WriteError as error:
            failure = error  # a service that refuses early closes its end, and its reply may be here to be read
        try:
            with mapped(httpx.ReadError, httpx.ReadTimeout):
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
        if len(head) + request.body.size <= SMALL_BYTES:
            self._socket.sendall(b"".join([head, *request.body.buffers]))
            return
        buffers = [memoryview(head), *request.body.views()]
        while buffers:
            self._wait_at_most(deadline)
            # TLS has no sendmsg.
            sent = self._socket.send(buffers[0]) if self._is_tls else self._socket.sendmsg(buffers[:_MOST_BUFFERS])
            buffers = _after(buffers, sent)

    def _receive(self, deadline: Deadline) -> Answer:
        head, size = Head(), 0
        while not head.is_read:
            data = self._next(deadline)
            size += len(data)
            if not data or size > MOST_HEAD_BYTES + _RECEIVED_BYTES:
                found = f"after {size} bytes" if not data else "or its head was too long"
                raise httpx.RemoteProtocolError(f"the reply was cut off {found}, within its head")
            head.feed(data)
        body = self._known(head, head.length, deadline) if head.length is not None else self._unknown(head, deadline)
        return Answer(head.status_code, head.headers, body)

    def _known(self, head: Head, length: int, deadline: Deadline) -> bytearray:
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

    def _unknown(self, head: Head, deadline: Deadline) -> bytearray:
        """A chunked body, or one that ends with the connection, as proxies may send."""
        is_chunked = "transfer-encoding" in head.headers
        while not head.is_complete:
            data = self._next(deadline)
            if not data:
                if is_chunked:
                    raise httpx.RemoteProtocolError("the reply was cut off within a chunk")
                return bytearray(b"".join(head.pieces))
            head.feed(data)
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


def _after(buffers: Sequence[memoryview], sent: int) -> list[memoryview]:
    """What is left of buffers once so many bytes of them were sent."""
    for i, buffer in enumerate(buffers):
        if sent < len(buffer):
            return [buffer[sent:], *buffers[i + 1 :]]
        sent -= len(buffer)
    return []


@contextlib.contextmanager
def mapped(error: type[httpx.TransportError], timeout: type[httpx.TransportError]) -> Iterator[None]:
    """The socket's exceptions as httpx's."""
    try:
        yield
    except TimeoutError as caught:
        if caught.errno == errno.ETIMEDOUT:  # the kernel's, of a peer that vanished, and not ours
            raise error(str(caught)) from caught
        raise timeout(str(caught) or "timed out") from caught
    except (OSError, ssl.SSLError) as caught:
        raise error(str(caught)) from caught
