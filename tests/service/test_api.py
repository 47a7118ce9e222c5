from __future__ import annotations

import asyncio
import copy
import io
import json
import re
from typing import Any

import httpx
import pytest
import torch
from asgi_lifespan import LifespanManager

from argrad.wire import JSON, SAFETENSORS, decode, encode
from argrad.wire.messages import JvpReply, JvpRequest, SolveReply, SolveRequest, VjpReply, VjpRequest
from argrad_service.http import examples
from argrad_service.http.problems import INTERNAL, KINDS
from tests.service.support import HookedEngine, make_app, post, projection, running_app, simplex, tensor

pytestmark = pytest.mark.anyio

CALLS = [
    (path, name, example)
    for path, group in (("/v1/solve", examples.SOLVE), ("/v1/vjp", examples.VJP), ("/v1/jvp", examples.JVP))
    for name, example in group.items()
]
STAGES = ", ".join(rf"{stage};dur=[\d.]+" for stage in ("read", "decode", "queue", "solve", "differentiate", "encode"))


def check_like(found: Any, wanted: Any, where: str = "reply") -> None:
    """The reply says what the example says, but for what differs from run to run."""
    if isinstance(wanted, dict):
        assert set(wanted) <= set(found), where
        for name, value in wanted.items():
            check_like(found[name], value, f"{where}.{name}")
    elif re.search(r"timings_ms|\.state$|iterations$", where):
        assert type(found) is type(wanted), where
    elif isinstance(wanted, list) and not any(isinstance(value, str | list) for value in wanted):
        assert found == pytest.approx(wanted, abs=1e-9), where
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
            check_like(one, other, f"{where}[{i}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, abs=1e-9), where
    else:
        assert found == wanted, where


@pytest.mark.parametrize(("path", "name", "example"), CALLS, ids=lambda value: value if isinstance(value, str) else "")
async def test_every_example_is_true(client: httpx.AsyncClient, path: str, name: str, example: examples.Example):
    documented = (await client.get("/openapi.json")).json()["paths"][path]["post"]
    shown = documented["requestBody"]["content"][JSON]["examples"][name]["value"]
    promised = documented["responses"]["200"]["content"][JSON]["examples"][name]["value"]
    assert (shown, promised) == (example.request, example.reply)
    if "state" in shown:
        solved = await client.post("/v1/solve", json=examples.SOLVE["batch"].request)
        shown = copy.deepcopy(shown) | {"state": solved.json()["state"]}
    if "registered" in shown.get("problem", {}):
        registered = await client.put(f"/v1/problems/{examples.REGISTERED}", json=examples.REGISTER.request)
        assert (registered.status_code, registered.json()) == (201, examples.REGISTER.reply)
    response = await client.post(path, json=shown)
    assert response.status_code == 200, response.text
    check_like(response.json(), promised)
    section = {"solution", "gradients", "adjoint", "tangents"} & set(promised)
    for part in section:
        assert set(response.json()[part]) == set(promised[part]), "the example leaves nothing out"


async def test_openapi_describes_every_route_and_resolves(client: httpx.AsyncClient):
    document = (await client.get("/openapi.json")).json()
    assert set(document["paths"]) == {
        "/v1/solve",
        "/v1/vjp",
        "/v1/jvp",
        "/v1/states/{token}",
        "/v1/problems/{sha256}",
        "/v1/solvers",
        "/health/live",
        "/health/ready",
        "/metrics",
    }
    for reference in re.findall(r'"\$ref":\s*"#/components/schemas/(\w+)"', json.dumps(document)):
        assert reference in document["components"]["schemas"]
    problem = document["components"]["schemas"]["ProblemDocument"]
    parameters = {"Q", "q", "G", "h", "A", "b", "lb", "ub", "entropy", "P", "l", "u"}
    assert set(problem["properties"]) == {"kind", "registered"} | parameters
    types = document["components"]["schemas"]["Problem"]["properties"]["type"]["enum"]
    assert set(types) == {kind.type for kind in (*KINDS.values(), INTERNAL)}
    assert {"400", "409", "413", "422", "429", "504"} <= set(document["paths"]["/v1/vjp"]["post"]["responses"])
    assert (await client.get("/docs")).status_code == 200


@pytest.mark.parametrize("source", [JSON, SAFETENSORS])
@pytest.mark.parametrize(
    "accept", [None, JSON, SAFETENSORS, "*/*", "application/x-safetensors;q=0.5, application/json"]
)
async def test_both_formats_both_ways_say_the_same(client: httpx.AsyncClient, source: str, accept: str | None):
    tensors = projection((-1, 2), (-3, -0.5)) | {"upstream.z": tensor([1, 2], [3, 4])}
    body = b"".join(encode(SolveRequest(), tensors, source))
    headers = {"content-type": source} | ({"accept": accept} if accept else {})
    response = await client.post("/v1/solve", content=body, headers=headers)
    target = {None: source, "*/*": source, JSON: JSON, SAFETENSORS: SAFETENSORS}.get(accept, JSON)
    assert response.headers["content-type"] == target
    reply, out = decode(SolveReply, bytearray(response.content), target)
    torch.testing.assert_close(out["gradients.q"], tensor([-1, 0], [-3, -4]), rtol=0, atol=1e-9)
    assert reply.gradient_status == ["ok", "ok"]


async def test_a_training_step_by_state_and_without(client: httpx.AsyncClient):
    problem, upstream = projection((-1, 2)), {"upstream.z": tensor([1, 1])}
    solved, point = await post(client, "/v1/solve", SolveRequest(), problem, SolveReply)
    _, first = await post(client, "/v1/vjp", VjpRequest(state=solved.state), upstream, VjpReply)
    _, again = await post(client, "/v1/vjp", VjpRequest(state=solved.state), upstream, VjpReply)
    blocks = {name: t for name, t in point.items() if name.startswith("solution.")}
    _, stateless = await post(client, "/v1/vjp", VjpRequest(), problem | blocks | upstream, VjpReply)
    _, tangents = await post(
        client, "/v1/jvp", JvpRequest(state=solved.state), {"tangents.q": tensor([1, 1])}, JvpReply
    )
    for name in first:
        if name.startswith("gradients"):
            assert torch.equal(first[name], again[name])
            torch.testing.assert_close(first[name], stateless[name], rtol=0, atol=1e-12)
    assert tangents["tangents.z"].tolist() == [[-1.0, 0.0]]


async def test_timings_are_in_the_reply_and_in_server_timing(client: httpx.AsyncClient):
    response = await client.post("/v1/solve", json={"problem": simplex(), "upstream": {"z": [1, 0]}})
    timings = response.json()["timings_ms"]
    assert set(timings) == {"read", "decode", "queue", "solve", "differentiate"}
    assert all(ms >= 0 for ms in timings.values())
    assert re.fullmatch(STAGES, response.headers["server-timing"])


async def test_replies_carry_the_request_id_and_safe_headers(client: httpx.AsyncClient):
    response = await client.get("/health/live", headers={"X-Request-ID": "mine-1.2:3"})
    assert response.headers["x-request-id"] == "mine-1.2:3"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-store"
    first, second = [(await client.get("/health/live")).headers["x-request-id"] for _ in range(2)]
    assert re.fullmatch("[0-9a-f]{16}", first)
    assert first != second


@pytest.mark.parametrize("request_id", ["", "a b", "x" * 129, "a\x7f", "<script>"], ids=repr)
async def test_a_request_id_that_could_harm_a_log_is_refused(client: httpx.AsyncClient, request_id: str):
    response = await client.get("/health/live", headers={"X-Request-ID": request_id})
    assert response.status_code == 400
    problem = response.json()
    assert problem["type"] == "bad-request"
    assert problem["field"] == "X-Request-ID"
    assert re.fullmatch("[0-9a-f]{16}", response.headers["x-request-id"])


@pytest.mark.parametrize(
    ("method", "path", "status", "type_"),
    [
        ("GET", "/v1/nope", 404, "not-found"),
        ("POST", "/v1/solve/", 404, "not-found"),
        ("GET", "/v1/solve", 405, "method-not-allowed"),
        ("POST", "/health/live", 405, "method-not-allowed"),
    ],
)
async def test_routing_errors_are_problems_too(
    client: httpx.AsyncClient, method: str, path: str, status: int, type_: str
):
    response = await client.request(method, path)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert (response.json()["type"], response.json()["status"]) == (type_, status)
    assert response.json()["request_id"] == response.headers["x-request-id"]
    if status == 405:
        allowed = {"/v1/solve": "POST", "/health/live": "GET, HEAD"}[path]
        assert response.headers["allow"] == allowed
        assert response.json()["detail"] == f"method: found {method}, wanted {allowed}"


async def test_405_names_the_methods_of_every_route_that_has_the_path(client: httpx.AsyncClient):
    response = await client.patch(f"/v1/problems/{64 * '0'}")
    assert (response.status_code, response.headers["allow"]) == (405, "DELETE, GET, HEAD, PUT")


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/metrics", "/v1/solvers", "/docs", "/openapi.json"])
async def test_head_is_answered_as_get_is(client: httpx.AsyncClient, path: str):
    head, get = await client.head(path), await client.get(path)
    assert (head.status_code, head.headers["content-type"]) == (200, get.headers["content-type"])
    assert head.headers["cache-control"] == get.headers["cache-control"]


async def test_head_of_what_has_no_get_is_405(client: httpx.AsyncClient):
    response = await client.head("/v1/solve")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")


async def test_openapi_does_not_list_head(client: httpx.AsyncClient):
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert all("head" not in path for path in paths.values())


async def test_a_defect_is_a_500_without_a_traceback_and_the_log_has_its_id():
    log = io.StringIO()
    engine = HookedEngine()
    async with running_app(make_app(log, engine)) as client:
        engine.on_solve = lambda _: 1 / 0
        response = await client.post("/v1/solve", json={"problem": simplex()}, headers={"x-request-id": "find-me"})
        assert response.status_code == 500
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json() == {
            "type": "internal",
            "title": "A defect of the service. Its log has the request id.",
            "status": 500,
            "detail": "The service failed; nothing is wrong with the request as far as it knows.",
            "request_id": "find-me",
        }
        engine.on_solve = lambda _: None
        assert (await client.post("/v1/solve", json={"problem": simplex()})).status_code == 200
    (line,) = [line for line in map(json.loads, log.getvalue().splitlines()) if line["event"] == "defect"]
    assert (line["request_id"], line["route"], line["level"]) == ("find-me", "/v1/solve", "error")
    assert line["exception"][0]["exc_type"] == "ZeroDivisionError"


async def test_memory_that_runs_out_is_the_call_s_size_and_not_a_defect():
    def fail(_: object) -> None:
        raise MemoryError

    engine = HookedEngine()
    async with running_app(make_app(engine_=engine)) as client:
        engine.on_solve = fail
        response = await client.post("/v1/solve", json={"problem": simplex()})
        assert (response.status_code, response.json()["type"]) == (413, "too-large")
        assert response.json()["field"] == "memory of the device"


async def test_solvers_are_listed(client: httpx.AsyncClient):
    table = (await client.get("/v1/solvers")).json()
    assert table["protocol"] == 1
    assert table["device"] == "cpu"
    assert "pdipm" in json.dumps(table["solvers"])


async def test_metrics_count_calls_stages_and_verdicts(client: httpx.AsyncClient):
    await client.post("/v1/solve", json={"problem": simplex(), "upstream": {"z": [1, 0]}})
    await client.post("/v1/solve", json={"problem": {"Q": [[1]], "q": [0], "G": [[1], [-1]], "h": [-1, 0]}})
    await client.post("/v1/solve", json={"problem": simplex() | {"h": [0]}})
    await client.post("/v1/vjp", json={"state": "gone", "upstream": {"z": [1, 0]}})
    await client.get("/nowhere/in/particular")
    text = (await client.get("/metrics")).text
    for line in (
        'argrad_requests_total{route="/v1/solve",status="200",type=""} 2.0',
        'argrad_requests_total{route="/v1/solve",status="422",type="invalid"} 1.0',
        'argrad_requests_total{route="/v1/vjp",status="409",type="state-gone"} 1.0',
        'argrad_requests_total{route="unmatched",status="404",type="not-found"} 1.0',
        'argrad_problems_total{status="optimal"} 1.0',
        'argrad_problems_total{status="infeasible"} 1.0',
        'argrad_request_seconds_count{route="/v1/solve"} 3.0',
        "argrad_queued_calls 0.0",
        "argrad_state_entries 1.0",
        "argrad_state_misses_total 1.0",
        "argrad_solver_threads_alive 1.0",
    ):
        assert line in text.splitlines(), line
    for stage, count in {"read": 3, "decode": 2, "queue": 2, "solve": 2, "differentiate": 1, "encode": 2}.items():
        assert f'argrad_stage_seconds_count{{route="/v1/solve",stage="{stage}"}} {count}.0' in text


async def test_applications_have_metrics_of_their_own(client: httpx.AsyncClient):
    await client.get("/nowhere")
    async with running_app(make_app()) as other:
        assert "unmatched" not in (await other.get("/metrics")).text


async def test_a_log_line_says_what_came_of_a_call_and_no_token():
    log = io.StringIO()
    async with running_app(make_app(log)) as client:
        state = (await client.post("/v1/solve", json={"problem": simplex()})).json()["state"]
        await client.delete(f"/v1/states/{state}")
        await client.get("/a%0Ab")
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    (solved,) = [line for line in lines if line.get("route") == "/v1/solve"]
    assert (solved["event"], solved["method"], solved["status"], solved["level"]) == ("request", "POST", 200, "info")
    assert solved["solve_ms"] > 0
    assert solved["bytes_out"] > 100
    (deleted,) = [line for line in lines if line.get("route") == "/v1/states/{token}"]
    assert deleted["status"] == 204
    assert state not in log.getvalue()
    (unknown,) = [line for line in lines if line.get("route") == "unmatched"]
    assert unknown["path"] == "/a%0Ab"
    assert not [
        line
        for line in lines
        if line.get("route") == "/health/ready" and line["level"] != "debug" and line["status"] == 200
    ]


async def test_readiness_names_what_it_looks_at(client: httpx.AsyncClient):
    report = (await client.get("/health/ready")).json()
    assert report["status"] == "ready"
    assert report["checks"]["solver"]["alive"] == 1
    assert report["checks"]["state"] == {"store": "memory", "entries": 0, "held_bytes": 0}


async def test_a_first_solve_that_fails_keeps_the_service_unready():
    def fail(_: object) -> None:
        raise RuntimeError("no such device")

    app = make_app(engine_=HookedEngine(fail))
    transport = httpx.ASGITransport(app=app)
    async with LifespanManager(app), httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        while (response := await client.get("/health/ready")).json()["checks"]["phase"] == "starting":
            await asyncio.sleep(0.002)
        assert response.status_code == 503
        assert response.json()["type"] == "not-ready"
        assert "the first solve failed: no such device" in response.json()["detail"]
        assert (await client.get("/health/live")).json() == {"status": "live"}
