"""`kkt`: implicit differentiation of the KKT conditions, from the factor of the active-set finish.

    [ Q    C_aᵀ ] [d_z]      [g_z − Gᵀg_s]
    [ C_a   0   ] [d_y] = −  [g_ν; g_λ,a ]        d_y = [d_ν; μ_a],  μ = 0 on inactive rows

Weakly active rows are dropped: a one-sided derivative, an element of the Clarke subdifferential (flag `degenerate`).
Where active rows are dependent the minimum-norm multipliers are taken (flag `dependent`), and cotangents on them are
refused. Where the solution is not unique there is no gradient.

Reference: Amos & Kolter, OptNet, ICML 2017, eqs. (6)–(8). Deviations: the system is that of the exact active set, not
the last interior iterate's; ∂G as printed there is wrong (see `argrad.problems.gradients`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from argrad.problems import Adjoint, Flag, Solution
from argrad_service.engine.data import matvec
from argrad_service.engine.outcome import Backward, Forward, Tangents
from argrad_service.engine.solution import KKTFactor, name_flags

NAME = "kkt"

INACCURATE = 1e-6
"""An adjoint whose relative residual stays above this is refused."""


def vjp(forward: Forward, upstream: Mapping[str, Tensor]) -> Backward:
    """Pull cotangents of the solution back to an adjoint.

    Args:
        forward: Outcome of the forward solve, with its factor.
        upstream: Cotangents of `z`, `nu`, `lam`, `s`, each `(B, ·)` or `(k, B, ·)` with one k; absent means zero.

    Returns:
        Adjoint with blocks `(B, ·)` or `(k, B, ·)`; rows of problems without a gradient are NaN.
    """
    kkt: KKTFactor = forward.factor
    factor = kkt.factor
    data, rows = factor.data, factor.rows
    given = {name: block.to(data.q) for name, block in upstream.items()}
    many = next(iter(given.values())).ndim == 3
    sizes = {"z": data.n, "nu": data.p, "lam": data.m, "s": data.m}
    count = next(iter(given.values())).shape[0] if many else 1

    def cotangent(name: str) -> Tensor:
        block = given.get(name)
        if block is None:
            return data.q.new_zeros(count, data.B, sizes[name])
        return block if many else block.unsqueeze(0)

    g_z, g_y = cotangent("z"), torch.cat([cotangent("nu"), cotangent("lam")], dim=-1)
    if "s" in given:
        g_z = g_z - (cotangent("s").transpose(0, 1) @ data.G).transpose(0, 1)
    g_active = rows.gather(g_y)
    d_z, d_y, error = factor.solve(-g_z.permute(1, 2, 0), -g_active.permute(1, 2, 0))
    full = rows.scatter(d_y.permute(2, 0, 1), data.d.shape[1])
    mu = full[..., data.p :]
    if "s" in given:
        mu = mu - cotangent("s")
    on_duals = (g_active != 0).any(-1).any(0)
    status, is_refused = _verdicts(forward, kkt, error, factor.is_dependent & on_duals)
    blocks = {"z": d_z.permute(2, 0, 1), "nu": full[..., : data.p], "mu": mu}
    refused = is_refused.unsqueeze(-1)
    blocks = {name: torch.where(refused, torch.nan, block) for name, block in blocks.items()}
    if not many:
        blocks = {name: block.squeeze(0) for name, block in blocks.items()}
    return Backward(adjoint=Adjoint(**blocks), gradient_status=status, flags=_flags(forward, kkt), method=NAME)


def jvp(forward: Forward, tangents: Mapping[str, Tensor]) -> Tangents:
    """Push tangents of the parameters forward to tangents of the solution.

        K [ż; ẏ_a] = −[Q̇z + q̇ + Ċᵀy;  Ċ_a z − ḋ_a],    ṡ = ḣ − Ġz − Gż

    Args:
        forward: Outcome of the forward solve, with its factor.
        tangents: Tangents of `Q`, `q`, `G`, `h`, `A`, `b`, each shaped like the parameter; absent means zero.

    Returns:
        Tangents of z, ν, λ, s, `(B, ·)` each; NaN in problems without a derivative, and in ν and λ of problems with
        dependent rows, whose multipliers are not unique.
    """
    kkt: KKTFactor = forward.factor
    factor = kkt.factor
    data, rows = factor.data, factor.rows
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
    r_equality = data.q.new_zeros(data.B, data.p) + given.get("b", 0.0) - times("A", z)
    room = data.q.new_zeros(data.B, data.m) + given.get("h", 0.0) - times("G", z)
    r2 = rows.gather(torch.cat([r_equality, room], dim=1))
    dz, dy, error = factor.solve(r1.unsqueeze(-1), r2.unsqueeze(-1))
    dz, dy = dz.squeeze(-1), rows.scatter(dy.squeeze(-1), data.d.shape[1])
    # On strongly active rows the slack stays zero; elsewhere it follows from its definition.
    is_active = rows.scatter(rows.valid.to(dz.dtype), data.d.shape[1])[:, data.p :] > 0
    ds = torch.where(is_active, 0.0, room - matvec(data.G, dz))
    # Dependent rows have tangents only where the perturbed rows stay consistent; the residual tells.
    status, is_refused = _verdicts(forward, kkt, error, torch.zeros_like(kkt.is_weak))
    hidden = (is_refused | factor.is_dependent).unsqueeze(-1)
    refused = is_refused.unsqueeze(-1)
    solution = Solution(
        z=torch.where(refused, torch.nan, dz),
        nu=torch.where(hidden, torch.nan, dy[:, : data.p]),
        lam=torch.where(hidden, torch.nan, dy[:, data.p :]),
        s=torch.where(refused, torch.nan, ds),
    )
    return Tangents(solution=solution, gradient_status=status, flags=_flags(forward, kkt), method=NAME)


def _verdicts(forward: Forward, kkt: KKTFactor, error: Tensor, on_dependent: Tensor) -> tuple[tuple[str, ...], Tensor]:
    """Of each problem `ok` or why it has no gradient, and the mask of those that have none."""
    reasons = {
        "nonunique": kkt.factor.is_nonunique,
        "dependent": on_dependent,
        "inaccurate": ~(error <= INACCURATE),
    }
    is_refused = ~kkt.is_optimal
    for mask in reasons.values():
        is_refused = is_refused | mask
    if not bool(is_refused.any()):
        return ("ok",) * len(forward.status), is_refused
    status = [str(s) if not good else "ok" for s, good in zip(forward.status, kkt.is_optimal.tolist(), strict=True)]
    for reason, mask in reasons.items():
        for i in torch.nonzero(mask).flatten().tolist():
            if status[i] == "ok":
                status[i] = reason
    return tuple(status), is_refused


def _flags(forward: Forward, kkt: KKTFactor) -> tuple[tuple[Flag, ...], ...]:
    return name_flags(
        {
            Flag.DEGENERATE: kkt.is_weak,
            Flag.DEPENDENT: kkt.factor.is_dependent & kkt.is_optimal,
            Flag.NONUNIQUE: kkt.factor.is_nonunique & kkt.is_optimal,
        },
        len(forward.status),
    )
