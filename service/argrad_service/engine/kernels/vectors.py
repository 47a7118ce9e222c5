"""Arithmetic on vectors of `LANES` numbers in memory: an instruction or two each, which plain loops do not become.

An operand is an array, C-contiguous float64, and a position in it, counted in vectors: a matrix [i, j, lane] with n
columns has its entry (i, j) at i n + j. Nothing is fused or reordered: each lane rounds as a loop over it would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import extending, types

intrinsic: Any = extending.intrinsic  # a kernel calls the result without the first argument, which types do not say

LANES = 8
"""Numbers side by side: two registers of AVX2, one of AVX-512."""


def _compiled(operands: int, compute: Callable[..., Any]) -> Callable[..., Any]:
    """What numba asks of an intrinsic whose first operand is written.

    Args:
        operands: How many there are.
        compute: Makes the vector to be written of the builder and the vectors that the operands hold.
    """

    def write(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointers = []
        for i in range(operands):
            array = context.make_array(signature.args[2 * i])(context, builder, values[2 * i])
            at = builder.mul(values[2 * i + 1], ir.Constant(values[2 * i + 1].type, LANES))
            vector = ir.VectorType(ir.DoubleType(), LANES)
            pointers.append(builder.bitcast(builder.gep(array.data, [at]), vector.as_pointer()))
        # What is not looked at is not loaded.
        found = compute(builder, *(builder.load(pointer, align=8) for pointer in pointers))
        builder.store(found, pointers[0], align=8)
        return context.get_dummy_value()

    return write


def _takes(*arrays: Any) -> Any:
    return types.void(*(part for array in arrays for part in (array, types.intp)))


def _size(builder: Any, value: Any) -> Any:
    opposite = builder.fneg(value)
    return builder.select(builder.fcmp_ordered(">", value, opposite), value, opposite)


def _larger(builder: Any, x: Any, a: Any) -> Any:
    size = _size(builder, a)
    return builder.select(builder.fcmp_ordered(">", size, x), size, x)


@intrinsic
def set_copy(typing: Any, x: Any, at_x: Any, a: Any, at_a: Any) -> Any:  # noqa: ARG001 - numba passes types by position
    """X = a."""
    return _takes(x, a), _compiled(2, lambda _builder, _x, a: a)


@intrinsic
def set_sum(typing: Any, x: Any, at_x: Any, a: Any, at_a: Any, b: Any, at_b: Any) -> Any:  # noqa: ARG001 - as above
    """X = a + b."""
    return _takes(x, a, b), _compiled(3, lambda builder, _x, a, b: builder.fadd(a, b))


@intrinsic
def set_difference(typing: Any, x: Any, at_x: Any, a: Any, at_a: Any, b: Any, at_b: Any) -> Any:  # noqa: ARG001 - as above
    """X = a − b."""
    return _takes(x, a, b), _compiled(3, lambda builder, _x, a, b: builder.fsub(a, b))


@intrinsic
def set_product(typing: Any, x: Any, at_x: Any, a: Any, at_a: Any, b: Any, at_b: Any) -> Any:  # noqa: ARG001 - as above
    """X = ab."""
    return _takes(x, a, b), _compiled(3, lambda builder, _x, a, b: builder.fmul(a, b))


@intrinsic
def add_product(typing: Any, x: Any, at_x: Any, a: Any, at_a: Any, b: Any, at_b: Any) -> Any:  # noqa: ARG001 - as above
    """X += ab."""
    return _takes(x, a, b), _compiled(3, lambda builder, x, a, b: builder.fadd(x, builder.fmul(a, b)))


@intrinsic
def subtract_product(typing: Any, x: Any, at_x: Any, a: Any, at_a: Any, b: Any, at_b: Any) -> Any:  # noqa: ARG001 - as above
    """X −= ab."""
    return _takes(x, a, b), _compiled(3, lambda builder, x, a, b: builder.fsub(x, builder.fmul(a, b)))


@intrinsic
def raise_to_size(typing: Any, x: Any, at_x: Any, a: Any, at_a: Any) -> Any:  # noqa: ARG001 - as above
    """X = |a| where that is larger; where a is NaN, x stays."""
    return _takes(x, a), _compiled(2, _larger)
