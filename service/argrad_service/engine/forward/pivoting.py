"""`pivoting`: exact active sets of strictly convex QPs, by compiled kernels on the CPU.

Form: dense QPs, Q positive definite. Method: the dual form (`systems`), then block principal pivoting where the rows
are no more than the variables, and the dual active set of Goldfarb and Idnani elsewhere and where pivoting
fails (`kernels.active_set`); a refined solve on the active set. Problems that neither decides, and those with a
singular Q or with weakly active or dependent rows, go to `pdipm` and carry the flag `fallback`. Warm start: not used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from argrad.problems import Status
from argrad_service.engine import compiled
from argrad_service.engine.data import Data
from argrad_service.engine.finish import Guess
from argrad_service.engine.forward import pdipm
from argrad_service.engine.kernels.active_set import INFEASIBLE, SOLVED
from argrad_service.engine.options import OwnOptions, SolverOptions, Stopped
from argrad_service.engine.point import CODE, Point

Options = OwnOptions


def solve(data: Data, options: SolverOptions, warm: Guess | None) -> Point:  # noqa: ARG001 - every solver's signature
    """Solve a batch of strictly convex QPs on the CPU.

    Args:
        data: The problems.
        options: Tolerance and who asks to stop; the kernels have their own limits on rounds and steps.
        warm: Not used.

    Raises:
        Stopped: options.should_stop() was true before the start. The kernels, once begun, are not interrupted.
    """
    if options.should_stop():
        raise Stopped
    solved = compiled.solve_batch(data)
    is_solved, is_infeasible = solved.code == SOLVED, solved.code == INFEASIBLE
    status = torch.where(is_infeasible, CODE[Status.INFEASIBLE], CODE[Status.OPTIMAL])
    is_fallback = ~(is_solved | is_infeasible)
    point = Point(
        active=solved.active,
        z=solved.z,
        y=solved.y,
        iterations=solved.steps,
        status=status,
        is_exact=is_solved,
        is_fallback=is_fallback,
    )
    if bool(is_solved.all()):
        point.finished = compiled.finish(data, solved)
        return point
    rest = torch.nonzero(is_fallback).squeeze(-1)
    if len(rest):
        _fall_back(data, rest, point, options)
    return point


def _fall_back(data: Data, rest: Tensor, point: Point, options: SolverOptions) -> None:
    """Let `pdipm` solve the problems named by rest."""
    other = pdipm.solve(data.select(rest), options, None)
    for name in ("active", "z", "y", "iterations", "status", "is_exact"):
        getattr(point, name)[rest] = getattr(other, name)
