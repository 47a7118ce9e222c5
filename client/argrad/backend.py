"""What a client needs of whoever solves: the service over HTTP, or the engine in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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
