"""Typed problems, their shape rules, and how an adjoint becomes parameter gradients."""

from argrad.problems.forms import Form, check_values, parse
from argrad.problems.qp import PARAMETERS, PRIMAL_DUAL, QP, Adjoint, Solution, gradients
from argrad.problems.rows import Canonical, RowMap, with_bounds, with_two_sided
from argrad.problems.shapes import check_finite, check_names
from argrad.problems.status import Flag, Status

__all__ = [
    "PARAMETERS",
    "PRIMAL_DUAL",
    "QP",
    "Adjoint",
    "Canonical",
    "Flag",
    "Form",
    "RowMap",
    "Solution",
    "Status",
    "check_finite",
    "check_names",
    "check_values",
    "gradients",
    "parse",
    "with_bounds",
    "with_two_sided",
]
