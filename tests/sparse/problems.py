"""Sparse QPs for the tests, drawn from a seed, and central differences."""

from __future__ import annotations

import warnings

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

NAMES = ("Q", "q", "G", "h", "A", "b")
MATRICES = ("Q", "G", "A")


def draw(n=40, m=30, p=5, *, nnz=5, seed=0) -> dict:
    """A strictly convex feasible QP with a banded Q and rows of nnz entries, as SciPy CSR matrices and arrays."""
    rng = np.random.default_rng(seed)
    L = sp.diags([1 + rng.random(n), rng.normal(size=n - 1), rng.normal(size=n - 3)], [0, -1, -3], format="csr")
    Q = (L @ L.T + 0.1 * sp.eye(n)).tocsr()

    def rows(count: int) -> sp.csr_matrix:
        width = min(n, 4 * nnz)
        starts = rng.integers(0, n - width + 1, size=count)
        columns = np.concatenate([[], *(s + np.sort(rng.choice(width, nnz, replace=False)) for s in starts)])
        return sp.csr_matrix((rng.normal(size=count * nnz), columns, np.arange(0, count * nnz + 1, nnz)), (count, n))

    G, A, z = rows(m), rows(p), rng.normal(size=n)
    Q.sort_indices()
    return {"Q": Q, "q": rng.normal(size=n), "G": G, "h": G @ z + rng.random(m), "A": A, "b": A @ z}


def csr(matrix) -> Tensor:
    """A SciPy matrix as a CSR tensor of torch."""
    matrix = matrix.tocsr()
    matrix.sort_indices()
    parts = (matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64), matrix.data)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled")  # torch 2.11, once
        return torch.sparse_csr_tensor(*map(torch.from_numpy, parts), size=matrix.shape, check_invariants=True)


def tensors(problem: dict) -> dict[str, Tensor]:
    """The problem for `argrad.solve_qp`."""
    return {name: csr(value) if name in MATRICES else torch.from_numpy(value) for name, value in problem.items()}


def dense(problem: dict) -> dict[str, Tensor]:
    """The problem with dense matrices."""
    return {
        name: torch.from_numpy(value.toarray() if name in MATRICES else value.copy()) for name, value in problem.items()
    }


def parts(problem: dict) -> dict[str, Tensor]:
    """The problem as kind `sparse_qp` has it."""
    found = {}
    for name, value in problem.items():
        if name in MATRICES:
            found[f"{name}_indptr"] = torch.from_numpy(value.indptr.astype(np.int64))
            found[f"{name}_indices"] = torch.from_numpy(value.indices.astype(np.int64))
            found[f"{name}_values"] = torch.from_numpy(value.data.copy())
        else:
            found[name] = torch.from_numpy(value.copy())
    return found


def tracked(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leaves that record gradients."""
    return {name: tensor.detach().requires_grad_() for name, tensor in given.items()}


def moved(given: dict[str, Tensor], name: str, direction: Tensor, step: float) -> dict[str, Tensor]:
    """The parameters with one of them moved along a direction, of a matrix along its values."""
    tensor = given[name].detach()
    if tensor.layout == torch.strided:
        return given | {name: tensor + step * direction}
    values = tensor.values() + step * direction
    pattern = (tensor.crow_indices(), tensor.col_indices())
    return given | {name: torch.sparse_csr_tensor(*pattern, values, tensor.shape, check_invariants=False)}


def values_of(tensor: Tensor) -> Tensor:
    """Stored entries."""
    return tensor if tensor.layout == torch.strided else tensor.values()
