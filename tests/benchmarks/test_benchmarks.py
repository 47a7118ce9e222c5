"""The yardsticks of `make bench`: its problems, its judgement, its processes, its tables and its page."""

import dataclasses
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks import workloads
from benchmarks.__main__ import main
from benchmarks.contestants.base import Answer
from benchmarks.contestants.field import PEERS, Entrant, our_variants, ours
from benchmarks.groups import GROUPS, Size
from benchmarks.measures import find_best, is_right, judge
from benchmarks.page import render_page
from benchmarks.race import Field, Limits
from benchmarks.reference import exact
from benchmarks.report import SCHEMA, render
from benchmarks.storage import load_workload, save_workload
from benchmarks.workloads import optnet, two_variables

BRIEF = Limits(command_s=30.0, budget_s=0.01, turn_ms=1.0)


def test_workloads_are_seeded_and_feasible():
    first, again, other = optnet(10, 3, seed=5), optnet(10, 3, seed=5), optnet(10, 3, seed=6)
    assert torch.equal(first.problem.Q, again.problem.Q)
    assert not torch.equal(first.problem.Q, other.problem.Q)
    assert torch.linalg.eigvalsh(first.problem.Q).min() > 0
    assert first.problem.batch_size == 3
    assert two_variables().problem.batch_size is None


def test_a_workload_survives_its_file(tmp_path):
    workload = workloads.bpqp_active(6, 2, seed=1)
    save_workload(workload, tmp_path / "it.pt")
    found = load_workload(tmp_path / "it.pt")
    assert found.wrt == workload.wrt
    assert torch.equal(found.parameters["G"], workload.parameters["G"])
    assert torch.equal(found.known["lam"], workload.known["lam"])


@pytest.mark.parametrize(
    "workload",
    [
        optnet(20, 8, seed=3),
        optnet(5, 32, m=10, seed=3),
        workloads.total_variation(20, 3, seed=3),
        workloads.bpqp_active(30, 10, seed=3),
        workloads.bpqp_lp(40, 8, seed=3),
        workloads.vertex_lp(10, 20, 3, 4, seed=3),
        workloads.sparsemax(300, seed=3),
        workloads.softmax(20, 8, 3, seed=3),
    ],
    ids=lambda workload: workload.name,
)
def test_argrad_misses_nothing(workload):
    contestant = ours().create()
    contestant.prepare(workload)
    contestant.forward()
    contestant.backward()
    accuracy = judge(workload, contestant.answer(), exact(workload))
    assert is_right(dataclasses.asdict(accuracy)), accuracy
    assert accuracy.cosine > 0.999999


def test_judgement_sees_what_is_wrong():
    workload = optnet(6, 4, seed=4)
    truth = exact(workload)
    right = judge(workload, Answer(z=truth.z, gradients=truth.gradients), truth)
    assert (right.z_worst, right.gradient_worst, right.z_missed, right.gradient_missed) == (0.0, 0.0, 0, 0)
    assert right.cosine == pytest.approx(1.0)
    scaled = {name: 1.1 * gradient for name, gradient in truth.gradients.items()}
    wrong = judge(workload, Answer(z=truth.z, gradients=scaled), truth)
    assert 0.05 < wrong.gradient_median <= 0.1
    assert wrong.gradient_missed == wrong.gradient_rough == 4
    holed = truth.z.clone()
    holed[2, 0] = torch.nan
    assert judge(workload, Answer(z=holed, gradients=truth.gradients), truth).z_missed == 1
    with pytest.raises(ValueError, match="z has shape"):
        judge(workload, Answer(z=truth.z[:1], gradients=truth.gradients), truth)


def row(name: str, milliseconds: float, **changes: object) -> dict[str, object]:
    found = {
        "name": name,
        "settings": "",
        "is_ours": name.startswith("argrad"),
        "status": "ok",
        "forward_ms": milliseconds,
        "backward_ms": 1.0,
        "repeats": 3,
        "elements": 200,
        "z_worst": 2e-14,
        "z_median": 1e-14,
        "z_missed": 0,
        "gradient_elements": 200,
        "gradient_worst": 3e-13,
        "gradient_median": 4e-14,
        "gradient_missed": 0,
        "gradient_rough": 0,
        "cosine": 1.0,
    }
    return found | changes


def test_the_best_is_the_fastest_that_is_right_on_99_per_cent():
    rows = [
        row("argrad", 1.0),
        row("wrong", 2.0, gradient_rough=3),
        row("failed", 2.0, status="failed", why="not done in 1 s"),
        row("nearly", 5.0, z_missed=2, gradient_rough=2),
        row("slow", 9.0),
    ]
    assert find_best(rows)["name"] == "nearly"
    assert find_best(rows[:3]) is None


def results(**changes: object) -> dict[str, object]:
    case = {
        "name": "n = m = 10",
        "wrt": ["Q", "q"],
        "elements": 200,
        "active_mean": 4.0,
        "smallest_margin": 1e-3,
        "contestants": [row("argrad", 10.0), row("qpth", 29.0), row("moreau", 0.0, status="failed", why="not done")],
        "best": "qpth",
        "ratio": 30.0 / 11.0,
        "goal": 5,
        "is_right": True,
    }
    step = {"name": "2 variables", "solver": "auto", "engine_ms": 1.0, "in_process_ms": 2.0, "remote_ms": 5.0}
    found = {
        "schema": SCHEMA,
        "is_quick": False,
        "commit": "abc",
        "date": "2026-01-01",
        "seed": 7,
        "machine": {"cpu": "cpu", "cores": 2, "torch_threads": 2, "load_at_start": 0.0, "load_at_end": 0.1},
        "versions": {"argrad": "0.1.0", "torch": "2.13.0"},
        "groups": [{"name": "optnet", "title": "OptNet", "cases": [case]}],
        "remote": [step],
    }
    return found | changes


def test_tables_show_ratios_and_who_failed_and_why():
    text = render(results())
    assert "| qpth (best) | 29.0 | 1.00 | 2.73 | 2e-14 | 3e-13 (4e-14) | 0 of 200 | 0 of 200 | 1.0000000 |" in text
    assert "- moreau: failed (not done)" in text
    assert "1/2.7 of the time of the best peer, qpth; 1/5 or less is wanted: **short of what is wanted**" in text
    assert "| 2 variables, auto | 1.00 | 2.00 | 5.00 | 2.50 | 3.00 |" in text
    assert "seed 7" in text


def test_the_page_takes_the_newest_of_each_group_and_says_where_argrad_falls_short(tmp_path):
    newer = results(date="2026-02-01", seed=8)
    for name, one in {"a": results(), "b": newer, "quick": results(is_quick=True, date="2026-03-01", seed=9)}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(one))
    (tmp_path / "old.json").write_text(json.dumps({"peers": [], "date": "2026-04-01"}))
    text = render_page(tmp_path)
    assert "seed 8" in text
    assert "seed 7" not in text
    assert "seed 9" not in text
    assert "1/5 is wanted, 1/2.7 is reached" in text
    assert "Not yet measured: tiny, tv" in text


def test_the_page_says_whether_anything_was_measured_on_a_gpu(tmp_path):
    assert "## On a GPU\n\nNot yet measured: nothing of argrad has run on CUDA so far" in render_page(tmp_path)
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "first.json").write_text(json.dumps({"device": "NVIDIA H200", "date": "2026-05-01"}))
    text = render_page(tmp_path)
    assert "- [first.json](../benchmarks/results/gpu/first.json): NVIDIA H200, 2026-05-01" in text
    assert "nothing of argrad has run" not in text


def test_every_group_has_its_cases_and_every_size_its_name():
    for title, cases in GROUPS.values():
        assert title
        assert list(cases(Size(quick=True)))
        assert len(list(cases(Size(large=True)))) >= len(list(cases(Size())))
    names = [entrant.name for entrant in (ours(), *our_variants(), *PEERS)]
    assert len(names) == len(set(names))


def test_an_unknown_group_is_refused(capsys):
    assert main(["--groups", "nothing"]) == 2
    assert "there are optnet, tiny" in capsys.readouterr().err


class Hanging:
    """A contestant that never ends."""

    def prepare(self, workload: object) -> None:
        import time

        time.sleep(60)


class Dying(Hanging):
    """A contestant that takes its process with it."""

    def prepare(self, workload: object) -> None:
        import os

        print("about to die", file=sys.stderr)
        os._exit(3)


@pytest.mark.slow
def test_a_contestant_that_hangs_or_dies_is_a_row_and_takes_nobody_with_it(monkeypatch, tmp_path):
    """Two contestants of this file, put where workers look for them."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "import benchmarks.contestants, tests.benchmarks.test_benchmarks as here\n"
        "sys.modules['benchmarks.contestants.trial'] = here\n"
    )
    entrants = [ours()]
    entrants += [
        Entrant(name=name, settings="", factory=f"trial:{name}", package="torch") for name in ("Hanging", "Dying")
    ]
    field = Field(dataclasses.replace(BRIEF, command_s=8.0))
    try:
        found = field.race(optnet(4, 2, seed=1), entrants, goal=5)
    finally:
        field.close()
    rows = {one["name"]: one for one in found["contestants"]}
    assert rows["argrad"]["status"] == "ok"
    assert rows["argrad"]["z_missed"] == 0
    assert "not done in 8 s" in rows["Hanging"]["why"]
    assert "its process died: about to die" in rows["Dying"]["why"]
    assert found["best"] is None


@pytest.mark.slow
def test_gpu_script_runs_on_the_cpu_without_what_argrad_asks_for():
    """As on a bare machine: whatever is neither torch nor NumPy cannot be found."""
    import subprocess

    program = """
import importlib.machinery, runpy, sys
bad = {"numba", "scipy", "threadpoolctl", "pydantic", "pydantic_core", "jaxtyping", "httpx", "orjson"}
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = staticmethod(
    lambda name, path=None, target=None: None if name.split(".")[0] in bad else find(name, path, target)
)
sys.argv = ["gpu.py", "--device", "cpu", "--quick"]
runpy.run_path("benchmarks/gpu.py", run_name="__main__")
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "everything agrees with the CPU" in done.stdout


def test_stand_ins_for_missing_packages_are_not_installed_here():
    from benchmarks.bare import enter_checkout

    before, path = dict(sys.modules), list(sys.path)
    try:
        enter_checkout(Path(__file__).parents[2])
    finally:
        sys.path[:] = path
    assert isinstance(sys.modules["pydantic"], types.ModuleType)
    assert sys.modules["pydantic"] is before["pydantic"]
