"""`bpqp`: the backward pass as a QP of its own, on the active set of any solution.

    minimise ½z̃ᵀP z̃ + gᵀz̃  subject to  A z̃ = −g_ν,  G₊ z̃ = −g_λ₊          P = ∇²_zz L = Q

Its solution is d_z, the multipliers of its rows are d_ν and μ₊; μ = 0 on the other rows. All that is taken of the
forward solve is (z, ν, λ) and the rows that are active there, so the point may come from any solver. The QP has only
equalities: it is solved directly on the null space of its rows, by OSQP (the paper's choice), or by the method of
multipliers; all cotangents share one factorisation. Weakly active rows are dropped, as by `kkt`.

Reference: Pan et al., BPQP: a differentiable convex optimization framework for efficient end-to-end learning, NeurIPS
2024. Deviation: OSQP runs at 1e-9 with polishing and on the residual again until that is small, not once at 1e-3.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from argrad.errors import MissingExtraError, ProblemError
from argrad_service.engine.backward import kkt
from argrad_service.engine.backward.adjoints import conclude_adjoint, read_cotangents
from argrad_service.engine.backward.equality import Direct, EqualityQP, Multipliers
from argrad_service.engine.data import residuals
from argrad_service.engine.options import OwnOptions
from argrad_service.engine.outcome import Backward, Forward, Tangents

NAME = "bpqp"

AIM = 1e-4
"""The iterative backends aim at this fraction of the tolerance: a small residual is not yet a small error."""

ITERATIONS_PER_UNIT = 10
"""ADMM iterations of OSQP that one of max_iterations stands for."""


class Options(OwnOptions):
    """How the backward QP is solved."""

    backend: Literal["direct", "osqp", "admm"] = Field(default="direct")
    """A factorisation on the null space of the active rows; OSQP; or the method of multipliers, batched."""

    tolerance: float = Field(default=1e-8, ge=1e-12, le=1e-6)
    """Residual of the backward QP's KKT system, relative to the cotangents, above which there is no gradient."""

    rho: float = Field(default=1e6, ge=1e-3, le=1e8)
    """Penalty of `admm`, in units of P's largest diagonal entry."""

    max_iterations: int = Field(default=1000, ge=1, le=100_000)
    """Iterations of `admm` at most; of `osqp`, in tens, for each of the few solves it takes."""


def vjp(forward: Forward, upstream: Mapping[str, Tensor], options: Options) -> Backward:
    """Pull cotangents of the solution back to an adjoint.

    Args:
        forward: Outcome of a forward solve, or a caller's point; of its factor only the active rows are used.
        upstream: Cotangents of `z`, `nu`, `lam`, `s`, each `(B, ·)` or `(k, B, ·)` with one k; absent means zero.
        options: How the QP is solved.

    Returns:
        Adjoint with blocks `(B, ·)` or `(k, B, ·)`; rows of problems without a gradient are NaN. Measures:
        `backward_residual`, relative, `backward_iterations`, and `kkt_norm`, the scaled residual of the point itself.

    Raises:
        ProblemError: the backend cannot take a linear program.
        MissingExtraError: OSQP is not installed.
    """
    system = _system(forward, options)
    given = read_cotangents(forward.data, upstream)
    r1, r2 = -given.g_z.permute(1, 2, 0), -system.rows.gather(given.g_y).permute(1, 2, 0)
    d_z, d_y, error = system.solve(r1, r2)
    full = system.rows.scatter(d_y.permute(2, 0, 1), forward.data.d.shape[1])
    z, y = forward.solution.z, torch.cat([forward.solution.nu, forward.solution.lam], dim=1)
    measures = {
        "backward_residual": system.residual,
        "backward_iterations": system.backend.iterations.to(error),
        "kkt_norm": residuals(forward.data, z, y).scaled,
    }
    judged = _with(forward, system)
    return conclude_adjoint(judged, given, d_z.permute(2, 0, 1), full, error=error, method=NAME, measures=measures)


def jvp(forward: Forward, tangents: Mapping[str, Tensor], options: Options) -> Tangents:
    """Push tangents of the parameters forward: the same QP with other right-hand sides.

    Args:
        forward: As for `vjp`.
        tangents: Tangents of `Q`, `q`, `G`, `h`, `A`, `b`, each shaped like the parameter; absent means zero.
        options: How the QP is solved.

    Raises:
        ProblemError: the backend cannot take a linear program.
        MissingExtraError: OSQP is not installed.
    """
    system = _system(forward, options)
    tangents_of_kkt = kkt.jvp(_with(forward, system), tangents, kkt.Options())
    return replace(tangents_of_kkt, method=NAME, measures={"backward_residual": system.residual.cpu()})


def _system(forward: Forward, options: Options) -> EqualityQP:
    data = forward.data
    if data.is_linear and options.backend != "direct":
        raise ProblemError("differentiation.options.backend", repr(options.backend), "'direct' for a linear program")
    system = EqualityQP(forward.factor.factor, options.tolerance)
    if options.backend == "direct":
        system.backend = Direct(data.Q, system.C, system.rows.valid, system.is_dependent)
    elif options.backend == "admm":
        aim = AIM * options.tolerance
        system.backend = Multipliers(data.Q, system.C, rho=options.rho, tolerance=aim, most=options.max_iterations)
    else:
        if importlib.util.find_spec("osqp") is None:
            raise MissingExtraError("backend 'osqp'", "service")
        from argrad_service.engine.backward.by_osqp import ByOSQP

        system.backend = ByOSQP(
            data.Q, system.C, system.rows.valid, aim=AIM * options.tolerance, most=10 * options.max_iterations
        )
    return system


def _with(forward: Forward, system: EqualityQP) -> Forward:
    """The outcome with this system in the place of its factor."""
    is_regular = forward.factor.is_regular and not bool(system.is_nonunique.any())
    return replace(forward, factor=replace(forward.factor, factor=system, is_regular=is_regular))
