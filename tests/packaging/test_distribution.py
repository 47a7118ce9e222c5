"""The wheel and the source archive: built, opened, and installed bare."""

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = (
    "fastapi",
    "starlette",
    "uvicorn",
    "redis",
    "osqp",
    "clarabel",
    "highspy",
    "proxsuite",
    "scipy",
    "numba",
    "cvxpy",
    "argrad_service",
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def run(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run and return the output, without the environment's own Python path."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder of the source archive, and of the wheel that is built from that archive."""
    folder = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def bare_python():
    """The interpreter of a virtual environment that holds the wheel and what it asks for; none of the extras."""
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        yield Path(folder) / "bin" / "python"


def test_wheel_holds_both_packages_and_nothing_else(dist):
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"argrad", "argrad_service"}
    assert {"argrad/py.typed", "argrad_service/py.typed"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    sources = {str(p.relative_to(ROOT / "client")) for p in (ROOT / "client").rglob("*.py")}
    sources |= {str(p.relative_to(ROOT / "service")) for p in (ROOT / "service").rglob("*.py")}
    assert sources <= set(names)


def test_source_archive_holds_what_make_test_needs(dist):
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    wanted = {"Makefile", "constraints-cpu.txt", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "Dockerfile"}
    assert wanted <= names
    assert {"tests/packaging/test_distribution.py", "examples/mnist.py", "benchmarks/__main__.py"} <= names


def test_bare_install_is_light_and_says_how_to_get_the_rest(dist, bare_python):
    (wheel,) = dist.glob("*.whl")
    constraints = ROOT / "constraints-cpu.txt"
    done = run(
        sys.executable, "-m", "pip", "--python", bare_python, "install", "--quiet", "--no-compile",
        "--constraint", constraints, wheel,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    script = f"import sys, argrad; print(argrad.__version__, *[m for m in {HEAVY!r} if m in sys.modules])"
    imported = run(bare_python, "-W", "error", "-c", script)
    assert imported.returncode == 0, imported.stderr
    assert len(imported.stdout.split()) == 1, "the version, and no heavy module after it"
    absent = run(bare_python, "-c", "import fastapi")
    assert "No module named 'fastapi'" in absent.stderr

    served = run(bare_python.with_name("argrad"), "serve")
    assert served.returncode != 0
    assert "pip install 'argrad[service]'" in served.stdout + served.stderr
    assert "Traceback" not in served.stderr

    solve = "argrad.Client('local').solve(argrad.QP(Q=torch.eye(1), q=torch.ones(1))).statuses[0]"
    solved = run(bare_python, "-W", "error", "-c", f"import argrad, torch; print({solve})")
    assert solved.stdout == "optimal\n", "the engine itself needs no extra"
