"""Which solves may share a batch, and what each adds to its cost: read off shapes and options alone."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from argrad.problems import QP
from argrad.wire.messages import SolveRequest, VjpRequest
from argrad_service.admission import Size
from argrad_service.batching.frames import Sizes, ceiling
from argrad_service.engine import Prepared

PADDED = frozenset({"auto", "pdipm", "pivoting"})
"""Solvers whose problems are padded to a common shape."""

UNPADDED = frozenset({"admm", "barrier", "pgd"})
"""Solvers that take batches of one shape: their iterations depend on it, or on the structure of the rows. Those that
are absent here and above solve one problem after the other, and gain nothing."""

METHODS = frozenset({"auto", "kkt"})
"""Differentiation methods whose result for a problem depends on that problem alone, up to rounding."""

REPEATED = 65_536
"""Elements of a shared matrix, repeated for each problem, up to which a caller's batch is merged with others'; above it
the matrix is factored once, for that caller alone."""


FACTORED = 10_000
"""Elements of registered matrices from which on solves that name them share batches only among themselves: to use what
earlier solves have left of their factors is worth more than company. Smaller ones are factored in no time."""


@dataclass(frozen=True, kw_only=True)
class Lot:
    """What a solve adds to a batch.

    Args:
        key: Solves of equal keys may share one; None for a solve that goes alone.
        count: Problems.
        flops: Of forming and factoring one Newton system of each problem, padded to the end of its class.
        nbytes: Bound on the solver's memory, padded likewise.
    """

    key: Hashable | None
    count: int
    flops: float
    nbytes: int


def lot_of(
    request: SolveRequest | VjpRequest,
    problem: QP,
    cotangents: Mapping[str, Tensor],
    *,
    count: int,
    is_plain: bool,
    prepared: Prepared | None = None,
) -> Lot:
    """What a solve adds to a batch, or a vjp at a point that its caller brings, which is solved on its active set.

    Args:
        request: Its document.
        problem: Canonical, dense.
        cotangents: Canonical, of a differentiation in the same call.
        count: How many problems it is.
        is_plain: Whether it may share a batch at all: no warm start, and a form that has no rules of its own.
        prepared: Of the registered parameters in the problem.
    """
    sizes = Sizes.of(problem)
    is_linear = problem.Q is None
    solver, method = request.solver, request.differentiation
    takes_padding = solver.name in PADDED
    padded, flops, nbytes = _cost(sizes, count, takes_padding, is_linear)
    key: Hashable | None = None
    matrices = [t for t in (problem.Q, problem.G, problem.A) if t is not None]
    shares_factors = prepared is not None and _is_factored(matrices, prepared)
    if (
        is_plain
        and not (isinstance(request, SolveRequest) and request.deterministic)
        and problem.entropy is None
        and (takes_padding or solver.name in UNPADDED)
        and (not cotangents or method.method in METHODS)
        and (shares_factors or _repeats_little(matrices, count))
    ):
        key = (
            type(request).__name__,
            (solver.name, solver.tolerance, solver.max_iterations, *sorted(solver.options.items())),
            (method.method, *sorted(method.options.items())) if cotangents else (),
            tuple((name, *t.shape[:-2]) if t.ndim > 2 else (name,) for name, t in sorted(cotangents.items())),
            (problem.dtype, problem.device, is_linear, problem.G is None, problem.A is None),
            padded,
            sizes.m <= sizes.n - sizes.p,  # `auto` and `pdipm` choose their form by it
            id(prepared) if shares_factors else None,
        )
    return Lot(key=key, count=count, flops=flops, nbytes=nbytes)


@lru_cache(maxsize=256)
def _cost(sizes: Sizes, count: int, takes_padding: bool, is_linear: bool) -> tuple[Sizes, float, int]:
    """Sizes with padding, floating-point operations and bytes of so many problems."""
    padded = sizes
    if takes_padding:
        # A linear program has no term that holds a variable of the padding in its place.
        n, p = (sizes.n, sizes.p) if is_linear else (ceiling(sizes.n - sizes.p) + ceiling(sizes.p), ceiling(sizes.p))
        padded = Sizes(n, p, ceiling(sizes.m))
    n, rows = padded.n, padded.p + padded.m
    return padded, count * (n**3 / 3 + rows * n * n + rows * rows * n), Size(count, n, rows).work_bytes


def _repeats_little(matrices: Sequence[Tensor], count: int) -> bool:
    return count == 1 or count * sum(t.numel() for t in matrices if t.ndim == 2) <= REPEATED


def _is_factored(matrices: Sequence[Tensor], prepared: Prepared) -> bool:
    is_shared = all(t.ndim == 2 and prepared.knows([t]) for t in matrices)
    return is_shared and sum(t.numel() for t in matrices) >= FACTORED
