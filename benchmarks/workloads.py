"""The problems on which everybody is timed, drawn afresh from a seed by the recipes of the papers."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from argrad.problems import QP

Kind = Literal["qp", "lp", "tv", "sparsemax", "softmax"]

TV_WEIGHT = 1.0
"""Weight of ‖Dz‖₁ in the layer of total variation,"""

TV_CURVATURE = 1e-4
"""and the curvature of its epigraph variables, without which Q would be singular."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A batch of problems and the cotangent of its solution.

    Args:
        name: What a table calls it.
        kind: `qp` and `lp` have the parameters Q q G h A b of `argrad.problems.QP`; `tv` has y, D, `sparsemax` y, u and
            `softmax` y, A, b, G, h.
        parameters: float64; with a batch dimension unless shared by the batch.
        wrt: Parameters whose gradient is asked for.
        grad_z: ∂loss/∂z, `(B, n)`; `(n,)` where no parameter is batched.
        known: Parts of the solution that the recipe knows, by the names z nu lam, to check or spare the reference.
    """

    name: str
    kind: Kind = "qp"
    parameters: dict[str, Tensor]
    wrt: tuple[str, ...]
    grad_z: Float[Tensor, "*batch n"]
    known: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def problem(self) -> QP:
        """The parameters as a QP, if they are one."""
        return QP(**self.parameters)


class _Draw:
    """Random tensors, float64, from a seed and the name of what is drawn."""

    def __init__(self, seed: int, name: str) -> None:
        self._generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=self._generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self._generator)

    def subset(self, size: int, of: int) -> Tensor:
        """A mask of length `of` with `size` true entries."""
        mask = torch.zeros(of, dtype=torch.bool)
        mask[torch.randperm(of, generator=self._generator)[:size]] = True
        return mask


def optnet(n: int, batch: int, *, seed: int, m: int | None = None) -> Workload:
    """Draw OptNet's random QPs with inequalities, and no equalities.

    Q = UᵀU + 1e-3 I with U uniform on (0, 1), G and z₀ normal, h = Gz₀ + s₀ with s₀ uniform, so that z₀ is feasible.

    Args:
        n: Variables.
        batch: Problems.
        seed: Of the generator; results name it.
        m: Inequalities, by default as many as variables.

    References:
        Amos & Kolter, OptNet, ICML 2017, footnote 4.
    """
    m = n if m is None else m
    size = f"n = m = {n}" if m == n else f"n = {n}, m = {m}"
    name = f"{size}, batch {batch}"
    draw = _Draw(seed, f"optnet {name}")
    factor, G = draw.uniform(batch, n, n), draw.normal(batch, m, n)
    parameters = {
        "Q": factor.mT @ factor + 1e-3 * torch.eye(n, dtype=torch.float64),
        "q": draw.normal(batch, n),
        "G": G,
        "h": _times(G, draw.normal(batch, n)) + draw.uniform(batch, m),
    }
    return Workload(name=name, parameters=parameters, wrt=("Q", "q", "G", "h"), grad_z=draw.normal(batch, n))


def two_variables() -> Workload:
    """One problem of two variables: its solve costs next to nothing, so that a call shows what surrounds it."""
    parameters = {
        "Q": torch.tensor([[4.0, 1.0], [1.0, 2.0]], dtype=torch.float64),
        "q": torch.ones(2, dtype=torch.float64),
        "G": -torch.eye(2, dtype=torch.float64),
        "h": torch.zeros(2, dtype=torch.float64),
        "A": torch.ones(1, 2, dtype=torch.float64),
        "b": torch.ones(1, dtype=torch.float64),
    }
    grad_z = torch.tensor([1.0, 0.0], dtype=torch.float64)
    return Workload(name="2 variables, batch 1", parameters=parameters, wrt=tuple(parameters), grad_z=grad_z)


def altdiff(n: int, m: int, p: int, *, seed: int) -> Workload:
    """Draw Alt-Diff's dense quadratic layer: everything normal, Q = PᵀP; feasible since m + p ≤ n.

    References:
        Sun et al., Alternating Differentiation for Optimization Layers, ICLR 2023, section 5.1, table 1.
    """
    name = f"n = {n}, m = {m}, p = {p}"
    draw = _Draw(seed, f"altdiff {name}")
    factor = draw.normal(1, n, n)
    parameters = {
        "Q": factor.mT @ factor,
        "q": draw.normal(1, n),
        "G": draw.normal(1, m, n),
        "h": draw.normal(1, m),
        "A": draw.normal(1, p, n),
        "b": draw.normal(1, p),
    }
    return _summed(name, parameters)


def bpqp(n: int, m: int, *, seed: int, batch: int = 1) -> Workload:
    """Draw the BPQP slides' QPs: everything uniform, m equalities and m inequalities; none of these is active.

    References:
        Pan et al., BPQP, slides: tables "Small Scale" and "Large Scale".
    """
    name = f"QP {n}×{m}{_batch_words(batch)}"
    draw = _Draw(seed, f"bpqp {name}")
    factor, G, A = draw.uniform(batch, n, n), draw.uniform(batch, m, n), draw.uniform(batch, m, n)
    parameters = {
        "Q": factor.mT @ factor + 1e-3 * torch.eye(n, dtype=torch.float64),
        "q": draw.uniform(batch, n),
        "G": G,
        "h": _times(G, draw.uniform(batch, n)),
        "A": A,
        "b": draw.uniform(batch, m),
    }
    return _summed(name, parameters)


def bpqp_active(n: int, m: int, *, seed: int, batch: int = 1) -> Workload:
    """Draw QPs of the same size and Q whose solution is chosen first, with half of the inequalities active."""
    name = f"QP {n}×{m}, half active{_batch_words(batch)}"
    draw = _Draw(seed, f"bpqp {name}")
    factor, G, A = draw.uniform(batch, n, n), draw.uniform(batch, m, n), draw.uniform(batch, m, n)
    Q = factor.mT @ factor + 1e-3 * torch.eye(n, dtype=torch.float64)
    z, nu = draw.uniform(batch, n), draw.normal(batch, m)
    active = torch.stack([draw.subset(m // 2, m) for _ in range(batch)])
    lam, slack = (0.1 + draw.uniform(batch, m)) * active, (0.1 + draw.uniform(batch, m)) * ~active
    parameters = {
        "Q": Q,
        "q": -(_times(Q, z) + _times(A.mT, nu) + _times(G.mT, lam)),
        "G": G,
        "h": _times(G, z) + slack,
        "A": A,
        "b": _times(A, z),
    }
    return _summed(name, parameters, known={"z": z, "nu": nu, "lam": lam})


def bpqp_lp(n: int, m: int, *, seed: int, curvature: float = 1e-6) -> Workload:
    """Draw the BPQP slides' "LP", which is a QP with Q = 1e-6 I; by itself it has no vertex.

    References:
        Pan et al., BPQP, slides: table "Small Scale".
    """
    name = f"“LP” {n}×{m}, Q = {curvature:.0e} I"
    draw = _Draw(seed, f"bpqp {name}")
    signed, z0, G, A = draw.normal(1, m), draw.uniform(1, n), draw.uniform(1, m, n), draw.uniform(1, m, n)
    parameters = {
        "Q": curvature * torch.eye(n, dtype=torch.float64).unsqueeze(0),
        "q": -_times(G.mT, (-signed).clamp(min=0)),
        "G": G,
        "h": _times(G, z0) + signed.clamp(min=0),
        "A": A,
        "b": _times(A, z0),
    }
    return _summed(name, parameters)


def vertex_lp(n: int, m: int, p: int, batch: int, *, seed: int) -> Workload:
    """Draw LPs with a unique, nondegenerate vertex that is chosen first: n − p of the m inequalities are active.

    The multipliers are away from 0 and so are the other slacks: z moves with b, h, A and G, and not with q.
    """
    name = f"vertex LP {n} / {m} / {p}, batch {batch}"
    draw = _Draw(seed, f"lp {name}")
    G, A, z, nu = draw.normal(batch, m, n), draw.normal(batch, p, n), draw.normal(batch, n), draw.normal(batch, p)
    active = torch.stack([draw.subset(n - p, m) for _ in range(batch)])
    lam, slack = (0.1 + draw.uniform(batch, m)) * active, (0.1 + draw.uniform(batch, m)) * ~active
    parameters = {
        "q": -(_times(A.mT, nu) + _times(G.mT, lam)),
        "G": G,
        "h": _times(G, z) + slack,
        "A": A,
        "b": _times(A, z),
    }
    known = {"z": z, "nu": nu, "lam": lam}
    grad_z = draw.normal(batch, n)
    return Workload(name=name, kind="lp", parameters=parameters, wrt=("G", "h", "A", "b"), grad_z=grad_z, known=known)


def total_variation(points: int, batch: int, *, seed: int) -> Workload:
    """Draw noisy steps to be denoised by ½‖z − y‖² + ‖Dz‖₁ with a learned D near the matrix of differences.

    As a QP in (z, t) with |Dz| ≤ t it has 2·points − 1 variables and 2·points − 2 inequalities; D's gradient is asked
    for, and D is shared by the batch.

    References:
        Amos & Kolter, OptNet, ICML 2017, section 4.2.
    """
    name = f"TV of {points} points, batch {batch}"
    draw = _Draw(seed, name)
    jumps = 2.0 * draw.normal(batch, points) * (draw.uniform(batch, points) < 0.06)
    eye = torch.eye(points, dtype=torch.float64)
    D = eye[1:] - eye[:-1] + 0.02 * draw.normal(points - 1, points)
    parameters = {"y": jumps.cumsum(-1) + 0.3 * draw.normal(batch, points), "D": D}
    return Workload(name=name, kind="tv", parameters=parameters, wrt=("D",), grad_z=draw.normal(batch, points))


def sparsemax(n: int, *, seed: int) -> Workload:
    """Draw Alt-Diff's constrained sparsemax: ‖x − y‖² over 1ᵀx = 1, 0 ≤ x ≤ u; gradients of y and u.

    References:
        Sun et al., ICLR 2023, section 5.1 and table 4.
    """
    name = f"sparsemax {n}"
    draw = _Draw(seed, name)
    parameters = {"y": draw.normal(1, n), "u": 0.02 * (0.5 + draw.uniform(1, n))}
    grad_z = draw.normal(1, n)
    return Workload(name=name, kind="sparsemax", parameters=parameters, wrt=("y", "u"), grad_z=grad_z)


def softmax(n: int, m: int, p: int, *, seed: int) -> Workload:
    """Draw Alt-Diff's constrained softmax: −yᵀx + Σ x log x over Ax = b, Gx ≤ h; gradients of y, b, h.

    References:
        Sun et al., ICLR 2023, table 6.
    """
    name = f"softmax {n} / {m} / {p}"
    draw = _Draw(seed, name)
    A, G, x0 = draw.normal(1, p, n), draw.normal(1, m, n), draw.uniform(1, n)
    parameters = {
        "y": draw.uniform(1, n),
        "A": A,
        "b": _times(A, x0),
        "G": G,
        "h": _times(G, x0) + 0.3 * draw.uniform(1, m),
    }
    grad_z = draw.normal(1, n)
    return Workload(name=name, kind="softmax", parameters=parameters, wrt=("y", "b", "h"), grad_z=grad_z)


def _summed(name: str, parameters: dict[str, Tensor], *, known: Mapping[str, Tensor] | None = None) -> Workload:
    """Loss Σ z, gradients of the vectors."""
    grad_z = torch.ones_like(parameters["q"])
    return Workload(name=name, parameters=parameters, wrt=("q", "h", "b"), grad_z=grad_z, known=known or {})


def _batch_words(batch: int) -> str:
    return f", batch {batch}" if batch > 1 else ""


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
