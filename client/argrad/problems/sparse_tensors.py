"""QPs whose matrices are sparse tensors of torch: to the parameters of kind `sparse_qp` and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from argrad.errors import ProblemError
from argrad.problems.form import Blocks, Form
from argrad.problems.shapes import shape_of
from argrad.problems.sparse import MATRICES, SPARSE, VECTORS, SparseForm, row_indices
from argrad.problems.sparse_parsing import parse_sparse


def is_sparse(tensors: Mapping[str, Tensor | None]) -> bool:
    """Whether a matrix among the parameters of a QP is a sparse tensor."""
    return any(isinstance(t, Tensor) and t.layout != torch.strided for t in tensors.values())


def take_apart(tensors: Mapping[str, Tensor | None]) -> Blocks:
    """The parameters of kind `sparse_qp`, from those of a QP whose matrices are sparse tensors of torch.

    A dense matrix beside sparse ones counts as one whose entries are all stored. Autograd sees through: a gradient of
    values becomes one of the tensor that was given, on its pattern.

    Args:
        tensors: Q q G h A b; CSR, COO or CSC, without a batch dimension.

    Raises:
        ProblemError: another layout, another rank, another number of columns, or bounds.
    """
    parts: Blocks = {}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if name not in (*MATRICES, *VECTORS):
            wanted = "Q q G h A b alone: bounds are rows of G"
            raise ProblemError(f"problem.{name}", "a tensor beside sparse matrices", wanted)
        if name in VECTORS:
            parts[name] = tensor.to_dense() if tensor.layout != torch.strided else tensor
            continue
        q = tensors.get("q")
        n = tensor.shape[-1] if q is None else q.shape[-1]
        if tensor.ndim != 2 or tensor.shape[1] != n or (name == "Q" and tensor.shape[0] != n):
            wanted = f"({'n' if name == 'Q' else MATRICES[name][0]}, n) with n = {n}: sparse problems have no batch"
            raise ProblemError(f"problem.{name}", f"shape {shape_of(tensor)}", wanted)
        parts |= {f"{name}_{part}": value for part, value in _triplet(name, tensor).items()}
    return {name: parts[name] for name in SPARSE if name in parts}


def _triplet(name: str, tensor: Tensor) -> Blocks:
    rows, columns = tensor.shape
    if tensor.layout == torch.sparse_csr:
        return {
            "indptr": tensor.crow_indices().to(torch.int64),
            "indices": tensor.col_indices().to(torch.int64),
            "values": tensor.values(),
        }
    if tensor.layout == torch.strided:
        every = torch.arange(columns, device=tensor.device).repeat(rows)
        return _sorted(
            torch.arange(rows, device=tensor.device).repeat_interleave(columns), every, tensor.flatten(), rows
        )
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        row, column = tensor.indices()
        return _sorted(row, column, tensor.values(), rows)
    if tensor.layout == torch.sparse_csc:
        column = row_indices(tensor.ccol_indices().to(torch.int64))
        row = tensor.row_indices().to(torch.int64)
        order = torch.argsort(row * columns + column)
        return _sorted(row[order], column[order], tensor.values()[order], rows)
    raise ProblemError(
        f"problem.{name}", f"layout {tensor.layout}", "torch.sparse_csr, sparse_coo, sparse_csc or dense"
    )


def _sorted(row: Tensor, column: Tensor, values: Tensor, rows: int) -> Blocks:
    """CSR parts of entries that are sorted by row and then by column."""
    counts = torch.bincount(row, minlength=rows)
    return {"indptr": torch.cat([counts.new_zeros(1), counts.cumsum(0)]), "indices": column, "values": values}


def form_of_sparse(given: Mapping[str, Tensor]) -> SparseForm:
    """A QP whose matrices are sparse tensors of torch, checked; results name and shape matrices as they were given."""
    return replace(parse_sparse(take_apart(given)), given=dict(given))


def part_names(form: Form, names: Collection[str]) -> list[str]:
    """Names of parameters as a request has them: `Q_values` for a Q that was given as a tensor."""
    matrices = form.given if isinstance(form, SparseForm) else {}
    return [f"{name}_values" if name in MATRICES and name in matrices else name for name in names]


def as_parts(form: Form, tangents: Mapping[str, Tensor]) -> Blocks:
    """Tangents as a request has them; that of a sparse tensor is one on the same pattern.

    Raises:
        ProblemError: its pattern is another.
    """
    if not isinstance(form, SparseForm) or not form.given:
        return dict(tangents)
    parts: Blocks = {}
    for name, tensor in tangents.items():
        if name not in MATRICES or name not in form.given:
            parts[name] = tensor
            continue
        found = _triplet(name, tensor)
        if any(not torch.equal(found[part], form.parameters[f"{name}_{part}"]) for part in ("indptr", "indices")):
            raise ProblemError(f"tangents.{name}", "another pattern", f"the stored entries of problem.{name}")
        parts[f"{name}_values"] = found["values"]
    return parts


def as_given(form: Form, gradients: Blocks) -> Blocks:
    """Gradients of a reply as those of the parameters that were given.

    Returns:
        In place of values, where the matrix was a tensor, a CSR tensor on its pattern (a dense one where that was
        dense); for k cotangents a batch of k.
    """
    if not isinstance(form, SparseForm) or not form.given:
        return gradients
    named: Blocks = {}
    for name, tensor in gradients.items():
        matrix = name.removesuffix("_values")
        if matrix == name or matrix not in form.given:
            named[name] = tensor
            continue
        model, k = form.given[matrix], tensor.shape[:-1]
        if model.layout == torch.strided:
            named[matrix] = tensor.reshape(*k, *model.shape)
        else:
            named[matrix] = torch.sparse_csr_tensor(
                form.parameters[f"{matrix}_indptr"].expand(*k, -1).contiguous(),
                form.parameters[f"{matrix}_indices"].expand(*k, -1).contiguous(),
                tensor.contiguous(),
                (*k, *model.shape),
                check_invariants=False,
            )
    return named
