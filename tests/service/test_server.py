"""`argrad serve` as a process: its address, its flags, its signals."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from argrad.wire import SAFETENSORS, encode
from argrad.wire.messages import SolveRequest
from argrad_service.listening import ServeError, listening
from argrad_service.server import PROCESS_ENVIRONMENT, serve, serve_command
from argrad_service.settings import Settings, flag, load_settings
from tests.conftest import running_service
from tests.service.support import D, simplex, wait_until

pytestmark = pytest.mark.slow  # each starts a service of its own


@pytest.fixture
def free_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("ARGRAD_"):
            monkeypatch.delenv(name)


@pytest.fixture
def no_restart(monkeypatch: pytest.MonkeyPatch, free_environment: None) -> None:
    """The process environment is complete, so that nothing is executed anew."""
    for name, text in PROCESS_ENVIRONMENT.items():
        monkeypatch.setenv(name, text)


def test_the_service_solves_prints_where_it_is_and_started_anew_with_its_environment(service_url: str):
    response = httpx.post(f"{service_url}/v1/solve", json={"problem": simplex()}, trust_env=False)
    assert response.json()["solution"]["z"] == pytest.approx([0.25, 0.75])
    assert "server" not in response.headers


def test_sigterm_finishes_what_is_under_way_and_ends_with_0(tmp_path: Path):
    log = tmp_path / "log.txt"
    with running_service(log, "--log-format", "json") as (url, process):
        environment = Path(f"/proc/{process.pid}/environ").read_bytes().decode().split("\0")
        assert {f"{name}={text}" for name, text in PROCESS_ENVIRONMENT.items()} <= set(environment)
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
            client.get("/health/live")
            body = b"".join(encode(SolveRequest(), heavy(), SAFETENSORS))
            with ThreadPoolExecutor() as pool:
                solving = pool.submit(client.post, "/v1/solve", content=body, headers={"content-type": SAFETENSORS})
                with httpx.Client(base_url=url, trust_env=False) as other:
                    wait_until(lambda: "argrad_running_calls 1.0" in other.get("/metrics").text)
                process.send_signal(signal.SIGTERM)
                assert solving.result().status_code == 200
        assert process.wait(30) == 0
    text = log.read_text()
    assert re.search(rf"^argrad \S+ on {re.escape(url)} \((cpu|cuda), \d+ threads\)$", text, re.MULTILINE)
    assert f"documentation: {url}/docs" in text
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert any(line["event"] == "ready" for line in lines)
    assert "Traceback" not in text


def heavy() -> dict[str, torch.Tensor]:
    """A batch that takes the solver about a second."""
    torch.manual_seed(0)
    B, n = 128, 100
    L = torch.randn(B, n, n, dtype=D)
    return {
        "problem.Q": L @ L.mT / n + torch.eye(n, dtype=D),
        "problem.q": torch.randn(B, n, dtype=D),
        "problem.G": torch.randn(B, n, n, dtype=D),
        "problem.h": torch.rand(B, n, dtype=D),
    }


def test_readiness_turns_false_before_the_listener_closes_and_a_second_signal_ends_at_once(tmp_path: Path):
    with running_service(tmp_path / "log.txt", "--drain-delay-s", "30") as (url, process):
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{url}/health/ready", trust_env=False).status_code == 503)
        response = httpx.get(f"{url}/health/ready", trust_env=False)
        assert (response.json()["type"], response.json()["checks"]["phase"]) == ("not-ready", "stopping")
        assert httpx.post(f"{url}/v1/solve", json={"problem": simplex()}, trust_env=False).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_a_unix_socket_is_its_owner_s_alone_and_replaces_a_stale_one(tmp_path: Path, free_environment: None):
    path = tmp_path / "argrad.sock"
    settings = load_settings(uds=path)
    with listening(settings) as ((first,), address):
        first.listen()
        assert address == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(ServeError, match="another process listens on"), listening(settings):
            pass
    assert not path.exists()
    with listening(settings) as ((stale,), _):
        os.link(path, tmp_path / "left")
        stale.close()
    os.rename(tmp_path / "left", path)
    with listening(settings) as (_, _):
        assert stat.S_ISSOCK(path.stat().st_mode)
    path.write_text("a file")
    with pytest.raises(ServeError, match="exists and is no socket"), listening(settings):
        pass
    assert path.read_text() == "a file"


def test_the_service_answers_on_a_unix_socket(tmp_path: Path):
    path = tmp_path / "argrad.sock"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ARGRAD_")}
    command = [sys.executable, "-m", "argrad_service", "--uds", str(path)]
    process = subprocess.Popen(command, env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        while not (line := process.stdout.readline()).startswith("argrad "):
            assert line, "the service ended"
        assert f" on unix:{path} " in line
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://argrad") as client:
            wait_until(lambda: client.get("/health/ready").status_code == 200)
            assert client.post("/v1/solve", json={"problem": simplex()}).json()["status"] == "optimal"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert not path.exists()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_an_address_in_use_is_said_with_the_flags_that_change_it(
    no_restart: None, capsys: pytest.CaptureFixture[str], service_url: str
):
    port = service_url.rpartition(":")[2]
    assert serve_command(["--port", port]) == 1
    message = capsys.readouterr().err
    assert (
        f"cannot listen on 127.0.0.1:{port} (Address already in use); choose another with --host and --port" in message
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--port", "high"], "ARGRAD_PORT (flag --port) cannot be 'high': input should be a valid integer"),
        (["--device", "tpu"], "ARGRAD_DEVICE (flag --device) cannot be 'tpu'"),
    ],
)
def test_wrong_flags_end_the_start_with_2(
    no_restart: None, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
):
    assert serve_command(argv) == 2
    assert message in capsys.readouterr().err


def test_flags_are_not_abbreviated_and_unknown_ones_are_refused(no_restart: None, capsys: pytest.CaptureFixture[str]):
    for argv in (["--por", "1"], ["--prot", "1"], ["8000"]):
        with pytest.raises(SystemExit) as caught:
            serve_command(argv)
        assert caught.value.code == 2
        assert "unrecognized arguments" in capsys.readouterr().err


def test_help_lists_a_flag_for_every_setting(no_restart: None, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        serve_command(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in Settings.model_fields:
        assert flag(name) in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_said(free_environment: None):
    with pytest.raises(ServeError, match=r"ARGRAD_DEVICE is cuda, and torch .* finds no GPU here"):
        serve(load_settings(device="cuda"))


@pytest.fixture
def open_service(tmp_path: Path) -> Iterator[Path]:
    log = tmp_path / "log.txt"
    with running_service(log, "--host", "0.0.0.0", "--insecure", ARGRAD_LOG_FORMAT="json"):
        yield log


def test_an_address_that_others_reach_is_warned_of(open_service: Path):
    lines = [json.loads(line) for line in open_service.read_text().splitlines() if line.startswith("{")]
    (warning,) = [line for line in lines if line["level"] == "warning"]
    assert (warning["event"], warning["host"]) == ("no authentication", "0.0.0.0")
