"""Callers that are killed in the middle of an upload leave nothing behind."""

from __future__ import annotations

import socket
import struct
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from argrad.wire import SAFETENSORS
from tests.conftest import running_service
from tests.service.support import simplex, wait_until

ANNOUNCED = 64 * 1024**2
SENT = 48 * 1024**2


def upload_and_die(url: str, http: httpx.Client) -> None:
    """Send most of a body, and end with a reset, as the kernel of a killed process does."""
    parts = urlsplit(url)
    head = f"POST /v1/solve HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: {SAFETENSORS}\r\n"
    piece = b"\x01" * 1024**2
    with socket.create_connection((str(parts.hostname), int(parts.port or 80)), timeout=30) as connection:
        connection.sendall(f"{head}Content-Length: {ANNOUNCED}\r\n\r\n".encode())
        for _ in range(SENT // len(piece)):
            connection.sendall(piece)
        wait_until(lambda: metric(http, "argrad_pending_bytes") == ANNOUNCED)  # it is in the middle of it
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(lambda: metric(http, "argrad_pending_calls") == 0)


def metric(http: httpx.Client, name: str) -> float:
    text = http.get("/metrics").text
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))


@pytest.mark.slow
def test_memory_after_the_tenth_killed_upload_is_that_after_the_second(tmp_path: Path):
    log = tmp_path / "log.txt"
    with running_service(log, "--log-format", "json") as (url, process):
        watched = psutil.Process(process.pid)
        with httpx.Client(base_url=url, trust_env=False, timeout=30) as http:
            resident, descriptors = [], []
            for _ in range(10):
                upload_and_die(url, http)
                time.sleep(0.05)
                resident.append(watched.memory_info().rss)
                descriptors.append(watched.num_fds())
            assert log.read_text().count('"status": 499') == 10, "each was cut off"
            assert metric(http, "argrad_pending_bytes") == 0
            assert http.post("/v1/solve", json={"problem": simplex()}).json()["status"] == "optimal"
    assert resident[9] <= 1.05 * resident[1], [f"{bytes_ / 2**20:.0f} MiB" for bytes_ in resident]
    assert descriptors[9] <= descriptors[1]
