"""What a solver can say of one problem of a batch."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """Verdict on one problem; its gradient exists only if it is `optimal`."""

    OPTIMAL = "optimal"
    INFEASIBLE = "infeasible"
    UNBOUNDED = "unbounded"
    NONCONVEX = "nonconvex"
    MAX_ITERATIONS = "max_iterations"
    NUMERICAL_ERROR = "numerical_error"
    NO_INTERIOR = "no_interior"

    @property
    def sentence(self) -> str:
        """What the verdict means and what to do about it."""
        return _SENTENCES[self]


class Flag(StrEnum):
    """What else is to be known of one problem's solution or gradient."""

    DEGENERATE = "degenerate"
    DEPENDENT = "dependent"
    NONUNIQUE = "nonunique"
    REGULARISED = "regularised"
    FALLBACK = "fallback"
    SMOOTHED = "smoothed"
    TRUNCATED = "truncated"

    @property
    def sentence(self) -> str:
        """What the flag means for the solution and its gradient."""
        return _SENTENCES[self]


_SENTENCES: dict[StrEnum, str] = {
    Status.OPTIMAL: "The scaled KKT residuals are below the tolerance.",
    Status.INFEASIBLE: "No point satisfies the constraints: a certificate (ν, λ ≥ 0 with Aᵀν + Gᵀλ = 0 and "
    "bᵀν + hᵀλ < 0) was found.",
    Status.UNBOUNDED: "The objective falls without limit along a direction d with Qd = 0, Ad = 0, Gd ≤ 0, qᵀd < 0.",
    Status.NONCONVEX: "The symmetric part of Q has a negative eigenvalue; a QP must be convex.",
    Status.MAX_ITERATIONS: "The iteration limit came first: raise max_iterations or loosen tolerance.",
    Status.NUMERICAL_ERROR: "The residuals stopped falling above the tolerance: scale the problem, or loosen "
    "tolerance.",
    Status.NO_INTERIOR: "The problem may have a solution, but no point satisfies its inequalities strictly, and the "
    "barrier method needs one: take another solver.",
    Flag.DEGENERATE: "Some active rows have a zero multiplier: the gradient is one element of the Clarke "
    "subdifferential (those rows are dropped).",
    Flag.DEPENDENT: "Active rows are linearly dependent: z and the gradient are exact in d_z and Aᵀd_ν + Gᵀμ; the "
    "multipliers are not unique, and cotangents on them are refused.",
    Flag.NONUNIQUE: "The primal solution is not unique: the objective is exact, the gradient is refused.",
    Flag.FALLBACK: "The solver of the report could not decide this problem; `pdipm` solved it.",
    Flag.SMOOTHED: "The gradient is that of a smoothed problem, not of the problem itself: see smoothing_distance.",
    Flag.TRUNCATED: "A truncation ended the iterations: the solution's residuals are above the tolerance, or its "
    "gradient misses the KKT system by more than 1e-6.",
    Flag.REGULARISED: "The point was accepted from a regularised system, with its residual checked.",
}
