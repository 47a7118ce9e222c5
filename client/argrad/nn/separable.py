"""Large shares, one problem at a time, as sparse problems: a dense identity would be n² numbers."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from argrad.nn.layer import ProblemLayer
from argrad.problems.form import Blocks
from argrad.problems.sparse import SPARSE
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
    """
    fixed = _fixed(len(y), upper is not None, y.dtype, y.device)
    h = y.new_zeros(len(y)) if upper is None else torch.cat([upper, y.new_zeros(len(y))])
    given = fixed | {"q": -y, "h": h, "b": total}
    found = solve_parts(
        layer.client,
        {name: given[name] for name in SPARSE},
        options=layer.options,
        on_failure=layer.on_failure,
        gradients=layer.gradients,
        timeout_s=layer.timeout_s,
        request_id=None,
    )
    return found["z"]


@lru_cache(maxsize=16)
@torch.inference_mode(mode=False)
def _fixed(n: int, is_bounded: bool, dtype: torch.dtype, device: torch.device) -> Blocks:
    """Q = I, A = 1ᵀ and G = [I; −I], or −I, in CSR: the same at every call, and never changed."""
    i, ones = torch.arange(n, device=device), torch.ones(n, dtype=dtype, device=device)
    G = (torch.cat([i, i]), torch.cat([ones, -ones])) if is_bounded else (i, -ones)
    matrices = {"Q": (i, ones), "G": G, "A": (i, ones)}
    starts = {name: torch.arange(len(column) + 1, device=device) for name, (column, _) in matrices.items()}
    starts["A"] = torch.tensor([0, n], device=device)
    parts: Blocks = {}
    for name, (column, values) in matrices.items():
        parts |= {f"{name}_indptr": starts[name], f"{name}_indices": column, f"{name}_values": values}
    return parts
