"""What tensors must agree on before anything is computed: names, shapes, batch, dtype, device, finite values.

Messages name the field, what was found and what was wanted. Only `check_finite` reads values.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor

from argrad.errors import ProblemError

Dimensions = Mapping[str, tuple[str, ...]]
"""Dimensions of each parameter by symbol, without the batch: {"G": ("m", "n"), …}."""

_DTYPES = (torch.float32, torch.float64)


_ONE_THREAD = 32_768
"""Elements up to which torch sums in the calling thread."""


def check_parameters(parameters: Mapping[str, Tensor | None], dimensions: Dimensions) -> None:
    """Check that parameters are dense, alike, and fit one another.

    Args:
        parameters: By name; None counts as absent.
        dimensions: Of every parameter that may be there.

    Raises:
        ProblemError: names the first parameter that does not fit.
    """
    given = {name: tensor for name, tensor in parameters.items() if tensor is not None}
    for name, tensor in given.items():
        _check_kind(name, tensor)
    check_alike("problem", given, next(iter(given.items())))
    for name, tensor in given.items():
        rank = len(dimensions[name])
        if tensor.ndim not in (rank, rank + 1):
            raise _misshapen(name, tensor, dimensions[name])
    _check_sizes(given, dimensions)
    batched = {name: t.shape[0] for name, t in given.items() if t.ndim > len(dimensions[name])}
    for name, size in batched.items():
        first = next(iter(batched))
        if size == 0:
            raise ProblemError(f"problem.{name}", "a batch of 0", "at least one problem")
        if size != batched[first]:
            wanted = f"{batched[first]}, as problem.{first} has, or no batch dimension"
            raise ProblemError(f"problem.{name}", f"a batch of {size}", wanted)


def batch_size(parameters: Mapping[str, Tensor], dimensions: Dimensions) -> int | None:
    """B, or None where no parameter has a batch dimension."""
    return next((t.shape[0] for name, t in parameters.items() if t.ndim > len(dimensions[name])), None)


def _check_kind(name: str, tensor: object) -> None:
    field = f"problem.{name}"
    if not isinstance(tensor, Tensor):
        raise ProblemError(field, type(tensor).__name__, "a torch.Tensor")
    if tensor.dtype not in _DTYPES:
        raise ProblemError(field, f"dtype {tensor.dtype}", "torch.float64 or torch.float32")
    if tensor.layout != torch.strided:
        raise ProblemError(field, f"layout {tensor.layout}", "a dense tensor")


def _check_sizes(given: Mapping[str, Tensor], dimensions: Dimensions) -> None:
    """Vectors define the sizes, matrices must follow them."""
    sizes: dict[str, int] = {}
    for name in sorted(given, key=lambda name: len(dimensions[name])):
        symbols = dimensions[name]
        shape = given[name].shape[given[name].ndim - len(symbols) :]
        if any(sizes.get(symbol, size) != size for symbol, size in zip(symbols, shape, strict=True)):
            raise _misshapen(name, given[name], tuple(str(sizes.get(symbol, symbol)) for symbol in symbols))
        sizes.update(zip(symbols, shape, strict=True))
        if sizes.get("n") == 0:
            raise ProblemError(f"problem.{name}", f"shape {shape_of(given[name])}, no variables", "at least one")


def _misshapen(name: str, tensor: Tensor, symbols: tuple[str, ...]) -> ProblemError:
    return ProblemError(f"problem.{name}", f"shape {shape_of(tensor)}", _shapes_wanted(symbols))


def _shapes_wanted(symbols: tuple[str, ...]) -> str:
    """The shape of one parameter and of a batch of them: (n,) or (B, n)."""
    plain, batched = (f"({s[0]},)" if len(s) == 1 else f"({', '.join(s)})" for s in (symbols, ("B", *symbols)))
    return f"{plain} or {batched}"


def check_alike(section: str, tensors: Mapping[str, Tensor], reference: tuple[str, Tensor]) -> None:
    """Refuse what is no tensor, or has not the dtype and device of the reference, a parameter of the problem by name.

    Raises:
        ProblemError: names the tensor.
    """
    owner, model = reference
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ProblemError(f"{section}.{name}", type(tensor).__name__, "a torch.Tensor")
        for what in ("dtype", "device"):
            found, wanted = getattr(tensor, what), getattr(model, what)
            if found != wanted:
                raise ProblemError(f"{section}.{name}", f"{what} {found}", f"{what} {wanted}, as problem.{owner} has")


def require(parameters: Mapping[str, Tensor | None], name: str, dimensions: Dimensions) -> Tensor:
    """The parameter of that name.

    Raises:
        ProblemError: it is absent.
    """
    tensor = parameters.get(name)
    if tensor is None:
        raise ProblemError(f"problem.{name}", "nothing", f"a tensor of shape {_shapes_wanted(dimensions[name])}")
    return tensor


def without_empty(parameters: Mapping[str, Tensor | None], matrix: str, vector: str) -> dict[str, Tensor | None]:
    """Drop a matrix and its right-hand side that have no rows; then neither may stand alone.

    `[]`, `(0,)`, `(0, n)` and `(B, 0, n)` are matrices without rows; a batch of 0 is an error, not an absence.

    Raises:
        ProblemError: one of the two is there and the other is not, or the batch is empty.
    """
    left, right = parameters.get(matrix), parameters.get(vector)
    for name, tensor, rank in ((matrix, left, 2), (vector, right, 1)):
        if isinstance(tensor, Tensor) and tensor.ndim == rank + 1 and tensor.shape[0] == 0:
            raise ProblemError(f"problem.{name}", "a batch of 0", "at least one problem")
    if all(t is None or (isinstance(t, Tensor) and t.numel() == 0) for t in (left, right)):
        left = right = None
    elif left is None or right is None:
        missing, given = (matrix, vector) if left is None else (vector, matrix)
        wanted = f"a tensor, as problem.{given} is given (or neither of the two)"
        raise ProblemError(f"problem.{missing}", "nothing", wanted)
    return {**parameters, matrix: left, vector: right}


def check_finite(field: str, tensor: Tensor, wanted: str = "finite numbers", *, allowing: float | None = None) -> None:
    """Refuse values that are not finite, naming the first one.

    Costs one pass over the data, and on a GPU one synchronisation.

    Args:
        field: Dotted name for the message.
        tensor: Any shape.
        wanted: What would have been accepted, for the message.
        allowing: An infinity that is accepted.

    Raises:
        ProblemError: with the value and its position.
    """
    # A finite sum has finite terms: one pass without a temporary. Should finite numbers overflow it, or infinities be
    # there that are allowed, the exact test decides.
    if _has_finite_sum(tensor):
        return
    tensor = tensor.detach()
    bad = ~torch.isfinite(tensor)
    if allowing is not None:
        bad &= tensor != allowing
    if bool(bad.any()):
        where = torch.nonzero(bad)[0].tolist()
        raise ProblemError(field, f"{tensor[tuple(where)].item()} at {where}", wanted)


def _has_finite_sum(tensor: Tensor) -> bool:
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_cpu and tensor.numel() > _ONE_THREAD:
        # NumPy sums in the calling thread; torch wakes its thread pool, which costs 10 ms where that is busy solving.
        with contextlib.suppress(RuntimeError), np.errstate(all="ignore"):  # torch.func's tensors have no storage
            return bool(np.isfinite(tensor.numpy().sum()))
    return math.isfinite(tensor.sum().item())


def check_positive(field: str, tensor: Tensor, wanted: str = "finite numbers > 0") -> None:
    """Refuse values that are not finite and positive, naming the first one.

    Raises:
        ProblemError: with the value and its position.
    """
    bad = ~((tensor.detach() > 0) & torch.isfinite(tensor))
    if bool(bad.any()):
        where = torch.nonzero(bad)[0].tolist()
        raise ProblemError(field, f"{tensor[tuple(where)].item()}" + (f" at {where}" if where else ""), wanted)


def check_names(field: str, names: Collection[str], allowed: Collection[str]) -> None:
    """Refuse a name that is not allowed.

    Raises:
        ProblemError: with the name and the list of those that are.
    """
    for name in names:
        if name not in allowed:
            raise ProblemError(field, repr(name), f"one of {', '.join(allowed)}")


def shape_of(tensor: Tensor) -> str:
    """A shape as messages print it: (2, 3)."""
    return str(tuple(tensor.shape))
