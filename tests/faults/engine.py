"""An engine that fails where it is told to, and proves that it did."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from argrad.problems import QP
from argrad_service import engine
from argrad_service.engine.outcome import Forward

MARK = 6.02214076e23
"""Where `q` begins with it, the problem is the poison of a batch; engines that are well solve it as any other."""

SOON_S = 20.0


class FaultyEngine:
    """The real engine; before each solve it asks `fault`, which may raise, or may hand back another problem.

    Args:
        fault: Called with the stacked problem.
    """

    def __init__(self, fault: Callable[[QP], QP | None] = lambda _: None) -> None:
        self.fault = fault
        self.batches: list[int] = []
        self._gate = threading.Event()
        self._gate.set()
        self.entered = threading.Event()

    def hold(self) -> None:
        """Let the next solve wait until `free`, so that calls accumulate behind it."""
        self.entered.clear()
        self._gate.clear()

    def free(self) -> None:
        """Let it go on."""
        self._gate.set()

    def solve(self, problem: QP, **more: Any) -> Forward:
        self.entered.set()
        assert self._gate.wait(SOON_S)
        self.batches.append(problem.batch_size or 1)
        return engine.solve(self.fault(problem) or problem, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(engine, name)


def has_mark(problem: QP) -> bool:
    """Whether the poison is in a batch."""
    return bool((problem.q == MARK).any())


def poisoned(problem: QP, value: float) -> QP:
    """The batch, in which the poison has that number everywhere in its q."""
    q = torch.where((problem.q == MARK).any(-1, keepdim=True), torch.full_like(problem.q, value), problem.q)
    return QP.of_checked(problem.parameters() | {"q": q})
