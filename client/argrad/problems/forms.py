"""The forms in which a caller may state a QP; `parse` reads one.

qp             ½zᵀQz + qᵀz   subject to   Az = b (ν),  Gz ≤ h (λ),  lb ≤ z ≤ ub (λ_lb, λ_ub ≥ 0, both optional)
               with `entropy` τ > 0:  ½zᵀQz + qᵀz + τ Σ zᵢ log zᵢ,  which implies z ≥ 0
qp_two_sided   ½xᵀPx + qᵀx   subject to   l ≤ Ax ≤ u (y: positive at the upper bound, negative at the lower)
sparse_qp      a single qp without bounds whose matrices are CSR triplets (see `sparse.py`)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from argrad.errors import ProblemError
from argrad.problems.bounded import BoundedQP
from argrad.problems.form import Form
from argrad.problems.qp import QP
from argrad.problems.rows import BOUNDED, TWO_SIDED, append_bounds, check_bounded, check_two_sided, split_rows
from argrad.problems.shapes import check_finite, check_positive
from argrad.problems.sparse import SparseForm
from argrad.problems.sparse_parsing import parse_sparse
from argrad.problems.two_sided import TwoSidedQP

__all__ = ["BoundedQP", "Form", "SparseForm", "TwoSidedQP", "parse"]

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
    dimensions = _DIMENSIONS[kind]
    for name in tensors:
        if name not in dimensions:
            raise ProblemError(f"problem.{name}", "an unknown parameter", f"one of {', '.join(dimensions)}")
    given = {name: tensors.get(name) for name in dimensions}
    form: type[Form]
    if kind == "qp":
        form, parameters = BoundedQP, check_bounded(given)
        canonical, row_map = append_bounds(parameters)
    else:
        form, parameters = TwoSidedQP, check_two_sided(given)
        canonical, row_map = split_rows(parameters)
    for name, tensor in parameters.items():
        if name not in trusted:
            _check_values(name, tensor)
    problem = QP.of_checked(canonical._asdict()) if row_map.size == 0 else QP(**canonical._asdict())
    return form(parameters=parameters, problem=problem, row_map=row_map)


def _check_values(name: str, tensor: Tensor) -> None:
    if name == "h":
        check_finite("problem.h", tensor, "finite numbers or +inf", allowing=float("inf"))
    elif name == "entropy":
        check_positive("problem.entropy", tensor)
    elif name not in _SIDES:
        check_finite(f"problem.{name}", tensor)
