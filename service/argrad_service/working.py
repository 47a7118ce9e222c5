"""What the operations need of an engine, and what they hand to whoever runs them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from argrad.problems import QP, Solution
from argrad.wire.messages import Message, SolverDocument, TensorMap
from argrad_service.admission import TooLarge
from argrad_service.engine import Prepared
from argrad_service.engine.options import ShouldStop, SolverOptions
from argrad_service.engine.outcome import Backward, Outcome, Tangents

Timings = dict[str, float]
Reply = TypeVar("Reply", bound=Message)
Run = Callable[[ShouldStop, Timings], tuple[Reply, TensorMap]]
"""The second half: solves. It asks the first argument whether to go on, and adds its stages to the second, in ms."""


class Engine(Protocol):
    """What the operations need of an engine; the module `argrad_service.engine` has it."""

    def solve(
        self,
        problem: QP,
        *,
        solver: str = ...,
        options: SolverOptions | None = ...,
        warm_start: Solution | None = ...,
        device: torch.device | None = ...,
        prepared: Prepared | None = ...,
        check: Callable[[], None] | None = ...,
    ) -> Outcome:
        """Solve a batch."""
        ...

    def at_point(
        self,
        problem: QP,
        solution: Solution,
        *,
        options: SolverOptions | None = ...,
        device: torch.device | None = ...,
        prepared: Prepared | None = ...,
    ) -> Outcome:
        """Take over a point that someone else computed."""
        ...

    def vjp(
        self,
        forward: Outcome,
        upstream: Mapping[str, Tensor],
        *,
        method: str = ...,
        options: Mapping[str, Any] | None = ...,
    ) -> Backward:
        """Form the adjoint."""
        ...

    def jvp(
        self,
        forward: Outcome,
        tangents: Mapping[str, Tensor],
        *,
        method: str = ...,
        options: Mapping[str, Any] | None = ...,
    ) -> Tangents:
        """Push tangents forward."""
        ...

    def solvers(self) -> list[dict[str, Any]]:
        """Table of what can be solved and differentiated how."""
        ...

    def default_device(self) -> torch.device:
        """A GPU where there is one."""
        ...


class OutOfMemory(TooLarge):
    """The memory that there is does not suffice for this work; for less of it, it may."""


def options_of(solver: SolverDocument, should_stop: ShouldStop) -> SolverOptions:
    """What a document asks of a solver."""
    return SolverOptions(
        tolerance=solver.tolerance,
        max_iterations=solver.max_iterations,
        should_stop=should_stop,
        own=solver.options,
    )


@contextmanager
def stage(timings: Timings, name: str) -> Iterator[None]:
    """Time a stage; memory that runs out is the call's size, not a defect."""
    began = time.perf_counter()
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what torch keeps for the next call is in the way of the next attempt
        raise OutOfMemory("memory of the device", "less than this call needs", "fewer or smaller problems") from None
    timings[name] = timings.get(name, 0.0) + 1e3 * (time.perf_counter() - began)
