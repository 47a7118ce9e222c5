"""The service over HTTP, for callers that wait: an `argrad.backend.Backend`.

Requests go over connections of our own (`argrad.transport.connection`), or, where a proxy stands between or the caller
brings one, to a transport of httpx; either raises httpx's exceptions. What httpx's client adds (redirects, cookies,
authentication flows) is not used.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import httpx

from argrad.backend import Call
from argrad.transport.address import Address
from argrad.transport.bodies import Download, decoded
from argrad.transport.calls import HttpCalls, HttpOptions, read_document, read_reply
from argrad.transport.connection import KEEPALIVE
from argrad.transport.exchange import Answer, Pause, Send, Steps, drive
from argrad.transport.pool import LIMITS, Pool
from argrad.wire.messages import (
    JvpReply,
    JvpRequest,
    Message,
    RegisteredReply,
    RegisterRequest,
    SolveReply,
    SolveRequest,
    TensorMap,
    VjpReply,
    VjpRequest,
)


class HttpBackend:
    """A service, called from any thread. It survives a fork, and pickles.

    Args:
        options: How the service is called.
        transport: Sends requests; by default a pool of connections, opened again in a forked child.
        sleep: Waits between attempts; tests bring their own.
    """

    def __init__(
        self,
        options: HttpOptions,
        *,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._options, self._given, self._sleep = options, transport, sleep
        self._open()

    def _open(self) -> None:
        self._calls = HttpCalls(self._options)
        given = self._given
        self._transports = [_pool(address) if given is None else given for address in self._calls.addresses]
        self._pid = os.getpid()

    def _current(self) -> HttpCalls:
        if self._pid != os.getpid():
            # The parent's pools are kept, unused: closing their sockets here could disturb the parent's connections.
            self._parents = self._transports
            self._open()
        return self._calls

    def solve(self, request: SolveRequest, tensors: TensorMap, call: Call) -> tuple[SolveReply, TensorMap]:
        """POST /v1/solve."""
        answer = self._post("solve", request, tensors, call)
        reply, out = read_reply(SolveReply, answer)
        self._calls.note(reply.state, answer)
        return reply, out

    def vjp(self, request: VjpRequest, tensors: TensorMap, call: Call) -> tuple[VjpReply, TensorMap]:
        """POST /v1/vjp."""
        return read_reply(VjpReply, self._post("vjp", request, tensors, call))

    def jvp(self, request: JvpRequest, tensors: TensorMap, call: Call) -> tuple[JvpReply, TensorMap]:
        """POST /v1/jvp."""
        return read_reply(JvpReply, self._post("jvp", request, tensors, call))

    def register(self, request: RegisterRequest, tensors: TensorMap, call: Call) -> tuple[RegisteredReply, TensorMap]:
        """PUT /v1/problems/{sha256}."""
        return read_reply(RegisteredReply, self._run(self._current().put(request, tensors, call)))

    def solvers(self) -> dict[str, Any]:
        """GET /v1/solvers."""
        return read_document(self._run(self._current().get("solvers")))

    def release(self, states: Sequence[str]) -> None:
        """Note states that nobody needs any more; they ride on the next call. Does no I/O."""
        if self._pid == os.getpid():
            self._calls.release(states)

    def close(self) -> None:
        """Close the connections."""
        self._current()
        for transport in self._transports:
            transport.close()

    def __del__(self) -> None:
        # A layer's own client is nobody's to close. What was given is the giver's; a forked child's is the parent's.
        if getattr(self, "_pid", None) == os.getpid() and self._given is None:
            for transport in self._transports:
                transport.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._options, self._given, self._sleep)

    def __repr__(self) -> str:
        return f"HttpBackend({', '.join(self._options.urls)!r})"

    def _post(self, name: str, request: Message, tensors: TensorMap, call: Call) -> Answer:
        return self._run(self._current().post(name, request, tensors, call))

    def _run(self, steps: Steps) -> Answer:
        return drive(steps, self._perform, (httpx.HTTPError,))

    def _perform(self, effect: Send | Pause) -> Answer | None:
        if isinstance(effect, Pause):
            self._sleep(effect.seconds)
            return None
        return decoded(self._send(effect), self._calls.accepted)

    def _send(self, effect: Send) -> Answer:
        transport = self._transports[effect.request.target]
        if isinstance(transport, Pool):
            return transport.exchange(effect.request, effect.deadline)
        response = transport.handle_request(effect.request.as_httpx())
        try:
            download = Download(response.headers, effect.deadline)
            for piece in cast("httpx.SyncByteStream", response.stream):
                download.add(piece)
            return Answer(response.status_code, response.headers, download.finish())
        finally:
            response.close()


def _rebuild(
    options: HttpOptions, transport: httpx.BaseTransport | None, sleep: Callable[[float], None]
) -> HttpBackend:
    return HttpBackend(options, transport=transport, sleep=sleep)


def _pool(address: Address) -> httpx.BaseTransport | Pool:
    if address.proxy is None:
        return Pool(address)
    return httpx.HTTPTransport(proxy=address.proxy, limits=LIMITS, socket_options=KEEPALIVE)
