"""Who may call what: with keys, without, and from a web page."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from argrad.keys import new_key, stored_line
from argrad_service.http.pages import documentation
from argrad_service.settings import SettingsError
from tests.service.support import make_app, running_app, simplex

pytestmark = pytest.mark.anyio

ALICE, BOB = new_key(), new_key()
KEYS = f"{stored_line('alice', ALICE)},{stored_line('bob', BOB)}"
DIGEST = "c076fa58f1e82c8437b00651ef0b8d465d414ab71872151dcf351a170999a69d"
REGISTERED = {"problem": {"Q": [[1, 0], [0, 1]]}}
SOLVE = {"problem": simplex()}
EVIL = "https://evil.example"
ROUTES = [
    ("POST", "/v1/solve"),
    ("POST", "/v1/vjp"),
    ("POST", "/v1/jvp"),
    ("DELETE", "/v1/states/x"),
    ("PUT", f"/v1/problems/{DIGEST}"),
    ("GET", f"/v1/problems/{DIGEST}"),
    ("DELETE", f"/v1/problems/{DIGEST}"),
    ("GET", "/v1/solvers"),
    ("GET", "/metrics"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/"),
    ("GET", "/nowhere"),
    ("POST", "/health/ready/"),
    ("GET", "//health/live"),
    ("GET", "/health/live/../../metrics"),
    ("OPTIONS", "/v1/solve"),
]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def check_refused(response: httpx.Response, status: int, kind: str) -> None:
    document = response.json()
    assert (response.status_code, document["type"], document["status"]) == (status, kind, status), response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert document["request_id"] == response.headers["x-request-id"]


@pytest.mark.parametrize(
    "given",
    [{}, bearer(new_key()), bearer(""), {"authorization": f"Basic {ALICE}"}],
    ids=["no header", "an unknown key", "an empty key", "another scheme"],
)
async def test_every_route_is_denied_without_a_known_key(given: dict[str, str]):
    async with running_app(make_app(api_keys=KEYS)) as client:
        for method, path in ROUTES:
            response = await client.request(method, path, headers=given)
            check_refused(response, 401, "unauthorized")
            assert response.headers["www-authenticate"].startswith('Bearer realm="argrad"')
            assert ("invalid_token" in response.headers["www-authenticate"]) == bool(given)
        assert (await client.get("/health/live", headers=given)).json() == {"status": "live"}
        assert (await client.get("/health/ready", headers=given)).json() == {"status": "ready"}


async def test_what_else_is_wrong_is_not_looked_at_without_a_key():
    wrong = {"x-request-id": "a" * 129}
    async with running_app(make_app(api_keys=KEYS)) as client:
        check_refused(await client.get("/v1/solvers", headers=wrong), 401, "unauthorized")
        check_refused(await client.get("/v1/solvers", headers=wrong | bearer(BOB)), 400, "bad-request")


async def test_the_list_above_has_every_route():
    paths = {re.sub(r"\{\w+\}", "", route.path) for route in make_app().routes}
    assert all(any(listed.startswith(path) for _, listed in [*ROUTES, ("", "/health/")]) for path in paths), paths


async def test_a_key_opens_everything():
    async with running_app(make_app(api_keys=KEYS)) as client:
        client.headers["authorization"] = f"bearer  {ALICE} "
        assert (await client.post("/v1/solve", json=SOLVE)).json()["status"] == "optimal"
        for path in ("/v1/solvers", "/metrics", "/docs", "/openapi.json"):
            assert (await client.get(path)).status_code == 200
        assert (await client.get("/health/ready")).json()["checks"]["phase"] == "ready"
        check_refused(await client.get("/nowhere"), 404, "not-found")


async def test_readiness_without_a_key_says_no_more_than_no():
    app = make_app(api_keys=KEYS)
    async with running_app(app) as client:
        app.state.readiness.phase, app.state.readiness.reason = "failed", "a reason"
        response = await client.get("/health/ready")
        check_refused(response, 503, "not-ready")
        assert "reason" not in response.text
        assert "checks" not in response.json()
        assert (await client.get("/health/ready", headers=bearer(BOB))).json()["checks"]["reason"] == "a reason"


async def test_two_keys_do_not_see_what_is_the_other_s():
    async with running_app(make_app(api_keys=KEYS)) as client:
        one, other = bearer(ALICE), bearer(BOB)
        put = await client.put(f"/v1/problems/{DIGEST}", json=REGISTERED, headers=one)
        assert put.status_code == 201
        state = (await client.post("/v1/solve", json=SOLVE, headers=one)).json()["state"]
        url, pull = f"/v1/problems/{DIGEST}", {"state": state, "upstream": {"z": [1, 0]}}
        named = {"problem": {"registered": DIGEST, "q": [1, 1]}, "keep_state": False}
        for gone, call in (
            ("state-gone", client.post("/v1/vjp", json=pull, headers=other)),
            ("state-gone", client.post("/v1/solve", json=SOLVE | {"warm_start": {"state": state}}, headers=other)),
            ("state-gone", client.delete(f"/v1/states/{state}", headers=other)),
            ("problem-gone", client.post("/v1/solve", json=named, headers=other)),
            ("problem-gone", client.get(url, headers=other)),
            ("problem-gone", client.delete(url, headers=other)),
        ):
            check_refused(await call, 409, gone)
        released = await client.post("/v1/solve", json=SOLVE, headers=other | {"argrad-release": state})
        assert released.status_code == 200, "what is not one's own is left alone"
        assert (await client.put(url, json=REGISTERED, headers=other)).status_code == 201
        assert (await client.delete(url, headers=other)).status_code == 204
        assert (await client.post("/v1/vjp", json=pull, headers=one)).status_code == 200
        assert (await client.post("/v1/solve", json=named, headers=one)).status_code == 200


async def test_keys_are_never_logged_and_their_names_are(tmp_path: Path):
    log, stranger = io.StringIO(), new_key()
    async with running_app(make_app(log, api_keys=KEYS, log_level="debug")) as client:
        for key in (ALICE, stranger):
            for path in ("/metrics", "/nowhere", "/health/ready", "/v1/states/token-of-a-state"):
                await client.get(path, headers=bearer(key))
            await client.post("/v1/solve", json=SOLVE, headers=bearer(key))
            await client.post("/v1/solve", content=b"{", headers=bearer(key))
    text = log.getvalue()
    for secret in (ALICE, stranger, *re.findall("[0-9a-f]{64}", KEYS)):
        assert secret not in text
    lines = [json.loads(line) for line in text.splitlines()]
    assert sum(line.get("key") == "alice" for line in lines) == 6
    refused = [line for line in lines if line.get("type") == "unauthorized"]
    assert {line["path"] for line in refused} >= {"/metrics", "/v1/states"}


async def test_a_wrong_list_or_file_of_keys_ends_the_start(tmp_path: Path):
    with pytest.raises(SettingsError, match="cannot be read: No such file or directory"):
        make_app(api_keys_file=tmp_path / "none")


# Without keys, on loopback: a browser on this machine is everybody's hand.


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8000",
        "LOCALHOST",
        "a.localhost:1",
        "127.0.0.1:8000",
        "127.9.9.9",
        "[::1]:8000",
        "mine.example:80",
    ],
)
async def test_names_of_this_machine_are_answered(host: str):
    async with running_app(make_app(allowed_hosts="Mine.example")) as client:
        assert (await client.get("/v1/solvers", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["", "evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "evil@localhost",
     "localhost:x", "localhost/evil", "10.0.0.1", "[::2]", "[::1", "notlocalhost", "é"],
)  # fmt: skip
async def test_other_names_are_refused(host: str):
    async with running_app(make_app()) as client:
        for path in ("/v1/solvers", "/metrics", "/health/live", "/nowhere"):
            response = await client.get(path, headers={"host": host.encode()})
            check_refused(response, 403, "forbidden")
            assert response.json()["field"] == "Host"


@pytest.mark.parametrize(
    "more",
    [{"api_keys": KEYS}, {"host": "0.0.0.0", "insecure": True}, {"uds": "/run/x"}],
    ids=lambda more: next(iter(more)),
)
async def test_where_no_page_gets_by_its_name_alone_any_host_is_answered(more: dict[str, Any]):
    async with running_app(make_app(**more)) as client:
        response = await client.get("/v1/solvers", headers={"host": "any.example"} | bearer(ALICE))
        assert response.status_code == 200
    async with running_app(make_app(**more, allowed_hosts="mine.example")) as client:
        assert (await client.get("/v1/solvers", headers={"host": "mine.example:9"} | bearer(ALICE))).status_code == 200
        response = await client.get("/v1/solvers", headers={"host": "any.example"} | bearer(ALICE))
        check_refused(response, 403, "forbidden")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
async def test_what_a_form_can_send_is_refused(client: httpx.AsyncClient, kind: str):
    for method, path in (("POST", "/v1/solve"), ("PUT", f"/v1/problems/{DIGEST}")):
        response = await client.request(method, path, content=json.dumps(SOLVE), headers={"content-type": kind})
        check_refused(response, 415, "unsupported-media-type")


async def test_a_page_of_another_site_is_refused_and_the_service_s_own_is_not(client: httpx.AsyncClient):
    for origin in (EVIL, "null", "http://localhost:1", "https://localhost", "http://localhost.evil.example"):
        response = await client.post("/v1/solve", json=SOLVE, headers={"origin": origin})
        check_refused(response, 403, "forbidden")
        assert response.json()["field"] == "Origin"
    assert (await client.post("/v1/solve", json=SOLVE, headers={"origin": "http://localhost"})).status_code == 200


async def test_cors_is_off_by_default(client: httpx.AsyncClient):
    asked = {"origin": EVIL, "access-control-request-method": "POST"}
    for response in (
        await client.options("/v1/solve", headers=asked),
        await client.post("/v1/solve", json=SOLVE, headers={"origin": EVIL}),
        await client.post("/v1/solve", json=SOLVE),
    ):
        assert not any(name.startswith("access-control") for name in response.headers)


@pytest.mark.parametrize("keys", ["", KEYS], ids=["open", "keys"])
async def test_named_origins_may_call(keys: str):
    page = "https://page.example:8443"
    async with running_app(make_app(cors_origins=f"{page},https://b.example", api_keys=keys)) as client:
        asked = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        preflight = await client.options("/v1/solve", headers=asked | {"origin": page})
        assert preflight.status_code == 204
        assert preflight.headers["access-control-allow-origin"] == page
        assert preflight.headers["access-control-allow-headers"] == "authorization,content-type"
        assert "POST" in preflight.headers["access-control-allow-methods"]
        assert "access-control-allow-credentials" not in preflight.headers
        reply = await client.post("/v1/solve", json=SOLVE, headers={"origin": page} | bearer(ALICE))
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, page)
        assert "Retry-After" in reply.headers["access-control-expose-headers"]
        assert reply.headers["vary"] == "Origin"
        other = await client.options("/v1/solve", headers=asked | {"origin": EVIL})
        check_refused(other, 401 if keys else 403, "unauthorized" if keys else "forbidden")
        for response in (other, await client.get("/v1/solvers", headers={"origin": EVIL} | bearer(ALICE))):
            assert "access-control-allow-origin" not in response.headers
            assert response.headers["vary"] == "Origin"


async def test_every_reply_has_its_security_headers():
    async with running_app(make_app(api_keys=KEYS)) as client:
        for headers in ({}, bearer(ALICE)):
            for _, path in ROUTES:
                reply = await client.get(path, headers=headers)
                assert reply.headers["x-content-type-options"] == "nosniff"
                assert reply.headers["cache-control"] == "no-store"
                assert reply.headers["x-frame-options"] == "DENY"
                assert reply.headers["referrer-policy"] == "no-referrer"


def test_the_documentation_runs_its_own_script_and_no_other():
    page = documentation("argrad")
    policy = page.headers["content-security-policy"]
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/]{43}=' https://cdn.jsdelivr.net/\S+\.js;", policy)
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]
    assert bytes(page.body).count(b"<script>") == 1


async def test_each_key_has_a_rate_of_its_own():
    now = [0.0]
    app = make_app(api_keys=KEYS, rate_limit_per_minute=2, clock=lambda: now[0])
    async with running_app(app) as client:
        for _ in range(2):
            assert (await client.get("/v1/solvers", headers=bearer(ALICE))).status_code == 200
        response = await client.post("/v1/solve", json=SOLVE, headers=bearer(ALICE))
        check_refused(response, 429, "rate-limited")
        assert response.headers["retry-after"] == "30"
        assert "ARGRAD_RATE_LIMIT_PER_MINUTE" in response.json()["detail"]
        for path in ("/health/live", "/health/ready", "/metrics"):
            assert (await client.get(path, headers=bearer(ALICE))).status_code == 200
        check_refused(await client.get("/v1/solvers"), 401, "unauthorized")
        assert (await client.get("/v1/solvers", headers=bearer(BOB))).status_code == 200
        now[0] = 29.0
        assert (await client.get("/v1/solvers", headers=bearer(ALICE))).headers["retry-after"] == "1"
        now[0] = 30.0
        assert (await client.get("/v1/solvers", headers=bearer(ALICE))).status_code == 200
