"""The service where its files are read-only, as in a container: kernels are cached elsewhere, before it is ready."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from argrad_service.engine import kernels
from tests.conftest import free_port
from tests.service.support import simplex, wait_until

ROOT = Path(__file__).parents[2]
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1


def test_the_user_s_cache_is_taken_if_it_is_the_user_s_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = Path(kernels.__file__).parent
    folder = Path(kernels._folder_elsewhere(source))
    assert folder.parent == tmp_path / "cache" / "argrad"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert kernels._folder_elsewhere(source) == str(folder), "the same sources find it again"
    folder.chmod(0o777)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    other = Path(kernels._folder_elsewhere(source))
    assert other.parent == tmp_path, "others could have filled it, and what is cached is executed"
    assert other.stat().st_mode & 0o777 == 0o700


def obey_permissions() -> None:
    """Let permissions bind the program that is executed next even if it is root's."""
    if os.getuid() == 0:
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Path]:
    """The files of a container: whole seconds, kernels compiled as the Dockerfile has it, and nothing to be written."""
    source = tmp_path / "source"
    for package in ("client", "service"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__", "compiled"))
    for path in source.rglob("*.py"):
        os.utime(path, (1577836800, 1577836800))
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{source}/client:{source}/service"}
    command = [sys.executable, "-m", "argrad_service.warming", "--for-image"]
    done = subprocess.run(command, env=environment, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folders = [source, *(path for path in source.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    yield source
    for folder in folders:
        folder.chmod(0o755)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_container_compiles_nothing_and_writes_to_temporary_files_alone(image: Path, tmp_path: Path):
    """No home and no cache: there is the folder of temporary files, as in the container, and nothing else."""
    temporary, nowhere = tmp_path / "tmp", image / "none"
    temporary.mkdir()
    port = free_port()
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": f"{image}/client:{image}/service",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(nowhere),
        "TMPDIR": str(temporary),
        "ARGRAD_PORT": str(port),
    }
    url = f"http://127.0.0.1:{port}"

    def status() -> int | None:
        try:
            return httpx.get(f"{url}/health/ready", trust_env=False).status_code
        except httpx.TransportError:
            return None

    def cached(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.rglob("*.nb?") if path.is_file()}

    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "argrad_service"],
            env=environment,
            cwd=image,
            stdout=log,
            stderr=log,
            preexec_fn=obey_permissions,
        )
    try:
        wait_until(lambda: process.poll() is not None or status() == 200, 300)
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert "compiling" not in (tmp_path / "log").read_text()
        compiled = cached(temporary)
        assert compiled == cached(image), "none is missing, none was added, none was compiled again"
        assert any(name.startswith("small.solve_small_range") for name in compiled)
        began = time.monotonic()
        reply = httpx.post(f"{url}/v1/solve", json={"problem": simplex()}, trust_env=False, timeout=60)
        assert reply.json()["report"]["solver"] == "pivoting"
        assert reply.json()["solution"]["z"] == pytest.approx([0.25, 0.75])
        assert time.monotonic() - began < 5, "nothing is compiled inside a request"
        assert cached(temporary) == compiled
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    assert list(temporary.glob("argrad-kernels-*")) == [], "what is this process's own goes with it"
