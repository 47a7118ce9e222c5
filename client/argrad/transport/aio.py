"""The service over HTTP, for callers on an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

import httpx

from argrad.backend import Call
from argrad.transport.address import Address
from argrad.transport.bodies import Download, decoded
from argrad.transport.calls import HttpCalls, HttpOptions, read_document, read_reply
from argrad.transport.connection import KEEPALIVE
from argrad.transport.exchange import Answer, Pause, Send, Steps, drive_async
from argrad.transport.pool import LIMITS
from argrad.transport.streams import Streams
from argrad.wire.messages import (
    JvpReply,
    JvpRequest,
    RegisteredReply,
    RegisterRequest,
    SolveReply,
    SolveRequest,
    TensorMap,
    VjpReply,
    VjpRequest,
)


class AsyncHttpBackend:
    """`HttpBackend` with methods that are awaited; belongs to one event loop.

    Args:
        options: How the service is called.
        transport: Sends requests; by default a pool of connections.
        sleep: Waits between attempts; tests bring their own.
    """

    def __init__(
        self,
        options: HttpOptions,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._calls, self._sleep = HttpCalls(options), sleep
        self._transports = [_pool(address) if transport is None else transport for address in self._calls.addresses]

    async def solve(self, request: SolveRequest, tensors: TensorMap, call: Call) -> tuple[SolveReply, TensorMap]:
        """POST /v1/solve."""
        answer = await self._call(lambda: self._calls.post("solve", request, tensors, call))
        reply, out = read_reply(SolveReply, answer)
        self._calls.note(reply.state, answer)
        return reply, out

    async def vjp(self, request: VjpRequest, tensors: TensorMap, call: Call) -> tuple[VjpReply, TensorMap]:
        """POST /v1/vjp."""
        return read_reply(VjpReply, await self._call(lambda: self._calls.post("vjp", request, tensors, call)))

    async def jvp(self, request: JvpRequest, tensors: TensorMap, call: Call) -> tuple[JvpReply, TensorMap]:
        """POST /v1/jvp."""
        return read_reply(JvpReply, await self._call(lambda: self._calls.post("jvp", request, tensors, call)))

    async def register(
        self, request: RegisterRequest, tensors: TensorMap, call: Call
    ) -> tuple[RegisteredReply, TensorMap]:
        """PUT /v1/problems/{sha256}."""
        return read_reply(RegisteredReply, await self._call(lambda: self._calls.put(request, tensors, call)))

    async def solvers(self) -> dict[str, Any]:
        """GET /v1/solvers."""
        return read_document(await self._run(self._calls.get("solvers")))

    def release(self, states: Sequence[str]) -> None:
        """Note states that nobody needs any more; they ride on the next call. Does no I/O."""
        self._calls.release(states)

    async def close(self) -> None:
        """Close the connections."""
        for transport in self._transports:
            await transport.aclose()

    async def _call(self, begin: Callable[[], Steps]) -> Answer:
        """Begin a call, in a thread where that compresses, and make it."""
        return await self._run(begin() if self._calls.options.compression is None else await asyncio.to_thread(begin))

    async def _run(self, steps: Steps) -> Answer:
        return await drive_async(steps, self._perform, (httpx.HTTPError,))

    async def _perform(self, effect: Send | Pause) -> Answer | None:
        if isinstance(effect, Pause):
            await self._sleep(effect.seconds)
            return None
        answer = await self._send(effect)
        if "content-encoding" not in answer.headers:
            return answer
        return await asyncio.to_thread(decoded, answer, self._calls.accepted)

    async def _send(self, effect: Send) -> Answer:
        transport = self._transports[effect.request.target]
        if isinstance(transport, Streams):
            return await transport.exchange(effect.request, effect.deadline)
        response = await transport.handle_async_request(effect.request.as_httpx())
        try:
            download = Download(response.headers, effect.deadline)
            async for piece in cast("httpx.AsyncByteStream", response.stream):
                download.add(piece)
            return Answer(response.status_code, response.headers, download.finish())
        finally:
            await response.aclose()


def _pool(address: Address) -> httpx.AsyncBaseTransport | Streams:
    if address.proxy is None:
        return Streams(address)
    return httpx.AsyncHTTPTransport(proxy=address.proxy, limits=LIMITS, socket_options=KEEPALIVE)
