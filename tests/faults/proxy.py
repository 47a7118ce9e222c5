"""A TCP proxy in this process that breaks connections where it is told to.

    with FaultProxy("http://127.0.0.1:8000") as proxy:
        proxy.plan(Fault("reset", Phase.REPLY_BODY), None, Fault("garbage", Phase.REPLY_HEAD))
        client = argrad.Client(proxy.url)
        ...
        assert [fired.fault.action for fired in proxy.fired] == ["reset", "garbage"]

It understands as much of HTTP/1.1 as it needs to know where it is: each request that arrives takes the next entry of
the plan, None for a request that is left alone. A `Fault` acts half-way through its phase (`fraction`), once; `fired`
proves that it did. `is_http=False` passes bytes of any protocol. For both, what follows holds for all connections at
once until it is taken back, so that a whole service can be slow, paused or gone:

    proxy.latency_s = 0.05       each piece waits so long
    proxy.stall(), resume()      nothing passes, nothing is closed: a peer that hangs
    proxy.refuse(), accept()     connections are refused, and those that stand are reset: a peer that is not there
    proxy.cut()                  those that stand are reset
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import deque
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tests.faults.exchange import PIECE_BYTES, End, Exchange, Fault, Fired, Phase, first_byte, reset

__all__ = ["Fault", "FaultProxy", "Fired", "Phase"]

T = TypeVar("T")

_MOST_HEAD_BYTES = 1 << 20


class FaultProxy:
    """See the module.

    Args:
        target: `http://host:port`, or host and port.
        is_http: Whether to follow requests and replies; otherwise bytes are passed on as they come.
        seed: Of garbage.
    """

    def __init__(self, target: str | tuple[str, int], *, is_http: bool = True, seed: int = 0) -> None:
        if isinstance(target, str):
            parts = urlsplit(target)
            target = (parts.hostname or "127.0.0.1", parts.port or 80)
        self.target, self.is_http = target, is_http
        self.latency_s = 0.0
        self.fired: list[Fired] = []
        self.requests: list[str] = []
        self.connections = 0
        self._random = random.Random(seed)
        self._plan: deque[Fault | None] = deque()
        self._open: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._port = 0

    def __enter__(self) -> FaultProxy:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy", daemon=True)
        self._thread.start()
        self._passes = self._run(_new_event())
        self.accept()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._loop.close()

    @property
    def url(self) -> str:
        """Address of the proxy."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def port(self) -> int:
        """Port of the proxy, on 127.0.0.1."""
        return self._port

    @property
    def open_connections(self) -> int:
        """Connections of clients that stand now."""
        return len(self._open)

    def plan(self, *faults: Fault | None) -> None:
        """What happens to the next requests, one entry each."""
        self._plan.extend(faults)

    def stall(self) -> None:
        """Let nothing pass any more, in either direction."""
        self._loop.call_soon_threadsafe(self._passes.clear)

    def resume(self) -> None:
        """Let pass again what was held back."""
        self._loop.call_soon_threadsafe(self._passes.set)

    def cut(self) -> None:
        """Reset every connection that stands."""
        self._run(self._cut())

    def refuse(self) -> None:
        """Refuse connections, and reset those that stand."""
        self._run(self._refuse())

    def accept(self) -> None:
        """Accept connections, at the same port as before."""
        self._run(self._listen())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port, limit=_MOST_HEAD_BYTES)
            self._port = self._server.sockets[0].getsockname()[1]

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._cut()

    async def _cut(self) -> None:
        for writer in list(self._open):
            reset(writer)

    async def _end(self) -> None:
        await self._refuse()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.sleep(0)  # a task that has not begun would not close what it was given
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # sockets are closed by callbacks

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        self.connections += 1
        up: asyncio.StreamWriter | None = None
        try:
            if self._plan and (first := self._plan[0]) is not None and first.phase is Phase.CONNECT:
                await Exchange(self, reader, writer, None, None, self._next_fault()).at_connect()
            down, up = await asyncio.open_connection(*self.target, limit=_MOST_HEAD_BYTES)
            if self.is_http:
                await self._http(reader, writer, down, up)
            else:
                await self._bytes(reader, writer, down, up)
        except (End, OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            for each in (writer, up):
                if each is not None:
                    each.close()
            self._open.discard(writer)

    async def _http(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        down: asyncio.StreamReader,
        up: asyncio.StreamWriter,
    ) -> None:
        while True:
            first = await first_byte(reader, down)
            exchange = Exchange(self, reader, writer, down, up, self._next_fault())
            await exchange.at_connect()
            await exchange.run(first)

    async def _bytes(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        down: asyncio.StreamReader,
        up: asyncio.StreamWriter,
    ) -> None:
        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while piece := await source.read(PIECE_BYTES):
                await self.gate()
                sink.write(piece)
                await sink.drain()

        pumps = [asyncio.ensure_future(pump(reader, up)), asyncio.ensure_future(pump(down, writer))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in pumps:
                each.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    def _next_fault(self) -> Fault | None:
        return self._plan.popleft() if self._plan else None

    async def gate(self) -> None:
        """Wait as long as the proxy as a whole is stalled or slow."""
        if self.latency_s:
            await asyncio.sleep(self.latency_s)
        await self._passes.wait()

    def garbage(self, size: int) -> bytes:
        """Random bytes, the first of which no HTTP message begins with."""
        return b"\xff" + self._random.randbytes(size)


async def _new_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event
