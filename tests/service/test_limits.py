"""Every limit of one call, over HTTP: at the bound it is served, one beyond it is refused with the documented code."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from argrad.wire import JSON, SAFETENSORS
from argrad_service.settings import Settings, variable
from tests.service.support import make_app, running_app

pytestmark = pytest.mark.anyio

LIMITS: dict[str, Any] = {
    "max_variables": 4,
    "max_constraints": 6,
    "max_batch": 3,
    "max_cotangents": 2,
    "max_iterations": 100,
    "max_json_numbers": 300,
    "max_json_depth": 8,
    "max_json_bytes": 8_000,
    "max_body_bytes": 20_000,
    "max_json_reply_bytes": 16_000,
    "max_reply_bytes": 30_000,
    "max_work_bytes": 300_000,
}
ELSEWHERE = {
    "max_queue": "tests/service/test_concurrency.py",
    "max_pending": "tests/service/test_concurrency.py",
    "max_pending_bytes": "tests/service/test_concurrency.py",
    "max_connections": "tests/service/test_connections.py",
}
"""Limits of all calls together."""


def qp(n: int, rows: int, batch: int) -> dict[str, Any]:
    """Projections on z ≤ 1, with some rows more than once."""
    line = [[1.0 if j == i % n else 0.0 for j in range(n)] for i in range(max(n, rows))]
    return {"Q": line[:n], "q": [[0.5] * n] * batch, "G": line[:rows], "h": [1.0] * rows}


def solve(n: int = 4, rows: int = 6, batch: int = 3, **more: Any) -> dict[str, Any]:
    return {"problem": qp(n, rows, batch), "keep_state": False, **more}


def nested(depth: int) -> dict[str, Any]:
    """A call with an option that no solver has, in brackets so many deep."""
    value: Any = 1
    for _ in range(depth - 3):
        value = [value]
    return solve(solver={"name": "pdipm", "options": {"x": value}})


def numbers(count: int) -> dict[str, Any]:
    """A call with so many elements, of which some make the last row longer than the others."""
    return {"problem": {"q": [[1] * (count - 1), []]}}


ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "max_variables": (solve(n=4), solve(n=5)),
    "max_constraints": (solve(rows=6), solve(rows=7)),
    "max_batch": (solve(batch=3), solve(batch=4)),
    "max_cotangents": (
        solve(upstream={"z": [[[1.0] * 4] * 3] * 2}),
        solve(upstream={"z": [[[1.0] * 4] * 3] * 3}),
    ),
    "max_iterations": (solve(solver={"max_iterations": 100}), solve(solver={"max_iterations": 101})),
}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def server(anyio_backend: str) -> AsyncIterator[httpx.AsyncClient]:
    async with running_app(make_app(**LIMITS)) as client:
        yield client


@pytest.mark.parametrize("name", ROWS)
async def test_at_the_bound_and_one_beyond(server: httpx.AsyncClient, name: str):
    within, beyond = ROWS[name]
    served = await server.post("/v1/solve", json=within)
    assert served.status_code == 200, served.text
    check_refused(await server.post("/v1/solve", json=beyond), name)


@pytest.mark.parametrize(
    ("name", "within", "beyond"),
    [("max_json_depth", nested(8), nested(9)), ("max_json_numbers", numbers(300), numbers(302))],
)
async def test_json_is_counted_before_it_is_read(server, name: str, within: dict[str, Any], beyond: dict[str, Any]):
    read = await server.post("/v1/solve", json=within)
    assert read.json()["type"] == "invalid", "it is read, and says something wrong"
    check_refused(await server.post("/v1/solve", json=beyond), name)


@pytest.mark.parametrize("is_announced", [True, False], ids=["by its length", "while it comes"])
@pytest.mark.parametrize(("name", "content_type"), [("max_json_bytes", JSON), ("max_body_bytes", SAFETENSORS)])
async def test_bytes(server: httpx.AsyncClient, name: str, content_type: str, is_announced: bool):
    async def pieces(size: int) -> AsyncIterator[bytes]:
        for _ in range(size // 500):
            yield b" " * 500
        yield b" " * (size % 500)

    for size in (LIMITS[name], LIMITS[name] + 1):
        content = b" " * size if is_announced else pieces(size)
        reply = await server.post("/v1/solve", content=content, headers={"content-type": content_type})
        if size == LIMITS[name]:
            assert (reply.status_code, reply.json()["type"]) == (400, "bad-request"), "it was looked at"
        else:
            check_refused(reply, name)


async def test_work_and_replies_are_computed_from_shapes():
    """Their sizes are estimates with a formula of their own: what is far below is served, what is far above is not."""
    wide = solve(n=4, rows=6, batch=3, upstream={"z": [[1.0] * 4] * 3}, gradients="full")
    for name, bound in (("max_work_bytes", 2_000), ("max_json_reply_bytes", 500), ("max_reply_bytes", 500)):
        async with running_app(make_app(**(LIMITS | {name: bound}))) as client:
            accept = SAFETENSORS if name == "max_reply_bytes" else JSON
            check_refused(await client.post("/v1/solve", json=wide, headers={"accept": accept}), name)
            small = await client.post("/v1/solve", json=solve(n=1, rows=0, batch=1), headers={"accept": accept})
            assert small.status_code == 200 or name == "max_work_bytes"
    async with running_app(make_app(**LIMITS)) as client:
        assert (await client.post("/v1/solve", json=wide)).status_code == 200


def test_every_limit_is_in_a_test():
    named = {name for name in Settings.model_fields if name.startswith("max_")}
    assert named == {*LIMITS, *ELSEWHERE}
    for name, file in ELSEWHERE.items():
        assert name in Path(file).read_text()


def check_refused(reply: httpx.Response, name: str) -> None:
    problem = reply.json()
    wanted = (422, "invalid") if name == "max_iterations" else (413, "too-large")
    assert (reply.status_code, problem["type"]) == wanted, problem
    assert variable(name) in problem["detail"], problem
