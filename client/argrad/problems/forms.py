"""The forms in which a caller may state a QP; `parse` reads one.

qp             ½zᵀQz + qᵀz   subject to   Az = b (ν),  Gz ≤ h (λ),  lb ≤ z ≤ ub (λ_lb, λ_ub ≥ 0, both optional)
               with `entropy` τ > 0:  ½zᵀQz + qᵀz + τ Σ zᵢ log zᵢ,  which implies z ≥ 0
qp_two_sided   ½xᵀPx + qᵀx   subject to   l ≤ Ax ≤ u (y: positive at the upper bound, negative at the lower)
sparse_qp      a single qp without bounds whose matrices are CSR triplets (see `sparse.py`)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from argrad.errors import ProblemError
from argrad.problems.bounded import BoundedQP
from argrad.problems.form import Form
from argrad.problems.qp import QP
from argrad.problems.rows import BOUNDED, TWO_SIDED, RowMap, append_bounds, check_bounded, check_two_sided, split_rows
from argrad.problems.shapes import Dimensions, check_finite, check_positive
from argrad.problems.sparse import SparseForm
from argrad.problems.sparse_parsing import parse_sparse
from argrad.problems.two_sided import TwoSidedQP

__all__ = ["BoundedQP", "Form", "SparseForm", "TwoSidedQP", "check_values", "parse"]

_DIMENSIONS = {"qp": BOUNDED, "qp_two_sided": TWO_SIDED}
_SIDES = {"lb", "ub", "l", "u"}


def parse(kind: str, tensors: Mapping[str, Tensor], *, trusted: Collection[str] = ()) -> Form:
    """Check a problem, values included, and bring it into the canonical form.

    Args:
        kind: `qp` with Q q G h A b lb ub entropy, `qp_two_sided` with P q A l u, or `sparse_qp`.
        tensors: Parameters by name, of which only q must be there; without Q (P) it is a linear program.
        trusted: Those whose values were checked before, and are not looked at again but for the order of bounds.

    Returns:
        The problem in the caller's form, with its canonical QP.

    Raises:
        ProblemError: the kind or a name is unknown, or a shape, dtype, device or value does not fit.
    """
    if kind == "sparse_qp":
        return parse_sparse(tensors)
    if kind not in _DIMENSIONS:
        raise ProblemError("problem.kind", repr(kind), f"one of {', '.join(_DIMENSIONS)}, sparse_qp")
    if kind == "qp" and (shapes := _shapes_without_bounds(tensors)) is not None:
        names, row_map = _fitting(*shapes)
        parameters = {name: tensors[name] for name in names}
        check_values(parameters, trusted)
        return BoundedQP(parameters=parameters, problem=QP.of_checked(parameters), row_map=row_map)
    dimensions = _DIMENSIONS[kind]
    given = _named(tensors, dimensions)
    form: type[Form]
    if kind == "qp":
        form, parameters = BoundedQP, check_bounded(given)
        canonical, row_map = append_bounds(parameters)
    else:
        form, parameters = TwoSidedQP, check_two_sided(given)
        canonical, row_map = split_rows(parameters)
    check_values(parameters, trusted)
    problem = QP.of_checked(canonical._asdict()) if row_map.size == 0 else QP(**canonical._asdict())
    return form(parameters=parameters, problem=problem, row_map=row_map)


def _named(tensors: Mapping[str, Tensor], dimensions: Dimensions) -> dict[str, Tensor | None]:
    """The parameters in order, None for those that are not given.

    Raises:
        ProblemError: a name is unknown.
    """
    for name in tensors:
        if name not in dimensions:
            raise ProblemError(f"problem.{name}", "an unknown parameter", f"one of {', '.join(dimensions)}")
    return {name: tensors.get(name) for name in dimensions}


_Shapes = tuple[tuple[str, torch.Size, torch.dtype], ...]


def _shapes_without_bounds(tensors: Mapping[str, Tensor]) -> tuple[_Shapes, torch.device] | None:
    """All that the rules of shapes ask of dense parameters on one device; None where there is more to look at."""
    q = tensors.get("q")
    if not isinstance(q, Tensor) or "lb" in tensors or "ub" in tensors:
        return None
    device, found = q.device, []
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device != device:
            return None
        found.append((name, tensor.shape, tensor.dtype))
    return tuple(found), device


@lru_cache(maxsize=256)
def _fitting(shapes: _Shapes, device: torch.device) -> tuple[tuple[str, ...], RowMap]:
    """The parameters that count, in order, and where their rows are: a training loop asks for the same at each step.

    Raises:
        ProblemError: see `parse`.
    """
    like = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape, dtype in shapes}
    parameters = check_bounded(_named(like, BOUNDED))
    own_m, own_p = (parameters[name].shape[-1] if name in parameters else 0 for name in ("h", "b"))
    none = torch.empty(0, dtype=torch.int64, device=device)
    return tuple(parameters), RowMap(size=0, own_m=own_m, own_p=own_p, lower=none, upper=none, equal=none)


def check_values(parameters: Mapping[str, Tensor], trusted: Collection[str] = ()) -> None:
    """Refuse values that no parameter of its name may have, but for those of bounds, which `parse` looks at always.

    Args:
        parameters: Dense ones by name.
        trusted: Those that are not looked at.

    Raises:
        ProblemError: names the first parameter with such a value, and where.
    """
    for name, tensor in parameters.items():
        if name not in trusted:
            _check_values(name, tensor)


def _check_values(name: str, tensor: Tensor) -> None:
    if name == "h":
        check_finite("problem.h", tensor, "finite numbers or +inf", allowing=float("inf"))
    elif name == "entropy":
        check_positive("problem.entropy", tensor)
    elif name not in _SIDES:
        check_finite(f"problem.{name}", tensor)
