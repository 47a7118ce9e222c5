"""A full disk under the log, and under the cache of kernels: the service goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.conftest import free_port
from tests.service.support import simplex, wait_until


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/health/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize(
    "log_format", [pytest.param("json", marks=pytest.mark.slow), pytest.param("console", marks=pytest.mark.faults)]
)
def test_a_log_on_a_full_disk_takes_no_answer_away(log_format: str):
    port = free_port()
    command = [sys.executable, "-m", "argrad_service", "--port", str(port), "--log-format", log_format]
    with open("/dev/full", "wb", buffering=0) as full:
        with pytest.raises(OSError, match="No space left on device"):
            full.write(b"a line")
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=full)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
            wait_until(lambda: is_ready(client), 60)
            assert os.readlink(f"/proc/{process.pid}/fd/2") == "/dev/full"
            for _ in range(20):
                reply = client.post("/v1/solve", json={"problem": simplex(), "upstream": {"z": [1, 0]}})
                assert reply.status_code == 200
                assert reply.json()["gradients"]["q"] == pytest.approx([-0.25, 0.25])
            assert client.post("/v1/solve", content=b"{").status_code == 415
            assert client.post("/v1/solve", json={"problem": 1}).status_code == 422
    finally:
        process.terminate()
        assert process.wait(30) == 0


@pytest.mark.faults
def test_a_cache_of_kernels_that_cannot_be_written_costs_time_and_no_answer(tmp_path: Path):
    """Nothing can be written under /proc, whoever one is; a full disk is no different for numba."""
    port = free_port()
    with pytest.raises(OSError, match=r"No such file|not permitted|denied"):
        os.mkdir("/proc/full")
    environment = os.environ | {"NUMBA_CACHE_DIR": "/proc/full"}
    command = [sys.executable, "-m", "argrad_service", "--port", str(port)]
    log = tmp_path / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client:
            wait_until(lambda: is_ready(client) or process.poll() is not None, 110)
            assert process.poll() is None, log.read_text()
            reply = client.post("/v1/solve", json={"problem": simplex(), "upstream": {"z": [1, 0]}})
            assert reply.json()["gradients"]["q"] == pytest.approx([-0.25, 0.25])
    finally:
        process.terminate()
        process.wait(30)
