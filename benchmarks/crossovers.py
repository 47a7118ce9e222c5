"""Which solver is the fastest, by kind, size, rows and batch: what `auto`'s table is made from.

    python -m benchmarks.crossovers [--kinds qp,lp] [--output benchmarks/crossovers.json]
    python -m benchmarks.crossovers --page

Times one solve and one vjp of the engine, in process, for every solver that `auto` may take. Random problems with
known solutions; a solver that is wrong, or too slow at the next smaller size, has no time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from argrad.problems import QP
from argrad_service import engine
from argrad_service.capabilities import replace_section
from argrad_service.engine.crossovers import CANDIDATES
from argrad_service.engine.registry import SOLVERS
from benchmarks.machine import circumstances, load

OUTPUT = Path(__file__).with_name("crossovers.json")
PAGE = Path(__file__).parents[1] / "docs" / "solvers.md"
REPEATS = 7
TOO_SLOW_S = 1.5
"""After this many seconds for one solve and one vjp a solver is not tried on larger problems."""

ACCURATE = 1e-6
"""Error of z, relative to its largest entry, above which a time does not count."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A kind of problem, its size, and how many at once; `kind` is `bounds` where Q is diagonal and rows are bounds."""

    kind: str
    n: int
    m: int
    p: int
    batch: int


def cells() -> Iterator[Cell]:  # noqa: C901 - a list of sizes, in loops
    """Sizes of each kind, growing."""
    for n in (5, 10, 20, 50, 100, 200, 400):
        for ratio in (0.5, 2, 8):
            for batch in (1, 64):
                if n * ratio * batch <= 60_000:
                    yield Cell(kind="qp", n=n, m=max(1, int(ratio * n)), p=n // 10, batch=batch)
    for n in (5, 20, 50, 100, 200):
        for ratio in (2, 8):
            for batch in (1, 32):
                if n * ratio * batch <= 30_000:
                    yield Cell(kind="lp", n=n, m=ratio * n, p=n // 10, batch=batch)
    for n in (5, 20, 100, 300):
        for batch in (1, 32):
            yield Cell(kind="entropy", n=n, m=max(1, n // 10), p=1, batch=batch)
    for n in (20, 64, 100, 200, 500, 2000):
        for batch in (1, 16):
            if n * batch <= 4000:
                yield Cell(kind="bounds", n=n, m=2 * n, p=1, batch=batch)


def draw(cell: Cell, seed: int) -> tuple[QP, Tensor]:
    """A batch of the cell's size and its solution, which is chosen first."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    B, n, m, p = cell.batch, cell.n, cell.m, cell.p
    if cell.kind == "bounds":
        # Constrained sparsemax: ½‖z − y‖² over 1ᵀz = 1, 0 ≤ z ≤ 2/n, with y as spread as z: many entries are free.
        eye = torch.eye(n, dtype=torch.float64)
        G, h = torch.cat([-eye, eye]), torch.cat([eye[0] * 0, torch.full((n,), 2.0 / n, dtype=torch.float64)])
        problem = QP(Q=eye, q=normal(B, n) / n, G=G, h=h, A=eye[:1] * 0 + 1, b=torch.ones(1, dtype=torch.float64))
        return problem, _capped_simplex(-problem.q, 2.0 / n)
    G, A, z = normal(B, m, n) / n**0.5, normal(B, p, n) / n**0.5, normal(B, n)
    if cell.kind == "entropy":
        A, z = torch.ones(B, 1, n, dtype=torch.float64), torch.softmax(normal(B, n), dim=-1)
    free = n - p
    count = free if cell.kind == "lp" else max(1, min(m, free) // 2)
    is_active = torch.arange(m) < count
    lam = torch.where(is_active, 0.3 + torch.rand(B, m, generator=g, dtype=torch.float64), 0.0)
    s = torch.where(is_active, 0.0, 0.3 + torch.rand(B, m, generator=g, dtype=torch.float64))
    q = -(_times(G.mT, lam) + _times(A.mT, normal(B, p)))
    data = {"q": q, "G": G, "h": _times(G, z) + s}
    if p:
        data |= {"A": A, "b": _times(A, z)}
    if cell.kind == "qp":
        root = normal(B, n, n) / n**0.5
        data["Q"] = root @ root.mT + 0.1 * torch.eye(n, dtype=torch.float64)
        data["q"] = q - _times(data["Q"], z)
    if cell.kind == "entropy":
        data |= {"entropy": torch.ones((), dtype=torch.float64), "q": q - (1 + z.log())}
    return QP(**data), z


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _capped_simplex(y: Tensor, cap: float) -> Tensor:
    """Projection of y on 1ᵀz = 1, 0 ≤ z ≤ cap, by bisection."""
    low, high = y.amin(-1, keepdim=True) - cap - 1, y.amax(-1, keepdim=True)
    for _ in range(200):
        middle = 0.5 * (low + high)
        is_more = (y - middle).clamp(0, cap).sum(-1, keepdim=True) > 1
        low, high = torch.where(is_more, middle, low), torch.where(is_more, high, middle)
    return (y - low).clamp(0, cap)


def measure(cell: Cell, solver: str) -> float | None:
    """Least milliseconds of a solve and a vjp, or None where the answer is wrong.

    The least, for other processes on the machine can only add to it.
    """
    problem, known = draw(cell, seed=1)
    upstream = {"z": torch.ones_like(known)}

    def once() -> tuple[float, engine.Outcome]:
        begin = time.perf_counter()
        forward = engine.solve(problem, solver=solver)
        engine.vjp(forward, upstream)
        return time.perf_counter() - begin, forward

    first_s, forward = once()
    error = (forward.solution.z - known).abs().amax(-1) / known.abs().amax(-1)
    if any(status != "optimal" for status in forward.status) or float(error.max()) > ACCURATE:
        return None
    count = 1 if first_s > TOO_SLOW_S / 2 else REPEATS
    return round(1e3 * min(first_s, *(once()[0] for _ in range(count))), 3)


def run(kinds: set[str], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every cell by every candidate of its kind that is installed."""
    rows, too_slow = [], set()
    for cell in cells():
        if cell.kind not in kinds:
            continue
        times: dict[str, float | None] = {}
        for solver in CANDIDATES["qp" if cell.kind == "bounds" else cell.kind]:
            key = (solver, cell.kind, cell.m // cell.n, cell.batch)
            if not SOLVERS[solver].is_installed or key in too_slow:
                continue
            times[solver] = took_ms = measure(cell, solver)
            if took_ms is None or took_ms > 1e3 * TOO_SLOW_S:
                too_slow.add(key)
        rows.append({**vars(cell), "ms": times})
        say(f"{rows[-1]}")
    return rows


def table(cells: list[dict[str, Any]]) -> str:
    """The times as docs/solvers.md has them, the fastest of each row in bold."""
    names = list(dict.fromkeys(name for row in cells for name in row["ms"]))
    head = ["problems", "n", "m", "p", "batch", *(f"`{name}`" for name in names)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in cells:
        best = min(ms for ms in row["ms"].values() if ms is not None)
        times = [row["ms"].get(name) for name in names]
        shown = ["" if ms is None else f"**{_plain(ms)}**" if ms == best else _plain(ms) for ms in times]
        lines.append([f"`{row['kind']}`", *(str(row[key]) for key in ("n", "m", "p", "batch")), *shown])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 10 else f"{ms:.2g}"


def main() -> None:
    """Measure and write the JSON file, or write the page from it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default="qp,lp,entropy,bounds", help="separated by commas")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="merged with what the file has of other kinds")
    parser.add_argument("--page", action="store_true", help="only write the table of docs/solvers.md from the file")
    given = parser.parse_args()
    if given.page:
        cells = json.loads(given.output.read_text())["cells"]
        PAGE.write_text(replace_section(PAGE.read_text(), "crossovers", table(cells)))
        return
    kinds = set(given.kinds.split(","))
    before = json.loads(given.output.read_text())["cells"] if given.output.exists() else []
    kept = [row for row in before if row["kind"] not in kinds]
    where = circumstances()
    found = run(kinds, print)
    document = {**where, "load_at_end": load(), "cells": kept + found}
    given.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
