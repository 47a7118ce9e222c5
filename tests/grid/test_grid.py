"""The grid, cell by cell.

The cells that cover every pair of values run always; all of them with `make grid`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest

from argrad_service.engine.registry import METHODS, SOLVERS
from tests.grid import checks, invariances
from tests.grid.cases import Case, has_two_sides
from tests.grid.known import defect_of
from tests.grid.run import Run

Check = Callable[[Run], None]

ALWAYS: dict[str, Check] = {
    "verdicts": checks.check_verdicts,
    "optimality": checks.check_optimality,
    "solution": checks.check_solution,
    "singles": invariances.check_singles,
    "permuted": invariances.check_permuted,
    "scaled": invariances.check_scaled,
    "slack": invariances.check_slack,
}
OF_UNIQUE_SOLUTIONS: dict[str, Check] = {
    "gradient": checks.check_gradient,
    "differences": checks.check_differences,
    "agreement": checks.check_agreement,
}
OF_FORWARD_MODE: dict[str, Check] = {"transposes": checks.check_transposes}


@lru_cache(maxsize=2)
def run_of(case: Case) -> Run:
    return Run(case)


def checks_of(case: Case) -> dict[str, Check]:
    """Those that apply: a smoothed problem or an iterate has another derivative where the solution's has two sides."""
    found = dict(ALWAYS)
    is_unique = case.situation != "non-unique" and (case.kind, case.situation) != ("lp", "no-constraints")
    if is_unique and not has_two_sides(case):
        found |= OF_UNIQUE_SOLUTIONS
    if METHODS[case.method].has_jvp:
        found |= OF_FORWARD_MODE
    return found


def cells(cases: list[Case], mark: str) -> list[object]:
    """The checks of every case."""
    found = []
    for case in cases:
        for name, check in checks_of(case).items():
            reason = defect_of(case, name)
            marks = [getattr(pytest.mark, mark)]
            marks += [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
            found.append(pytest.param((case, check), marks=marks, id=f"{case}-{name}"))
    return found


def test_cell(cell, record_property):
    case, check = cell
    record_property("cell", str(case))
    record_property("pair", f"{case.solver} {case.method}")
    check(run_of(case))


def test_every_installed_solver_is_in_the_grid():
    missing = [name for name, solver in SOLVERS.items() if not solver.is_installed]
    if missing:
        pytest.skip(f"not in the grid, for their packages are not installed: {', '.join(missing)}")
