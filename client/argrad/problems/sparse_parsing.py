"""What the parameters of kind `sparse_qp` must agree on, values included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from argrad.errors import ProblemError
from argrad.problems.form import Blocks
from argrad.problems.rows import RowMap
from argrad.problems.shapes import check_finite, shape_of
from argrad.problems.sparse import MATRICES, PATTERN, SPARSE, VECTORS, Constants, SparseForm, SparseMatrix, SparseQP

_FLOATS = (torch.float32, torch.float64)


def parse_sparse(tensors: Mapping[str, Tensor]) -> SparseForm:
    """Check the parameters of a sparse problem, values included.

    Args:
        tensors: By the names of `SPARSE`, of which q must be there. An absent Q makes a linear program.

    Raises:
        ProblemError: a name is unknown, a part of a matrix is missing, or a shape, dtype, device, index or value does
            not fit.
    """
    given = _vectors(tensors)
    matrices: dict[str, SparseMatrix] = {}
    for name, (_, vector) in MATRICES.items():
        parts = {part: given.get(f"{name}_{part}") for part in ("indptr", "indices", "values")}
        if _is_absent(name, vector, parts, given):
            for key in (*(f"{name}_{part}" for part in parts), *([vector] if name != "Q" else [])):
                given.pop(key, None)
            continue
        matrices[name] = _checked_matrix(name, len(given[vector]), len(given["q"]), parts)
    _check_finite(given)
    return _form(given, SparseQP(**_named_vectors(given), matrices=matrices))


def constants_of(tensors: Mapping[str, Tensor]) -> Constants:
    """The matrices of a problem, checked, for `parse_beside`; nobody may change them from now on."""
    return Constants(matrices=parse_sparse(tensors).sparse.matrices)


def parse_beside(constants: Constants, vectors: Mapping[str, Tensor]) -> SparseForm:
    """Check the vectors of a problem whose matrices are checked already.

    Args:
        constants: Its matrices.
        vectors: q, and h or b where there is G or A.

    Raises:
        ProblemError: a shape, dtype, device or value does not fit.
    """
    for name, tensor in vectors.items():
        _check_vector(name, tensor, vectors["q"])
    for name, matrix in constants.matrices.items():
        vector = MATRICES[name][1]
        rows = len(matrix.indptr) - 1
        if vectors[vector].shape[0] != rows:
            wanted = f"({rows},), a number for each row of problem.{name}"
            raise ProblemError(f"problem.{vector}", f"shape {shape_of(vectors[vector])}", wanted)
    _check_finite(vectors)
    problem = SparseQP(**_named_vectors(vectors), matrices=constants.matrices, constants=constants)
    return _form(constants.beside(vectors), problem)


def _check_finite(given: Mapping[str, Tensor]) -> None:
    for name in ("q", "b"):
        if name in given:
            check_finite(f"problem.{name}", given[name])
    if "h" in given:
        check_finite("problem.h", given["h"], "finite numbers or +inf", allowing=float("inf"))


def _named_vectors(given: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: given.get(name) for name in VECTORS}


def _vectors(tensors: Mapping[str, Tensor]) -> Blocks:
    """The parameters in order, each a vector of its dtype."""
    for name in tensors:
        if name not in SPARSE:
            raise ProblemError(f"problem.{name}", "an unknown parameter", f"one of {', '.join(SPARSE)}")
    if "q" not in tensors:
        raise ProblemError("problem.q", "nothing", "a tensor of shape (n,)")
    given = {name: tensors[name] for name in SPARSE if name in tensors}
    for name, tensor in given.items():
        _check_vector(name, tensor, given["q"])
    if len(given["q"]) == 0:
        raise ProblemError("problem.q", "shape (0,), no variables", "at least one")
    return given


def _form(given: Mapping[str, Tensor], problem: SparseQP) -> SparseForm:
    none = torch.empty(0, dtype=torch.int64)
    rows = RowMap(size=0, own_m=problem.m, own_p=problem.p, lower=none, upper=none, equal=none)
    return SparseForm(parameters=given, problem=problem, row_map=rows, sparse=problem)


def _check_vector(name: str, tensor: object, q: Tensor) -> None:
    """Every parameter of this kind is a vector."""
    if not isinstance(tensor, Tensor):
        raise ProblemError(f"problem.{name}", type(tensor).__name__, "a torch.Tensor")
    if tensor.layout != torch.strided:
        raise ProblemError(f"problem.{name}", f"layout {tensor.layout}", "a dense vector")
    if name in PATTERN:
        if tensor.dtype != torch.int64:
            raise ProblemError(f"problem.{name}", f"dtype {tensor.dtype}", "torch.int64")
    elif tensor.dtype not in _FLOATS:
        raise ProblemError(f"problem.{name}", f"dtype {tensor.dtype}", "torch.float64 or torch.float32")
    elif tensor.dtype != q.dtype:
        raise ProblemError(f"problem.{name}", f"dtype {tensor.dtype}", f"dtype {q.dtype}, as problem.q has")
    if tensor.device != q.device:
        raise ProblemError(f"problem.{name}", f"device {tensor.device}", f"device {q.device}, as problem.q has")
    if tensor.ndim != 1:
        wanted = f"({SPARSE[name][0]},): a sparse problem is solved alone, without a batch"
        raise ProblemError(f"problem.{name}", f"shape {shape_of(tensor)}", wanted)


def _is_absent(name: str, vector: str, parts: Mapping[str, Tensor | None], given: Mapping[str, Tensor]) -> bool:
    """Whether a matrix is not there; a matrix without rows is not.

    Raises:
        ProblemError: a part of it, or its right-hand side, is.
    """
    missing = [part for part, tensor in parts.items() if tensor is None]
    if name != "Q" and vector in given and len(given[vector]) == 0:
        rows = parts["indptr"]
        if rows is None or len(rows) <= 1:
            return True
    if not missing and (name == "Q" or vector in given):
        return False
    if len(missing) == len(parts) and (name == "Q" or vector not in given):
        return True
    if not missing:
        raise ProblemError(f"problem.{vector}", "nothing", f"a tensor, as problem.{name}_values is given")
    found = next((f"{name}_{part}" for part in parts if part not in missing), vector)
    raise ProblemError(f"problem.{name}_{missing[0]}", "nothing", f"a tensor, as problem.{found} is given")


def _checked_matrix(name: str, rows: int, columns: int, parts: Mapping[str, Tensor | None]) -> SparseMatrix:
    indptr, indices, values = (parts[part] for part in ("indptr", "indices", "values"))
    assert indptr is not None  # noqa: S101 - `_is_absent` has looked
    assert indices is not None  # noqa: S101
    assert values is not None  # noqa: S101
    if len(indptr) != rows + 1:
        of = MATRICES[name][1]
        wanted = f"({rows + 1},), one more than the {rows} entries of problem.{of}"
        raise ProblemError(f"problem.{name}_indptr", f"shape {shape_of(indptr)}", wanted)
    if len(values) != len(indices):
        wanted = f"({len(indices)},), as problem.{name}_indices has"
        raise ProblemError(f"problem.{name}_values", f"shape {shape_of(values)}", wanted)
    _check_pattern(name, columns, indptr.cpu().numpy(), indices.cpu().numpy())
    check_finite(f"problem.{name}_values", values)
    return SparseMatrix(indptr=indptr, indices=indices, values=values, columns=columns)


def _check_pattern(name: str, columns: int, indptr: NDArray[np.int64], indices: NDArray[np.int64]) -> None:
    if indptr[0] != 0 or indptr[-1] != len(indices):
        found = f"{indptr[0]} first and {indptr[-1]} last"
        raise ProblemError(f"problem.{name}_indptr", found, f"0 first and {len(indices)} last, the stored entries")
    lengths = np.diff(indptr)
    if (lengths < 0).any():
        i = int(np.argmax(lengths < 0))
        found = f"{indptr[i]} and then {indptr[i + 1]} at [{i}]"
        raise ProblemError(f"problem.{name}_indptr", found, "numbers that do not fall")
    outside = (indices < 0) | (indices >= columns)
    if outside.any():
        i = int(np.argmax(outside))
        raise ProblemError(f"problem.{name}_indices", f"{indices[i]} at [{i}]", f"columns from 0 to {columns - 1}")
    falls = np.diff(indices) <= 0
    falls[indptr[1:-1][(indptr[1:-1] > 0) & (indptr[1:-1] < len(indices))] - 1] = False  # from one row to the next
    if falls.any():
        i = int(np.argmax(falls)) + 1
        row = int(np.searchsorted(indptr, i, side="right")) - 1
        found = f"{indices[i]} after {indices[i - 1]} at [{i}], in row {row}"
        raise ProblemError(f"problem.{name}_indices", found, "ascending columns, each once in a row")
