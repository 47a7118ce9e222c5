"""What can never fit is refused from shapes alone, before anything is expanded, copied or solved."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from argrad.errors import ArgradError, ProblemError

_RANKS = {"entropy": 0} | dict.fromkeys(("q", "h", "b", "lb", "ub", "l", "u"), 1)
_DOUBLE = 8
_JSON_NUMBER = 25
"""Bytes of the longest float64 in JSON, with its comma."""


class TooLarge(ArgradError):  # noqa: N818 - a verdict, not a defect
    """Something is over a limit.

    Args:
        field: What is too large.
        found: How large it is.
        wanted: The limit, and the setting that raises it.
    """

    def __init__(self, field: str, found: str, wanted: str) -> None:
        super().__init__(f"{field}: found {found}, wanted {wanted}")
        self.field, self.found, self.wanted = field, found, wanted


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on one call; None is no bound, for a caller who shares our process."""

    variables: int | None = None
    constraints: int | None = None
    batch: int | None = None
    cotangents: int | None = None
    iterations: int | None = None
    work_bytes: int | None = None
    reply_bytes: int | None = None
    json_reply_bytes: int | None = None

    def check(self, name: str, field: str, found: int, unit: str = "") -> None:
        """Refuse what is over the bound of that name, which is the setting `ARGRAD_MAX_<name>`.

        Raises:
            TooLarge: with the bound and its variable.
        """
        limit = getattr(self, name)
        if limit is not None and found > limit:
            raise TooLarge(field, f"{found}{unit}", f"at most {limit}{unit} (ARGRAD_MAX_{name.upper()})")


@dataclass(frozen=True)
class Size:
    """What a problem's tensors announce, whether or not their shapes fit one another.

    Args:
        batch: B, 1 where nothing is batched.
        n: Variables.
        rows: Constraints, bounds included, two-sided rows counted twice.
        nnz: Stored entries of sparse matrices; None where they are dense.
    """

    batch: int
    n: int
    rows: int
    nnz: int | None = None

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor]) -> Size:
        """Read the sizes of a problem's parameters, by the caller's names."""
        return _size_of(tuple([(name, tensor.shape) for name, tensor in parameters.items()]))

    def check(self, limits: Limits) -> None:
        """Refuse a problem that can never be solved here.

        Raises:
            TooLarge: names what is too large and the limit.
        """
        limits.check("variables", "variables of the problem", self.n)
        limits.check("constraints", "constraints of the problem", self.rows)
        limits.check("batch", "problems in the batch", self.batch)
        what = f"memory to solve {self.batch} problems with {self.n} variables and {self.rows} constraints"
        limits.check("work_bytes", what, self.work_bytes, " bytes")

    @property
    def work_bytes(self) -> int:
        """Bound on the solver's memory, fitted to what every solver and method took, with a margin of 1 to 5.

        Per problem, in doubles: 8n² for Q, its scaled copy and factors, 24 rows·n for the constraints, their copies
        and products, 2 rows² for what looks at pairs of rows, 96 vectors of an iteration. The most take infeasible
        batches with more rows than variables, and `altdiff` in its forward mode. Graphs of `unrolled` and the
        perturbed problems of `smoothed` come on top, in pieces of 256 MiB at most.

        Of a sparse problem, 256 doubles a stored entry or row: copies, and factors with moderate fill. Their true fill
        shows only when they are formed, by a process of its own.
        """
        n, rows = self.n, self.rows
        if self.nnz is not None:
            return self.batch * _DOUBLE * 256 * (self.nnz + n + rows)
        return self.batch * _DOUBLE * (8 * n * n + 24 * rows * n + 2 * rows * rows + 96 * (n + rows))


@lru_cache(maxsize=256)
def _size_of(shapes: tuple[tuple[str, torch.Size], ...]) -> Size:
    """Sizes of parameters of these names and shapes: callers come with the same again and again."""
    last = {name: shape[-1] if shape else 0 for name, shape in shapes}
    batches = [shape[0] for name, shape in shapes if len(shape) > _RANKS.get(name, 2)]
    rows = sum(last.get(name, 0) for name in ("h", "b", "lb", "ub", "l", "u"))
    stored = [shape.numel() for name, shape in shapes if name.endswith("_values")]
    n = max(last.get("q", 0), last.get("Q", 0), last.get("P", 0))
    return Size(max(batches, default=1), n, rows, sum(stored) if stored else None)


def check_reply(
    limits: Limits,
    size: Size,
    parameters: Mapping[str, Tensor],
    *,
    wrt: Collection[str],
    cotangents: int,
    is_json: bool,
) -> None:
    """Refuse a call whose reply would be too large.

    Args:
        limits: Bounds.
        size: Of the problem.
        parameters: Of the problem, by the caller's names.
        wrt: Parameters whose gradients are formed; none if the adjoint is asked for.
        cotangents: k.
        is_json: Whether numbers are spelt out.

    Raises:
        TooLarge: with the bytes of the reply and the limit.
    """
    limits.check("cotangents", "cotangents", cotangents)
    per_problem = (1 + cotangents) * (size.n + 2 * size.rows) + 5
    numbers = size.batch * per_problem + cotangents * sum(parameters[name].numel() for name in wrt)
    if is_json:
        limits.check("json_reply_bytes", "reply in JSON (the binary form is smaller)", _JSON_NUMBER * numbers, " bytes")
    else:
        itemsize = max(tensor.element_size() for tensor in parameters.values())
        limits.check("reply_bytes", "reply (gradients: adjoint is smaller)", itemsize * numbers, " bytes")


def check_iterations(limits: Limits, max_iterations: int) -> None:
    """Refuse an iteration limit above the service's own.

    Raises:
        ProblemError: with the limit.
    """
    if limits.iterations is not None and max_iterations > limits.iterations:
        wanted = f"at most {limits.iterations} (ARGRAD_MAX_ITERATIONS)"
        raise ProblemError("solver.max_iterations", str(max_iterations), wanted)
