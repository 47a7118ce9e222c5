"""What a client needs of whoever solves: the service over HTTP, or the engine in this process."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from argrad.problems import Form, Status
from argrad.problems.form import Blocks
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

ENTRY_POINT_GROUP = "argrad.backends"
"""Entry points of this group are callables without arguments that return a Backend; `local` is the engine."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """What surrounds one call.

    Args:
        timeout_s: Seconds that the whole call may take, retries included; None for no limit.
        request_id: Travels to the service's log and back.
        affinity: Key by which a proxy sends a solve and its vjp to the same replica.
    """

    timeout_s: float | None = None
    request_id: str | None = None
    affinity: str | None = None


class Backend(Protocol):
    """Solves and differentiates; every method may raise any `argrad.ArgradError`."""

    def solve(self, request: SolveRequest, tensors: TensorMap, call: Call) -> tuple[SolveReply, TensorMap]:
        """POST /v1/solve."""
        ...

    def vjp(self, request: VjpRequest, tensors: TensorMap, call: Call) -> tuple[VjpReply, TensorMap]:
        """POST /v1/vjp."""
        ...

    def jvp(self, request: JvpRequest, tensors: TensorMap, call: Call) -> tuple[JvpReply, TensorMap]:
        """POST /v1/jvp."""
        ...

    def register(self, request: RegisterRequest, tensors: TensorMap, call: Call) -> tuple[RegisteredReply, TensorMap]:
        """PUT /v1/problems/{sha256}; the digest is `request.problem.registered`."""
        ...

    def release(self, states: Sequence[str]) -> None:
        """Free forward states early, at the backend's convenience; does no I/O and never raises."""
        ...

    def solvers(self) -> dict[str, Any]:
        """GET /v1/solvers: the table of solvers, methods and their options."""
        ...

    def close(self) -> None:
        """Release what the backend holds; a closed backend is not used again."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Derived:
    """A derivative of a solve in this process.

    Args:
        blocks: Of the adjoint, or tangents of the solution, by the caller's names; `(B, ·)` or `(k, B, ·)`, without B
            where nothing is batched.
        statuses: Of each problem `ok`, or why it has no derivative.
        method: Differentiation method that formed it.
    """

    blocks: Blocks
    statuses: Sequence[str]
    method: str


class SolvedHere(Protocol):
    """A solve in this process: what it found, and its derivatives. It lives as long as whoever holds it."""

    @property
    def solution(self) -> Blocks:
        """Blocks of the solution by the caller's names."""
        ...

    @property
    def statuses(self) -> Sequence[Status]:
        """Verdict on each problem."""
        ...

    def adjoint(self, cotangents: Mapping[str, Tensor], *, failed: FailedGradients, timeout_s: float | None) -> Derived:
        """The adjoint of cotangents of the caller's blocks."""
        ...

    def gradients(self, g_z: Tensor, wrt: Collection[str]) -> dict[str, Tensor] | None:
        """Gradients of the caller's parameters at once, from a cotangent of z whose values nobody has looked at.

        None where the backend has no shortcut to them, or where one does not exist: `adjoint` says what is the matter.
        """
        ...

    def tangents(self, tangents: Mapping[str, Tensor], *, failed: FailedGradients, timeout_s: float | None) -> Derived:
        """Tangents of the solution, of tangents of the caller's parameters."""
        ...


@runtime_checkable
class DirectBackend(Protocol):
    """A backend in this process, which solves without messages too: they take longer than a small problem."""

    def solve_here(
        self, form: Form, solver: SolverDocument, differentiation: DifferentiationDocument, *, timeout_s: float | None
    ) -> SolvedHere:
        """Solve a problem whose values nobody has looked at; the derivatives are by the method that the document names.

        Raises:
            ProblemError: a value is not finite.
        """
        ...
