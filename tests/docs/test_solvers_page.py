"""docs/solvers.md: its tables are what the code and the measurements say, and `auto` does what they say."""

import json
import re

import pytest
import torch

from argrad.problems import QP, Flag, Status
from argrad_service import capabilities, engine
from argrad_service.engine import SolverOptions, crossovers, registry
from argrad_service.engine.data import stack
from argrad_service.engine.registry import METHODS, SOLVERS
from benchmarks import crossovers as measured
from tests.docs.markdown import ROOT
from tests.solvers.linear import draw_lp

PAGE = ROOT / "docs" / "solvers.md"
CELLS = json.loads(measured.OUTPUT.read_text())["cells"]

AT_MOST = 4.0
"""`auto` takes at most this many times as long as the fastest,"""

SHORT_MS = 10.0
"""or has done within this."""

eye = torch.eye(120, dtype=torch.float64)
slope = torch.linspace(-1, 1, 120, dtype=torch.float64)


def test_the_tables_are_what_the_registry_generates():
    assert PAGE.read_text() == capabilities.render(PAGE.read_text()), "run: python -m argrad_service.capabilities"


def test_the_times_are_those_of_the_file():
    page = PAGE.read_text()
    shown = capabilities.replace_section(page, "crossovers", measured.table(CELLS))
    assert page == shown, "run: python -m benchmarks.crossovers --page"


def test_a_page_without_the_marks_is_refused():
    with pytest.raises(ValueError, match="no section choice"):
        capabilities.replace_section("<!-- choice -->\n", "choice", "")


def test_everything_has_its_row_and_its_page():
    page = PAGE.read_text()
    for name in (*SOLVERS, *METHODS):
        assert re.search(rf"^\| \[?`{name}`", page, re.MULTILINE), name
    for place in ("solvers", "methods"):
        for path in (ROOT / "docs" / place).glob("*.md"):
            assert "](../solvers.md" in path.read_text(), path
            assert f"]({place}/{path.name})" in page, path


def shaped(kind: str, n: int, m: int, p: int, batch: int) -> QP:
    """A problem of a cell's shape, of zeros that take no memory, but for what is looked at."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros((), dtype=torch.float64).expand(shape)

    parts = {"q": zeros(batch, n), "G": zeros(batch, m, n), "h": zeros(batch, m)}
    if kind == "bounds":
        one = torch.eye(n, dtype=torch.float64)
        parts |= {"Q": one, "G": torch.cat([-one, one])}
    if kind == "qp":
        parts["Q"] = torch.ones((), dtype=torch.float64).expand(n, n)
    if kind == "entropy":
        parts["entropy"] = torch.ones((), dtype=torch.float64)
    if p:
        parts |= {"A": zeros(batch, p, n), "b": zeros(batch, p)}
    return QP(**parts)


@pytest.mark.parametrize(
    "cell",
    [row for row in CELLS if row["n"] * row["m"] * row["batch"] <= 1_000_000],
    ids=lambda row: f"{row['kind']}-{row['n']}-{row['m']}-{row['batch']}",
)
def test_auto_is_never_far_from_the_fastest(cell: dict):
    problem = shaped(*(cell[key] for key in ("kind", "n", "m", "p", "batch")))
    taken = crossovers.choose(stack(problem), lambda name: True)
    times = [ms for ms in cell["ms"].values() if ms is not None]
    assert cell["ms"][taken] <= max(AT_MOST * min(times), SHORT_MS), taken


@pytest.mark.parametrize(
    ("problem", "solver"),
    [
        (QP(Q=eye, q=slope, G=-eye, h=0 * slope), "admm"),
        (QP(Q=eye[:90, :90], q=slope[:90], G=-eye[:90, :90], h=0 * slope[:90]), "pivoting"),
        (QP(q=eye[0, :2], G=-eye[:2, :2], h=0 * eye[0, :2]), "pdipm"),
    ],
    ids=["bounds", "small", "linear"],
)
def test_auto_takes_what_the_table_says(problem: QP, solver: str):
    assert engine.solve(problem).solver == solver


def test_a_warm_start_goes_to_a_solver_that_uses_it():
    problem = QP(Q=eye[:4, :4], q=slope[:4], G=-eye[:4, :4], h=0 * slope[:4])
    first = engine.solve(problem)
    assert first.solver == "pivoting"
    assert engine.solve(problem, warm_start=first.solution).solver == "pdipm"


def test_what_admm_leaves_undecided_is_solved_and_flagged(monkeypatch: pytest.MonkeyPatch):
    known = draw_lp(30, 90, 3, batch=6)
    options = SolverOptions(max_iterations=8)
    alone = engine.solve(known.problem, solver="admm", options=options)
    assert Status.MAX_ITERATIONS in alone.status
    monkeypatch.setattr(registry, "choose", lambda data, suits: "admm")
    found = engine.solve(known.problem, options=options)
    assert set(found.status) == {Status.OPTIMAL}
    torch.testing.assert_close(found.solution.z, known.z, rtol=0, atol=1e-9)
    assert found.solver == "admm"
    assert [Flag.FALLBACK in flags for flags in found.flags] == [s == Status.MAX_ITERATIONS for s in alone.status]
