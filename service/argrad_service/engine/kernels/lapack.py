"""BLAS and LAPACK inside numba, by the function pointers that SciPy exports.

Matrices are C-ordered. Fortran sees their transposes, so our lower triangle is its upper one, and the rows of ours are
its columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import get_cython_function_address, intrinsic

LETTERS = np.frombuffer(b"ULTN", dtype=np.uint8)
"""The flags of BLAS: upper, left, transposed, not transposed or not unit, at offsets 0 to 3."""


class Lapack(NamedTuple):
    """Addresses of the routines."""

    potrf: int
    trsm: int
    trsv: int
    syrk: int


def load() -> Lapack:
    """Look the routines up in SciPy."""
    blas, lapack = "scipy.linalg.cython_blas", "scipy.linalg.cython_lapack"
    return Lapack(
        potrf=get_cython_function_address(lapack, "dpotrf"),
        trsm=get_cython_function_address(blas, "dtrsm"),
        trsv=get_cython_function_address(blas, "dtrsv"),
        syrk=get_cython_function_address(blas, "dsyrk"),
    )


@intrinsic
def _call_pointers(typing_context: Any, address: Any, pointers: Any) -> Any:  # noqa: ARG001 - numba's signature
    """Call a C function that takes pointers and returns nothing."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        where, packed = arguments
        word = ir.IntType(64)
        function = ir.FunctionType(ir.VoidType(), [word] * len(pointers))
        target = builder.inttoptr(where, function.as_pointer())
        builder.call(target, [builder.extract_value(packed, i) for i in range(len(pointers))])
        return context.get_dummy_value()

    return types.void(address, pointers), generate


_call: Any = _call_pointers


SMALL = 12
"""Up to this size plain loops are faster than a call."""


@njit(nogil=True, cache=True)
def _small_cholesky(matrix, n):  # type: ignore[no-untyped-def]
    """`cholesky` by loops, row by row."""
    for i in range(n):
        for j in range(i):
            value = matrix[i, j]
            for k in range(j):
                value -= matrix[i, k] * matrix[j, k]
            matrix[i, j] = value / matrix[j, j]
        value = matrix[i, i]
        for k in range(i):
            value -= matrix[i, k] * matrix[i, k]
        if not value > 0.0:
            return i + 1
        matrix[i, i] = np.sqrt(value)
    return 0


@njit(nogil=True, cache=True)
def cholesky(lapack, matrix, n, work):  # type: ignore[no-untyped-def]
    """Lower factor of the leading n × n block, in its lower triangle; 0 if it is definite.

    Args:
        lapack: Addresses.
        matrix: `(≥ n, ≥ n)`; only its lower triangle is read.
        n: Size.
        work: `Work`'s integers and letters.
    """
    if n <= SMALL:
        return _small_cholesky(matrix, n)
    integers, letters, _ = work
    integers[0], integers[1], integers[2] = n, matrix.shape[1], 0
    i, c = integers.ctypes.data, letters.ctypes.data
    _call(lapack.potrf, (c, i, matrix.ctypes.data, i + 4, i + 8))
    return integers[2]


@njit(nogil=True, cache=True)
def solve_rows(lapack, lower, rows, work):  # type: ignore[no-untyped-def]
    """Each row x of `rows` `(r, n)` becomes L⁻¹x."""
    if rows.shape[0] == 0:  # BLAS calls a leading dimension of 0 an error, here and below
        return
    n = rows.shape[1]
    if n <= SMALL:
        for i in range(rows.shape[0]):
            for j in range(n):
                value = rows[i, j]
                for k in range(j):
                    value -= lower[j, k] * rows[i, k]
                rows[i, j] = value / lower[j, j]
        return
    integers, letters, doubles = work
    integers[0], integers[1] = n, rows.shape[0]
    integers[2], integers[3] = lower.shape[1], rows.shape[1]
    doubles[0] = 1.0
    i, c = integers.ctypes.data, letters.ctypes.data
    pointers = (
        c + 1,
        c,
        c + 2,
        c + 3,
        i,
        i + 4,
        doubles.ctypes.data,
        lower.ctypes.data,
        i + 8,
        rows.ctypes.data,
        i + 12,
    )
    _call(lapack.trsm, pointers)


@njit(nogil=True, cache=True)
def gram(lapack, rows, out, work):  # type: ignore[no-untyped-def]
    """Lower triangle of `out` `(r, r)`: inner products of the rows."""
    if rows.shape[0] == 0:
        return
    if rows.shape[1] <= SMALL:
        for i in range(rows.shape[0]):
            for j in range(i + 1):
                value = 0.0
                for k in range(rows.shape[1]):
                    value += rows[i, k] * rows[j, k]
                out[i, j] = value
        return
    integers, letters, doubles = work
    integers[0], integers[1] = rows.shape[0], rows.shape[1]
    integers[2], integers[3] = rows.shape[1], out.shape[1]
    doubles[0], doubles[1] = 1.0, 0.0
    i, c, d = integers.ctypes.data, letters.ctypes.data, doubles.ctypes.data
    _call(lapack.syrk, (c, c + 2, i, i + 4, d, rows.ctypes.data, i + 8, d + 8, out.ctypes.data, i + 12))


@njit(nogil=True, cache=True)
def solve_lower(lapack, lower, n, x, work):  # type: ignore[no-untyped-def]
    """x[:n] becomes L⁻¹x."""
    if n <= SMALL:
        for i in range(n):
            value = x[i]
            for k in range(i):
                value -= lower[i, k] * x[k]
            x[i] = value / lower[i, i]
        return
    _triangular(lapack, lower, n, x, 2, work)


@njit(nogil=True, cache=True)
def solve_upper(lapack, lower, n, x, work):  # type: ignore[no-untyped-def]
    """x[:n] becomes L⁻ᵀx."""
    if n <= SMALL:
        for i in range(n - 1, -1, -1):
            x[i] /= lower[i, i]
            for k in range(i):
                x[k] -= lower[i, k] * x[i]
        return
    _triangular(lapack, lower, n, x, 3, work)


@njit(nogil=True, cache=True)
def _triangular(lapack, lower, n, x, letter, work):  # type: ignore[no-untyped-def]
    integers, letters, _ = work
    integers[0], integers[1], integers[2] = n, lower.shape[1], 1
    i, c = integers.ctypes.data, letters.ctypes.data
    _call(lapack.trsv, (c, c + letter, c + 3, i, lower.ctypes.data, i + 4, x.ctypes.data, i + 8))
