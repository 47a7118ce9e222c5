"""The engine in this process, behind the same protocol as the service: `argrad.Client("local")`."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from argrad.backend import Call
from argrad.errors import DeadlineExceededError, ProblemError, ProblemGoneError, StateGoneError
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
from argrad_service import engine as default_engine
from argrad_service.admission import Limits
from argrad_service.engine.options import Stopped
from argrad_service.operations import Operations
from argrad_service.registered import Registrations
from argrad_service.state import MemoryProblemStore, MemoryStateStore, ProblemGone, StateGone, TokenSigner
from argrad_service.working import Engine, Reply, Run

STATE_BUDGET_BYTES = 4 * 1024**3
STATE_TTL_S = 3600.0
PROBLEM_BUDGET_BYTES = 4 * 1024**3
PROBLEM_TTL_S = 3600.0
_OWNER = "local"


def create_backend(engine: Engine = default_engine) -> LocalBackend:
    """Make a backend without HTTP, queue or limits; the caller's memory is the caller's own."""
    return LocalBackend(engine)


class LocalBackend:
    """Solves in the calling thread; every method may be called from any thread.

    Tensors are not copied on the way in: a state whose problem was edited in place since is `StateGoneError`.

    Args:
        engine: Solves and differentiates.
    """

    def __init__(self, engine: Engine) -> None:
        self._store = MemoryStateStore(
            budget_bytes=STATE_BUDGET_BYTES, ttl_s=STATE_TTL_S, signer=TokenSigner(secrets.token_urlsafe())
        )
        self._problems = MemoryProblemStore(budget_bytes=PROBLEM_BUDGET_BYTES, ttl_s=PROBLEM_TTL_S)
        self._registrations = Registrations(self._problems, Limits())
        self._operations = Operations(
            engine=engine,
            store=self._store,
            registrations=self._registrations,
            limits=Limits(),
            device=engine.default_device(),
        )

    def solve(self, request: SolveRequest, tensors: TensorMap, call: Call) -> tuple[SolveReply, TensorMap]:
        """POST /v1/solve."""
        with torch.no_grad(), _gone():
            return _run(self._operations.prepare_solve(request, tensors, owner=_OWNER), call)

    def vjp(self, request: VjpRequest, tensors: TensorMap, call: Call) -> tuple[VjpReply, TensorMap]:
        """POST /v1/vjp."""
        with torch.no_grad(), _gone():
            return _run(self._operations.prepare_vjp(request, tensors, owner=_OWNER), call)

    def jvp(self, request: JvpRequest, tensors: TensorMap, call: Call) -> tuple[JvpReply, TensorMap]:
        """POST /v1/jvp."""
        with torch.no_grad(), _gone():
            return _run(self._operations.prepare_jvp(request, tensors, owner=_OWNER), call)

    def register(
        self,
        request: RegisterRequest,
        tensors: TensorMap,
        call: Call,  # noqa: ARG002 - a backend's signature
    ) -> tuple[RegisteredReply, TensorMap]:
        """PUT /v1/problems/{sha256}; the tensors are not copied either, and must not be changed."""
        name = request.problem.registered
        if name is None:
            raise ProblemError("problem.registered", "nothing", "the digest of the parameters")
        self._problems.sweep()
        return self._registrations.register(request, tensors, name=name, owner=_OWNER)[0], {}

    def release(self, states: Sequence[str]) -> None:
        """Free forward states early."""
        for token in states:
            with contextlib.suppress(StateGone):
                self._operations.release(token, owner=_OWNER)

    def solvers(self) -> dict[str, Any]:
        """GET /v1/solvers."""
        return self._operations.solvers()

    def close(self) -> None:
        """Free every forward state and every registered problem."""
        self._store.clear()
        self._problems.clear()


def _run(run: Run[Reply], call: Call) -> tuple[Reply, TensorMap]:
    until = None if call.timeout_s is None else time.monotonic() + call.timeout_s
    timings: dict[str, float] = {}
    try:
        return run(lambda: until is not None and time.monotonic() >= until, timings)
    except Stopped:
        raise DeadlineExceededError(f"the solve was stopped after its {call.timeout_s} s") from None


@contextlib.contextmanager
def _gone() -> Iterator[None]:
    try:
        yield
    except StateGone as error:
        raise StateGoneError(str(error), status_code=409, type="state-gone") from None
    except ProblemGone as error:
        raise ProblemGoneError(str(error), status_code=409, type="problem-gone") from None
