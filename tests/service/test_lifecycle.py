"""How a real service ends while calls are under way, and what their callers see."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from argrad.keys import new_key, stored_line
from tests.conftest import _wait_until_ready, free_port
from tests.service.support import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.alone]

LONG = json.dumps({"problem": {"Q": [[1, 0, 0], [0, 1, 0], [0, 0, 1]], "q": [1, 2, 3]}})
SHORT = json.dumps({"problem": {"Q": [[1, 0], [0, 1]], "q": [1, 2]}})
JSON = {"content-type": "application/json"}


@contextlib.contextmanager
def slow_service(log: Path, solve_s: float, **settings: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    port = free_port()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ARGRAD_")}
    command = [sys.executable, "-m", "tests.service.slow_service", str(solve_s)]
    environment = clean | {"ARGRAD_PORT": str(port), "ARGRAD_LOG_FORMAT": "json"} | settings
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(f"http://127.0.0.1:{port}", process, log)
            yield f"http://127.0.0.1:{port}", process
        finally:
            process.kill()
            process.wait()


def solve(url: str, body: str = LONG) -> httpx.Response:
    with httpx.Client(trust_env=False, timeout=60) as client:
        return client.post(f"{url}/v1/solve", content=body, headers=JSON)


def wait_for_calls(url: str, name: str, number: int) -> None:
    line = f"argrad_{name}_calls {number}.0"
    wait_until(lambda: line in httpx.get(f"{url}/metrics", trust_env=False).text)


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def check_handed_back(response: httpx.Response) -> None:
    document = response.json()
    assert (response.status_code, document["type"]) == (503, "not-ready"), response.text
    assert (response.headers["retry-after"], response.headers["connection"]) == ("1", "close")
    assert document["request_id"] == response.headers["x-request-id"]


@pytest.fixture
def sockets() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def test_readiness_turns_false_first_and_what_is_under_way_is_finished(tmp_path: Path, sockets: contextlib.ExitStack):
    log = tmp_path / "log"
    with slow_service(log, 8.0, ARGRAD_DRAIN_DELAY_S="4") as (url, process), ThreadPoolExecutor() as pool:
        idle = sockets.enter_context(connect(url))
        idle.sendall(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert b'{"status":"live"}' in idle.recv(65536)
        solving = pool.submit(solve, url)
        wait_for_calls(url, "running", 1)
        told = time.monotonic()
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{url}/health/ready", trust_env=False).status_code == 503)
        late = httpx.get(f"{url}/v1/solvers", trust_env=False)
        assert (late.status_code, late.headers["connection"]) == (200, "close")
        assert time.monotonic() - told < 4, "all this was in the delay"
        assert read_all(idle) == b"", "closed in good order, not reset"
        with pytest.raises(httpx.ConnectError):
            httpx.get(url, trust_env=False)
        finished = solving.result()
        assert (finished.json()["status"], finished.headers["connection"]) == ("optimal", "close")
        assert process.wait(20) == 0
    assert "Traceback" not in log.read_text()


def test_what_cannot_be_finished_is_handed_back_wherever_it_is(tmp_path: Path, sockets: contextlib.ExitStack):
    log = tmp_path / "log"
    with slow_service(log, 60.0, ARGRAD_SHUTDOWN_TIMEOUT_S="1") as (url, process), ThreadPoolExecutor() as pool:
        running = pool.submit(solve, url)
        wait_for_calls(url, "running", 1)
        queued = pool.submit(solve, url)
        wait_for_calls(url, "queued", 1)
        uploading = sockets.enter_context(connect(url))
        uploading.sendall(b"POST /v1/solve HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n")
        uploading.sendall(b"content-length: 100\r\n\r\n{")
        wait_for_calls(url, "pending", 3)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        check_handed_back(running.result())
        check_handed_back(queued.result())
        assert read_all(uploading).startswith(b"HTTP/1.1 503 ")
        assert 0.9 < time.monotonic() - began < 10
        assert process.wait(20) == 0
    text = log.read_text()
    assert "Traceback" not in text
    calls = [json.loads(line) for line in text.splitlines() if '"/v1/solve"' in line]
    assert [call["status"] for call in calls] == [503, 503, 503]


def test_a_second_signal_ends_at_once_and_still_tells_the_callers(tmp_path: Path):
    log = tmp_path / "log"
    with slow_service(log, 60.0) as (url, process), ThreadPoolExecutor() as pool:
        running = pool.submit(solve, url)
        wait_for_calls(url, "running", 1)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        check_handed_back(running.result())
        assert process.wait(10) == 0
        assert time.monotonic() - began < 8
    assert "Traceback" not in log.read_text()


def test_sighup_reads_the_keys_again_and_metrics_have_a_port_of_their_own(tmp_path: Path):
    file, log, metrics_port = tmp_path / "keys", tmp_path / "log", free_port()
    first, second = new_key(), new_key()
    file.write_text(stored_line("alice", first))
    with slow_service(log, 0.0, ARGRAD_API_KEYS_FILE=str(file), ARGRAD_METRICS_PORT=str(metrics_port)) as (
        url,
        process,
    ):

        def status(key: str) -> int:
            return httpx.get(
                f"{url}/v1/solvers", headers={"authorization": f"Bearer {key}"}, trust_env=False
            ).status_code

        assert (status(first), status(second)) == (200, 401)
        file.write_text(stored_line("alice", second))
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: (status(first), status(second)) == (401, 200))
        metrics = httpx.get(f"http://127.0.0.1:{metrics_port}/metrics", trust_env=False)
        assert "argrad_requests_total" in metrics.text
        other = httpx.get(f"http://127.0.0.1:{metrics_port}/v1/solvers", trust_env=False)
        assert (other.status_code, other.json()["type"]) == (403, "forbidden")
        assert httpx.get(f"{url}/metrics", trust_env=False).status_code == 401
    assert first not in log.read_text()
    assert '"event": "keys reloaded"' in log.read_text()
