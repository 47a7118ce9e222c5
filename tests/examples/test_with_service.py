"""`examples/with_service.py` finds or starts a service, and stops what it started."""

import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from examples import with_service

SAY_URL = [sys.executable, "-c", "import os; print(os.environ['ARGRAD_URL'])"]


class Ready(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health/ready" else 404)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def ready_url():
    with HTTPServer(("127.0.0.1", 0), Ready) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("ARGRAD_URL", "ARGRAD_HOST", "ARGRAD_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_a_service_that_is_up_is_used(ready_url, monkeypatch, capfd):
    monkeypatch.setenv("ARGRAD_PORT", ready_url.rpartition(":")[2])
    assert with_service.main(SAY_URL) == 0
    assert capfd.readouterr().out == f"{ready_url}\n"


def test_a_named_service_that_is_down_is_an_error(monkeypatch, capfd):
    monkeypatch.setenv("ARGRAD_URL", f"http://127.0.0.1:{with_service.free_port()}")
    assert with_service.main(SAY_URL) == 1
    assert "no service is ready at ARGRAD_URL=" in capfd.readouterr().err


def test_without_a_command_it_says_how_it_is_used(capfd):
    assert with_service.main([]) == 2
    assert "--fresh COMMAND" in capfd.readouterr().err


@pytest.mark.slow
def test_a_service_that_does_not_start_is_an_error_with_its_last_words():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with (
            pytest.raises(RuntimeError, match=r"did not become ready:\n.+"),
            with_service.started_service(taken.getsockname()[1]),
        ):
            pass


@pytest.mark.slow
def test_a_service_is_started_for_the_command_and_stopped_after_it(capfd):
    status = (
        "import os, httpx, sys; sys.exit(httpx.get(os.environ['ARGRAD_URL'] + '/health/ready').status_code - 200 + 7)"
    )
    assert with_service.main(["--fresh", sys.executable, "-c", status]) == 7
    url = capfd.readouterr().err.removeprefix("started a service at ").strip()
    assert url.startswith("http://127.0.0.1:")
    assert not with_service.is_ready(url)
