"""Two replicas in one process, which share a store: any of them answers what the other was asked before."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI

from argrad.problems.content import digest
from argrad_service.settings import SettingsError, load_settings
from argrad_service.state import MemoryShared, StateGone
from tests.redis_server import RedisServer
from tests.service.support import D, HookedEngine, make_app, running_app, simplex

pytestmark = pytest.mark.anyio

VJP = {"upstream": {"z": [1, 0]}, "wrt": ["q", "b"]}
GRADIENTS = {"q": [-0.25, 0.25], "b": [0.25]}
Q = {"Q": [[4, 1], [1, 2]]}
DIGEST = digest("qp", {"Q": torch.tensor(Q["Q"], dtype=D)})


@dataclass
class Replica:
    """One of the replicas: its application, its client, and how often its engine has solved."""

    app: FastAPI
    client: httpx.AsyncClient
    engine: HookedEngine = field(default_factory=HookedEngine)

    async def solve(self, problem: dict[str, Any] | None = None, **fields: Any) -> str:
        response = await self.client.post("/v1/solve", json={"problem": problem or simplex(), **fields})
        assert response.status_code == 200, response.text
        token: str = response.json()["state"]
        await asyncio.sleep(0.1)  # what is written behind the reply
        return token

    async def vjp(self, token: str, **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/vjp", json=VJP | {"state": token} | fields)

    async def metric(self, line: str) -> float:
        text = (await self.client.get("/metrics")).text
        return next((float(row.rpartition(" ")[2]) for row in text.splitlines() if row.startswith(line)), 0.0)


Settings = dict[str, Any]
Start = Callable[..., contextlib.AbstractAsyncContextManager[Replica]]


@pytest.fixture(params=["memory", "redis"])
def start(request: pytest.FixtureRequest) -> Start:
    """Starts replicas that share one store."""
    if request.param == "redis":
        settings: Settings = {"redis_url": request.getfixturevalue("redis_server").url, "redis_timeout_s": 2.0}
        shared = None
    else:
        settings = {}
        shared = MemoryShared(idempotency_ttl_s=60, idempotency_budget_bytes=1 << 20, record_budget_bytes=1 << 24)

    @contextlib.asynccontextmanager
    async def started(**more: Any) -> AsyncIterator[Replica]:
        engine = HookedEngine()
        app = make_app(engine_=engine, shared=shared, **{**settings, **more})
        async with running_app(app) as client:
            yield Replica(app, client, engine)

    return started


@pytest.fixture
async def pair(start: Start, anyio_backend: str) -> AsyncIterator[tuple[Replica, Replica]]:
    async with start() as one, start() as two:
        yield one, two


Pair = tuple[Replica, Replica]


async def test_a_token_of_one_replica_differentiates_on_another(pair: Pair):
    one, two = pair
    token = await one.solve()
    at_home, away = (await one.vjp(token)).json(), (await two.vjp(token)).json()
    assert at_home["gradients"] == {name: pytest.approx(values) for name, values in GRADIENTS.items()}
    for name, values in at_home["gradients"].items():
        assert away["gradients"][name] == pytest.approx(values, abs=1e-14)
    assert at_home.keys() == away.keys()
    assert at_home["gradient_status"] == away["gradient_status"] == "ok"
    assert await two.metric('argrad_shared_states_total{result="hit"}') == 1


async def test_what_was_taken_over_once_is_here_from_then_on(pair: Pair):
    one, two = pair
    token = await one.solve()
    replies = [(await two.vjp(token)).json() for _ in range(3)]
    assert replies[0]["gradients"] == replies[1]["gradients"] == replies[2]["gradients"]
    assert await two.metric("argrad_shared_states_total") == 1


@pytest.mark.parametrize("kind", ["batched", "bounded", "two-sided", "sparse", "entropy"])
async def test_every_form_of_problem_is_taken_over(pair: Pair, kind: str):
    one, two = pair
    problem: dict[str, Any] = {
        "batched": simplex() | {"q": [[1, 1], [0.5, 0], [1, 2]]},
        "bounded": {"Q": [[2, 0], [0, 2]], "q": [-1, 1], "lb": [0, 0], "ub": [1, 1]},
        "two-sided": {"kind": "qp_two_sided", "P": [[2, 0], [0, 2]], "q": [-1, 1], "A": [[1, 0]], "l": [-1], "u": [1]},
        "sparse": {
            "kind": "sparse_qp",
            "q": [-1, 1],
            "Q_indptr": [0, 1, 2],
            "Q_indices": [0, 1],
            "Q_values": [2, 2],
            "h": [1],
            "G_indptr": [0, 1],
            "G_indices": [0],
            "G_values": [1],
        },
        "entropy": {"q": [1, 2, 3], "A": [[1, 1, 1]], "b": [1], "entropy": 1},
    }[kind]
    block = "x" if kind == "two-sided" else "z"
    size = len(problem["q"][0]) if kind == "batched" else len(problem["q"])
    upstream = {block: [[1] * size] * 3 if kind == "batched" else [1, 0, 2][:size]}
    if kind == "batched":
        upstream = {block: [[1, 0], [0, 1], [1, 2]]}
    token = await one.solve(problem)
    at_home, away = [(await replica.vjp(token, upstream=upstream, wrt=["q"])) for replica in (one, two)]
    assert (at_home.status_code, away.status_code) == (200, 200), away.text
    found, wanted = (torch.tensor(reply.json()["gradients"]["q"]) for reply in (away, at_home))
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert await two.metric('argrad_shared_states_total{result="hit"}') == 1


async def test_a_jvp_and_a_warm_start_work_by_another_s_token_too(pair: Pair):
    one, two = pair
    token = await one.solve()
    tangents = {"tangents": {"b": [1]}, "state": token}
    at_home, away = [(await r.client.post("/v1/jvp", json=tangents)).json()["tangents"]["z"] for r in pair]
    assert away == pytest.approx(at_home, abs=1e-14)
    token = await one.solve()
    warm = {"problem": simplex(), "warm_start": {"state": token}}
    response = await two.client.post("/v1/solve", json=warm)
    assert response.json()["solution"]["z"] == pytest.approx([0.25, 0.75])
    assert await two.metric('argrad_shared_states_total{result="hit"}') == 2


async def test_a_problem_registered_at_one_replica_is_used_at_another(pair: Pair):
    one, two = pair
    response = await one.client.put(f"/v1/problems/{DIGEST}", json={"problem": Q})
    assert response.status_code == 201
    rest = {name: values for name, values in simplex().items() if name != "Q"}
    response = await two.client.post("/v1/solve", json={"problem": {"registered": DIGEST, **rest}})
    assert response.json()["solution"]["z"] == pytest.approx([0.25, 0.75])
    assert (await two.client.get(f"/v1/problems/{DIGEST}")).json()["registered"] == DIGEST
    assert await two.metric('argrad_shared_problems_total{result="hit"}') == 1


async def test_a_state_of_a_registered_problem_needs_both_and_finds_both(pair: Pair, start: Start):
    one, two = pair
    await one.client.put(f"/v1/problems/{DIGEST}", json={"problem": Q})
    rest = {name: values for name, values in simplex().items() if name != "Q"}
    token = await one.solve({"registered": DIGEST, **rest})
    away = (await two.vjp(token)).json()
    assert away["gradients"]["q"] == pytest.approx(GRADIENTS["q"])
    assert (await one.client.delete(f"/v1/problems/{DIGEST}")).status_code == 204
    async with start() as three:
        assert (await three.vjp(token)).status_code == 409


async def test_what_is_deleted_at_one_replica_is_not_found_by_another(pair: Pair):
    one, two = pair
    token, second = await one.solve(), await one.solve()
    assert (await two.client.delete(f"/v1/states/{token}")).status_code == 204, "it was there, if not here"
    assert (await two.vjp(token)).status_code == 409
    await one.client.post(
        "/v1/solve", json={"problem": simplex(), "keep_state": False}, headers={"Argrad-Release": second}
    )
    await asyncio.sleep(0.2)  # what is to be forgotten waits a moment for company
    assert (await two.vjp(second)).json()["type"] == "state-gone"
    await one.client.put(f"/v1/problems/{DIGEST}", json={"problem": Q})
    assert (await two.client.delete(f"/v1/problems/{DIGEST}")).status_code == 204
    assert (await two.client.get(f"/v1/problems/{DIGEST}")).json()["type"] == "problem-gone"
    assert (await two.client.delete(f"/v1/problems/{DIGEST}")).status_code == 409


async def test_a_token_with_another_key_s_signature_asks_nobody(start: Start):
    async with start() as one, start(state_secret="another secret of tests") as other:
        token = await one.solve()
        assert (await other.vjp(token)).json()["type"] == "state-gone"
        assert (await other.vjp("A" * 40)).json()["type"] == "state-gone"
        assert await other.metric("argrad_shared_states_total") == 0


async def test_states_that_only_their_replica_can_differentiate_are_not_shared(pair: Pair):
    one, two = pair
    infeasible = simplex() | {"q": [[1, 1], [1, 1]], "b": [[1], [-1]]}
    large = {"Q": torch.eye(100).tolist(), "q": [1.0] * 100}
    for fields in (
        {"problem": infeasible},
        {"problem": large},
        {"solver": {"name": "admm", "options": {"rho": 0.5}}},
    ):
        token = await one.solve(**fields)
        upstream = {"z": [[1, 0]] * 2} if fields.get("problem") == infeasible else VJP["upstream"]
        response = await two.vjp(token, upstream=upstream)
        assert response.json()["type"] == "state-gone"
    assert await two.metric('argrad_shared_states_total{result="miss"}') == 3
    token = await one.solve(solver={"name": "admm"})
    response = await two.vjp(token, differentiation={"method": "altdiff"})
    assert response.json()["type"] == "state-gone", "altdiff repeats the iterations of the solver"
    assert (await two.vjp(token)).status_code == 200


async def test_owners_do_not_find_one_another_s_states(pair: Pair):
    one, _ = pair
    token = await one.solve()
    assert await one.app.state.shared.get("state", "public", token) is not None
    assert await one.app.state.shared.get("state", "somebody else", token) is None


async def test_the_same_post_at_two_replicas_does_the_work_once(pair: Pair):
    one, two = pair
    before = one.engine.solves + two.engine.solves
    key = {"Idempotency-Key": "one-step"}
    first = await one.client.post("/v1/solve", json={"problem": simplex()}, headers=key)
    again = await two.client.post("/v1/solve", json={"problem": simplex()}, headers=key)
    assert first.content == again.content
    assert ("idempotent-replayed" in first.headers, again.headers["idempotent-replayed"]) == (False, "true")
    assert one.engine.solves + two.engine.solves == before + 1
    await asyncio.sleep(0.2)  # its state is written behind the reply
    assert (await two.vjp(again.json()["state"])).status_code == 200


async def test_readiness_and_metrics_count_the_replicas(start: Start, redis_server: RedisServer):
    async with start(redis_url=redis_server.url) as one, start(redis_url=redis_server.url) as two:
        await asyncio.sleep(0.05)
        report = (await two.client.get("/health/ready")).json()
        assert report["status"] == "ready"
        assert report["checks"]["shared"]["degraded"] == {}
        if report["checks"]["shared"]["store"] == "redis":
            assert report["checks"]["shared"]["replicas"] == 2
            assert await two.metric("argrad_replicas ") == 2
        assert one is not two


async def test_everything_in_redis_expires(redis_server: RedisServer):
    app = make_app(redis_url=redis_server.url, redis_timeout_s=2.0)
    async with running_app(app) as client:
        replica = Replica(app, client)
        await replica.solve()
        await client.put(f"/v1/problems/{DIGEST}", json={"problem": Q})
        await client.post("/v1/solve", json={"problem": simplex()}, headers={"Idempotency-Key": "k"})
        await app.state.rates.take("me", per_minute=10)
        keys = redis_server.admin.keys("*")
        assert {key.split(":")[2] for key in keys} == {"state", "problem", "once", "rate", "replicas"}
        assert all(redis_server.admin.pttl(key) > 0 for key in keys)


def test_redis_without_a_secret_refuses_to_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ARGRAD_STATE_SECRET", raising=False)
    with pytest.raises(SettingsError, match=r"ARGRAD_REDIS_URL .* is set without ARGRAD_STATE_SECRET: .* the same"):
        load_settings(redis_url="redis://localhost")
    assert load_settings(redis_url="redis://localhost", state_secret="0123456789abcdef").redis_url is not None


def test_an_address_that_is_none_is_refused_without_telling_its_password():
    with pytest.raises(
        SettingsError, match=r"ARGRAD_REDIS_URL .* cannot be that value: .*begins with redis://"
    ) as error:
        load_settings(redis_url="http://user:password@host", state_secret="0123456789abcdef")
    assert "password" not in str(error.value)
    assert "password" not in json.dumps(repr(load_settings(redis_url="redis://:password@h", state_secret="x" * 16)))


def test_state_gone_is_one_answer():
    assert "send problem and solution" in str(StateGone())
