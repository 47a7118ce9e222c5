"""What one replica leaves for the others, and takes over from them: states that tokens name, registered problems.

A record is a message as a caller would send it, in the binary form: of a state the vjp by problem and solution, without
its cotangents; of registered parameters their registration. It is read and checked as if a caller had sent it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterator

from argrad._version import __version__
from argrad.errors import ArgradError
from argrad.operations import kind_of
from argrad.problems import Flag, Status
from argrad.wire import SAFETENSORS, decode, encode
from argrad.wire.messages import (
    JvpRequest,
    Message,
    ProblemDocument,
    RegisterRequest,
    SolverDocument,
    SolveReply,
    SolveRequest,
    TensorMap,
    VjpRequest,
)
from argrad_service.admission import TooLarge
from argrad_service.kept import Kept
from argrad_service.operations import Operations
from argrad_service.registered import Registration, Registrations
from argrad_service.settings import Settings
from argrad_service.state import (
    MemoryShared,
    ProblemGone,
    ProblemStore,
    Replica,
    Seal,
    Shared,
    StateGone,
    StateStore,
    TokenSigner,
)

Missing = list[tuple[str, str]]
"""What a call names and is not here: `state` and a token, or `problem` and a digest."""

_EVERYWHERE = frozenset({"0.0.0.0", "::", ""})  # noqa: S104 - addresses that say nothing of where
_HEADER_BYTES = 2048
_CHEAP_BYTES = 16 * 1024
_SHARED_FLAGS = {Flag.FALLBACK.value}
"""What may be known of a solution that another replica shall differentiate at: nothing that its verdict rests on."""


class Sharing:
    """Shares states and registrations through a store that other replicas read.

    Args:
        shared: The store.
        store: This replica's states.
        problems: This replica's registered problems.
        operations: Takes over states.
        registrations: Takes over registrations.
        signer: Checks tokens before anybody is asked about them.
        max_state_bytes: States up to this size are shared.
        max_problem_bytes: Registrations likewise.
        in_thread: Runs what is too long for the event loop.
    """

    def __init__(
        self,
        *,
        shared: Shared,
        store: StateStore,
        problems: ProblemStore,
        operations: Operations,
        registrations: Registrations,
        signer: TokenSigner,
        max_state_bytes: int,
        max_problem_bytes: int,
        in_thread: Callable[[Callable[[], None]], Awaitable[None]],
    ) -> None:
        self._shared, self._store, self._problems = shared, store, problems
        self._operations, self._registrations, self._signer = operations, registrations, signer
        self._max_state_bytes, self._max_problem_bytes = max_state_bytes, max_problem_bytes
        self._in_thread = in_thread

    def missing(self, document: Message, owner: str) -> Missing:
        """What a call names that is not here and may be elsewhere; as a rule nothing, and found out at no cost."""
        missing = []
        token, problem = _named(document)
        if token is not None and self._store.peek(token, owner=owner) is None and self._is_ours(token, owner):
            missing.append(("state", token))
        if problem is not None and self._problems.peek(problem, owner=owner) is None:
            missing.append(("problem", problem))
        return missing

    async def bring(self, missing: Missing, owner: str) -> None:
        """Take over what a call names and others have; what nobody has is for the call itself to miss."""
        for space, name in missing:
            if space == "state":
                await self._bring_state(name, owner)
            else:
                await self._bring_problem(name, owner)

    async def _bring_state(self, token: str, owner: str) -> None:
        record = await self._shared.get("state", owner, token)
        if record is None:
            return
        with _unusable():
            request, tensors = decode(VjpRequest, bytearray(record), SAFETENSORS)
            await self.bring(self.missing(request, owner), owner)
            self._operations.recall(token, request, tensors, owner=owner)

    async def _bring_problem(self, name: str, owner: str) -> None:
        record = await self._shared.get("problem", owner, name)
        if record is None:
            return

        def register() -> None:
            request, tensors = decode(RegisterRequest, bytearray(record), SAFETENSORS)
            self._registrations.register(request, tensors, name=name, owner=owner)

        with _unusable():
            await self._in_thread(register)

    def publish(self, request: Message, reply: Message, owner: str) -> None:
        """Leave the state of a solve for others soon, if it is small and nothing but its solution matters."""
        if not isinstance(reply, SolveReply) or not isinstance(request, SolveRequest) or reply.state is None:
            return
        kept = self._store.peek(reply.state, owner=owner)
        if not isinstance(kept, Kept) or request.solver.options:
            return
        own = {name: t for name, t in kept.form.parameters.items() if name not in kept.known}
        tensors = (*own.values(), *kept.solution.blocks().values())
        nbytes = _HEADER_BYTES + sum(tensor.nbytes for tensor in tensors)
        if nbytes <= self._max_state_bytes and _is_plain(reply):
            solver = SolverDocument(tolerance=request.solver.tolerance, max_iterations=request.solver.max_iterations)
            # A tensor on a GPU is waited for, behind whatever else is queued there.
            is_cheap = nbytes <= _CHEAP_BYTES and all(tensor.device.type == "cpu" for tensor in tensors)
            self._shared.put_later(
                "state", owner, reply.state, lambda: _state_record(kept, own, solver), nbytes, is_cheap=is_cheap
            )

    async def publish_problem(self, name: str, owner: str) -> None:
        """Leave registered parameters for others, and return once they are there, or cannot be."""
        registration: Registration | None = self._problems.peek(name, owner=owner)
        if registration is None:
            return
        nbytes = _HEADER_BYTES + sum(tensor.nbytes for tensor in registration.tensors.values())
        if nbytes <= self._max_problem_bytes:
            parameters = {f"problem.{key}": tensor for key, tensor in registration.tensors.items()}
            request = RegisterRequest(problem=ProblemDocument(kind=registration.kind))
            await self._shared.put("problem", owner, name, _joined(request, parameters))

    def release(self, token: str, owner: str) -> None:
        """Forget a state soon."""
        if self._is_ours(token, owner):
            self._shared.delete_later("state", owner, token)

    async def delete_state(self, token: str, owner: str) -> bool:
        """Forget a state; whether it was there."""
        return self._is_ours(token, owner) and await self._shared.delete("state", owner, token)

    async def delete_problem(self, name: str, owner: str) -> bool:
        """Forget registered parameters; whether they were there. Replicas that use them keep theirs for a time."""
        return await self._shared.delete("problem", owner, name)

    def _is_ours(self, token: str, owner: str) -> bool:
        try:
            self._signer.check(token, owner)
        except StateGone:
            return False
        return True


def _named(document: Message) -> tuple[str | None, str | None]:
    """Token and digest that a call names."""
    if isinstance(document, SolveRequest):
        token = None if document.warm_start is None else document.warm_start.state
        return token, document.problem.registered
    if isinstance(document, VjpRequest | JvpRequest):
        return document.state, None if document.problem is None else document.problem.registered
    return None, None


@contextlib.contextmanager
def _unusable() -> Iterator[None]:
    """A record that cannot be used is no record: limits differ, versions differ, its problem is gone."""
    with contextlib.suppress(ArgradError, TooLarge, ProblemGone, StateGone):
        yield


def _is_plain(reply: SolveReply) -> bool:
    """Whether every problem has a solution and a gradient there that rests on nothing else."""
    statuses = [reply.status] if isinstance(reply.status, str) else reply.status
    flags = {flag for one in reply.report.flags for flag in ([one] if isinstance(one, str) else one)}
    return flags <= _SHARED_FLAGS and all(status == Status.OPTIMAL for status in statuses)


def _state_record(kept: Kept, own: TensorMap, solver: SolverDocument) -> bytes:
    solution = kept.form.solution(kept.solution)
    tensors = {f"problem.{name}": tensor for name, tensor in own.items()}
    tensors |= {f"solution.{name}": tensor for name, tensor in solution.items() if name != "s"}
    document = ProblemDocument(kind=kind_of(kept.form), registered=kept.registered)
    return _joined(VjpRequest(problem=document, solver=solver), tensors)


def _joined(message: Message, tensors: TensorMap) -> bytes:
    return b"".join(encode(message, tensors, SAFETENSORS))


def make_shared(settings: Settings, *, in_flight: Callable[[], int], clock: Callable[[], float]) -> Shared:
    """What the settings say: Redis, or this process alone.

    Args:
        settings: Of the service.
        in_flight: Calls in the house, for heartbeats.
        clock: Monotonic seconds.
    """
    identity, where = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}", str(settings.uds)
    if settings.uds is None:
        where = f"{socket.gethostname() if settings.host in _EVERYWHERE else settings.host}:{settings.port}"

    def replica() -> Replica:
        return Replica(id=identity, version=__version__, address=where, in_flight=in_flight())

    alone = MemoryShared(
        idempotency_ttl_s=settings.idempotency_ttl_s,
        idempotency_budget_bytes=int(settings.idempotency_budget_bytes),
        replica=replica,
        clock=clock,
    )
    if settings.redis_url is None:
        return alone
    # Its import takes longer than everything else of the state room together.
    from argrad_service.state.remote import RedisShared

    return RedisShared(
        settings.redis_url.get_secret_value(),
        prefix=settings.redis_prefix,
        timeout_s=settings.redis_timeout_s,
        ttl_s={"state": settings.state_ttl_s, "problem": settings.problem_ttl_s},
        largest={"state": int(settings.shared_state_bytes), "problem": int(settings.shared_problem_bytes)},
        idempotency_ttl_s=settings.idempotency_ttl_s,
        alone=alone,
        seal=Seal(settings.state_secret.get_secret_value()),
        replica=replica,
        clock=clock,
    )
