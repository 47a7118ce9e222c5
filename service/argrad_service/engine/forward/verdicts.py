"""Why a solver's point is not a solution: what an iterative solver says of the problems that it could not finish."""

from __future__ import annotations

import torch
from torch import Tensor

from argrad.problems import Status
from argrad_service.engine.data import Data, residuals
from argrad_service.engine.forward.certificates import find_certificates
from argrad_service.engine.forward.pdipm import solve_feasible
from argrad_service.engine.options import SolverOptions
from argrad_service.engine.point import CODE, Point


def classify(data: Data, point: Point, options: SolverOptions, *, otherwise: Tensor) -> None:
    """Write the status of every problem of the point that is neither `optimal` nor `nonconvex`.

    `optimal` where the point meets the tolerance, `infeasible` or `unbounded` where there is a certificate, and
    elsewhere what the solver says itself.

    Args:
        data: The problems.
        point: What was found; its status is written.
        options: Tolerance, and who asks to stop.
        otherwise: `(B,)`, codes of statuses.
    """
    is_open = (point.status != CODE[Status.OPTIMAL]) & (point.status != CODE[Status.NONCONVEX])
    point.z, point.y = torch.nan_to_num(point.z), torch.nan_to_num(point.y)
    is_good = residuals(data, point.z, point.y).scaled <= options.tolerance
    point.status = torch.where(is_open & is_good, CODE[Status.OPTIMAL], point.status)
    left = torch.nonzero(is_open & ~is_good).squeeze(-1)
    if len(left) == 0:
        return
    part = data.select(left)

    def project(projection: Data) -> Tensor:
        return solve_feasible(projection, SolverOptions(should_stop=options.should_stop))

    infeasible, unbounded = find_certificates(part, project, options.should_stop)
    code = torch.where(unbounded, CODE[Status.UNBOUNDED], otherwise[left])
    point.status[left] = torch.where(infeasible, CODE[Status.INFEASIBLE], code)
