"""Which cells a run has: those that cover every pair of values, or with `-m grid` all of them, and their table."""

from __future__ import annotations

import pytest

from argrad_service.engine.registry import METHODS, SOLVERS
from tests.grid.cases import all_cases, pairwise_cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise the grid; all of its cells take seconds to collect, and are left out where nobody asks for them."""
    if "cell" not in metafunc.fixturenames:
        return
    from tests.grid.test_grid import cells

    has_all = _has_all(metafunc.config)
    metafunc.parametrize("cell", cells(all_cases(), "grid") if has_all else cells(pairwise_cases(), "slow"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The cells of every solver with every method: passed, failed."""
    if not _has_all(config):
        return
    failed, cells = set(), {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            said = dict(report.user_properties)
            if "cell" not in said:
                continue
            cells.setdefault(said["pair"], set()).add(said["cell"])
            failed |= {said["cell"]} if outcome == "failed" else set()
    terminalreporter.section("grid")
    terminalreporter.write_line(f"{'solver':10}{'method':10}{'cells':>8}{'passed':>8}{'failed':>8}")
    for solver in SOLVERS.values():
        for method in METHODS:
            mine = cells.get(f"{solver.name} {method}", set())
            if method not in solver.methods:
                terminalreporter.write_line(f"{solver.name:10}{method:10}{'no such pair':>16}")
            elif mine:
                counts = len(mine), len(mine - failed), len(mine & failed)
                columns = "".join(f"{count:>8}" for count in counts)
                terminalreporter.write_line(f"{solver.name:10}{method:10}{columns}")


def _has_all(config: pytest.Config) -> bool:
    return bool(config.getoption("markexpr") == "grid")
