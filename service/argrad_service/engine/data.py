"""A batch of QPs as the solvers see it: float64, symmetric, stacked rows, every block present."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from argrad.problems import QP
from argrad_service.engine.prepared import Prepared, kept


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """M x for each problem; M is `(1 or B, r, c)`, x `(B, c)`, the result `(B, r)`."""
    if matrix.shape[0] == 1:
        return vector @ matrix[0].transpose(0, 1)
    return torch.bmm(matrix, vector.unsqueeze(-1)).squeeze(-1)


def matvec_t(matrix: Tensor, vector: Tensor) -> Tensor:
    """Mᵀ y for each problem; M is `(1 or B, r, c)`, y `(B, r)`, the result `(B, c)`."""
    if matrix.shape[0] == 1:
        return vector @ matrix[0]
    return torch.bmm(vector.unsqueeze(-2), matrix).squeeze(-2)


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Inner product of each problem, `(B,)`."""
    return (left * right).sum(-1)


def inf_norm(vector: Tensor) -> Tensor:
    """Largest absolute entry of each problem, `(B,)`; 0 of an empty vector."""
    if vector.shape[-1] == 0:
        return vector.new_zeros(vector.shape[:-1])
    return vector.abs().amax(-1)


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """Rows of a batch; a shared block (leading dimension 1) stays as it is."""
    return tensor if tensor.shape[0] == 1 else tensor[index]


def cut(tensor: Tensor, start: int, stop: int) -> Tensor:
    """A copy of the problems from start to stop, so that the rest can be freed; a shared block stays as it is."""
    return tensor if tensor.shape[0] == 1 else tensor[start:stop].clone()


@dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """½zᵀQz + qᵀz subject to C₁z = d₁ (the first p rows), C₂z ≤ d₂ (the other m).

    With τ the objective has τ Σ zᵢ log zᵢ too, which implies z ≥ 0.

    Matrices have a leading dimension 1 where they are shared by the batch, vectors always B.

    Args:
        Q: `(1 or B, n, n)`, symmetric.
        q: `(B, n)`.
        C: `(1 or B, p + m, n)`, equalities first.
        d: `(B, p + m)`, finite: a row that cannot bind (h = +inf) is 0·z ≤ 1.
        p: Number of equalities.
        is_linear: Whether Q was absent; it is zero then.
        tau: `(B,)`, τ > 0, or None without entropy.
        full_G: With entropy, G as it was given: in C the rows that z ≥ 0 implies cannot bind.
        prepared: What solvers keep for the next solve with the same Q and C.
        has_free: Whether h was +inf in some row, or implied by an entropy.
    """

    Q: Tensor
    q: Tensor
    C: Tensor
    d: Tensor
    p: int
    is_linear: bool = False
    tau: Tensor | None = None
    full_G: Tensor | None = None  # noqa: N815 - the field's letter
    prepared: Prepared | None = None
    has_free: bool = False

    @property
    def kind(self) -> str:
        """What a solver must be able to take: `qp`, `lp` or `entropy`."""
        if self.tau is not None:
            return "entropy"
        return "lp" if self.is_linear else "qp"

    @property
    def n(self) -> int:
        """Number of variables."""
        return self.q.shape[-1]

    @property
    def m(self) -> int:
        """Number of inequalities."""
        return self.d.shape[-1] - self.p

    @property
    def B(self) -> int:
        """Number of problems."""
        return self.q.shape[0]

    @property
    def A(self) -> Tensor:
        """Equality rows."""
        return self.C[:, : self.p]

    @property
    def G(self) -> Tensor:
        """Inequality rows."""
        return self.C[:, self.p :]

    @property
    def given_G(self) -> Tensor:
        """Inequality rows as they were given, whose slacks are the caller's."""
        return self.G if self.full_G is None else self.full_G

    @property
    def b(self) -> Tensor:
        """Right-hand sides of the equalities."""
        return self.d[:, : self.p]

    @property
    def h(self) -> Tensor:
        """Right-hand sides of the inequalities."""
        return self.d[:, self.p :]

    def select(self, index: Tensor) -> Data:
        """The sub-batch of the problems named by index."""
        Q, C = take(self.Q, index), take(self.C, index)
        if self.tau is None or self.full_G is None:
            return replace(self, Q=Q, C=C, q=self.q[index], d=self.d[index])
        tau, full_G = self.tau[index], take(self.full_G, index)
        return replace(self, Q=Q, C=C, q=self.q[index], d=self.d[index], tau=tau, full_G=full_G)

    def cut(self, start: int, stop: int) -> Data:
        """Copies of the problems from start to stop, of more than one."""
        tau = None if self.tau is None else cut(self.tau, start, stop)
        full_G = None if self.full_G is None else cut(self.full_G, start, stop)
        Q, q, C, d = (cut(t, start, stop) for t in (self.Q, self.q, self.C, self.d))
        return replace(self, Q=Q, q=q, C=C, d=d, tau=tau, full_G=full_G)


def stack(problem: QP, prepared: Prepared | None = None) -> Data:
    """Symmetrise Q, stack the rows and make rows that cannot bind inert: h = +inf, or implied by an entropy's z ≥ 0.

    Args:
        problem: float64, on the device where it is to be solved.
        prepared: Keeps Q and C where the parameters that they are made of are known.
    """
    batch = problem.batch_size or 1
    n = problem.n

    def matrix(tensor: Tensor | None) -> Tensor:
        if tensor is None:
            return problem.q.new_zeros(1, 0, n)
        return tensor if tensor.ndim == 3 else tensor.unsqueeze(0)

    def vector(tensor: Tensor | None) -> Tensor:
        if tensor is None:
            return problem.q.new_zeros(batch, 0)
        return (
            tensor
            if tensor.ndim == 2 and len(tensor) == batch
            else tensor.reshape(-1, tensor.shape[-1]).expand(batch, -1)
        )

    if problem.Q is None:
        Q = problem.q.new_zeros(1, n, n)
    else:
        Q = kept(prepared, "symmetric", [problem.Q], lambda: _symmetric(matrix(problem.Q)))
    G, h = matrix(problem.G), vector(problem.h)
    full_G = G
    free = h == torch.inf if problem.entropy is None else (h == torch.inf) | _is_implied(G, h)
    has_free = bool(free.any())
    if has_free:
        shared = free[:1] if bool((free == free[:1]).all()) else free
        G = torch.where(shared.unsqueeze(-1), torch.zeros_like(G), G)
        h = torch.where(free, torch.ones_like(h), h)
    # Rows that cannot bind depend on more than the matrices: nothing is kept where there are some.
    made_of = [t for t in (problem.A, problem.G) if t is not None]
    C = kept(None if has_free or not made_of else prepared, "rows", made_of, lambda: _below(matrix(problem.A), G))
    d = h if problem.b is None else torch.cat([vector(problem.b), h], dim=1)
    data = Data(
        Q=Q,
        q=vector(problem.q),
        C=C,
        d=d,
        p=problem.p,
        is_linear=problem.Q is None,
        prepared=prepared,
        has_free=has_free,
    )
    if problem.entropy is None:
        return data
    return replace(data, tau=problem.entropy.reshape(-1).expand(batch), full_G=full_G)


def _symmetric(Q: Tensor) -> Tensor:
    return (Q + Q.transpose(1, 2)).mul_(0.5)


def _below(A: Tensor, G: Tensor) -> Tensor:
    """The rows of both, `(1 or B, p + m, n)`; the only ones there are as they are."""
    if A.shape[1] == 0:
        return G
    if G.shape[1] == 0:
        return A
    count = max(A.shape[0], G.shape[0])
    return torch.cat([A.expand(count, -1, -1), G.expand(count, -1, -1)], dim=1)


def _is_implied(G: Tensor, h: Tensor) -> Tensor:
    """Rows −a zᵢ ≤ h with a, h ≥ 0, which z ≥ 0 implies, `(B, m)`."""
    return (G <= 0).all(-1) & ((G != 0).sum(-1) <= 1) & (h >= 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Residuals:
    """How far a point is from the KKT conditions, `(B,)` each, in the problem's own units.

    Args:
        primal: max(‖C₁z − d₁‖∞, ‖(C₂z − d₂)₊‖∞).
        dual: ‖Qz + q + Cᵀy‖∞, with entropy ‖Qz + q + τ(1 + log z) + Cᵀy‖∞.
        gap: |zᵀQz + qᵀz + dᵀy|, with entropy |zᵀ(Qz + q + τ(1 + log z)) + dᵀy|, the duality gap.
        objective: ½zᵀQz + qᵀz, with entropy + τ Σ zᵢ log zᵢ.
        scaled: Largest of the first three, each divided by 1 + the largest of its terms.
    """

    primal: Tensor
    dual: Tensor
    gap: Tensor
    objective: Tensor
    scaled: Tensor


def residuals(data: Data, z: Tensor, y: Tensor) -> Residuals:
    """Judge a point z `(B, n)` with multipliers y = [ν; λ] `(B, p + m)`, λ ≥ 0."""
    Qz, Cz, Cty = matvec(data.Q, z), matvec(data.C, z), matvec_t(data.C, y)
    violation = Cz - data.d
    violation = torch.cat([violation[:, : data.p].abs(), violation[:, data.p :].clamp(min=0)], dim=1)
    gradient, q = Qz + data.q + Cty, data.q
    zQz, qz, dy = dot(z, Qz), dot(data.q, z), dot(data.d, y)
    objective = 0.5 * zQz + qz
    if data.tau is not None:
        slope, is_small = entropy_slope(data.tau, z)
        # Below the smallest z that a float64 holds with all digits only the sign of what is missing can be judged.
        gradient = torch.where(is_small, (gradient + slope).clamp(max=0), gradient + slope)
        q = torch.where(is_small, q, q + slope)
        qz = qz + dot(slope, z)
        objective = objective + dot(slope, z) - data.tau * z.sum(-1)
        violation = torch.cat([violation, (-z).clamp(min=0)], dim=1)
    primal, dual = inf_norm(violation), inf_norm(gradient)
    gap = (zQz + qz + dy).abs()
    primal_scale = 1 + torch.maximum(inf_norm(Cz), inf_norm(data.d))
    dual_scale = 1 + torch.maximum(torch.maximum(inf_norm(Qz), inf_norm(q)), inf_norm(Cty))
    gap_scale = 1 + torch.maximum(torch.maximum(zQz.abs(), qz.abs()), dy.abs())
    scaled = torch.maximum(torch.maximum(primal / primal_scale, dual / dual_scale), gap / gap_scale)
    scaled = torch.nan_to_num(scaled, nan=torch.inf)
    return Residuals(primal=primal, dual=dual, gap=gap, objective=objective, scaled=scaled)


def entropy_slope(tau: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """τ(1 + log z), with the smallest normal float64 in the place of a smaller z; and where z is that small.

    Args:
        tau: `(B,)`.
        z: `(B, n)`.
    """
    smallest = torch.finfo(z.dtype).tiny
    return tau.unsqueeze(-1) * (1 + z.clamp(min=smallest).log()), z <= smallest
