"""Registered parameters on the wire, and in their store."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
import torch

from argrad.problems.content import digest
from argrad.wire import JSON, SAFETENSORS, decode, encode
from argrad.wire.messages import (
    JvpReply,
    JvpRequest,
    ProblemDocument,
    RegisteredReply,
    RegisterRequest,
    SolveReply,
    SolveRequest,
    TensorMap,
    VjpReply,
    VjpRequest,
)
from argrad_service.state import MemoryProblemStore, ProblemGone
from tests.service.support import make_app, post, projection, running_app, tensor

pytestmark = pytest.mark.anyio

WHOLE = projection((-1.0, 2.0), (-3.0, -0.5))
FIXED = {name: value for name, value in WHOLE.items() if name != "problem.q"}
REST = {"problem.q": WHOLE["problem.q"]}
UPSTREAM = {"upstream.z": tensor((1.0, 2.0), (3.0, 4.0))}
DIGEST = digest("qp", {name.removeprefix("problem."): value for name, value in FIXED.items()})
NAMED = ProblemDocument(registered=DIGEST)


async def put(
    client: httpx.AsyncClient, name: str = DIGEST, tensors: TensorMap | None = None, source: str = SAFETENSORS
) -> httpx.Response:
    body = b"".join(encode(RegisterRequest(), FIXED if tensors is None else tensors, source))
    return await client.put(f"/v1/problems/{name}", content=body, headers={"content-type": source, "accept": JSON})


async def named(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    problem = {"registered": DIGEST, "q": [[-1, 2], [-3, -0.5]]}
    return await client.post("/v1/solve", json={"problem": problem, **fields})


def same(found: TensorMap, wanted: TensorMap) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("source", [JSON, SAFETENSORS])
async def test_register_describe_name_and_delete(client: httpx.AsyncClient, source: str) -> None:
    first, again = await put(client, source=source), await put(client, source=source)
    assert (first.status_code, again.status_code) == (201, 200)
    shown = await client.get(f"/v1/problems/{DIGEST}")
    assert shown.status_code == 200
    assert first.json() == again.json() == shown.json()
    assert shown.json() == {
        "protocol": 1,
        "kind": "qp",
        "registered": DIGEST,
        "nbytes": 80,
        "tensors": {
            "Q": {"dtype": "F64", "shape": [2, 2]},
            "G": {"dtype": "F64", "shape": [2, 2]},
            "h": {"dtype": "F64", "shape": [2]},
        },
    }
    binary = await client.get(f"/v1/problems/{DIGEST}", headers={"accept": SAFETENSORS})
    reply, _ = decode(RegisteredReply, bytearray(binary.content), binary.headers["content-type"])
    assert reply.model_dump(mode="json") == shown.json()
    assert (await named(client)).json()["solution"]["z"] == [[1.0, 0.0], [3.0, 0.5]]
    assert (await client.delete(f"/v1/problems/{DIGEST}")).status_code == 204
    for gone in (await named(client), await client.get(f"/v1/problems/{DIGEST}")):
        assert (gone.status_code, gone.json()["type"]) == (409, "problem-gone")
    assert (await client.delete(f"/v1/problems/{DIGEST}")).json()["type"] == "problem-gone"


async def test_every_call_is_the_same_to_the_last_bit(client: httpx.AsyncClient) -> None:
    assert (await put(client)).status_code == 201
    for _ in range(2):  # the second finds the factors of the first
        named_, found = await post(client, "/v1/solve", SolveRequest(problem=NAMED), REST | UPSTREAM, SolveReply)
        plain, wanted = await post(client, "/v1/solve", SolveRequest(), WHOLE | UPSTREAM, SolveReply)
        assert named_.status == plain.status
        same(found, wanted)
    point = {name: value for name, value in wanted.items() if name in ("solution.z", "solution.nu", "solution.lam")}
    _, found = await post(client, "/v1/vjp", VjpRequest(problem=NAMED), REST | point | UPSTREAM, VjpReply)
    _, wanted = await post(client, "/v1/vjp", VjpRequest(), WHOLE | point | UPSTREAM, VjpReply)
    same(found, wanted)
    moving = {"tangents.h": tensor(1.0, 0.0)}
    _, found = await post(client, "/v1/jvp", JvpRequest(problem=NAMED), REST | point | moving, JvpReply)
    _, wanted = await post(client, "/v1/jvp", JvpRequest(), WHOLE | point | moving, JvpReply)
    same(found, wanted)


async def test_a_state_outlives_what_it_was_solved_with(client: httpx.AsyncClient) -> None:
    await put(client)
    solved = (await named(client)).json()
    assert (await client.delete(f"/v1/problems/{DIGEST}")).status_code == 204
    body = {"state": solved["state"], "upstream": {"z": [[1, 1], [1, 1]]}, "wrt": ["h"]}
    assert (await client.post("/v1/vjp", json=body)).json()["gradients"]["h"] == [0.0, -1.0]


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        ({"q": [[1, 2, 3]]}, "problem.Q: found shape (2, 2), wanted (3, 3)"),
        ({}, "problem.q: found nothing"),
        ({"q": [1, 1], "b": [1]}, "problem.A: found nothing"),
        ({"q": [1, "NaN"]}, "problem.q: found nan at [1]"),
        ({"q": [1, 1], "h": [1, 1]}, "problem.h: found a tensor, and one registered"),
    ],
)
async def test_the_merged_problem_is_checked_as_ever(client: httpx.AsyncClient, problem: Any, words: str) -> None:
    await put(client)
    response = await client.post("/v1/solve", json={"problem": {"registered": DIGEST, **problem}})
    assert response.status_code == 422
    assert words in response.json()["detail"]


async def test_a_token_and_a_digest_are_two_places(client: httpx.AsyncClient) -> None:
    await put(client)
    state = (await named(client)).json()["state"]
    body = {"state": state, "problem": {"registered": DIGEST}, "upstream": {"z": [[1, 1], [1, 1]]}}
    response = await client.post("/v1/vjp", json=body)
    assert response.json()["detail"] == "state: found a token beside problem.* or solution.*, wanted one of the two"


async def test_a_wrong_digest_is_refused_and_keeps_nothing(client: httpx.AsyncClient) -> None:
    response = await put(client, "0" * 64)
    assert (response.status_code, response.json()["field"], response.json()["found"]) == (422, "sha256", "0" * 64)
    assert DIGEST in response.json()["wanted"]
    assert (await client.get(f"/v1/problems/{'0' * 64}")).status_code == 409
    body = encode(RegisterRequest(problem=ProblemDocument(registered="1" * 64)), FIXED, JSON)
    response = await client.put(f"/v1/problems/{DIGEST}", content=b"".join(body), headers={"content-type": JSON})
    assert (response.status_code, response.json()["field"]) == (422, "problem.registered")
    for name in ("short", DIGEST.upper()):
        assert (await put(client, name)).json()["field"] == "sha256"


async def test_concurrent_registrations_of_the_same(client: httpx.AsyncClient) -> None:
    codes = [response.status_code for response in await asyncio.gather(*(put(client) for _ in range(8)))]
    assert sorted(codes) == [200] * 7 + [201]
    answers = await asyncio.gather(*(named(client, keep_state=False) for _ in range(8)))
    assert all(answer.json()["solution"]["z"] == [[1.0, 0.0], [3.0, 0.5]] for answer in answers)


async def test_no_room_says_so_and_room_is_made(anyio_backend: str) -> None:
    other = {"problem.h": tensor(1.0, 2.0)}
    name = digest("qp", {"h": other["problem.h"]})
    async with running_app(make_app(problem_budget_bytes=79)) as client:
        response = await put(client)
        assert (response.status_code, response.json()["type"]) == (413, "too-large")
        assert "ARGRAD_PROBLEM_BUDGET_BYTES" in response.json()["detail"]
    async with running_app(make_app(problem_budget_bytes=80)) as client:
        assert (await put(client)).status_code == 201
        # The factors have no room, and the answers are right without.
        assert [(await named(client)).status_code for _ in range(2)] == [200, 200]
        assert (await put(client, name, other)).status_code == 201
        assert (await named(client)).json()["type"] == "problem-gone"
        metrics = (await client.get("/metrics")).text
        for line in ("entries 1.0", "bytes 16.0", "hits_total 2.0", "evictions_total 1.0", "refusals_total 0.0"):
            assert f"argrad_registered_{line}" in metrics


async def test_what_a_solve_leaves_is_counted(client: httpx.AsyncClient) -> None:
    await put(client)
    await named(client)
    metrics = (await client.get("/metrics")).text
    (held,) = [line for line in metrics.splitlines() if line.startswith("argrad_registered_bytes ")]
    assert float(held.split()[1]) > 80


class TestStore:
    """The store itself."""

    def make(self, budget_bytes: int = 100) -> tuple[MemoryProblemStore, list[float]]:
        now = [0.0]
        return MemoryProblemStore(budget_bytes=budget_bytes, ttl_s=60.0, clock=lambda: now[0]), now

    async def test_what_is_used_stays(self) -> None:
        store, now = self.make()
        store.put("a", "A", nbytes=1, owner="me")
        store.put("b", "B", nbytes=1, owner="me")
        now[0] = 59.0
        assert store.get("a", owner="me") == "A"
        now[0] = 61.0
        assert store.get("a", owner="me") == "A"
        with pytest.raises(ProblemGone, match="register it again"):
            store.get("b", owner="me")
        store.sweep()
        assert (store.counts().entries, store.counts().expirations) == (1, 1)

    async def test_owners(self) -> None:
        store, _ = self.make()
        store.put("a", "mine", nbytes=1, owner="me")
        store.put("a", "yours", nbytes=1, owner="you")
        assert (store.get("a", owner="me"), store.get("a", owner="you")) == ("mine", "yours")
        store.delete("a", owner="you")
        assert store.get("a", owner="me") == "mine"
        for call in (store.get, store.delete):
            with pytest.raises(ProblemGone):
                call("a", owner="you")

    async def test_growth_evicts_others_and_never_itself(self) -> None:
        store, _ = self.make(100)
        value, other = object(), object()
        store.put("a", value, nbytes=40, owner="me")
        store.put("b", other, nbytes=40, owner="me")
        assert not store.resize("a", value, nbytes=101, owner="me")
        assert not store.resize("a", other, nbytes=1, owner="me")  # not what is there
        assert not store.resize("c", value, nbytes=1, owner="me")
        assert store.counts().held_bytes == 80
        assert store.resize("a", value, nbytes=90, owner="me")
        assert (store.counts().entries, store.counts().held_bytes, store.counts().evictions) == (1, 90, 1)
        assert store.get("a", owner="me") is value
