"""A solver's iteration as automatic differentiation sees it: what a module of `forward` gives `unrolled`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from argrad_service.engine.data import Data

State = tuple[Tensor, ...]
"""The iterate of a batch: floating tensors with leading dimension B."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Unrolling:
    """The iteration of a solver from its own starting point, made of operations that autograd sees through.

    The step takes the data anew, because their vectors q and d are what is differentiated; what depends on Q and C
    alone, and choices such as step lengths, are constants. Problems of a batch are independent of each other.

    Args:
        start: Where the solver begins without a warm start.
        step: One iteration.
        result: z `(B, n)` and y = [ν; λ] `(B, p + m)` of an iterate.
    """

    start: State
    step: Callable[[Data, State], State]
    result: Callable[[Data, State], tuple[Tensor, Tensor]]
