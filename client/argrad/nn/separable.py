"""Large shares, one problem at a time, as sparse problems: a dense identity would be n² numbers."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from argrad.errors import ProblemError
from argrad.nn.layer import ProblemLayer
from argrad.problems.form import Blocks
from argrad.problems.shapes import shape_of
from argrad.problems.sparse import Constants
from argrad.problems.sparse_parsing import constants_of
from argrad.sparse import solve_parts

LARGE = 256
"""Variables from which a problem without a batch travels as a sparse one. It is solved by a search over breakpoints."""


def share(layer: ProblemLayer, y: Tensor, total: Tensor, upper: Tensor | None) -> Tensor:
    """Argmin ½‖x − y‖² subject to 1ᵀx = total, 0 ≤ x ≤ upper.

    Args:
        layer: Who solves, and how.
        y: `(n,)`.
        total: `(1,)`.
        upper: `(n,)`, or None for no bound.

    Raises:
        ProblemError: `upper` has not the shape of y.
    """
    if upper is not None and upper.shape != y.shape:
        raise ProblemError("problem.ub", f"shape {shape_of(upper)}", f"{shape_of(y)}, as problem.q has")
    n, zeros = y.shape[0], _zeros(y.shape[0], y.dtype, y.device)
    found = solve_parts(
        layer.client,
        {"q": -y, "h": zeros if upper is None else torch.cat([upper, zeros]), "b": total},
        constants=_constants(n, upper is not None, y.dtype, y.device),
        options=layer.options,
        on_failure=layer.on_failure,
        gradients=layer.gradients,
        timeout_s=layer.timeout_s,
        request_id=None,
    )
    return found["z"]


@lru_cache(maxsize=16)
@torch.inference_mode(mode=False)
def _zeros(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(n, dtype=dtype, device=device)


@lru_cache(maxsize=16)
@torch.inference_mode(mode=False)
def _constants(n: int, is_bounded: bool, dtype: torch.dtype, device: torch.device) -> Constants:
    """Q = I, A = 1ᵀ and G = [I; −I], or −I, in CSR: the same at every call, and never changed."""
    i, ones = torch.arange(n, device=device), torch.ones(n, dtype=dtype, device=device)
    G = (torch.cat([i, i]), torch.cat([ones, -ones])) if is_bounded else (i, -ones)
    matrices = {"Q": (i, ones), "G": G, "A": (i, ones)}
    starts = {name: torch.arange(len(column) + 1, device=device) for name, (column, _) in matrices.items()}
    starts["A"] = torch.tensor([0, n], device=device)
    parts: Blocks = {"q": ones, "h": G[1], "b": ones[:1]}
    for name, (column, values) in matrices.items():
        parts |= {f"{name}_indptr": starts[name], f"{name}_indices": column, f"{name}_values": values}
    return constants_of(parts)
