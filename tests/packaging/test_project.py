"""What the project's own files promise of each other."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = ("fastapi", "starlette", "uvicorn", "redis", "osqp", "clarabel", "scipy", "numba", "cvxpy", "argrad_service")


def project_files() -> list[Path]:
    """Text files of the project, whatever version control says."""
    left_out = {".git", "build", "dist"}
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [f for f in folders if f not in left_out and not (f.startswith(".") and f != ".ci")]
        found += [Path(folder, name) for name in names if not name.endswith(".pyc")]
    return found


@pytest.mark.slow
def test_import_of_the_client_pulls_nothing_heavy():
    script = f"import sys, argrad; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


@pytest.mark.slow
def test_without_the_extras_the_engine_works_and_names_them():
    script = """
import sys
for name in ("scipy", "numba", "threadpoolctl", "osqp", "clarabel", "highspy", "proxsuite", "fastapi", "structlog"):
    sys.modules[name] = None
import argrad, torch
client, eye, ones = argrad.Client("local"), torch.eye(2), torch.ones(2)
for options, Q in (
    *(({"solver": name}, eye) for name in ("auto", "pdipm", "pgd", "barrier", "admm")),
    *(({"solver": name}, eye) for name in ("pivoting", "osqp", "clarabel", "highs", "proxqp")),
    ({"solver": "pdipm", "method": "bpqp", "method_options": {"backend": "osqp"}}, eye),
    ({}, eye.to_sparse()),
):
    q = ones.clone().requires_grad_()
    try:
        z = argrad.nn.QPLayer(client, **options)(Q, q)
        z.sum().backward()
        print("ok")
    except argrad.MissingExtraError as error:
        print(error)
print(len(client.solvers()["solvers"]), "solvers")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    needs = "needs packages that are not installed: pip install 'argrad[{}]'"
    *said, table = done.stdout.splitlines()
    assert said[:5] == ["ok"] * 5
    wanted = [f"solver {name!r}" for name in ("pivoting", "osqp", "clarabel", "highs", "proxqp")]
    extras = ["service"] * 4 + ["proxqp"] + ["service"] * 2
    lines = zip([*wanted, "backend 'osqp'", "a sparse problem"], extras, strict=True)
    assert said[5:] == [f"{what} {needs.format(extra)}" for what, extra in lines]
    assert table == "9 solvers"


def test_changelog_has_the_version():
    version = re.search(r'__version__ = "(.+)"', (ROOT / "client/argrad/_version.py").read_text())[1]
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert f"[{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_both_packages_are_typed():
    assert (ROOT / "client/argrad/py.typed").exists()
    assert (ROOT / "service/argrad_service/py.typed").exists()


def test_base_dependencies_stay_light():
    names = {re.match(r"[a-z0-9-]+", d)[0] for d in PROJECT["dependencies"]}
    assert names == {"torch", "numpy", "httpx", "httptools", "pydantic", "orjson", "jaxtyping", "typer", "rich"}


def test_no_file_names_a_registry():
    pattern = re.compile(r"pypi\.org|pythonhosted|download\.pytorch|index-url [a-z]", re.IGNORECASE)
    for path in project_files():
        if path != Path(__file__):
            assert not pattern.search(path.read_text(errors="ignore")), path


def test_continuous_integration_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "exec make test"


def test_readme_names_the_two_commands_on_its_first_screen():
    first_screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    assert "make serve" in first_screen
    assert "make test" in first_screen


@pytest.mark.parametrize("target", ["install", "serve", "demo", "check", "test", "bench"])
def test_make_help_lists_the_target(target):
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(rf"^  make {target}  +\w", shown, re.MULTILINE)
