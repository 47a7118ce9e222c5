r"""`folded`: fixed-point folding of ADMM or of projected gradient.

    v = Φᵀv + (∂X, ∂Y/∂w)ᵀg    at the fixed point of one step w⁺ = U(w, θ), then the adjoint from v in one product

The step is that of the chosen map, whatever solver found the point (`forward.fixed_points`). Its vector-Jacobian
products are written out, not taken by automatic differentiation. Linear fixed-point iteration is what unrolling the
map at its fixed point would do; GMRES and BiCGSTAB solve the same system in fewer products.

Reference: Kotary, Dinh & Fioretto, Backpropagation of Unrolled Solvers with Folded Optimization, IJCAI 2023, theorem 1,
section 5; `pgd` is f-PGDa with the projection differentiated by its KKT system. Deviation: cotangents on multipliers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from argrad.errors import ProblemError
from argrad_service.engine.backward.adjoints import conclude_adjoint, read_cotangents
from argrad_service.engine.backward.inexact import adjoint_residual, missed
from argrad_service.engine.backward.linear import SOLVERS
from argrad_service.engine.forward.fixed_points import FixedPointMap, admm_map, pgd_map, spectral_radius
from argrad_service.engine.options import OwnOptions
from argrad_service.engine.outcome import Backward, Forward

NAME = "folded"

ACCURATE = 1e-8
"""Where the system is solved to its tolerance but the adjoint misses the KKT system by more than this, it is corrected
once, by the adjoint of what it misses; if that does not help, the map is too badly conditioned to be trusted."""


class Options(OwnOptions):
    """Options of `folded`."""

    map: Literal["admm", "pgd"] = "admm"
    """The step that is folded: ADMM's, or projected gradient's."""

    linear: Literal["lfpi", "gmres", "bicgstab"] = "gmres"
    """How v = Φᵀv + s is solved: linear fixed-point iteration, GMRES or BiCGSTAB."""

    tolerance: float = Field(default=1e-11, ge=1e-14, le=1e-7)
    """Residual of that system at which it is solved, relative to s."""

    max_iterations: int = Field(default=1000, ge=1, le=1_000_000)
    """Iterations of the linear solver; a problem that needs more has no gradient (`inaccurate`)."""

    rho: float | None = Field(default=None, ge=1e-8, le=1e8)
    """Penalty ρ of every row in ADMM's step, in the problem's own units; null: large on active rows, none on others."""

    power_iterations: int = Field(default=20, ge=2, le=10_000)
    """Products with Φᵀ from which ρ(Φ) is estimated."""


def vjp(forward: Forward, upstream: Mapping[str, Tensor], options: Options) -> Backward:
    """Pull cotangents of the solution back to an adjoint.

    Args:
        forward: Outcome of any solver.
        upstream: Cotangents of `z`, `nu`, `lam`, `s`, each `(B, ·)` or `(k, B, ·)` with one k; absent means zero.
        options: Map, linear solver and its limits.

    Returns:
        Adjoint, with the measures `spectral_radius`, an estimate of ρ(Φ), `linear_iterations`, and
        `adjoint_residual`, by how much the adjoint misses the KKT system. NaN in rows without a gradient.

    Raises:
        Stopped: the solve's `should_stop()` was true.
    """
    given = read_cotangents(forward.data, upstream)
    g_z, g_y = given.g_z.transpose(0, 1), given.g_y.transpose(0, 1)
    if options.map == "pgd" and forward.data.tau is not None:
        raise ProblemError("differentiation.options.map", "'pgd' for a problem with entropy", "'admm'")
    of: FixedPointMap = pgd_map(forward) if options.map == "pgd" else admm_map(forward, rho=options.rho)
    d_z, d_y, is_converged, iterations = _solve(of, g_z, g_y, forward, options)
    residual = adjoint_residual(forward, given, d_z, d_y)
    limit = max(ACCURATE, options.tolerance)
    misses = is_converged & (residual > limit)
    if bool(misses.any()):
        off_z, off_y = (block.transpose(0, 1) for block in missed(forward, given, d_z, d_y))
        more_z, more_y, _, more = _solve(of, off_z, off_y, forward, options)
        better_z, better_y = d_z + more_z, d_y + more_y
        refined = adjoint_residual(forward, given, better_z, better_y)
        takes = (misses & (refined < residual)).unsqueeze(-1)
        d_z, d_y = torch.where(takes, better_z, d_z), torch.where(takes, better_y, d_y)
        residual = torch.where(takes.squeeze(-1), refined, residual)
        iterations = iterations + torch.where(misses, more, 0)
    return conclude_adjoint(
        forward,
        given,
        d_z,
        d_y,
        error=torch.where(is_converged & (residual <= limit), residual, torch.inf),
        method=NAME,
        measures={
            "spectral_radius": spectral_radius(of, of.start(g_z, g_y), options.power_iterations),
            "linear_iterations": iterations,
            "adjoint_residual": residual,
        },
    )


def _solve(
    of: FixedPointMap, g_z: Tensor, g_y: Tensor, forward: Forward, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The adjoint of cotangents `(B, k, ·)`: d_z, d_y `(k, B, ·)`; whether and when each problem converged."""
    solved = SOLVERS[options.linear](
        of.vjp,
        of.start(g_z, g_y),
        tolerance=options.tolerance,
        max_iterations=options.max_iterations,
        should_stop=forward.options.should_stop,
    )
    d_z, d_y = (block.transpose(0, 1) for block in of.pull(solved.v, g_z, g_y))
    return d_z, d_y, solved.is_converged, solved.iterations
