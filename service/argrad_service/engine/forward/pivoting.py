"""`pivoting`: exact active sets of strictly convex QPs, by compiled kernels on the CPU, batched on a GPU.

Form: dense QPs, Q positive definite. Method: the dual form (`systems`), then block principal pivoting where the rows
are no more than the variables, and the dual active set of Goldfarb and Idnani elsewhere and where pivoting
fails (`kernels.active_set`); a refined solve on the active set. Problems that neither decides, and those with a
singular Q or with weakly active or dependent rows, go to `pdipm` and carry the flag `fallback`. On CUDA the pivoting
is batched torch (`masked_pivoting`), and problems with more rows than free variables go to `pdipm` at once. Warm
start: not used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from argrad.problems import Status
from argrad_service.engine.data import Data, residuals
from argrad_service.engine.finish import Guess
from argrad_service.engine.forward.fallback import fall_back
from argrad_service.engine.forward.masked_pivoting import solve_masked
from argrad_service.engine.options import OwnOptions, SolverOptions
from argrad_service.engine.point import CODE, NEAR, Point

if TYPE_CHECKING:
    from argrad_service.engine import compiled

Options = OwnOptions


def solve(data: Data, options: SolverOptions, warm: Guess | None) -> Point:  # noqa: ARG001 - every solver's signature
    """Solve a batch of strictly convex QPs.

    Args:
        data: The problems.
        options: Tolerance and who asks to stop, between pieces of the batch; the kernels have their own limits on
            rounds and steps.
        warm: Not used.

    Raises:
        Stopped: options.should_stop() was true.
    """
    if data.q.device.type == "cpu":
        return solve_compiled(data, options)
    point, rest = solve_masked(data, options)
    fall_back(data, rest, point, options)
    return point


def take_over(data: Data, guess: Guess, options: SolverOptions) -> Point | None:
    """The point of a caller's solutions, found anew: kernels that solve are quicker than what confirms an active set.

    Args:
        data: The problems, on the CPU.
        guess: The caller's points.
        options: Who asks to stop.

    Returns:
        The exact solutions; None where a point is not near its problem's, or the kernels leave a problem undecided.

    Raises:
        Stopped: options.should_stop() was true.
    """
    from argrad_service.engine import compiled

    if not bool((residuals(data, guess.z, guess.y).scaled <= NEAR).all()):
        return None
    solved = compiled.solve_batch(data, options.should_stop)
    return _whole(data, solved, torch.zeros_like(solved.steps)) if solved.is_whole else None


def _whole(data: Data, solved: compiled.Solved, iterations: Tensor) -> Point:
    """The point of a batch whose every problem the kernels solved."""
    from argrad_service.engine import compiled

    return Point(
        active=solved.active,
        z=solved.z,
        y=solved.y,
        iterations=iterations,
        status=torch.full_like(solved.code, CODE[Status.OPTIMAL]),
        is_exact=torch.ones_like(solved.code, dtype=torch.bool),
        finished=compiled.finish(data, solved),
    )


def solve_compiled(data: Data, options: SolverOptions, check: Callable[[], None] = lambda: None) -> Point:
    """Solve on the CPU.

    Args:
        data: The problems.
        options: See `solve`.
        check: Called unless every problem is solved, which says that its values are finite; raises if they are not.
    """
    # Imported when first needed: compiled kernels take a second to load, and a GPU needs none.
    from argrad_service.engine import compiled
    from argrad_service.engine.kernels.active_set import INFEASIBLE, SOLVED

    solved = compiled.solve_batch(data, options.should_stop)
    if solved.is_whole:
        return _whole(data, solved, solved.steps)
    check()
    is_solved, is_infeasible = solved.code == SOLVED, solved.code == INFEASIBLE
    point = Point(
        active=solved.active,
        z=solved.z,
        y=solved.y,
        iterations=solved.steps,
        status=torch.where(is_infeasible, CODE[Status.INFEASIBLE], CODE[Status.OPTIMAL]),
        is_exact=is_solved,
    )
    rest = torch.nonzero(~(is_solved | is_infeasible)).squeeze(-1)
    fall_back(data, rest, point, options)
    return point
