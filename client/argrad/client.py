"""`Client`: solve and differentiate through a service, or through the engine in this process."""

from __future__ import annotations

import collections
import contextlib
import os
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

import httpx
from pydantic import SecretStr
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
from argrad.backend import Backend, Call, DirectBackend, SolvedHere
from argrad.errors import ForkedError, StateGoneError
from argrad.futures import P, Threads
from argrad.handles import new_handle
from argrad.observation import Observer, observe
from argrad.operations import Exchange, Reply
from argrad.options import Options
from argrad.problems import QP, Form
from argrad.registered import FAILURES, Kind, Registered, Registering, Registry, handle_for, register
from argrad.results import GradientResult, Point, SolveResult, TangentResult
from argrad.transport.calls import Compression
from argrad.transport.exchange import drive
from argrad.transport.http import HttpBackend
from argrad.wire.messages import FailedGradients, Gradients

T = TypeVar("T")

_MAX_RELEASED = 4096
_DEFAULTS = Options()


class Client:
    """Solves optimisation problems and differentiates their solutions; may be used from any thread.

    A client of a service works after a fork, on connections of the child's own. A client pickles, API key included,
    because the workers that it is sent to need it: treat the pickle as the secret that it holds.

    Args:
        target: Address of a service (`http://host:port`, `https://…`, `http+unix:///path/of/socket`); addresses of its
            replicas, in a sequence or with commas between, of which each call takes one that answers; `local` for the
            engine in this process; or a backend of your own.
        api_key: Sent as `Authorization: Bearer`.
        timeout_s: Seconds that a call may take, retries included; None for no limit.
        retries: Further attempts after a connection error, a reply cut off, 429 or 503; by default as many as the
            deadline allows, unless nobody has ever answered: an address that is wrong fails after 20 s. With several
            addresses an attempt is one at each.
        transport: Sends HTTP requests in place of a pool of connections.
        observer: Called after each exchange, in the thread that made it.
        register: `explicit`: what `Client.register` and layers register is sent once. `auto`: so is every parameter of
            1 MiB or more that needs no gradient, from its second time on. For that it is hashed at each call; where
            its content is new four times in a row, at every sixteenth. `local` hashes nothing.
        prefetch: Let the derivative of a small problem come with its solution where autograd may ask for it, so that a
            training step is one exchange with the service. No other backend does so.
        compression: `zstd` compresses what is sent and received, from 16 KiB on, which pays on a slow line. Nothing
            travels to any other backend, and nothing is compressed.

    Raises:
        ProblemError: the address, the API key, the deadline, the number of retries, `register` or `compression` cannot
            be one.
        MissingExtraError: `local`, and the engine's packages are not installed; or what compresses is not.
    """

    def __init__(
        self,
        target: str | Sequence[str] | Backend,
        *,
        api_key: str | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        retries: int | None = None,
        transport: httpx.BaseTransport | None = None,
        observer: Observer | None = None,
        register: Registering = "auto",
        prefetch: bool = True,
        compression: Compression | None = None,
    ) -> None:
        operations.check_timeout(timeout_s)
        check_registering(register)
        check_compression(compression)
        self._settings = (
            tuple(target) if isinstance(target, Sequence) and not isinstance(target, str) else target,
            None if api_key is None else SecretStr(api_key),
            timeout_s,
            retries,
            transport,
            observer,
            register,
            prefetch,
            compression,
        )
        self.registry = Registry(is_automatic=register == "auto" and target != LOCAL)
        self.timeout_s, self._observer = timeout_s, observer
        self.handle = new_handle(self)
        self._threads = Threads()
        self._released: collections.deque[str] = collections.deque(maxlen=_MAX_RELEASED)
        self._pid = os.getpid()
        self._backend: Backend
        if target == LOCAL:
            self._backend = load_backend(LOCAL)
        elif isinstance(target, str | Sequence):
            options = http_options(addresses_of(target), api_key, retries, compression)
            self._backend = HttpBackend(options, transport=transport)
        else:
            self._backend = check_backend(target)
        self.fetches_ahead = prefetch and isinstance(self._backend, HttpBackend)
        self._direct: DirectBackend | None = None
        if target == LOCAL and observer is None and isinstance(self._backend, DirectBackend):
            self._direct = self._backend

    def solve(
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
        """Solve a batch of problems; with `upstream`, differentiate in the same call.

        Args:
            problem: A `QP`, or `argrad.problems.parse(kind, tensors)` for bounds and two-sided rows.
            options: Solver, tolerance, differentiation method.
            upstream: Cotangents ∂loss/∂block by block, `(B, ·)` or `(k, B, ·)`.
            wrt: Parameters whose gradients are wanted; all by default.
            gradients: `full`, or `adjoint` for `z nu mu`, from which gradients are outer products.
            failed_gradients: What stands where a problem has no gradient.
            keep_state: Whether the service keeps what a later vjp or jvp reuses; by default if there is no `upstream`.
            warm_start: A solution to begin with: blocks by name; an earlier result, whose state then stands for it; or
                `registered`, the last one that was solved so with the same registered parameters and sizes.
            check: Raise if a problem has no solution; False leaves it to `SolveResult.statuses`.
            timeout_s: Seconds for this call; by default the client's.
            request_id: Travels to the service's log; drawn at random by default.

        Raises:
            ProblemError: the problem, a cotangent or an option is wrong; nothing was sent, or nothing was solved.
            SolveError: a problem has no solution, and `check` is set.
        """
        operations.check_problem(problem)
        steps = operations.solve(
            problem
            if isinstance(problem, Form)
            else operations.form_of(problem, self.registry.trusted(problem.parameters())),
            options=options,
            call=operations.call_within(self.timeout_s, timeout_s, request_id),
            upstream=upstream,
            wrt=wrt,
            gradients=gradients,
            failed_gradients=failed_gradients,
            keep_state=keep_state,
            warm_start=warm_start,
            check=check,
        )
        return self.run(steps)

    def vjp(
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
        """Pull cotangents of a solution back to the parameters.

        Args:
            at: A `SolveResult`, or a `Point` that anyone solved for. A lost state costs one more exchange.
            upstream: See `solve`.
            options: See `solve`.
            wrt: See `solve`.
            gradients: See `solve`.
            failed_gradients: See `solve`.
            check: Raise if a problem has no gradient.
            timeout_s: See `solve`.
            request_id: See `solve`.

        Raises:
            ProblemError: a cotangent or a name is wrong.
            GradientError: a problem has no gradient, and `check` is set.
        """
        steps = operations.vjp_at(
            at,
            upstream,
            options=options,
            call=operations.call_within(self.timeout_s, timeout_s, request_id),
            wrt=wrt,
            gradients=gradients,
            failed_gradients=failed_gradients,
            check=check,
        )
        return self.run(steps)

    def jvp(
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
        """Push tangents of the parameters forward to the solution.

        Args:
            at: See `vjp`.
            tangents: Of some parameters by name, each shaped like its parameter; the others stand still.
            options: See `solve`.
            failed_gradients: See `solve`.
            check: Raise if a problem has no derivative.
            timeout_s: See `solve`.
            request_id: See `solve`.

        Raises:
            ProblemError: a tangent is wrong.
            GradientError: a problem has no derivative, and `check` is set.
        """
        steps = operations.jvp_at(
            at,
            tangents,
            options=options,
            call=operations.call_within(self.timeout_s, timeout_s, request_id),
            failed_gradients=failed_gradients,
            check=check,
        )
        return self.run(steps)

    def register(self, *, kind: Kind = "qp", timeout_s: float | None = None, **parameters: Tensor | None) -> Registered:
        """Send parameters once, for calls that pass the returned tensors on: `solve_qp(client, q=q, **registered)`.

        They are copied; later changes of the originals change nothing. The service keeps them for as long as they are
        used and there is room, and gets them again when they are gone.

        Args:
            kind: Of the problem that they are parameters of: `qp`, or `qp_two_sided`.
            timeout_s: See `solve`.
            parameters: Some or all parameters by name.

        Raises:
            ProblemError: a name, a shape, a dtype or a value cannot be right.
            PayloadTooLargeError: the service has no room for them.
        """
        handle = handle_for(self, kind, parameters)
        return self.run(register(handle, operations.call_within(self.timeout_s, timeout_s, None)))

    def solvers(self) -> dict[str, Any]:
        """Table of solvers and differentiation methods, with their options."""
        self._check_process()
        return self._backend.solvers()

    def submit(self, function: Callable[P, T], /, *arguments: P.args, **keywords: P.kwargs) -> Future[T]:
        """Call a function, such as a layer or `client.solve`, in a thread of this client; 32 run at a time.

        As `concurrent.futures.Executor.submit`, in the caller's grad mode and on its CUDA stream. Autograd takes the
        outputs together as if they had been computed one after the other, and its backward pass does not overlap calls
        of the CPU: it runs in the thread that asked for it, node by node. Micro-batches whose `backward()` is part of
        the function overlap; their sums in shared gradients are then formed in any order. Within such a call another
        one runs at once, in place.

        Args:
            function: Called with what follows.
            arguments: Of the function.
            keywords: Of the function.
        """
        self._check_process()
        return self._threads.submit(function, *arguments, **keywords)

    def map(self, function: Callable[..., T], *iterables: Iterable[Any]) -> Iterator[T]:
        """Submit a call for each element; their results in order.

        Args:
            function: See `submit`.
            iterables: Of its arguments, all of one length.
        """
        self._check_process()
        return self._threads.map(function, *iterables)

    def release(self, result: Point) -> None:
        """Let the service free a forward state early; rides on the next call."""
        if result.state is not None:
            self.let_go(result.state)

    def close(self) -> None:
        """Wait for calls that were submitted, drop those that have not begun, and close the connections."""
        self._threads.close()
        self._backend.close()

    def run(self, steps: Generator[Exchange, Reply, T]) -> T:
        """Carry out an operation of `argrad.operations`."""
        self._check_process()
        if self._released:
            self._backend.release(take_all(self._released))
        return drive(steps, self._perform, (StateGoneError,))

    def solves_here(self, parameters: Mapping[str, Tensor], options: Options) -> bool:
        """Whether a solve takes no exchange: `solve_here` does it in this process.

        Not so with a service, where an observer is told of exchanges, where results are rounded on their way, and where
        parameters are registered, whose factors are kept under their digest.
        """
        return self._direct is not None and options.precision == "float64" and not self.registry.trusted(parameters)

    def solve_here(self, form: Form, options: Options, call: Call) -> SolvedHere:
        """Solve in this process, for autograd, where `solves_here`.

        Args:
            form: The problem, its values not looked at yet.
            options: See `solve`.
            call: Its deadline.

        Raises:
            ProblemError: a value is not finite.
        """
        assert self._direct is not None  # noqa: S101 - as `solves_here` has said
        self._check_process()
        if self._released:
            self._backend.release(take_all(self._released))
        return self._direct.solve_here(
            form, options.solver_document, options.differentiation_document, timeout_s=call.timeout_s
        )

    def let_go(self, state: str) -> None:
        """Note a state that nobody needs any more. Does no I/O and takes no lock: finalisers call it."""
        self._released.append(state)

    def _perform(self, exchange: Exchange) -> Reply:
        return drive(self.registry.steps(exchange), self._exchange, FAILURES)

    def _exchange(self, exchange: Exchange) -> Reply:
        began = time.perf_counter()
        reply: Reply = getattr(self._backend, exchange.name)(exchange.request, exchange.tensors, exchange.call)
        if self._observer is not None:
            observe(self._observer, exchange, reply, time.perf_counter() - began)
        return reply

    def _check_process(self) -> None:
        if self._pid == os.getpid():
            return
        if self._settings[0] == LOCAL:
            raise ForkedError(
                "Client('local') was forked with its process, and the engine's threads were not: start workers with "
                "the 'spawn' start method (multiprocessing_context='spawn' for a DataLoader), or use a service"
            )
        self._pid = os.getpid()
        self._released = collections.deque(maxlen=_MAX_RELEASED)
        self._threads = Threads()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __copy__(self) -> Client:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Client:
        """Copies of a layer share its client, which belongs to no one of them."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, self._settings

    def __repr__(self) -> str:
        return f"argrad.Client({self._settings[0]!r})"


def _rebuild(
    target: str | Sequence[str] | Backend,
    api_key: SecretStr | None,
    timeout_s: float | None,
    retries: int | None,
    transport: httpx.BaseTransport | None,
    observer: Observer | None,
    register: Registering,
    prefetch: bool,
    compression: Compression | None,
) -> Client:
    return Client(
        target,
        api_key=None if api_key is None else api_key.get_secret_value(),
        timeout_s=timeout_s,
        retries=retries,
        transport=transport,
        observer=observer,
        register=register,
        prefetch=prefetch,
        compression=compression,
    )


def take_all(states: collections.deque[str]) -> list[str]:
    """Empty a deque that other threads append to."""
    taken: list[str] = []
    with contextlib.suppress(IndexError):
        while True:
            taken.append(states.popleft())
    return taken
