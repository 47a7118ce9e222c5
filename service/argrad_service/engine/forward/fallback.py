"""What another solver leaves open goes to `pdipm`, flagged `fallback`."""

from __future__ import annotations

import torch
from torch import Tensor

from argrad_service.engine.data import Data
from argrad_service.engine.forward import pdipm
from argrad_service.engine.options import SolverOptions
from argrad_service.engine.point import Point


def fall_back(data: Data, rest: Tensor, point: Point, options: SolverOptions) -> None:
    """Let `pdipm` solve the problems named by rest.

    Args:
        data: All problems.
        rest: Places of those that are open.
        point: What was found for all; gets what `pdipm` finds for the rest, and says so.
        options: Tolerance, and who asks to stop.

    Raises:
        Stopped: options.should_stop() was true.
    """
    point.is_fallback = torch.zeros(data.B, dtype=torch.bool, device=rest.device)
    point.is_fallback[rest] = True
    if len(rest) == 0:
        return
    other = pdipm.solve(data.select(rest), options, None)
    for name in ("active", "z", "y", "iterations", "status", "is_exact"):
        getattr(point, name)[rest] = getattr(other, name)
