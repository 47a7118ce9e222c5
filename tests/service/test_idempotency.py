"""`Idempotency-Key` over HTTP: the same tests with memory and with Redis."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import torch

from argrad.wire import SAFETENSORS, decode, encode
from argrad.wire.messages import SolveReply, SolveRequest
from argrad_service.engine.options import SolverOptions
from tests.service.support import HookedEngine, make_app, projection, running_app, simplex

pytestmark = pytest.mark.anyio
KEY = {"Idempotency-Key": "a-key"}


class Gate:
    """Lets solves wait, and counts them."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        self.opened.set()
        self.error: Exception | None = None
        self.engine = HookedEngine(self.pass_)

    def pass_(self, options: SolverOptions) -> None:
        self.entered.set()
        while not self.opened.wait(0.005):
            if options.should_stop():
                break
        if self.error is not None:
            raise self.error


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture(params=["memory", "redis"])
async def client(request: pytest.FixtureRequest, gate: Gate, anyio_backend: str) -> AsyncIterator[httpx.AsyncClient]:
    settings: dict[str, Any] = {}
    if request.param == "redis":
        settings = {"redis_url": request.getfixturevalue("redis_server").url, "redis_timeout_s": 2.0}
    async with running_app(make_app(engine_=gate.engine, **settings)) as client:
        gate.engine.solves = 0
        gate.entered.clear()
        yield client


async def solve(client: httpx.AsyncClient, problem: dict[str, Any] | None = None, **headers: str) -> httpx.Response:
    return await client.post("/v1/solve", json={"problem": problem or simplex()}, headers=KEY | headers)


async def test_the_same_post_twice_does_the_work_once(client: httpx.AsyncClient, gate: Gate):
    first, *others = [await solve(client) for _ in range(3)]
    assert first.status_code == 200
    assert "idempotent-replayed" not in first.headers
    for other in others:
        assert (other.status_code, other.headers["idempotent-replayed"]) == (200, "true")
        assert (other.content, other.headers["content-type"]) == (first.content, first.headers["content-type"])
        assert other.headers["content-length"] == str(len(first.content))
    assert gate.engine.solves == 1


async def test_without_the_header_nothing_is_remembered(client: httpx.AsyncClient, gate: Gate):
    for _ in range(2):
        response = await client.post("/v1/solve", json={"problem": simplex()})
        assert "idempotent-replayed" not in response.headers
    assert gate.engine.solves == 2


async def test_another_request_under_the_same_key_is_422(client: httpx.AsyncClient, gate: Gate):
    assert (await solve(client)).status_code == 200
    another = simplex() | {"q": [1, 2]}
    body = b"".join(encode(SolveRequest(), projection((1.0, 2.0)), SAFETENSORS))
    responses = [
        await solve(client, another),
        await solve(client, accept=SAFETENSORS),
        await client.post("/v1/solve", content=body, headers=KEY | {"content-type": SAFETENSORS}),
        await client.post("/v1/vjp", json={"problem": simplex()}, headers=KEY),
    ]
    for response in responses:
        assert (response.status_code, response.json()["type"]) == (422, "idempotency-mismatch")
    assert gate.engine.solves == 1
    assert (await solve(client)).headers["idempotent-replayed"] == "true"


async def test_a_duplicate_meanwhile_is_409_and_told_when_to_ask_again(client: httpx.AsyncClient, gate: Gate):
    gate.opened.clear()
    first = asyncio.create_task(solve(client))
    await asyncio.to_thread(gate.entered.wait, 10)
    duplicate = await solve(client)
    assert (duplicate.status_code, duplicate.json()["type"]) == (409, "idempotency-in-progress")
    assert duplicate.headers["retry-after"] == "1"
    gate.opened.set()
    assert (await first).status_code == 200
    assert (await solve(client)).content == (await first).content
    assert gate.engine.solves == 1
    metrics = (await client.get("/metrics")).text
    for result in ("new", "in-progress", "replayed"):
        assert f'argrad_idempotent_requests_total{{result="{result}"}} 1.0' in metrics


async def test_failures_are_not_remembered(client: httpx.AsyncClient, gate: Gate):
    gate.error = RuntimeError("a defect")
    assert (await solve(client)).status_code == 500
    gate.error = None
    await asyncio.sleep(0.05)
    wrong = simplex() | {"q": [1, 1, 1]}
    response = await client.post("/v1/solve", json={"problem": wrong}, headers={"Idempotency-Key": "wrong"})
    assert response.json()["type"] == "invalid"
    gate.opened.clear()
    late = await solve(client, **{"Argrad-Timeout-Ms": "50"})
    assert late.json()["type"] == "deadline"
    gate.opened.set()
    await asyncio.sleep(0.05)
    good = await solve(client)
    assert (good.status_code, "idempotent-replayed" in good.headers) == (200, False)
    response = await client.post("/v1/solve", json={"problem": simplex()}, headers={"Idempotency-Key": "wrong"})
    assert response.status_code == 200


async def test_a_reply_over_256_kib_is_not_kept_and_done_again(client: httpx.AsyncClient, gate: Gate):
    tensors = projection(*[(float(i), -1.0) for i in range(6000)])
    body = b"".join(encode(SolveRequest(), tensors, SAFETENSORS))
    for _ in range(2):
        response = await client.post("/v1/solve", content=body, headers=KEY | {"content-type": SAFETENSORS})
        assert response.status_code == 200
        assert len(response.content) > 256 * 1024
        assert "idempotent-replayed" not in response.headers
        await asyncio.sleep(0.05)
    assert gate.engine.solves == 2


async def test_binary_and_compressed_replies_are_replayed_as_they_were(client: httpx.AsyncClient):
    tensors = projection(*[(1.0, -1.0)] * 400)
    body = b"".join(encode(SolveRequest(), tensors, SAFETENSORS))
    headers = KEY | {"content-type": SAFETENSORS, "accept-encoding": "zstd"}
    raw = []
    for _ in range(2):
        async with client.stream("POST", "/v1/solve", content=body, headers=headers) as response:
            raw.append((response.headers.get("content-encoding"), b"".join([c async for c in response.aiter_raw()])))
    assert raw[0] == raw[1]
    assert raw[0][0] == "zstd"
    plain = await client.post(
        "/v1/solve", content=body, headers={"content-type": SAFETENSORS, "Idempotency-Key": "plain"}
    )
    again = await client.post(
        "/v1/solve", content=body, headers={"content-type": SAFETENSORS, "Idempotency-Key": "plain"}
    )
    _, first = decode(SolveReply, bytearray(plain.content), SAFETENSORS)
    _, second = decode(SolveReply, bytearray(again.content), SAFETENSORS)
    assert torch.equal(first["solution.z"], second["solution.z"])


async def test_vjp_and_jvp_take_a_key_too(client: httpx.AsyncClient):
    state = (await client.post("/v1/solve", json={"problem": simplex()})).json()["state"]
    for path, direction in (("/v1/vjp", {"upstream": {"z": [1, 0]}}), ("/v1/jvp", {"tangents": {"b": [1]}})):
        key = {"Idempotency-Key": path}
        first, again = [await client.post(path, json={"state": state} | direction, headers=key) for _ in range(2)]
        assert first.status_code == 200, first.text
        assert (first.content, again.headers["idempotent-replayed"]) == (again.content, "true")


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "é"], ids=["empty", "space", "long", "not ascii"])
async def test_what_is_no_key_is_refused_by_name(client: httpx.AsyncClient, gate: Gate, key: str):
    headers = {b"Idempotency-Key": key.encode()}
    response = await client.post("/v1/solve", json={"problem": simplex()}, headers=headers)
    document = response.json()
    assert (response.status_code, document["type"], document["field"]) == (400, "bad-request", "Idempotency-Key")
    assert "1 to 255 printable ASCII characters" in document["wanted"]
    assert gate.engine.solves == 0
