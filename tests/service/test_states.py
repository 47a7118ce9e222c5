from __future__ import annotations

import httpx
import pytest

from argrad.wire.messages import SolveReply, SolveRequest, VjpReply, VjpRequest
from argrad_service.app import create_app
from argrad_service.http.logs import make_logger
from argrad_service.settings import Settings
from tests.service.support import SECRET, make_app, post, projection, running_app, simplex, tensor

pytestmark = pytest.mark.anyio

VJP = {"upstream": {"z": [1, 0]}, "wrt": ["q"]}


async def solve(client: httpx.AsyncClient, **fields: object) -> str:
    response = await client.post("/v1/solve", json={"problem": simplex(), **fields})
    assert response.status_code == 200
    state: str = response.json().get("state")
    return state


async def vjp_status(client: httpx.AsyncClient, state: str) -> int:
    response = await client.post("/v1/vjp", json=VJP | {"state": state})
    if response.status_code == 200:
        assert response.json()["gradients"]["q"] == pytest.approx([-0.25, 0.25])
    else:
        assert response.json()["type"] == "state-gone"
    return response.status_code


async def test_a_state_serves_repeated_calls_until_it_is_deleted(client: httpx.AsyncClient):
    state = await solve(client)
    assert [await vjp_status(client, state) for _ in range(3)] == [200, 200, 200]
    assert (await client.delete(f"/v1/states/{state}")).status_code == 204
    assert await vjp_status(client, state) == 409
    response = await client.delete(f"/v1/states/{state}")
    assert (response.status_code, response.json()["type"]) == (409, "state-gone")


async def test_released_tokens_ride_on_the_next_call(client: httpx.AsyncClient):
    first, second, third = [await solve(client) for _ in range(3)]
    headers = {"Argrad-Release": f"{first}, {second},nonsense"}
    response = await client.post("/v1/solve", json={"problem": simplex(), "keep_state": False}, headers=headers)
    assert response.status_code == 200
    assert [await vjp_status(client, state) for state in (first, second, third)] == [409, 409, 200]


async def test_a_token_of_another_server_is_gone_and_one_of_a_server_with_our_key_too(client: httpx.AsyncClient):
    state = await solve(client)
    for secret in ("the secret of another server", SECRET):
        async with running_app(make_app(state_secret=secret)) as other:
            assert await vjp_status(other, state) == 409
    assert await vjp_status(client, state) == 200


async def test_states_expire():
    now = 0.0
    settings = Settings.model_validate({"state_ttl_s": 60.0, "device": "cpu", "log_level": "error"})
    app = create_app(settings, log=make_logger(settings), clock=lambda: now)
    async with running_app(app) as client:
        state = await solve(client)
        now = 59.0
        assert await vjp_status(client, state) == 200
        now = 118.0
        assert await vjp_status(client, state) == 200
        now = 178.0
        assert await vjp_status(client, state) == 409


async def test_a_small_budget_keeps_the_newest_and_who_keeps_none_evicts_none():
    async with running_app(make_app(state_budget_bytes=12_000)) as client:
        states = [await solve(client) for _ in range(40)]
        assert await solve(client, keep_state=False) is None
        assert await solve(client, upstream={"z": [1, 0]}) is None
        found = [await vjp_status(client, state) for state in states]
        assert found[-1] == 200
        assert found[0] == 409
        assert found == sorted(found, reverse=True), "the oldest went first"


async def test_a_state_that_does_not_fit_is_not_kept_and_the_caller_sends_the_point():
    async with running_app(make_app(state_budget_bytes=10)) as client:
        problem, upstream = projection((-1, 2)), {"upstream.z": tensor([1, 1])}
        reply, out = await post(client, "/v1/solve", SolveRequest(keep_state=True), problem, SolveReply)
        assert reply.state is None
        point = {name: t for name, t in out.items() if name.startswith("solution.")}
        _, gradients = await post(client, "/v1/vjp", VjpRequest(), problem | point | upstream, VjpReply)
        assert gradients["gradients.q"].tolist() == [[-1.0, 0.0]]
