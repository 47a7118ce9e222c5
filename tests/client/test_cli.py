"""The command line."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import argrad
from argrad import errors
from argrad.cli import app
from argrad.client import Client
from tests.client.support import FakeService, listening

REQUEST = {
    "problem": {
        "kind": "qp",
        "Q": [[4, 1], [1, 2]],
        "q": [1, 1],
        "A": [[1, 1]],
        "b": [1],
        "G": [[-1, 0], [0, -1]],
        "h": [0, 0],
    },
    "upstream": {"z": [1, 0]},
    "wrt": ["q", "b"],
}


@pytest.fixture
def url() -> Iterator[str]:
    with listening(FakeService()) as url:
        yield url


def run(*arguments: str, stdin: str | None = None, columns: int = 200) -> Any:
    return CliRunner().invoke(app, arguments, input=stdin, env={"ARGRAD_URL": None, "COLUMNS": str(columns)})


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.output) == (0, f"{argrad.__version__}\n")


def test_every_command_is_listed() -> None:
    listed = run("--help").output
    assert all(name in listed for name in ("serve", "solve", "solvers", "bench", "doctor"))


@pytest.mark.parametrize("where", ["file", "stdin"])
def test_solve(url: str, tmp_path: Path, where: str) -> None:
    file = tmp_path / "request.json"
    file.write_text(json.dumps(REQUEST))
    name, stdin = (str(file), None) if where == "file" else ("-", json.dumps(REQUEST))
    result = run("solve", name, "--url", url, stdin=stdin)
    assert result.exit_code == 0, result.output
    reply = json.loads(result.stdout)
    assert reply["status"] == "optimal"
    assert reply["solution"]["z"] == pytest.approx([0.25, 0.75])
    assert reply["gradients"] == {"q": pytest.approx([-0.25, 0.25]), "b": pytest.approx([0.25])}


def test_solve_in_process(tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text(json.dumps(REQUEST))
    result = run("solve", str(tmp_path / "request.json"), "--url", "local")
    assert json.loads(result.stdout)["solution"]["z"] == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        pytest.param("{", 2, "unexpected end of data", id="no-json"),
        pytest.param('{"problem": {}, "speed": 9}', 2, "speed: found an unknown field", id="unknown-field"),
        pytest.param('{"problem": {"Q": [[1]], "q": [1, 2]}}', 1, "problem.Q: found shape (1, 1)", id="shapes"),
    ],
)
def test_solve_says_what_is_wrong(url: str, tmp_path: Path, body: str, status: int, message: str) -> None:
    (tmp_path / "request.json").write_text(body)
    result = run("solve", str(tmp_path / "request.json"), "--url", url)
    assert result.exit_code == status
    assert result.stderr.startswith("argrad: ")
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param(["--timeout-s", "inf"], "timeout_s: found inf, wanted seconds above zero", id="for-ever"),
        pytest.param(["--timeout-s", "0"], "timeout_s: found 0.0, wanted seconds above zero", id="no-time"),
        pytest.param(["--url", "host:8000"], "url: found 'host:8000', wanted http://host:port", id="no-scheme"),
        pytest.param(["--api-key", "a\nb"], "api_key: found nothing, or what a header cannot carry", id="key"),
    ],
)
def test_flags_that_name_no_call_are_refused(tmp_path: Path, flags: list[str], message: str) -> None:
    (tmp_path / "request.json").write_text(json.dumps(REQUEST))
    result = run("solve", str(tmp_path / "request.json"), *flags)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"argrad: {message}")


def test_solve_without_a_file() -> None:
    result = run("solve", "/nowhere.json")
    assert result.exit_code == 2
    assert "No such file" in result.stderr


def test_solvers(service_url: str) -> None:
    result = run("solvers", "--url", service_url, columns=80)
    assert result.exit_code == 0
    assert all(word in result.stdout for word in ("pdipm", "qp", "lp", "kkt", "cpu", "breakpoint", "sparse_qp"))
    assert max(len(line) for line in result.stdout.splitlines()) <= 80
    assert len(result.stdout.splitlines()) < 60, "every solver fits on a screen or two"


def test_doctor(service_url: str) -> None:
    result = run("doctor", "--url", service_url)
    assert result.exit_code == 0, result.output
    assert argrad.__version__ in result.stdout
    assert service_url in result.stdout
    assert result.stdout.count("ms a round trip") == 2


def test_doctor_without_a_service() -> None:
    result = run("doctor", "--url", "http://127.0.0.1:1")
    assert result.exit_code == 1
    assert "ConnectionFailedError: http://127.0.0.1:1" in result.stdout


def test_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("argrad.cli.Client", lambda url, **more: Client(url, **(more | {"retries": 0})))
    result = run("solvers", "--url", "http://127.0.0.1:1")
    assert result.exit_code == 1
    assert "ConnectError" in result.stderr


@pytest.mark.slow
class TestServe:
    def test_passes_all_flags_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[list[str]] = []

        class Entry:
            def load(self) -> Any:
                return lambda argv: seen.append(argv) or 3

        monkeypatch.setattr("argrad.cli.entry_points", lambda **_: (Entry(),))
        result = run("serve", "--host", "0.0.0.0", "--port=1", "--help", "x")
        assert (result.exit_code, seen) == (3, [["--host", "0.0.0.0", "--port=1", "--help", "x"]])

    def test_without_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        broken = importlib.metadata.EntryPoint("serve", "no_such_package:main", "argrad.commands")
        for found in ((), (broken,)):
            monkeypatch.setattr("argrad.cli.entry_points", lambda found=found, **_: found)
            result = run("serve")
            assert result.exit_code == 2
            assert "argrad serve needs packages that are not installed: pip install 'argrad[service]'" in result.stderr

    def test_the_installed_command(self) -> None:
        command = [sys.executable, "-m", "argrad.cli", "serve", "--help"]
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        assert "--port PORT" in output


def test_exports_are_complete() -> None:
    assert all(hasattr(argrad, name) for name in argrad.__all__)
    raised = {
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert raised <= set(argrad.__all__)
