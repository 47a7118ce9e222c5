"""The engine in this process, behind the same protocol as the service: `argrad.Client("local")`."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from argrad.backend import Call, Derived
from argrad.errors import DeadlineExceededError, ProblemError, ProblemGoneError, StateGoneError
from argrad.problems import Form, check_values
from argrad.wire.messages import (
    DifferentiationDocument,
    FailedGradients,
    JvpReply,
    JvpRequest,
    RegisteredReply,
    RegisterRequest,
    SolverDocument,
    SolveReply,
    SolveRequest,
    TensorMap,
    VjpReply,
    VjpRequest,
)
from argrad_service import assembly
from argrad_service import engine as default_engine
from argrad_service.admission import Limits
from argrad_service.engine.backward import kkt
from argrad_service.engine.options import ShouldStop, Stopped
from argrad_service.engine.outcome import Forward, Outcome
from argrad_service.operations import Operations
from argrad_service.registered import Registrations
from argrad_service.solves import jvp, vjp
from argrad_service.state import MemoryProblemStore, MemoryStateStore, ProblemGone, StateGone, TokenSigner
from argrad_service.working import Engine, Reply, Run, options_of

STATE_BUDGET_BYTES = 4 * 1024**3
STATE_TTL_S = 3600.0
PROBLEM_BUDGET_BYTES = 4 * 1024**3
PROBLEM_TTL_S = 3600.0
_OWNER = "local"
_DIRECT = ("auto", "kkt")
"""Methods that take one solve by a factor, and ask nobody whether to go on."""


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
        self._engine, self._device = engine, engine.default_device()
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
            device=self._device,
        )

    def solve_here(
        self, form: Form, solver: SolverDocument, differentiation: DifferentiationDocument, *, timeout_s: float | None
    ) -> SolvedHere:
        """Solve without messages; the outcome lives with what is returned, not in the store."""
        with torch.no_grad(), _until(timeout_s) as should_stop:
            outcome = self._engine.solve(
                form.problem,
                solver=solver.name,
                options=options_of(solver, should_stop),
                device=self._device,
                check=lambda: check_values(form.parameters),
            )
            return SolvedHere(self._engine, form, outcome, differentiation)

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


class SolvedHere:
    """A solve without messages, and its derivatives; see `argrad.backend.SolvedHere`.

    Args:
        engine: Differentiates.
        form: The problem in the caller's form.
        outcome: What the engine made of it.
        differentiation: By which method.
    """

    def __init__(self, engine: Engine, form: Form, outcome: Outcome, differentiation: DifferentiationDocument) -> None:
        self._engine, self._form, self._differentiation = engine, form, differentiation
        self._outcome = outcome
        self.solution, self.statuses = assembly.solution_blocks(form, outcome), outcome.status

    def adjoint(self, cotangents: Mapping[str, Tensor], *, failed: FailedGradients, timeout_s: float | None) -> Derived:
        """The adjoint of finite cotangents of the caller's blocks."""
        form = self._form
        with torch.no_grad(), self._until(timeout_s) as outcome:
            canonical = assembly.Cotangent(form, cotangents, is_finite=True).canonical(outcome)
            backward = vjp(self._engine, outcome, canonical, self._differentiation)
            blocks = assembly.adjoint_blocks(form, outcome, backward, failed)
        return Derived(blocks=blocks, statuses=backward.gradient_status, method=backward.method)

    def gradients(self, g_z: Tensor, wrt: Collection[str]) -> dict[str, Tensor] | None:
        """Gradients of batched parameters at once, from a cotangent of z alone; None where it takes an adjoint."""
        outcome, form = self._outcome, self._form
        if not isinstance(outcome, Forward) or form.row_map.size:
            return None
        if self._differentiation.method not in _DIRECT or self._differentiation.options:
            return None
        if form.problem.dtype != torch.float64 or g_z.dtype != torch.float64 or g_z.shape != outcome.solution.z.shape:
            return None
        with torch.no_grad():
            return kkt.gradients(outcome, g_z, wrt)

    def tangents(self, tangents: Mapping[str, Tensor], *, failed: FailedGradients, timeout_s: float | None) -> Derived:
        """Tangents of the caller's blocks, of tangents of the caller's parameters."""
        form = self._form
        with torch.no_grad(), self._until(timeout_s) as outcome:
            pushed = jvp(self._engine, outcome, form.tangents(tangents), self._differentiation)
            blocks = assembly.tangent_blocks(form, outcome, pushed, failed)
        return Derived(blocks=blocks, statuses=pushed.gradient_status, method=pushed.method)

    @contextlib.contextmanager
    def _until(self, timeout_s: float | None) -> Iterator[Outcome]:
        """The outcome, for methods that ask whether to go on."""
        if self._differentiation.method in _DIRECT:
            yield self._outcome
            return
        with _until(timeout_s) as should_stop:
            yield self._outcome.stopped_by(should_stop)


def _run(run: Run[Reply], call: Call) -> tuple[Reply, TensorMap]:
    with _until(call.timeout_s) as should_stop:
        return run(should_stop, {})


@contextlib.contextmanager
def _until(timeout_s: float | None) -> Iterator[ShouldStop]:
    """Whether a deadline has passed, for whoever iterates."""
    until = None if timeout_s is None else time.monotonic() + timeout_s
    try:
        yield lambda: until is not None and time.monotonic() >= until
    except Stopped:
        raise DeadlineExceededError(f"the solve was stopped after its {timeout_s} s") from None


@contextlib.contextmanager
def _gone() -> Iterator[None]:
    try:
        yield
    except StateGone as error:
        raise StateGoneError(str(error), status_code=409, type="state-gone") from None
    except ProblemGone as error:
        raise ProblemGoneError(str(error), status_code=409, type="problem-gone") from None
