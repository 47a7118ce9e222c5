"""`smoothed`: gradients of a smoothed problem in place of an LP's own, whose ∂q is zero wherever it exists.

    barrier    min qᵀz − (1/t) Σ log(h − Gz)_i    differentiated implicitly at its solution, no unrolling
    quadratic  min qᵀz + ½γ‖z‖²
    entropy    min qᵀz + τ Σ z_i log z_i          where the rows say z ≥ 0
    random     E z*(q + σZ), Z standard normal    ∂q = E[(gᵀz*(q + σZ) − gᵀz*(q)) Z] / σ,  ∂b, ∂h = E of the exact ones

each under the problem's own constraints. What the adjoint means: ∂q = d_z, ∂b = −d_ν and ∂h = −μ are the exact
derivatives of gᵀz_smoothed (with `random`: unbiased estimates of them). ∂Q, ∂G, ∂A are formed with the z and λ of the
reply, the exact solution's, while their own formula has those of the smoothed problem: they are off by the order of
`smoothing_distance`. Where the reply's solution is the barrier point itself (solver `barrier` without polish, and `t`
left out here), all six are exact.

References: barrier: Mandi & Guns, Interior point solving for LP-based prediction+optimisation, NeurIPS 2020, section 3;
quadratic: Wilder, Dilkina & Tambe, AAAI 2019, section 5; random: Berthet et al., NeurIPS 2020, proposition 3.1, with
the unperturbed value subtracted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from argrad.problems import QP, Flag, Status
from argrad_service.engine.active_set import factor_active_set
from argrad_service.engine.backward import kkt
from argrad_service.engine.backward.adjoints import INACCURATE, Cotangents, read_cotangents
from argrad_service.engine.backward.inexact import conclude_inexact, distance
from argrad_service.engine.backward.sharp import solve_barrier
from argrad_service.engine.data import Data, dot, stack
from argrad_service.engine.finish import Guess, solve_on_active_set
from argrad_service.engine.forward import barrier, pdipm
from argrad_service.engine.forward.central_path import PathPoint, multipliers
from argrad_service.engine.forward.interior import find_interior
from argrad_service.engine.options import OwnOptions, SolverOptions
from argrad_service.engine.outcome import Backward, Forward
from argrad_service.engine.point import CODE
from argrad_service.engine.solution import conclude

NAME = "smoothed"

SHARPNESS = 100.0
"""T where the call says nothing and the solution is not a barrier point."""

GROWTH = 10.0
"""Factor by which t grows on the way."""

CHUNK = 2**22
"""Numbers in the matrices of the perturbed problems that are solved at a time."""


class Options(OwnOptions):
    """Options of `smoothed`; the ones of another smoothing than the one asked for are not looked at."""

    smoothing: Literal["barrier", "quadratic", "entropy", "random"] = "barrier"
    """Which smoothed problem is differentiated."""

    t: float | None = Field(default=None, gt=0, le=1e12)
    """Sharpness of the barrier, in units of 1 / objective; the gap is m/t. null: the t at which the solver `barrier`
    stopped, without polish, and 100 elsewhere."""

    gamma: float = Field(default=0.01, gt=0, le=1e6)
    """Weight of the quadratic term, in units of objective / z²."""

    tau: float = Field(default=0.01, gt=0, le=1e6)
    """Weight of the entropy, in units of objective."""

    sigma: float = Field(default=0.1, gt=0, le=1e6)
    """Standard deviation of the perturbation, in the units of q."""

    samples: int = Field(default=100, ge=2, le=10_000)
    """Perturbed problems solved for each problem."""

    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    """Of the perturbations, which all problems share: the same seed gives the same gradient."""

    def in_use(self) -> dict[str, bool | float | str]:
        """The smoothing, and its own parameters; the t that was taken where none was given is a measure."""
        own = {"barrier": {"t"}, "quadratic": {"gamma"}, "entropy": {"tau"}, "random": {"sigma", "samples", "seed"}}
        return self.model_dump(include={"smoothing"} | own[self.smoothing], exclude_none=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class Smoothed:
    """What a smoothing found.

    Args:
        d_z: `(k, B, n)`.
        d_y: `(k, B, p + m)`.
        z: `(B, n)`, the smoothed solution.
        status: Masks `(B,)` of problems without a gradient, by reason.
        flags: Masks `(B,)` of flags of the smoothed problem.
        measures: `(B,)` each.
    """

    d_z: Tensor
    d_y: Tensor
    z: Tensor
    status: dict[str, Tensor]
    flags: dict[Flag, Tensor] = field(default_factory=dict)
    measures: dict[str, Tensor] = field(default_factory=dict)


def vjp(forward: Forward, upstream: Mapping[str, Tensor], options: Options) -> Backward:
    """Pull cotangents back through the solution of a smoothed problem.

    Args:
        forward: Outcome of a forward solve.
        upstream: Cotangents of `z`, `nu`, `lam`, `s`, each `(B, ·)` or `(k, B, ·)` with one k; absent means zero.
        options: Which smoothing, and how much of it.

    Returns:
        Adjoint with the flag `smoothed` and the measures `smoothing_distance`, ‖z_smoothed − z‖₂, and with `random`
        `standard_error`, the root of the summed variances of ∂q's entries (the largest of k cotangents). NaN in rows
        of problems that are not optimal, or whose smoothed problem has no solution: `no_interior` with the barrier,
        `no_lower_bounds` with entropy where the rows do not say z ≥ 0, `unsolvable_sample` where some perturbed
        problem has no unique solution.

    Raises:
        Stopped: the solve's `should_stop()` was true.
    """
    given = read_cotangents(forward.data, upstream)
    found = {"barrier": _barrier, "quadratic": _quadratic, "entropy": _entropy, "random": _random}[options.smoothing](
        forward, given, options
    )
    return conclude_inexact(
        forward,
        given,
        found.d_z,
        found.d_y,
        status=found.status,
        flags={Flag.SMOOTHED: forward.factor.is_optimal, **found.flags},
        method=NAME,
        measures={"smoothing_distance": distance(forward, found.z), **found.measures},
    )


def _barrier(forward: Forward, given: Cotangents, options: Options) -> Smoothed:
    r"""The barrier point z_t, λ = 1/(t s), by the implicit function theorem, with D = λ/s = tλ².

    [ Q   Gᵀ    Aᵀ ] [d_z]      [g_z]
    [ G  −D⁻¹   0  ] [μ  ]  = − [g_λ]      so that (Q + GᵀDG)d_z + Aᵀd_ν = −g_z − GᵀDg_λ,  μ = D(Gd_z + g_λ)
    [ A   0     0  ] [d_ν]      [g_ν]
    """
    data = forward.data
    own = forward.options.own
    is_at_point = options.t is None and isinstance(own, barrier.Options) and not own.polish
    status: dict[str, Tensor] = {}
    if is_at_point:
        t, z, lam = forward.measures["t"].to(data.q), forward.solution.z, forward.solution.lam
    else:
        t = data.q.new_full((data.B,), SHARPNESS if options.t is None else options.t)
        limits = SolverOptions(max_iterations=200, should_stop=forward.options.should_stop)
        interior = find_interior(data, max_iterations=limits.max_iterations, should_stop=limits.should_stop)
        first = t / GROWTH ** max(0, math.ceil(math.log(float(t[0]), GROWTH)))
        is_inside = interior.is_found & forward.factor.is_optimal
        path, _, is_done = barrier.follow(
            data, PathPoint.at(data, interior.z, first), is_inside, t * (1 - 1e-9), limits, mu=GROWTH
        )
        z, lam = path.z, multipliers(data, path)[:, data.p :]
        status = {"no_interior": ~interior.is_found, "inaccurate": ~is_done}
    g_z, g_nu, g_lam = (g.permute(1, 2, 0) for g in (given.g_z, given.g_y[..., : data.p], given.g_y[..., data.p :]))
    d_z, d_nu, mu, error = solve_barrier(data, t.unsqueeze(-1) * lam.square(), g_z, g_nu, g_lam)
    status["inaccurate"] = status.get("inaccurate", torch.zeros_like(error, dtype=torch.bool)) | ~(error <= INACCURATE)
    d_y = torch.cat([d_nu, mu], dim=1)
    return Smoothed(d_z=d_z.permute(2, 0, 1), d_y=d_y.permute(2, 0, 1), z=z, status=status, measures={"t": t})


def _quadratic(forward: Forward, given: Cotangents, options: Options) -> Smoothed:
    """Q + γI, solved exactly and differentiated as a QP of its own."""
    data = forward.data
    eye = torch.eye(data.n, dtype=data.q.dtype, device=data.q.device)
    return _of_problem(forward, given, forward.problem, replace(data, Q=data.Q + options.gamma * eye, is_linear=False))


def _entropy(forward: Forward, given: Cotangents, options: Options) -> Smoothed:
    """The problem with an entropy, which implies z ≥ 0: rows that say so have μ = 0."""
    data = forward.data
    problem = QP.of_checked({**forward.problem.parameters(), "entropy": data.q.new_tensor(options.tau)})
    found = _of_problem(forward, given, problem, stack(problem))
    is_bound = ((data.G != 0).sum(-1) == 1) & (data.G <= 0).all(-1) & (data.h <= 0)
    says_sign = ((data.G < 0) & is_bound.unsqueeze(-1)).any(1).all(-1)
    return replace(found, status={"no_lower_bounds": ~says_sign, **found.status})


def _of_problem(forward: Forward, given: Cotangents, problem: QP, data: Data) -> Smoothed:
    """The solution and the adjoint of a smoothed problem that `pdipm` solves."""
    options = SolverOptions(tolerance=forward.options.tolerance, should_stop=forward.options.should_stop)
    smoothed = conclude(problem, data, pdipm.solve(data, options, None), options, solver="pdipm")
    upstream = {"z": given.g_z, "nu": given.g_y[..., : data.p], "lam": given.g_y[..., data.p :]}
    back = kkt.vjp(smoothed, upstream, kkt.Options())
    d_y = torch.cat([back.adjoint.nu, back.adjoint.mu], dim=-1)
    device = data.q.device
    words, flags = set(back.gradient_status) - {"ok"}, {flag for each in back.flags for flag in each}
    return Smoothed(
        d_z=back.adjoint.z,
        d_y=d_y,
        z=smoothed.solution.z,
        status={w: torch.tensor([w == word for word in back.gradient_status], device=device) for w in sorted(words)},
        flags={flag: torch.tensor([flag in each for each in back.flags], device=device) for flag in flags},
    )


def _random(forward: Forward, given: Cotangents, options: Options) -> Smoothed:
    """Gaussian perturbations of q: ∂q by the score function, ∂b and ∂h by the mean of each sample's own.

    Every problem of a batch gets the same perturbations: what it gets does not depend on its batchmates.
    """
    data = forward.data
    base = _values(given, forward.solution.z, torch.cat([forward.solution.nu, forward.solution.lam], dim=1))
    generator = torch.Generator(device="cpu").manual_seed(options.seed)
    noise = torch.randn(options.samples, 1, data.n, generator=generator, dtype=data.q.dtype).to(data.q.device)
    size = max(1, CHUNK // ((data.n + data.p + data.m) * data.n * data.B))
    d_z, square = torch.zeros_like(given.g_z), torch.zeros_like(given.g_z)
    d_y, z = torch.zeros_like(given.g_y), torch.zeros_like(data.q)
    is_bad = torch.zeros_like(forward.factor.is_optimal)
    for part in torch.split(noise, size):
        z_s, y_s, d_y_s, is_solved = _solve_perturbed(forward, given, data.q + options.sigma * part)
        score = torch.stack([_values(given, z, y) - base for z, y in zip(z_s, y_s, strict=True)])
        terms = score.unsqueeze(-1) * part.unsqueeze(1) / options.sigma
        d_z, square = d_z + terms.sum(0), square + terms.square().sum(0)
        d_y, z, is_bad = d_y + d_y_s, z + z_s.sum(0), is_bad | ~is_solved
    samples = options.samples
    d_z, d_y, z = d_z / samples, d_y / samples, z / samples
    variance = (square / samples - d_z.square()).clamp(min=0) / (samples - 1)
    return Smoothed(
        d_z=d_z,
        d_y=d_y,
        z=z,
        status={"unsolvable_sample": is_bad & forward.factor.is_optimal},
        measures={"standard_error": variance.sum(-1).sqrt().amax(0)},
    )


def _solve_perturbed(forward: Forward, given: Cotangents, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve the batch for every q `(S, B, n)`.

    Returns:
        z `(S, B, n)`, y `(S, B, p + m)`, the sum over samples of the exact d_y `(k, B, p + m)`, and whether a problem
        was solved, uniquely, for all of them `(B,)`. Problems that are not optimal themselves are not tried: zeros.
    """
    count, batch, rows = len(q), forward.data.B, forward.data.d.shape[1]
    z, y, d_y = q.new_zeros(q.shape), q.new_zeros(count, batch, rows), torch.zeros_like(given.g_y)
    is_solved = torch.zeros(count, batch, dtype=torch.bool, device=q.device)
    index = torch.nonzero(forward.factor.is_optimal).squeeze(-1)
    if len(index):
        data = _repeated(forward.data.select(index), q[:, index])
        point = pdipm.solve(data, SolverOptions(should_stop=forward.options.should_stop), None)
        factor = factor_active_set(data, point.active, lower=point.lower)
        z_s, y_s, _ = solve_on_active_set(factor, Guess(active=point.active, z=point.z, y=point.y))
        g_z = given.g_z[:, index].repeat(1, count, 1).permute(1, 2, 0)
        nothing = g_z.new_zeros(len(g_z), factor.C.shape[1], given.count)
        _, d_a, _ = factor.solve(-g_z, nothing)
        sampled = factor.rows.scatter(d_a.permute(2, 0, 1), rows)
        z[:, index], y[:, index] = z_s.reshape(count, len(index), -1), y_s.reshape(count, len(index), -1)
        d_y[:, index] = sampled.reshape(given.count, count, len(index), -1).sum(1)
        is_solved[:, index] = ((point.status == _OPTIMAL) & ~factor.is_nonunique).reshape(count, -1)
    return z, y, d_y, is_solved.all(0)


def _values(given: Cotangents, z: Tensor, y: Tensor) -> Tensor:
    """g_zᵀz + g_yᵀy, `(k, B)`."""
    return dot(given.g_z, z) + dot(given.g_y, y)


def _repeated(data: Data, q: Tensor) -> Data:
    """The batch once for each of the q `(S, B, n)`, sample by sample; shared matrices stay shared."""
    size = q.shape[0]

    def matrix(block: Tensor) -> Tensor:
        return block if block.shape[0] == 1 else block.repeat(size, 1, 1)

    return replace(data, Q=matrix(data.Q), C=matrix(data.C), q=q.flatten(0, 1), d=data.d.repeat(size, 1))


_OPTIMAL = CODE[Status.OPTIMAL]
