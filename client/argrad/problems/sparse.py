"""Sparse quadratic programs: matrices as CSR triplets, and quantities that live on their patterns alone.

    minimise ½zᵀQz + qᵀz   subject to   Az = b (ν),   Gz ≤ h (λ ≥ 0),   s = h − Gz

Kind `sparse_qp`, one problem a call, nothing batched. A matrix M with r rows is three parameters:

    M_indptr  (r + 1,)  int64      entries of row i stand at M_indptr[i] … M_indptr[i + 1] − 1
    M_indices (nnz,)    int64      their columns, ascending and each once in a row
    M_values  (nnz,)    float      what is differentiated; the pattern is not, and no gradient leaves it

    ∂Q_ij = ½(dz_i z_j + z_i dz_j)     ∂G_ij = μ_i z_j + λ_i dz_j     ∂A_ij = dν_i z_j + ν_i dz_j   for stored (i, j).

Q is read as its symmetric part ½(Q + Qᵀ): both triangles are stored, or the missing one counts as zero.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from argrad.problems.form import Blocks, Form
from argrad.problems.qp import QP, Adjoint, Solution
from argrad.problems.shapes import Dimensions, check_names

MATRICES = {"Q": ("n", "q"), "G": ("m", "h"), "A": ("p", "b")}
"""Of each matrix the symbol of its number of rows, and the vector that has as many entries."""

VECTORS = {"q": ("n",), "h": ("m",), "b": ("p",)}

SPARSE: dict[str, tuple[str, ...]] = {
    "q": ("n",),
    "Q_indptr": ("n + 1",),
    "Q_indices": ("nnz",),
    "Q_values": ("nnz",),
    "G_indptr": ("m + 1",),
    "G_indices": ("nnz",),
    "G_values": ("nnz",),
    "h": ("m",),
    "A_indptr": ("p + 1",),
    "A_indices": ("nnz",),
    "A_values": ("nnz",),
    "b": ("p",),
}
"""Dimensions of each parameter of kind `sparse_qp`."""

PATTERN = frozenset(name for name in SPARSE if name.endswith(("_indptr", "_indices")))
"""Parameters that say where entries are: int64, without gradients."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseMatrix:
    """A matrix in CSR form.

    Args:
        indptr: Where each row begins.
        indices: Columns, ascending in each row.
        values: Entries.
        columns: Number of columns.
    """

    indptr: Int[Tensor, " r+1"]
    indices: Int[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]
    columns: int

    @property
    def row_indices(self) -> Int[Tensor, " nnz"]:
        """Row of each entry."""
        return row_indices(self.indptr)

    def parts(self) -> dict[str, Tensor]:
        """The three tensors, by the ends of their names."""
        return {"indptr": self.indptr, "indices": self.indices, "values": self.values}


def row_indices(indptr: Int[Tensor, " r+1"]) -> Int[Tensor, " nnz"]:
    """Row of each entry of a CSR pattern."""
    if indptr.device.type == "cpu":  # NumPy's is ten times faster than torch's
        pointers = indptr.numpy()
        return torch.from_numpy(np.repeat(np.arange(len(pointers) - 1), np.diff(pointers)))
    rows = torch.arange(len(indptr) - 1, device=indptr.device)
    return rows.repeat_interleave(indptr.diff())


@dataclass(frozen=True, kw_only=True, eq=False)
class Constants:
    """Matrices that many problems have, checked when they are made and never changed.

    What depends on them alone is found once, and kept under this very object.

    Args:
        matrices: `Q`, `G`, `A` by name.
    """

    matrices: Mapping[str, SparseMatrix]

    def beside(self, vectors: Mapping[str, Tensor]) -> Blocks:
        """All parameters of a problem, in order."""
        return _in_order(self.matrices, vectors)


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseQP(QP):
    """One QP with sparse matrices; Q, G and A of the base are None, and `matrices` has those that are there.

    Args:
        matrices: `Q`, `G`, `A` by name; without Q it is a linear program.
        constants: Where they are known to be those of other problems too.
    """

    matrices: Mapping[str, SparseMatrix] = field(default_factory=dict)
    constants: Constants | None = None

    def __post_init__(self) -> None:
        """Nothing is checked: `sparse_parsing` has."""

    def parameters(self) -> dict[str, Tensor]:
        """Vectors and the parts of matrices, by name."""
        vectors = {name: vector for name in VECTORS if (vector := getattr(self, name)) is not None}
        return _in_order(self.matrices, vectors)

    @property
    def nnz(self) -> int:
        """Stored entries of all matrices."""
        return sum(len(matrix.values) for matrix in self.matrices.values())

    def check_finite(self) -> None:
        """See `QP`; nothing to do for what `parse_sparse` made."""


def _in_order(matrices: Mapping[str, SparseMatrix], vectors: Mapping[str, Tensor]) -> Blocks:
    found = {f"{name}_{part}": tensor for name, matrix in matrices.items() for part, tensor in matrix.parts().items()}
    found |= vectors
    return {name: found[name] for name in SPARSE if name in found}


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseForm(Form):
    """Kind `sparse_qp`.

    Args:
        sparse: The problem.
        given: The parameters of a QP whose matrices were sparse tensors of torch, from which this one was made.
    """

    sparse: SparseQP
    given: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def dimensions(self) -> Dimensions:
        """See `Form`."""
        return SPARSE

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that have gradients: values and vectors."""
        return tuple(name for name in self.parameters if name not in PATTERN)

    @property
    def block_sizes(self) -> dict[str, int]:
        """See `Form`: z nu lam s."""
        return {"z": self.sparse.n, "nu": self.sparse.p, "lam": self.sparse.m, "s": self.sparse.m}

    def solution(self, solution: Solution) -> Blocks:
        """See `Form`."""
        return self._without_batch(solution.blocks())

    def adjoint(self, adjoint: Adjoint, solution: Solution) -> Blocks:  # noqa: ARG002 - linear in this form
        """See `Form`: z nu mu."""
        return self._without_batch(adjoint.blocks())

    def gradients(self, solution: Solution, adjoint: Adjoint, wrt: Collection[str]) -> Blocks:
        """See `Form`; those of matrices on their patterns."""
        check_names("wrt", wrt, self.names)
        blocks, pulled = self.solution(solution), self.adjoint(adjoint, solution)
        return pattern_gradients(self.parameters, blocks, pulled, wrt)

    def solution_tangents(self, tangents: Solution, solution: Solution) -> Blocks:  # noqa: ARG002 - linear in this form
        """See `Form`."""
        return self._without_batch(tangents.blocks())

    def upstream(
        self,
        cotangents: Mapping[str, Tensor],
        solution: Solution | None = None,  # noqa: ARG002 - linear in this form
    ) -> Blocks:
        """See `Form`."""
        return self._cotangent_blocks(cotangents)

    def tangents(self, tangents: Mapping[str, Tensor]) -> Blocks:
        """See `Form`; those of matrices on their patterns."""
        self._check_tangents(tangents)
        return dict(tangents)

    def point(self, blocks: Mapping[str, Tensor], *, section: str = "solution") -> Solution:
        """See `Form`."""
        given = self._point_blocks(section, blocks)
        if "s" not in given:
            given["s"] = self._slack(given["z"])
        return Solution(**given)

    def _slack(self, z: Tensor) -> Tensor:
        G, h = self.sparse.matrices.get("G"), self.sparse.h
        if G is None or h is None:
            return z.new_zeros(*z.shape[:-1], 0)
        products = G.values * z[..., G.indices]
        return h - torch.zeros_like(h).expand(*z.shape[:-1], -1).index_add(-1, G.row_indices, products)


def pattern_gradients(
    parameters: Mapping[str, Tensor],
    solution: Mapping[str, Tensor],
    adjoint: Mapping[str, Tensor],
    wrt: Collection[str],
) -> Blocks:
    """Gradients of values and vectors, formed by plain torch operations; the formulas are at the head of this file.

    Args:
        parameters: Of the problem.
        solution: z nu lam, `(·)`.
        adjoint: z nu mu, `(·)` or `(k, ·)`.
        wrt: Parameters whose gradients are wanted.
    """
    z, dz = solution["z"], adjoint["z"]
    duals = {"G": (solution["lam"], adjoint["mu"]), "A": (solution["nu"], adjoint["nu"])}
    vectors = {"q": dz, "h": -adjoint["mu"], "b": -adjoint["nu"]}
    formed: Blocks = {}
    for name in wrt:
        if name in vectors:
            formed[name] = vectors[name]
            continue
        matrix = name.removesuffix("_values")
        row, column = row_indices(parameters[f"{matrix}_indptr"]), parameters[f"{matrix}_indices"]
        if matrix == "Q":
            formed[name] = 0.5 * (dz[..., row] * z[column] + z[row] * dz[..., column])
        else:
            y, dy = duals[matrix]
            formed[name] = dy[..., row] * z[column] + y[row] * dz[..., column]
    return formed
