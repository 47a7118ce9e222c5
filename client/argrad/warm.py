"""Warm starts: the last solution of a layer, where its next solve begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from argrad.handles import new_handle
from argrad.problems import Form
from argrad.results import Point, SolveResult


@dataclass(frozen=True, eq=False)
class _Last:
    """A solution, the sizes of its problem, and what keeps its state at the service alive."""

    point: Point
    sizes: tuple[Any, ...]
    state: object


class WarmStart:
    """Remembers a solution; a solve of the same sizes begins there, one of others begins anew.

    It changes how many iterations a solver takes, and not what it finds beyond its tolerance; where there are several
    solutions it may find another. Problem i of a batch begins at the last solution of problem i. Where the service
    keeps the state of the last solve, its token travels, else the solution. Solvers that cannot begin anywhere ignore
    it, and `auto` takes one that can. May be used from several threads, and then begins at whichever solve ended last.
    A copy, and a pickle, remember nothing.
    """

    def __init__(self) -> None:
        self.handle = new_handle(self)
        self._last: _Last | None = None

    def at(self, form: Form) -> Point | None:
        """Where a solve of this problem begins; None for the solver's own choice."""
        last = self._last
        return last.point if last is not None and last.sizes == _sizes(form) else None

    def keep(self, form: Form, result: SolveResult, state: object) -> None:
        """Remember a result.

        Args:
            form: The problem that was solved.
            result: Its solution; what is not finite in it counts as 0.
            state: Lets the state of the service go when it is dropped.
        """
        token = result.state if state is not None else None
        point = Point(problem=form, solution=result.solution, state=token, affinity=result.affinity)
        self._last = _Last(point, _sizes(form), state)

    def reset(self) -> None:
        """Forget: the next solve begins anew."""
        self._last = None

    def __copy__(self) -> WarmStart:
        return WarmStart()

    def __deepcopy__(self, memo: dict[int, Any]) -> WarmStart:
        return WarmStart()

    def __reduce__(self) -> tuple[Any, ...]:
        return WarmStart, ()

    def __repr__(self) -> str:
        return "argrad.WarmStart()"


def _sizes(form: Form) -> tuple[Any, ...]:
    q: Tensor = form.problem.q
    return type(form), form.batch_size, tuple(form.block_sizes.items()), q.dtype, q.device
