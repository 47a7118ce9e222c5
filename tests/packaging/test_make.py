"""The Makefile: what it plans to do, and that `make serve` ends when it is told to."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
CONSTRAINED = "install --quiet --constraint constraints-cpu.txt --editable"


def planned(*arguments: str) -> str:
    """What make would run in a folder where nothing has been installed."""
    command = ["make", "--dry-run", "VENV=/nonexistent/venv", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_install_takes_the_pinned_torch_by_default():
    assert f"{CONSTRAINED} '.[service,dev]'" in planned("install")
    assert f"{CONSTRAINED} '.[service]'" in planned("serve")


@pytest.mark.parametrize("choice", ["", "torch==2.11.0"])
def test_torch_can_be_chosen(choice):
    plan = planned("install", f"TORCH={choice}")
    assert "constraints-cpu.txt --editable" not in plan
    assert f"install --quiet {choice} --editable '.[service,dev]'" in plan


def test_the_choice_of_torch_is_remembered_and_a_second_install_does_nothing(tmp_path):
    """A virtual environment of stamps only, in which `pip` is a program that writes down how it was called."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    calls = tmp_path / "calls"
    python = venv / "bin" / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >>{calls}\n')
    python.chmod(0o755)

    def make(*arguments: str) -> list[str]:
        calls.unlink(missing_ok=True)
        subprocess.run(["make", "install", f"VENV={venv}", *arguments], cwd=ROOT, capture_output=True, check=True)
        return calls.read_text().splitlines() if calls.exists() else []

    assert "--constraint constraints-cpu.txt" in make()[0]
    assert make() == []
    assert "install --quiet torch==2.11.0 --editable" in make("TORCH=torch==2.11.0")[0]
    assert make() == [], "without TORCH the last choice stands"
    os.utime(venv / "with-dev", (0, 0))  # as if pyproject.toml had changed since
    assert "torch==2.11.0" in make()[0]
    assert "torch" not in make("TORCH=")[0].partition("--editable")[0]


@pytest.mark.slow
def test_make_serve_ends_with_its_server_on_sigterm(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/health/ready"
    command = ["make", "serve", f"BIN={Path(sys.executable).parent}", "--old-file=.venv/with-service"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "ARGRAD_PORT": str(port)}, stdout=log, stderr=log
        )
        try:
            _wait(lambda: _status(url) == 200, "the service to be ready")
            process.send_signal(signal.SIGTERM)
            process.wait(30)
            _wait(lambda: _status(url) is None, "the port to be free")
        finally:
            process.kill()


def _status(url: str) -> int | None:
    try:
        return httpx.get(url, trust_env=False).status_code
    except httpx.TransportError:
        return None


def _wait(is_done, what: str) -> None:
    deadline = time.monotonic() + 60
    while not is_done():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)
