"""`AsyncClient`: `Client` for callers on an event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, TypeVar

import httpx
from torch import Tensor

from argrad import operations
from argrad.arguments import (
    DEFAULT_TIMEOUT_S,
    LOCAL,
    addresses_of,
    check_backend,
    check_compression,
    check_registering,
    http_options,
    load_backend,
)
from argrad.backend import Backend, Call
from argrad.errors import StateGoneError
from argrad.observation import Observer, observe
from argrad.operations import Exchange, Reply
from argrad.options import Options
from argrad.problems import QP, Form
from argrad.registered import FAILURES, Kind, Registered, Registering, Registry, handle_for, register
from argrad.results import GradientResult, Point, SolveResult, TangentResult
from argrad.transport.aio import AsyncHttpBackend
from argrad.transport.calls import Compression
from argrad.transport.exchange import drive_async
from argrad.wire.messages import (
    FailedGradients,
    Gradients,
    JvpRequest,
    RegisterRequest,
    SolveRequest,
    TensorMap,
    VjpRequest,
)

T = TypeVar("T")

_DEFAULTS = Options()


class AsyncBackend(Protocol):
    """`argrad.backend.Backend` with methods that are awaited."""

    async def solve(self, request: SolveRequest, tensors: TensorMap, call: Call) -> Reply:
        """POST /v1/solve."""
        ...

    async def vjp(self, request: VjpRequest, tensors: TensorMap, call: Call) -> Reply:
        """POST /v1/vjp."""
        ...

    async def jvp(self, request: JvpRequest, tensors: TensorMap, call: Call) -> Reply:
        """POST /v1/jvp."""
        ...

    async def register(self, request: RegisterRequest, tensors: TensorMap, call: Call) -> Reply:
        """PUT /v1/problems/{sha256}."""
        ...

    async def solvers(self) -> dict[str, Any]:
        """GET /v1/solvers."""
        ...

    def release(self, states: Sequence[str]) -> None:
        """Free forward states early; does no I/O."""
        ...

    async def close(self) -> None:
        """Release what the backend holds."""
        ...


class _InThread:
    """A backend that blocks, called in threads."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.release = backend.release

    async def solve(self, request: SolveRequest, tensors: TensorMap, call: Call) -> Reply:
        return await asyncio.to_thread(self._backend.solve, request, tensors, call)

    async def vjp(self, request: VjpRequest, tensors: TensorMap, call: Call) -> Reply:
        return await asyncio.to_thread(self._backend.vjp, request, tensors, call)

    async def jvp(self, request: JvpRequest, tensors: TensorMap, call: Call) -> Reply:
        return await asyncio.to_thread(self._backend.jvp, request, tensors, call)

    async def register(self, request: RegisterRequest, tensors: TensorMap, call: Call) -> Reply:
        return await asyncio.to_thread(self._backend.register, request, tensors, call)

    async def solvers(self) -> dict[str, Any]:
        return await asyncio.to_thread(self._backend.solvers)

    async def close(self) -> None:
        self._backend.close()


class AsyncClient:
    """`Client` whose calls are awaited; belongs to one event loop, and is not for autograd, which waits.

    Args:
        target: See `Client`; `local` solves in threads.
        api_key: See `Client`.
        timeout_s: See `Client`.
        retries: See `Client`.
        transport: See `Client`.
        observer: See `Client`.
        register: See `Client`.
        compression: See `Client`; done in threads.
    """

    def __init__(
        self,
        target: str | Sequence[str] | AsyncBackend,
        *,
        api_key: str | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        retries: int | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        observer: Observer | None = None,
        register: Registering = "auto",
        compression: Compression | None = None,
    ) -> None:
        operations.check_timeout(timeout_s)
        check_registering(register)
        check_compression(compression)
        self.registry = Registry(is_automatic=register == "auto" and target != LOCAL)
        self._target, self._timeout_s, self._observer = target, timeout_s, observer
        self._backend: AsyncBackend
        if target == LOCAL:
            self._backend = _InThread(load_backend(LOCAL))
        elif isinstance(target, str | Sequence):
            options = http_options(addresses_of(target), api_key, retries, compression)
            self._backend = AsyncHttpBackend(options, transport=transport)
        else:
            self._backend = check_backend(target)

    async def solve(
        self,
        problem: QP | Form,
        *,
        options: Options = _DEFAULTS,
        upstream: Mapping[str, Tensor] | None = None,
        wrt: Collection[str] | None = None,
        gradients: Gradients = "full",
        failed_gradients: FailedGradients = "nan",
        keep_state: bool | None = None,
        warm_start: operations.WarmStarting | None = None,
        check: bool = True,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> SolveResult:
        """See `Client.solve`."""
        operations.check_problem(problem)
        steps = operations.solve(
            problem
            if isinstance(problem, Form)
            else operations.form_of(problem, self.registry.trusted(problem.parameters())),
            options=options,
            call=operations.call_within(self._timeout_s, timeout_s, request_id),
            upstream=upstream,
            wrt=wrt,
            gradients=gradients,
            failed_gradients=failed_gradients,
            keep_state=keep_state,
            warm_start=warm_start,
            check=check,
        )
        return await self._run(steps)

    async def vjp(
        self,
        at: Point,
        upstream: Mapping[str, Tensor],
        *,
        options: Options = _DEFAULTS,
        wrt: Collection[str] | None = None,
        gradients: Gradients = "full",
        failed_gradients: FailedGradients = "nan",
        check: bool = True,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> GradientResult:
        """See `Client.vjp`."""
        steps = operations.vjp_at(
            at,
            upstream,
            options=options,
            call=operations.call_within(self._timeout_s, timeout_s, request_id),
            wrt=wrt,
            gradients=gradients,
            failed_gradients=failed_gradients,
            check=check,
        )
        return await self._run(steps)

    async def jvp(
        self,
        at: Point,
        tangents: Mapping[str, Tensor],
        *,
        options: Options = _DEFAULTS,
        failed_gradients: FailedGradients = "nan",
        check: bool = True,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> TangentResult:
        """See `Client.jvp`."""
        steps = operations.jvp_at(
            at,
            tangents,
            options=options,
            call=operations.call_within(self._timeout_s, timeout_s, request_id),
            failed_gradients=failed_gradients,
            check=check,
        )
        return await self._run(steps)

    async def register(
        self, *, kind: Kind = "qp", timeout_s: float | None = None, **parameters: Tensor | None
    ) -> Registered:
        """See `Client.register`; copying and hashing take place on a thread."""
        handle = await asyncio.to_thread(handle_for, self, kind, parameters)
        return await self._run(register(handle, operations.call_within(self._timeout_s, timeout_s, None)))

    async def solvers(self) -> dict[str, Any]:
        """See `Client.solvers`."""
        return await self._backend.solvers()

    def release(self, result: Point) -> None:
        """See `Client.release`."""
        if result.state is not None:
            self._backend.release([result.state])

    async def close(self) -> None:
        """Close the connections."""
        await self._backend.close()

    async def _run(self, steps: Generator[Exchange, Reply, T]) -> T:
        return await drive_async(steps, self._perform, (StateGoneError,))

    async def _perform(self, exchange: Exchange) -> Reply:
        return await drive_async(self.registry.steps(exchange), self._exchange, FAILURES)

    async def _exchange(self, exchange: Exchange) -> Reply:
        began = time.perf_counter()
        reply: Reply = await getattr(self._backend, exchange.name)(exchange.request, exchange.tensors, exchange.call)
        if self._observer is not None:
            observe(self._observer, exchange, reply, time.perf_counter() - began)
        return reply

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"argrad.AsyncClient({self._target!r})"
