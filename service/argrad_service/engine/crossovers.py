"""What `auto` takes: one table, from the times in benchmarks/crossovers.json (`python -m benchmarks.crossovers`).

The first row that fits wins. A test holds the table against the times: what it takes is never far from the fastest.
`python -m argrad_service.capabilities docs/solvers.md` writes it into the page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from argrad_service.engine.data import Data
from argrad_service.engine.structure import detect

CANDIDATES = {
    "qp": ("pivoting", "pdipm", "admm", "clarabel", "osqp"),
    "lp": ("pdipm", "highs", "clarabel"),
    "entropy": ("pdipm", "admm"),
}
"""Solvers that `auto` may take, by kind: those that end exact without own options, and come with the service."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A kind of problem and who solves it; a bound that is None does not bind.

    Args:
        kind: `qp`, `lp` or `entropy`.
        solver: Who solves it.
        device: `cpu`, `cuda`, or None for both.
        least_n, most_n: Bounds on the number of variables.
        most_rows: Bound on m / (n − p), inequalities to a free variable.
        least_batch, most_batch: Bounds on the number of problems.
        is_diagonal: Whether Q must be diagonal, with rows that are bounds but for a few (`structure.detect`).
    """

    kind: str
    solver: str
    device: str | None = None
    least_n: int = 0
    most_n: int | None = None
    most_rows: float | None = None
    least_batch: int = 0
    most_batch: int | None = None
    is_diagonal: bool = False

    def fits(self, data: Data) -> bool:
        """Whether the row speaks of these problems."""
        return (
            data.kind == self.kind
            and self.device in (None, data.q.device.type)
            and self.least_n <= data.n
            and (self.most_n is None or data.n <= self.most_n)
            and (self.most_rows is None or data.m <= self.most_rows * (data.n - data.p))
            and self.least_batch <= data.B
            and (self.most_batch is None or self.most_batch >= data.B)
            and (not self.is_diagonal or detect(data) is not None)
        )


ROWS = (
    Row(kind="qp", solver="admm", device="cpu", least_n=100, is_diagonal=True),
    Row(kind="qp", solver="pivoting", most_rows=1),
    Row(kind="qp", solver="pivoting", device="cpu", most_n=200),
    Row(kind="qp", solver="pivoting", device="cpu", most_n=400, most_rows=2.5),
    Row(kind="qp", solver="pdipm"),
    Row(kind="lp", solver="pdipm"),
    Row(kind="entropy", solver="pdipm"),
)


def choose(data: Data, suits: Callable[[str], bool]) -> str:
    """The solver of the first row that fits.

    Args:
        data: The problems.
        suits: Whether a solver can be taken at all.
    """
    return next(row.solver for row in ROWS if suits(row.solver) and row.fits(data))
