"""`kkt`: implicit differentiation of the KKT conditions, from the factor of the active-set finish.

    [ Q    C_aᵀ ] [d_z]      [g_z − Gᵀg_s]
    [ C_a   0   ] [d_y] = −  [g_ν; g_λ,a ]        d_y = [d_ν; μ_a],  μ = 0 on inactive rows

With entropy Q + τD(1/z) stands for Q.
Weakly active rows are dropped: a one-sided derivative, an element of the Clarke subdifferential (flag `degenerate`).
Where active rows are dependent the minimum-norm multipliers are taken (flag `dependent`), and cotangents on them are
refused. Where the solution is not unique there is no gradient.

Reference: Amos & Kolter, OptNet, ICML 2017, eqs. (6)–(8). Deviations: the system is that of the exact active set, not
the last interior iterate's; ∂G as printed there is wrong (see `argrad.problems.gradients`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from argrad.problems import Solution
from argrad.problems.qp import log_slope
from argrad_service.engine.backward.adjoints import (
    INACCURATE,
    conclude_adjoint,
    gradient_flags,
    read_cotangents,
    verdicts,
)
from argrad_service.engine.data import matvec
from argrad_service.engine.options import OwnOptions
from argrad_service.engine.outcome import Backward, Forward, Tangents
from argrad_service.engine.point import FormsGradients, RowsFactor

NAME = "kkt"

Options = OwnOptions


def vjp(forward: Forward, upstream: Mapping[str, Tensor], options: Options) -> Backward:  # noqa: ARG001 - every method's signature
    """Pull cotangents of the solution back to an adjoint.

    Args:
        forward: Outcome of the forward solve, with its factor.
        upstream: Cotangents of `z`, `nu`, `lam`, `s`, each `(B, ·)` or `(k, B, ·)` with one k; absent means zero.
        options: There are none.

    Returns:
        Adjoint with blocks `(B, ·)` or `(k, B, ·)`; rows of problems without a gradient are NaN.
    """
    data, factor = forward.data, forward.factor.factor
    given = read_cotangents(data, upstream)
    if isinstance(factor, RowsFactor):
        on_rows = -given.on_rows.transpose(0, 1) if isinstance(given.on_rows, Tensor) else None
        d_z, full, error = factor.solve_rows(-given.g_z.transpose(0, 1), on_rows)
        d_z, full = d_z.transpose(0, 1), full.transpose(0, 1)
        return conclude_adjoint(forward, given, d_z, full, error=error, method=NAME)
    d_z, d_y, error = factor.solve(-given.g_z.permute(1, 2, 0), -factor.rows.gather(given.g_y).permute(1, 2, 0))
    full = factor.rows.scatter(d_y.permute(2, 0, 1), data.d.shape[1])
    return conclude_adjoint(forward, given, d_z.permute(2, 0, 1), full, error=error, method=NAME)


def gradients(forward: Forward, g_z: Tensor, wrt: Collection[str]) -> dict[str, Tensor] | None:
    """Gradients of batched parameters from a cotangent of z alone, where the solver left what forms them at once.

    It makes one pass over small problems of what `vjp` and `argrad.problems.gradients` make several of, with the same
    numbers.

    Args:
        forward: Outcome of the forward solve.
        g_z: Cotangent of z, `(B, n)`, float64; its values were not looked at.
        wrt: Names of parameters that have a batch dimension.

    Returns:
        Gradients by name; None where this shortcut does not lead to all of them, and `vjp` is to be asked.
    """
    kkt = forward.factor
    factor = kkt.factor
    if not isinstance(factor, FormsGradients) or not factor.forms_gradients or not kkt.is_regular:
        return None
    problem, solution = forward.problem, forward.solution
    if problem.entropy is not None or not all(problem.is_batched(name) for name in wrt):
        return None
    y = solution.lam if problem.p == 0 else torch.cat([solution.nu, solution.lam], dim=1)
    formed, error = factor.gradients(solution.z, y, g_z, wrt)
    return formed if bool((error <= INACCURATE).all()) else None


def jvp(forward: Forward, tangents: Mapping[str, Tensor], options: Options) -> Tangents:  # noqa: ARG001 - every method's signature
    """Push tangents of the parameters forward to tangents of the solution.

        K [ż; ẏ_a] = −[Q̇z + q̇ + τ̇(1 + log z) + Ċᵀy;  Ċ_a z − ḋ_a],    ṡ = ḣ − Ġz − Gż

    Args:
        forward: Outcome of the forward solve, with its factor.
        tangents: Of `Q`, `q`, `G`, `h`, `A`, `b`, `entropy`, each shaped like the parameter; absent means zero.
        options: There are none.

    Returns:
        Tangents of z, ν, λ, s, `(B, ·)` each; NaN in problems without a derivative, and in ν and λ of problems with
        dependent rows, whose multipliers are not unique.
    """
    kkt = forward.factor
    data, factor, rows = forward.data, kkt.factor, kkt.factor.rows
    z, nu, lam = forward.solution.z, forward.solution.nu, forward.solution.lam
    given = {name: block.to(data.q) for name, block in tangents.items()}

    def times(name: str, vector: Tensor, *, transposed: bool = False) -> Tensor | float:
        block = given.get(name)
        if block is None:
            return 0.0
        matrix = block.reshape(-1, *block.shape[-2:])
        return matvec(matrix.transpose(1, 2) if transposed else matrix, vector)

    r1 = data.q.new_zeros(data.B, data.n)
    r1 = r1 - 0.5 * (times("Q", z) + times("Q", z, transposed=True)) - given.get("q", 0.0)
    r1 = r1 - times("A", nu, transposed=True) - times("G", lam, transposed=True)
    if "entropy" in given:
        r1 = r1 - given["entropy"].reshape(-1, 1) * log_slope(z)
    r_equality = data.q.new_zeros(data.B, data.p) + given.get("b", 0.0) - times("A", z)
    room = data.q.new_zeros(data.B, data.m) + given.get("h", 0.0) - times("G", z)
    r2 = rows.gather(torch.cat([r_equality, room], dim=1))
    dz, dy, error = factor.solve(r1.unsqueeze(-1), r2.unsqueeze(-1))
    dz, dy = dz.squeeze(-1), rows.scatter(dy.squeeze(-1), data.d.shape[1])
    # On strongly active rows the slack stays zero; elsewhere it follows from its definition.
    is_active = rows.scatter(rows.valid.to(dz.dtype), data.d.shape[1])[:, data.p :] > 0
    ds = torch.where(is_active, 0.0, room - matvec(data.given_G, dz))
    # Dependent rows have tangents only where the perturbed rows stay consistent; the residual tells.
    status, is_refused = verdicts(forward, error, lambda: torch.zeros_like(kkt.is_weak))
    refused = torch.zeros_like(kkt.is_weak).unsqueeze(-1) if is_refused is None else is_refused.unsqueeze(-1)
    hidden = refused | factor.is_dependent.unsqueeze(-1)
    solution = Solution(
        z=torch.where(refused, torch.nan, dz),
        nu=torch.where(hidden, torch.nan, dy[:, : data.p]),
        lam=torch.where(hidden, torch.nan, dy[:, data.p :]),
        s=torch.where(refused, torch.nan, ds),
    )
    return Tangents(solution=solution, gradient_status=status, flags=gradient_flags(forward), method=NAME)
