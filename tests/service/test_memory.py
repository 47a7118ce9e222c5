"""How much memory one request takes, in a process of its own: at most twice its body, and the documented workspace."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from argrad.problems.content import digest
from argrad.wire import SAFETENSORS, compress, encode
from argrad.wire.messages import Message, RegisterRequest, SolveRequest, TensorMap
from argrad_service.admission import Size
from tests.conftest import running_service
from tests.service.support import D
from tests.wire.test_compression import bomb

pytestmark = pytest.mark.slow

BATCH, N, M = 700, 100, 100
ROOM_BYTES = 24 * 1024**2
"""For what is not the body: buffers of sockets, headers, a log, and pieces that are under way."""

CAP_BYTES = 128 * 1024**2

Peak = Callable[[Callable[[httpx.Client], httpx.Response]], tuple[int, httpx.Response]]


def drawn() -> TensorMap:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(BATCH, *shape, generator=random, dtype=D)

    root = normal(N, N)
    problem = {"Q": root @ root.mT + torch.eye(N, dtype=D), "q": normal(N), "G": normal(M, N), "h": normal(M).abs()}
    return {f"problem.{name}": tensor for name, tensor in problem.items()}


@pytest.fixture(scope="module")
def tensors() -> TensorMap:
    return drawn()


def body_of(message: Message, tensors: TensorMap) -> bytes:
    return b"".join(encode(message, tensors, SAFETENSORS))


def memory_bytes(process: subprocess.Popen[bytes], name: str) -> int:
    """VmRSS or VmHWM, what a process has in memory or had at most."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@pytest.fixture
def peak(tmp_path: Path) -> Iterator[Peak]:
    """Bytes by which a request lifts the memory of a fresh service, which has answered none yet."""
    with running_service(tmp_path / "log.txt", "--max-body-bytes", str(CAP_BYTES)) as (url, process):

        def measure(send: Callable[[httpx.Client], httpx.Response]) -> tuple[int, httpx.Response]:
            before = memory_bytes(process, "VmRSS")
            try:
                Path(f"/proc/{process.pid}/clear_refs").write_text("5")
            except PermissionError:
                # What the start took at most stays in the figure, which can only be too high.
                before = min(before, memory_bytes(process, "VmHWM"))
            with httpx.Client(base_url=url, trust_env=False, timeout=100) as client:
                response = send(client)
            return memory_bytes(process, "VmHWM") - before, response

        yield measure


def post(body: bytes) -> Callable[[httpx.Client], httpx.Response]:
    return lambda client: client.post("/v1/solve", content=body, headers={"content-type": SAFETENSORS})


@pytest.mark.parametrize(("way", "times"), [("plain", 1), ("compressed", 1), ("chunked", 2)])
def test_a_body_is_in_memory_once(peak: Peak, tensors: TensorMap, way: str, times: int) -> None:
    """Registering takes no solver: what it takes is what reading, decompressing, decoding and checking take.

    A body whose length nobody announced grows, and is moved while it does.
    """
    body = body_of(RegisterRequest(), tensors)
    path = "/v1/problems/" + digest("qp", {key.removeprefix("problem."): tensor for key, tensor in tensors.items()})
    sent: Any = b"".join(compress([body], len(body))) if way == "compressed" else body
    headers = {"content-type": SAFETENSORS} | ({"content-encoding": "zstd"} if way == "compressed" else {})
    if way == "chunked":
        sent = (body[at : at + 1_000_000] for at in range(0, len(body), 1_000_000))
    taken, response = peak(lambda client: client.put(path, content=sent, headers=headers))
    assert response.status_code == 201, response.text
    assert taken <= times * len(body) + ROOM_BYTES


@pytest.mark.parametrize(("gradients", "most_bodies"), [(None, 3.5), ("full", 7.0)], ids=["solution", "full gradients"])
def test_a_solve_takes_twice_its_body_and_the_documented_workspace(
    peak: Peak, tensors: TensorMap, gradients: str | None, most_bodies: float
) -> None:
    if gradients is None:
        body = body_of(SolveRequest(), tensors)
    else:
        body = body_of(SolveRequest(gradients="full"), tensors | {"upstream.z": torch.ones(BATCH, N, dtype=D)})
    taken, response = peak(post(body))
    assert response.status_code == 200, response.text
    assert taken <= 2 * len(body) + Size(BATCH, N, M).work_bytes
    assert taken <= most_bodies * len(body), "the figure of docs/configuration.md, and a sixth of it"


@pytest.mark.parametrize(("announced", "times"), [(CAP_BYTES, 1), (None, 2)], ids=["lying", "unannounced"])
def test_a_bomb_of_4_gib_takes_no_more_than_the_cap(peak: Peak, announced: int | None, times: int) -> None:
    data = bomb(4 << 30, announced=announced)
    assert len(data) < 140_000
    headers = {"content-type": SAFETENSORS, "content-encoding": "zstd"}
    taken, response = peak(lambda client: client.post("/v1/solve", content=data, headers=headers))
    assert response.status_code == (413 if announced is None else 400), response.text
    assert taken <= times * CAP_BYTES + ROOM_BYTES
