"""Connections that are kept open between calls."""

from __future__ import annotations

import ssl
import threading
import time

import httpx

from argrad.transport.address import Address
from argrad.transport.bodies import Outgoing
from argrad.transport.connection import Connection
from argrad.transport.exchange import Answer, Deadline

LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=60.0)
"""Of one pool; an idle connection is closed before the service closes it, which by default it does after 120 s."""

_MOST_IDLE = LIMITS.max_keepalive_connections or 0
_EXPIRY_S = LIMITS.keepalive_expiry or 0.0


class Pool:
    """Connections to one address; may be used from any thread, each of which has a connection while it calls.

    Args:
        address: Of the service; without a proxy.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._context: ssl.SSLContext | None = address.tls()
        self._idle: list[Connection] = []
        self._lock = threading.Lock()
        self._is_closed = False

    def exchange(self, request: Outgoing, deadline: Deadline) -> Answer:
        """Send a request and read its reply.

        Raises:
            httpx.TransportError: there is no connection, it broke, or what came back is no reply.
            DeadlineExceededError: the deadline passed.
        """
        connection = self._take() or Connection(self._address, self._context, request.timeouts["connect"])
        try:
            return connection.exchange(request, deadline)
        finally:
            self._put_back(connection)

    def close(self) -> None:
        """Close what is idle, and what is not as soon as its call ends."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _take(self) -> Connection | None:
        """The idle connection that was used last, if the service has not closed it."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if time.monotonic() - connection.used_at < _EXPIRY_S and not connection.is_stale():
                return connection
            connection.close()

    def _put_back(self, connection: Connection) -> None:
        surplus: Connection | None = connection
        if connection.is_reusable:
            with self._lock:
                if not self._is_closed:
                    self._idle.append(connection)
                    # The one that has waited longest goes.
                    surplus = self._idle.pop(0) if len(self._idle) > _MOST_IDLE else None
        if surplus is not None:
            surplus.close()
