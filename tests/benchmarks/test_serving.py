"""`make bench-serving`: its table of figures, its loads, and what goes into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving import callers, loads, memory, training
from benchmarks.serving.__main__ import PARTS, main
from benchmarks.serving.figures import Figure, figures, render
from benchmarks.serving.services import plain_client
from tests.client.support import FakeService, listening


def step_case(key: str, **medians: float) -> dict[str, Any]:
    row = {"repeats": 1, "sent_bytes": 2e6, "differs": 0.0}
    who = {name: {"median_ms": ms, "least_ms": ms, **row} for name, ms in medians.items()}
    return {"key": key, "name": key, "who": who}


def callers_case(case: callers.Case) -> dict[str, Any]:
    rates = {callers.BATCHING: 300.0, callers.PLAIN: 100.0, callers.NO_SOLVER: 400.0}
    who = {name: {"calls_per_s": rate, "median_ms": 1.0, "p99_ms": 2.0, "calls": 9} for name, rate in rates.items()}
    return {"key": case.key, "name": case.name, "mean_batch": 8.0, "differs": 1e-13, "who": who}


def results() -> dict[str, Any]:
    """Of a run in which every step over HTTP takes 1 ms more, and one through Tesseract 20 ms."""
    times = {training.IN_PROCESS: 1.0, training.REMOTE: 2.0, training.UNIX: 1.5, training.TESSERACT: 21.0}
    percentiles = {"median_ms": 1.0, "p99_ms": 21.0, "max_ms": 30.0}
    goodput = {"p99_ms": 9.0, "refused": 1, "failed": 2, "steps": 90, "resent": 0}
    return {
        "steps": [step_case(case.key, **times) for case in training.cases(0, batch=2)],
        "callers": [callers_case(case) for case in callers.cases(0)],
        "liveness": [
            {"key": load.key, "name": load.name, "calls": 9, "probes": 9} | percentiles for load in loads.loads(2)
        ],
        "overload": [
            {
                "key": load.key,
                "name": load.name,
                "who": {
                    loads.CACHE: goodput | {"steps_per_s": 100.0},
                    loads.NO_CACHE: goodput | {"steps_per_s": 50.0, "resent": 90},
                },
            }
            for load in loads.overloads()
        ],
        "memory": [
            {"key": key, "name": key, "body_bytes": 20e6, "peak_bytes": 30e6, "workspace_bytes": room}
            for key, room in ((memory.NO_SOLVER, 0), (memory.SOLVED, 60e6))
        ],
    }


def test_figures_are_read_from_the_results():
    found = {figure.name: figure for figure in figures(results())}
    assert len(found) == len(list(figures(results()))), "every figure has a name of its own"
    small = "two variables"
    assert found[f"overhead of a step, {small}"] == Figure(f"overhead of a step, {small}", 1.6, 1.0, "ms")
    assert found[f"the same beside Tesseract's, {small}"].found == pytest.approx(1 / 20)
    assert found[f"the same over a unix socket, {small}"].found == pytest.approx(0.5)
    assert found["overhead of a step, large, registered"].wanted == 6.0
    rates = [figure for name, figure in found.items() if name.startswith("rate to no batching")]
    assert [(figure.wanted, figure.found, figure.is_met) for figure in rates] == [
        (2.5, 3.0, True),
        (4.0, 3.0, False),
        (2.0, 3.0, True),
    ]
    short = [figure.name for figure in found.values() if not figure.is_met]
    assert sum("/health/live" in name for name in short) == 2
    assert sum("goodput left without the cache" in name for name in short) == 2
    assert len(short) == 5
    assert found[f"peak to 2 × body + workspace, {memory.NO_SOLVER}"].found == pytest.approx(0.75)


def test_the_tables_show_every_row_and_what_falls_short():
    found = results()
    text = render(list(figures(found)))
    assert "| overhead of a step, two variables | ≤ 1.6 ms | 1 ms | met |" in text
    assert "| rate to no batching, n = m = 10, pdipm, 32 callers | ≥ 4 × | 3 × | **short** |" in text
    assert (
        "| gradient with batching differs by, n = m from 20 to 60, pdipm, 32 callers | ≤ 1e-10 | 1e-13 | met |" in text
    )
    assert f"| {memory.SOLVED} | 20.0 | 30.0 | 60.0 | 0.30 |" in memory.render(found["memory"])
    steps = training.render(found["steps"])
    assert "| two variables | argrad remote, unix socket | 1.5 (1.5) | 0.5 | 2 | 0e+00 |" in steps
    shown = callers.render(found["callers"])
    assert "| n = m = 50, pdipm, 32 callers | batching | 300 | 3.00 | 0.75 | 1 | 2 | 8.0 | 1e-13 |" in shown
    assert "n = m = 10, auto, 1 caller |" in shown
    assert "| 32 callers, n = m = 50, pdipm | 9 | 9 | 1 | 21 | 30 |" in loads.render_liveness(found["liveness"])
    left = loads.render_overload(found["overload"])
    assert "| 200 callers, n = m = 50, pdipm | without | 50 | 0.50 | 9 | 90 | 90 | 2 (1) |" in left


def test_problems_of_mixed_shapes_are_of_mixed_shapes():
    mixed = next(case for case in callers.cases(1) if case.key == "pdipm mixed")
    sizes = {problem.n for problem in mixed.problems}
    assert len(mixed.problems) == callers.CALLERS
    assert len(sizes) > 10
    assert min(sizes) >= 20
    assert max(sizes) <= 60


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--parts", "steps,nothing"])
    assert f"nothing: there are {', '.join(PARTS)}" in capsys.readouterr().err


@pytest.mark.slow
def test_a_service_is_probed_while_it_is_loaded(service_url: str):
    load = loads.Load("small", "2 callers", "--callers 2 --n 5")
    process = load.start(service_url, 0, 0.5)
    times = loads.probe(service_url, process, 0.5)
    assert loads.result_of(process)["steps"] > 0
    assert len(times) > 5
    assert min(times) > 0


@pytest.mark.slow
def test_a_load_that_fails_is_no_result():
    process = loads.Load("wrong", "wrong", "--callers 0").start("http://127.0.0.1:1", 0, 0.5)
    with pytest.raises(RuntimeError, match="argrad bench ended with 2"):
        loads.result_of(process)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_services_are_asked_over_tcp_and_unix_sockets(kind: str, tmp_path: Path):
    with listening(FakeService(), tmp_path / "socket" if kind == "unix" else None) as url, plain_client(url) as client:
        assert client.get("/health/live").status_code == 501, "it knows POST alone"
