r"""Two-sided rows l ≤ Rz ≤ u, and bounds (R = I), as rows of a canonical QP.

Row i becomes

    −Rᵢ z ≤ −lᵢ  (λ_l)    if lᵢ is finite in some problem of the batch; where it is −inf, h = +inf says "does not bind"
     Rᵢ z ≤  uᵢ  (λ_u)    likewise
     Rᵢ z  =  uᵢ  (ν)      instead of both, if lᵢ = uᵢ in every problem of the batch

behind the rows that the caller's own G and A have. The multiplier of row i is y = λ_u − λ_l + ν, so that y > 0 at the
upper bound and the Lagrangian contains yᵀRz. With dy = μ_u − μ_l + d_ν of the adjoint,

    ∂R = dy zᵀ + y dzᵀ      ∂u = −μ_u      ∂l = μ_l      and of an equality row  ∂(u = l) = −d_ν.

An equality row's −d_ν belongs to u where ν > 0 and to l where ν < 0: it is the one-sided derivative in the direction
in which the two part, since only the bound that presses is felt. At ν = 0 each receives half: moved together, the two
then have the right derivative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from argrad.errors import ProblemError
from argrad.problems.qp import DIMENSIONS, Adjoint, Solution
from argrad.problems.shapes import batch_size, check_finite, check_parameters, require, without_empty


class Canonical(NamedTuple):
    """The parameters of a `QP`, not checked again: differentiable functions of what they were made from."""

    Q: Tensor | None
    q: Tensor
    G: Tensor | None
    h: Tensor | None
    A: Tensor | None
    b: Tensor | None
    entropy: Tensor | None = None


BOUNDED = {name: DIMENSIONS[name] for name in DIMENSIONS if name != "entropy"} | {
    "lb": ("n",),
    "ub": ("n",),
    "entropy": DIMENSIONS["entropy"],
}
TWO_SIDED = {"P": ("n", "n"), "q": ("n",), "A": ("m", "n"), "l": ("m",), "u": ("m",)}


@dataclass(frozen=True, kw_only=True, eq=False)
class RowMap:
    """Where each two-sided row went; `r` rows, of which L, U and E are in the three lists.

    Args:
        size: r.
        own_m: Inequalities in front of ours.
        own_p: Equalities in front of ours.
        lower: Rows with an inequality at the lower bound, in the order of the canonical rows.
        upper: The same at the upper bound, behind those.
        equal: Rows that became equalities.
    """

    size: int
    own_m: int
    own_p: int
    lower: Int[Tensor, " L"]
    upper: Int[Tensor, " U"]
    equal: Int[Tensor, " E"]

    def own(self, nu: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        """The multipliers of the caller's own rows."""
        if self.size == 0:
            return nu, lam
        return nu[..., : self.own_p], lam[..., : self.own_m]

    def spread(self, nu: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """λ_l, λ_u and ν of every two-sided row, `(…, r)` each, 0 where a row has none; linear, so for d_ν, μ too."""
        middle = self.own_m + len(self.lower)
        parts = (
            (self.lower, lam[..., self.own_m : middle]),
            (self.upper, lam[..., middle:]),
            (self.equal, nu[..., self.own_p :]),
        )
        lower, upper, equal = (
            values.new_zeros(*values.shape[:-1], self.size).index_copy(-1, index.to(values.device), values)
            for index, values in parts
        )
        return lower, upper, equal

    def collect(
        self, own_nu: Tensor, own_lam: Tensor, lower: Tensor, upper: Tensor, equal: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The transpose of `own` and `spread`: canonical ν and λ."""
        at_lower, at_upper, at_equal = (
            values[..., index.to(values.device)]
            for index, values in ((self.lower, lower), (self.upper, upper), (self.equal, equal))
        )
        return torch.cat([own_nu, at_equal], dim=-1), torch.cat([own_lam, at_lower, at_upper], dim=-1)

    def presses_up(self, nu: Tensor) -> Float[Tensor, "*batch r"]:
        """1 for an equality row that its upper bound holds (ν > 0), 0 for the lower, ½ for ν = 0."""
        _, _, equal = self.spread(nu, nu.new_zeros(*nu.shape[:-1], self.own_m + len(self.lower) + len(self.upper)))
        return torch.heaviside(equal, equal.new_tensor(0.5))

    def bound_gradients(self, solution: Solution, adjoint: Adjoint) -> tuple[Tensor, Tensor]:
        """∂l and ∂u of each problem, `(…, B, r)` both; the derivation is at the head of this file."""
        mu_lower, mu_upper, d_nu = self.spread(adjoint.nu, adjoint.mu)
        up = self.presses_up(solution.nu)
        return mu_lower - (1 - up) * d_nu, -mu_upper - up * d_nu


def with_bounds(
    Q: Tensor | None,
    q: Tensor,
    G: Tensor | None = None,
    h: Tensor | None = None,
    A: Tensor | None = None,
    b: Tensor | None = None,
    lb: Tensor | None = None,
    ub: Tensor | None = None,
) -> tuple[Canonical, RowMap]:
    """Append the bounds lb ≤ z ≤ ub to the rows of a QP, by differentiable operations.

    Which rows there are depends on values (on a GPU that costs a few synchronisations), but autograd maps gradients of
    the canonical parameters back to lb and ub. A variable fixed in the whole batch (lb = ub) enters by ½(lb + ub): each
    receives half, for autograd cannot know which of the two presses; `Form.gradients` can.

    Args:
        Q: Like the following five as in `QP`.
        q: See there.
        G: See there.
        h: See there.
        A: See there.
        b: See there.
        lb: Lower bounds, `(n,)` or `(B, n)`; −inf and None are no bound.
        ub: Upper bounds, `(n,)` or `(B, n)`; +inf and None are no bound.

    Returns:
        The six canonical parameters, and the map by which `RowMap.spread` finds the bounds' multipliers.

    Raises:
        ProblemError: a shape, dtype or device does not fit, a bound is NaN or the wrong infinity, or lb > ub.
    """
    given = {"Q": Q, "q": q, "G": G, "h": h, "A": A, "b": b, "lb": lb, "ub": ub}
    return append_bounds(check_bounded(given))


def with_two_sided(
    P: Tensor | None, q: Tensor, A: Tensor | None = None, l: Tensor | None = None, u: Tensor | None = None
) -> tuple[Canonical, RowMap]:
    """Turn ½xᵀPx + qᵀx, l ≤ Ax ≤ u into a canonical QP, by differentiable operations; see `with_bounds`.

    Args:
        P: `(n, n)` or `(B, n, n)`.
        q: `(n,)` or `(B, n)`.
        A: `(m, n)` or `(B, m, n)`; None without rows.
        l: `(m,)` or `(B, m)`; −inf and None are no bound.
        u: `(m,)` or `(B, m)`; +inf and None are no bound.

    Returns:
        The six canonical parameters, and the map by which `RowMap.spread` finds y.

    Raises:
        ProblemError: a shape, dtype or device does not fit, a bound is NaN or the wrong infinity, or l > u.
    """
    return split_rows(check_two_sided({"P": P, "q": q, "A": A, "l": l, "u": u}))


def check_bounded(given: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """The parameters that are there, those without elements dropped; their shapes fit, their values are not looked at.

    Raises:
        ProblemError: one is missing, or a shape, dtype or device does not fit.
    """
    require(given, "q", BOUNDED)
    for matrix, vector in (("G", "h"), ("A", "b")):
        given = without_empty(given, matrix, vector)
    check_parameters(given, BOUNDED)
    return {name: tensor for name, tensor in given.items() if tensor is not None}


def check_two_sided(given: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Check like `check_bounded`, in the two-sided form.

    Raises:
        ProblemError: one is missing, or a shape, dtype or device does not fit.
    """
    require(given, "q", TWO_SIDED)
    for side in [name for name in ("l", "u") if given.get(name) is not None] or ["u"]:
        given = without_empty(given, "A", side)
    check_parameters(given, TWO_SIDED)
    return {name: tensor for name, tensor in given.items() if tensor is not None}


def append_bounds(parameters: Mapping[str, Tensor]) -> tuple[Canonical, RowMap]:
    """Second half of `with_bounds`, for parameters whose shapes were checked."""
    row_map = _classify(parameters, "lb", "ub")
    q = parameters["q"]
    if row_map.size == 0:
        return Canonical(*(parameters.get(name) for name in DIMENSIONS)), row_map  # type: ignore[arg-type]  # q is there
    rows = [_unit_rows(index, q) for index in (row_map.lower, row_map.upper, row_map.equal)]
    G, h, A, b = _sides(row_map, rows, parameters.get("lb"), parameters.get("ub"))
    canonical = Canonical(
        parameters.get("Q"),
        q,
        _below(parameters.get("G"), G, rank=2),
        _below(parameters.get("h"), h, rank=1),
        _below(parameters.get("A"), A, rank=2),
        _below(parameters.get("b"), b, rank=1),
        parameters.get("entropy"),
    )
    return _keep_batch(canonical, batch_size(parameters, BOUNDED)), row_map


def split_rows(parameters: Mapping[str, Tensor]) -> tuple[Canonical, RowMap]:
    """Second half of `with_two_sided`, for parameters whose shapes were checked."""
    row_map = _classify(parameters, "l", "u")
    A = parameters.get("A")
    rows = [] if A is None else [A[..., index, :] for index in (row_map.lower, row_map.upper, row_map.equal)]
    sides = _sides(row_map, rows, parameters.get("l"), parameters.get("u"))
    canonical = Canonical(parameters.get("P"), parameters["q"], *sides)
    return _keep_batch(canonical, batch_size(parameters, TWO_SIDED)), row_map


def _classify(parameters: Mapping[str, Tensor], lower: str, upper: str) -> RowMap:
    """Check the two sides' values and decide what each row becomes."""
    q, l, u = parameters["q"], parameters.get(lower), parameters.get(upper)
    if l is not None:
        check_finite(f"problem.{lower}", l, "finite numbers or -inf", allowing=-torch.inf)
    if u is not None:
        check_finite(f"problem.{upper}", u, "finite numbers or +inf", allowing=torch.inf)
    own_m, own_p = (parameters[name].shape[-1] if name in parameters else 0 for name in ("h", "b"))
    some = l if l is not None else u
    if some is None:
        none = torch.empty(0, dtype=torch.int64, device=q.device)
        return RowMap(size=0, own_m=own_m, own_p=own_p, lower=none, upper=none, equal=none)
    nothing = q.new_zeros(some.shape[-1], dtype=torch.bool)
    has_lower = nothing if l is None else _in_some_problem(torch.isfinite(l))
    has_upper = nothing if u is None else _in_some_problem(torch.isfinite(u))
    equal = nothing
    if l is not None and u is not None:
        crossed = l > u
        if bool(crossed.any()):
            where = torch.nonzero(crossed)[0].tolist()
            low, high = (side.expand_as(crossed)[tuple(where)].item() for side in (l, u))
            raise ProblemError(f"problem.{lower}", f"{low} > {upper} = {high} at {where}", f"{lower} <= {upper}")
        equal = ~_in_some_problem(l != u)
    return RowMap(
        size=some.shape[-1],
        own_m=own_m,
        own_p=own_p,
        lower=torch.nonzero(has_lower & ~equal).flatten(),
        upper=torch.nonzero(has_upper & ~equal).flatten(),
        equal=torch.nonzero(equal).flatten(),
    )


def _in_some_problem(claim: Tensor) -> Tensor:
    return claim if claim.ndim == 1 else claim.any(dim=0)


def _unit_rows(index: Tensor, q: Tensor) -> Tensor:
    rows = q.new_zeros(len(index), q.shape[-1])
    return rows.scatter_(1, index.unsqueeze(1), 1.0)


def _sides(
    row_map: RowMap, rows: Sequence[Tensor], l: Tensor | None, u: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """G, h, A, b of the two-sided rows; `rows` are those at lower bounds, at upper bounds, and of equalities."""
    G, h, A, b = None, None, None, None
    if l is not None and len(row_map.lower):
        G, h = -rows[0], -l[..., row_map.lower]
    if u is not None and len(row_map.upper):
        G, h = _below(G, rows[1], rank=2), _below(h, u[..., row_map.upper], rank=1)
    if l is not None and u is not None and len(row_map.equal):
        A, b = rows[2], 0.5 * (l + u)[..., row_map.equal]
    return G, h, A, b


def _below(upper: Tensor | None, lower: Tensor | None, *, rank: int) -> Tensor | None:
    if upper is None or lower is None:
        return lower if upper is None else upper
    return stack([upper, lower], rank=rank)


def stack(parts: Sequence[Tensor], *, rank: int) -> Tensor:
    """Put rows below one another; those without a batch dimension are expanded where others have one."""
    batch = next((part.shape[:1] for part in parts if part.ndim > rank), ())
    return torch.cat([part.expand(*batch, *part.shape[-rank:]) for part in parts], dim=-rank)


def _keep_batch(canonical: Canonical, batch: int | None) -> Canonical:
    """Expand q where nothing else keeps the batch dimension: bounds that are infinite in every problem are dropped."""
    given = {name: tensor for name, tensor in canonical._asdict().items() if tensor is not None}
    if batch is None or batch_size(given, DIMENSIONS) is not None:
        return canonical
    return canonical._replace(q=canonical.q.expand(batch, -1))
