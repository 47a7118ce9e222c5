"""Quadratic programs: the data, its shape rules, and how an adjoint becomes parameter gradients.

    minimise ½ zᵀQz + qᵀz   subject to   Az = b  (ν),   Gz ≤ h  (λ ≥ 0),   s = h − Gz ≥ 0

Lagrangian ½zᵀQz + qᵀz + νᵀ(Az − b) + λᵀ(Gz − h); every sign follows from it. Each parameter is either
batched, with one leading dimension B, or shared by the batch; the gradient of a shared parameter is
the sum over the batch.

With a parameter `entropy` τ > 0 the objective has τ Σ zᵢ log zᵢ too, which implies z ≥ 0 (0 log 0 = 0). τ = 0 is
refused: there the derivative by τ is infinite and the solution need not be unique; the plain problem is stated without
the parameter, with rows or bounds for z ≥ 0.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from argrad.problems.shapes import batch_size, check_finite, check_parameters, check_positive, require, without_empty

PARAMETERS = ("Q", "q", "G", "h", "A", "b", "entropy")
"""The parameters of a QP, in the order in which every signature takes them."""

_SMALL = 1024
"""Entries of an outer product from which many of them are bound by memory."""

PRIMAL_DUAL = ("z", "nu", "lam", "s")
"""The blocks of a solution, in the order in which every signature returns them."""

DIMENSIONS: dict[str, tuple[str, ...]] = {
    "Q": ("n", "n"),
    "q": ("n",),
    "G": ("m", "n"),
    "h": ("m",),
    "A": ("p", "n"),
    "b": ("p",),
    "entropy": (),
}
"""Dimensions of each parameter, without the batch."""


@dataclass(frozen=True, kw_only=True, eq=False)
class QP:
    """A batch of quadratic programs with n variables, m inequalities and p equalities.

    Args:
        Q: `(n, n)` or `(B, n, n)`, read as its symmetric part, which must be positive semidefinite; None in a linear
            program.
        q: `(n,)` or `(B, n)`.
        G: `(m, n)` or `(B, m, n)`; None together with `h` where there are no inequalities.
        h: `(m,)` or `(B, m)`; +inf says that the row does not bind.
        A: `(p, n)` or `(B, p, n)`; None together with `b` where there are no equalities.
        b: `(p,)` or `(B, p)`.
        entropy: τ > 0 of the term τ Σ zᵢ log zᵢ, `()` or `(B,)`; None without such a term.

    G and A with no rows count as absent, and then say nothing of the batch. A single problem may have sparse matrices:
    Q, G and A as CSR or COO tensors of torch.

    Raises:
        ProblemError: a rank, a size, a dtype or a device does not fit the others.
    """

    Q: Float[Tensor, "*#batch n n"] | None = None
    q: Float[Tensor, "*#batch n"]
    G: Float[Tensor, "*#batch m n"] | None = None
    h: Float[Tensor, "*#batch m"] | None = None
    A: Float[Tensor, "*#batch p n"] | None = None
    b: Float[Tensor, "*#batch p"] | None = None
    entropy: Float[Tensor, "*#batch"] | None = None

    def __post_init__(self) -> None:
        parameters: dict[str, Tensor | None] = {name: getattr(self, name) for name in PARAMETERS}
        if any(isinstance(t, Tensor) and t.layout != torch.strided for t in parameters.values()):
            return  # checked where it is taken apart: argrad.problems.sparse_tensors
        require(parameters, "q", DIMENSIONS)
        for matrix, vector in (("G", "h"), ("A", "b")):
            parameters = without_empty(parameters, matrix, vector)
            object.__setattr__(self, matrix, parameters[matrix])
            object.__setattr__(self, vector, parameters[vector])
        check_parameters(parameters, DIMENSIONS)

    @classmethod
    def of_checked(cls, parameters: Mapping[str, Tensor | None]) -> QP:
        """A QP of parameters whose shapes fit each other already, none of them empty: nothing is looked at again."""
        problem = object.__new__(cls)
        for name in PARAMETERS:
            object.__setattr__(problem, name, parameters.get(name))
        return problem

    def parameters(self) -> dict[str, Tensor]:
        """The parameters that are there, by name."""
        return {name: value for name in PARAMETERS if (value := getattr(self, name)) is not None}

    def is_batched(self, name: str) -> bool:
        """Whether the parameter of that name has a batch dimension of its own."""
        return bool(getattr(self, name).ndim > len(DIMENSIONS[name]))

    @property
    def n(self) -> int:
        """Number of variables."""
        return self.q.shape[-1]

    @property
    def m(self) -> int:
        """Number of inequalities."""
        return 0 if self.h is None else self.h.shape[-1]

    @property
    def p(self) -> int:
        """Number of equalities."""
        return 0 if self.b is None else self.b.shape[-1]

    @property
    def batch_size(self) -> int | None:
        """B, or None where no parameter has a batch dimension."""
        return batch_size(self.parameters(), DIMENSIONS)

    @property
    def dtype(self) -> torch.dtype:
        """Common dtype of the parameters."""
        return self.q.dtype

    @property
    def device(self) -> torch.device:
        """Common device of the parameters."""
        return self.q.device

    def check_finite(self) -> None:
        """Refuse NaN, infinities but for +inf in `h` (a row that does not bind), and an entropy that is not positive.

        Costs one pass over the data, and on a GPU one synchronisation a parameter.

        Raises:
            ProblemError: names the first parameter with a value that is not allowed, and where.
        """
        for name, tensor in self.parameters().items():
            if name == "h":
                check_finite("problem.h", tensor, "finite numbers or +inf", allowing=torch.inf)
            elif name == "entropy":
                check_positive("problem.entropy", tensor)
            else:
                check_finite(f"problem.{name}", tensor)


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """A primal–dual point of a batch of QPs.

    Args:
        z: Primal solution `(B, n)`.
        nu: Multipliers of Az = b, `(B, p)`, of either sign.
        lam: Multipliers of Gz ≤ h, `(B, m)`, nonnegative.
        s: Slacks h − Gz, `(B, m)`, nonnegative.
    """

    z: Float[Tensor, "*batch n"]
    nu: Float[Tensor, "*batch p"]
    lam: Float[Tensor, "*batch m"]
    s: Float[Tensor, "*batch m"]

    def blocks(self) -> dict[str, Tensor]:
        """The four blocks by name."""
        return {name: getattr(self, name) for name in PRIMAL_DUAL}


@dataclass(frozen=True, kw_only=True, eq=False)
class Adjoint:
    """The whole answer of a backward pass (math: d_z, d_ν, μ), with k cotangents in front if k were asked for.

    A cotangent g_s on the slack is contained: `mu` is then D(λ)d_λ − g_s, so that the gradients below need no
    further term.

    Args:
        z: `(*k, B, n)`, which is ∂q.
        nu: `(*k, B, p)`, which is −∂b.
        mu: `(*k, B, m)`, which is −∂h.
    """

    z: Float[Tensor, "*batch n"]
    nu: Float[Tensor, "*batch p"]
    mu: Float[Tensor, "*batch m"]

    def blocks(self) -> dict[str, Tensor]:
        """The three blocks by name."""
        return {"z": self.z, "nu": self.nu, "mu": self.mu}


def gradients(
    solution: Solution, adjoint: Adjoint, *, wrt: Collection[str], batched: Collection[str]
) -> dict[str, Tensor]:
    """Form parameter gradients from an adjoint by outer products.

        ∂Q = ½(d_z zᵀ + z d_zᵀ)   ∂q = d_z   ∂G = μzᵀ + λd_zᵀ   ∂h = −μ   ∂A = d_ν zᵀ + ν d_zᵀ   ∂b = −d_ν
        ∂τ = d_zᵀ(1 + log z)

    For a shared parameter the sum over the batch is one matrix product.

    Args:
        solution: Blocks of shape `(B, ·)`.
        adjoint: Blocks of shape `(B, ·)` or `(k, B, ·)`.
        wrt: Parameters whose gradients are wanted, names of `PARAMETERS`.
        batched: Those of them that have a batch dimension.

    Returns:
        Gradients by name, shaped like the parameter, behind `(k,)` where the adjoint has k cotangents.

    References:
        Amos & Kolter, OptNet, ICML 2017, eq. (8). Deviation: its printed ∂G has D(λ) in front of both terms, which
        is wrong; differences confirm the form above.
    """
    z, nu, lam = solution.z, solution.nu, solution.lam
    formed: dict[str, Tensor] = {}
    for name in wrt:
        is_batched = name in batched
        if name == "Q":
            half = 0.5 * adjoint.z
            formed[name] = outer_pair(half, z, z, half, is_batched)
        elif name == "G":
            formed[name] = outer_pair(adjoint.mu, z, lam, adjoint.z, is_batched)
        elif name == "A":
            formed[name] = outer_pair(adjoint.nu, z, nu, adjoint.z, is_batched)
        elif name == "entropy":
            each = (adjoint.z * log_slope(z)).sum(dim=-1)
            formed[name] = each if is_batched else each.sum(dim=-1)
        else:
            vector = {"q": adjoint.z, "h": -adjoint.mu, "b": -adjoint.nu}[name]
            formed[name] = vector if is_batched else vector.sum(dim=-2)
    return formed


def log_slope(z: Tensor) -> Tensor:
    """1 + log z, the derivative of z log z; 1 where z is 0, for whatever it multiplies there is 0 too."""
    return 1 + torch.where(z > 0, z, 1.0).log()


def outer_pair(left: Tensor, right: Tensor, left2: Tensor, right2: Tensor, is_batched: bool) -> Tensor:
    """Sums left rightᵀ + left2 right2ᵀ of each problem, `(…, B, r, c)`, or of the batch, `(…, r, c)`.

    Where memory is what takes the time, one product of rank two writes the result once; small ones each cost a call.
    """
    if not is_batched:
        return left.transpose(-1, -2) @ right + left2.transpose(-1, -2) @ right2
    if left.shape[-1] * right.shape[-1] < _SMALL:
        return left.unsqueeze(-1) * right.unsqueeze(-2) + left2.unsqueeze(-1) * right2.unsqueeze(-2)
    # One of a pair may have k in front.
    columns = torch.stack(torch.broadcast_tensors(left, left2), dim=-1)  # type: ignore[no-untyped-call]
    return columns @ torch.stack(torch.broadcast_tensors(right, right2), dim=-2)  # type: ignore[no-untyped-call]
