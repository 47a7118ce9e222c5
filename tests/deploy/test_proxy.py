"""The shipped Caddyfile in front of three replicas: affinity, fail-over, large bodies, and what it does not show."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch

import argrad
from argrad.keys import append_line, new_key, stored_line
from argrad.wire import SAFETENSORS
from tests.conftest import free_port
from tests.deploy.names import Names, serving_names
from tests.deploy.support import CADDYFILE, Replica, caddy, composed, proxy
from tests.redis_server import running_redis
from tests.service.support import simplex, wait_until

HOSTS = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
KEYS = 60
D = torch.float64

pytestmark = pytest.mark.timeout(300)  # the first test waits for the start of three services


def adapted(**environment: str) -> dict:
    """The Caddyfile as Caddy's own JSON."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ARGRAD_")}
    command = [caddy(), "adapt", "--config", str(CADDYFILE), "--adapter", "caddyfile"]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("site", [{}, {"ARGRAD_SITE": "argrad.example.org"}], ids=["plain", "with TLS"])
def test_caddy_finds_the_file_valid_and_well_formatted(site: dict[str, str], tmp_path: Path):
    environment = os.environ | site | {"XDG_DATA_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    for command in (["validate", "--config"], ["fmt", "--diff"]):
        arguments = [caddy(), *command, str(CADDYFILE)] + (
            ["--adapter", "caddyfile"] if command[0] == "validate" else []
        )
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_domain_brings_tls_and_its_absence_does_not():
    plain, named = (adapted(**site)["apps"]["http"]["servers"] for site in ({}, {"ARGRAD_SITE": "argrad.example.org"}))
    assert {":8080"} < {address for server in plain.values() for address in server["listen"]}
    assert ":8443" in {address for server in named.values() for address in server["listen"]}


def test_listed_replicas_are_asked_for_their_readiness():
    server = adapted(ARGRAD_FIND="listed", ARGRAD_UPSTREAMS="10.0.0.5:8000 10.0.0.6:8000")["apps"]["http"]["servers"]
    text = json.dumps(server)
    assert '"upstreams": [{"dial": "10.0.0.5:8000"}, {"dial": "10.0.0.6:8000"}]' in text
    assert '"active": {"interval": 1000000000, "timeout": 2000000000, "uri": "/health/ready"}' in text
    assert '"source": "a"' not in text


def test_nothing_can_change_the_proxy_while_it_runs():
    assert adapted()["admin"] == {"disabled": True, "config": {"persist": False}}


@dataclass
class Deployment:
    """Three replicas, the name under which they are found, and the proxy."""

    replicas: list[Replica]
    names: Names
    url: str
    metrics_port: int
    log: Path
    key: str

    def solve(self, client: httpx.Client, key: str) -> str:
        """Solve with a key, and keep the state: its token."""
        body = {"problem": simplex(), "keep_state": True}
        response = client.post("/v1/solve", json=body, headers={"Argrad-Affinity": key})
        assert response.status_code == 200, response.text
        return response.json()["state"]

    def has_state(self, client: httpx.Client, token: str, key: str) -> bool:
        """Whether the replica that a key leads to holds a state."""
        body = {"state": token, "upstream": {"z": [1, 0]}, "wrt": ["q"]}
        response = client.post("/v1/vjp", json=body, headers={"Argrad-Affinity": key})
        if response.status_code == 409:
            assert response.json()["type"] == "state-gone"
            return False
        assert response.json()["gradients"]["q"] == pytest.approx([-0.25, 0.25])
        return True


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    place = tmp_path_factory.mktemp("deployment")
    caddy()  # skips before anything is started
    port, metrics_port, key = free_port(), free_port(), new_key()
    append_line(place / "api-keys", stored_line("tests", key))
    (place / "secrets").mkdir()
    with running_redis(free_port(), password="a password") as redis:
        (place / "secrets" / "ARGRAD_REDIS_URL").write_text(redis.url + "\n")
        settings = composed("argrad") | {
            "ARGRAD_API_KEYS_FILE": str(place / "api-keys"),
            "ARGRAD_SECRETS_DIR": str(place / "secrets"),
            "ARGRAD_SHARED_STATE_BYTES": "0",  # who holds a state is what is tested
            "ARGRAD_TORCH_THREADS": "1",
            "ARGRAD_DRAIN_DELAY_S": "1",
        }
        replicas = [Replica(host, port, place / f"{host}.log", settings, metrics_port) for host in HOSTS]
        yield from _deployed(replicas, place, key)


def _deployed(replicas: list[Replica], place: Path, key: str) -> Iterator[Deployment]:
    try:
        for replica in replicas:
            replica.start()
        for replica in replicas:
            replica.wait_until_ready()
        log = place / "caddy.log"
        with serving_names(HOSTS) as names, proxy(names, replicas[0].port, log) as (url, metrics_port):
            yield Deployment(replicas, names, url, metrics_port, log, key)
    finally:
        for replica in replicas:
            replica.stop()


@pytest.fixture
def client(deployment: Deployment) -> Iterator[httpx.Client]:
    bearer = {"Authorization": f"Bearer {deployment.key}"}
    with httpx.Client(base_url=deployment.url, trust_env=False, timeout=60, headers=bearer) as client:
        yield client


def random_qp(batch: int, n: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    L = torch.randn(batch, n, n, dtype=D, generator=generator)
    return {
        "Q": L @ L.mT / n + torch.eye(n, dtype=D),
        "q": torch.randn(batch, n, dtype=D, generator=generator),
        "G": torch.randn(batch, n, n, dtype=D, generator=generator),
        "h": torch.rand(batch, n, dtype=D, generator=generator),
    }


@pytest.mark.slow
def test_equal_keys_reach_the_same_replica_and_other_keys_others(deployment: Deployment, client: httpx.Client):
    before = [replica.posts("/v1/solve") for replica in deployment.replicas]
    tokens = {key: deployment.solve(client, key) for key in (f"key-{i}" for i in range(KEYS))}
    assert sum(deployment.has_state(client, token, key) for key, token in tokens.items()) == KEYS
    solved = [replica.posts("/v1/solve") - b for replica, b in zip(deployment.replicas, before, strict=True)]
    assert sum(solved) == KEYS
    assert min(solved) >= KEYS / 10, "keys spread over all replicas"
    astray = sum(deployment.has_state(client, token, f"another-{key}") for key, token in tokens.items())
    assert astray < KEYS * 0.6, "a state is with its own replica only, or this test could not fail"


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        "/metrics",
        "/METRICS",
        "//metrics",
        "/health/ready",
        "/v1/../metrics",
        "/v1/%2e%2e/metrics",
        "/v1/..%2fmetrics",
        "/v1//../metrics",
        "/v1/%2e%2e/health/ready",
        "/",
    ],
)
def test_what_is_the_operator_s_is_not_reached_through_the_proxy(deployment: Deployment, path: str):
    host, port = deployment.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"Host: {host}:{port}\r\nConnection: close\r\nAuthorization: Bearer {deployment.key}\r\n"
        connection.sendall(f"GET {path} HTTP/1.1\r\n{head}\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404 ")
    assert b"application/problem+json" in head
    assert b"argrad_requests" not in body
    assert b"solver" not in body


@pytest.mark.slow
def test_what_is_public_is_reached(client: httpx.Client):
    assert client.get("/health/live").json() == {"status": "live"}
    assert client.get("/v1/solvers").status_code == 200
    assert client.get("/openapi.json").json()["info"]["title"] == "argrad"
    assert "server" not in client.get("/health/live").headers


@pytest.mark.slow
def test_a_training_step_through_the_proxy_has_equal_gradients_with_20_mb_each_way(deployment: Deployment):
    given = random_qp(128, 100)
    assert sum(t.nbytes for t in given.values()) > 20e6
    gradients: list[dict[str, torch.Tensor]] = []
    for url in (deployment.url, deployment.replicas[0].url):
        with argrad.Client(url, api_key=deployment.key) as client:
            leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
            z = argrad.nn.QPLayer(client)(**leaves)
            z.square().sum().backward()
            reply = client.solve(argrad.QP(**given), upstream={"z": 2 * z.detach()}, gradients="full")
            gradients.append({name: t.grad for name, t in leaves.items()})
            for name, t in leaves.items():
                torch.testing.assert_close(reply.gradients[name], t.grad, rtol=1e-9, atol=1e-9)
    for name, expected in gradients[1].items():
        assert torch.equal(gradients[0][name], expected), name


@pytest.mark.slow
def test_a_body_goes_through_while_it_is_still_being_sent(deployment: Deployment):
    host, port = deployment.url.removeprefix("http://").split(":")
    size, half = 20_000_000, 10_000_000
    head = (
        f"POST /v1/solve HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
        f"Authorization: Bearer {deployment.key}\r\nContent-Type: {SAFETENSORS}\r\nContent-Length: {size}\r\n\r\n"
    )

    def pending() -> int:
        lines = (line for replica in deployment.replicas for line in replica.metrics())
        lines = (line for line in lines if line.startswith("argrad_pending_bytes "))
        return int(sum(float(line.split()[1]) for line in lines))

    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode() + bytes(half))
        wait_until(lambda: pending() > 0)
        connection.sendall(bytes(size - half))
        status = connection.recv(64)
    assert status.startswith(b"HTTP/1.1 4"), "zeros are no request: the replica says so once it has all of them"


@pytest.mark.slow
def test_a_body_over_the_limit_is_refused_by_the_proxy_itself(deployment: Deployment, tmp_path: Path):
    port = deployment.replicas[0].port
    with proxy(deployment.names, port, tmp_path / "log", ARGRAD_MAX_BODY_BYTES="1MiB") as (url, _):
        # Without key and type the replica may refuse by the head, before the proxy has seen how long the body is.
        head = {"Authorization": f"Bearer {deployment.key}", "Content-Type": SAFETENSORS}
        response = httpx.post(f"{url}/v1/solve", content=bytes(1024**2 + 1), headers=head, trust_env=False)
    assert (response.status_code, response.json()["type"]) == (413, "too-large")


@pytest.mark.slow
def test_the_keys_of_a_killed_replica_move_and_no_others_and_come_back(deployment: Deployment, client: httpx.Client):
    tokens = {key: deployment.solve(client, key) for key in (secrets.token_hex(8) for _ in range(KEYS))}
    lost = deployment.replicas[0]
    lost.kill()
    try:
        # One answer each: the proxy passes the dead replica over without help of the client.
        had = {key: deployment.has_state(client, token, key) for key, token in tokens.items()}
        counts = Counter(had.values())
        assert 0 < counts[False] < 0.6 * KEYS
        again = {key: deployment.solve(client, key) for key in tokens}
        assert all(deployment.has_state(client, token, key) for key, token in again.items()), "moved, and stay there"

    finally:
        lost.start()
        lost.wait_until_ready()
    home = [key for key, was_there in had.items() if not was_there]

    def is_back() -> bool:
        """Whether the proxy sends the keys home again."""
        before = lost.posts("/v1/solve")
        for key in home:
            deployment.solve(client, key)
        return lost.posts("/v1/solve") == before + len(home)

    wait_until(is_back)


@pytest.mark.slow
def test_a_listed_replica_that_drains_gets_no_new_calls_and_the_others_keep_their_keys(
    deployment: Deployment, tmp_path: Path
):
    addresses = " ".join(replica.url.removeprefix("http://") for replica in deployment.replicas)
    environment = {"ARGRAD_FIND": "listed", "ARGRAD_UPSTREAMS": addresses, "XDG_DATA_HOME": str(tmp_path)}
    bearer = {"Authorization": f"Bearer {deployment.key}"}
    leaving, *_ = deployment.replicas
    usual = leaving.settings
    leaving.stop()
    leaving.settings = {**usual, "ARGRAD_DRAIN_DELAY_S": "60"}
    leaving.start()
    leaving.wait_until_ready()

    def posts() -> list[float]:
        return [replica.posts("/v1/solve") for replica in deployment.replicas]

    with (
        proxy(deployment.names, 1, tmp_path / "log", **environment) as (url, _),
        httpx.Client(base_url=url, trust_env=False, timeout=60, headers=bearer) as client,
    ):
        before = posts()
        homes: dict[str, int] = {}
        for key in (f"listed-{i}" for i in range(KEYS)):
            deployment.solve(client, key)
            now = posts()
            (homes[key],) = [i for i in range(len(HOSTS)) if now[i] > before[i]]
            before = now
        assert set(homes.values()) == {0, 1, 2}
        assert leaving.process is not None
        leaving.process.terminate()
        try:
            wait_until(lambda: httpx.get(f"{leaving.url}/health/ready", trust_env=False).status_code == 503)
            time.sleep(1.5)  # it is asked every second
            before = posts()
            tokens = {key: deployment.solve(client, key) for key in homes}
            after = posts()
            assert after[0] == before[0], "it would still take calls, and gets none"
            assert leaving.process.poll() is None
            own = [list(homes.values()).count(i) for i in range(len(HOSTS))]
            assert all(after[i] - before[i] >= own[i] for i in (1, 2))
            assert sum(after) - sum(before) == KEYS
            assert all(deployment.has_state(client, token, key) for key, token in tokens.items())
            leaving.process.terminate()  # a second signal ends it at once
            leaving.process.wait(20)
        finally:
            leaving.stop()
            leaving.settings = usual
            leaving.start()
            leaving.wait_until_ready()
        wait_until(lambda: _is_home(deployment, client, homes, posts))


def _is_home(
    deployment: Deployment, client: httpx.Client, homes: dict[str, int], posts: Callable[[], list[float]]
) -> bool:
    """Whether every key is served by the replica that it had."""
    before = posts()
    for key in homes:
        deployment.solve(client, key)
    found = [now - b for now, b in zip(posts(), before, strict=True)]
    return found == [list(homes.values()).count(i) for i in range(len(HOSTS))]


def losses(client: argrad.Client, steps: int, after: Callable[[int], None] = lambda _: None) -> list[float]:
    """A training loop through a QP layer: forward, backward, and a step of Adam."""
    given = random_qp(4, 5)
    q = given["q"].clone().requires_grad_()
    optimiser = torch.optim.Adam([q], lr=0.05)
    layer, found = argrad.nn.QPLayer(client), []
    for step in range(steps):
        optimiser.zero_grad()
        loss = (layer(given["Q"], q, given["G"], given["h"]) - 1).square().sum()
        loss.backward()
        optimiser.step()
        found.append(loss.item())
        after(step)
    return found


@pytest.mark.slow
def test_a_training_loop_loses_nothing_while_one_replica_after_the_other_is_restarted(deployment: Deployment):
    steps, statuses = 400, []

    def restart() -> None:
        for replica in deployment.replicas[1:]:  # the first came back in the test before
            assert replica.process is not None
            replica.process.terminate()
            statuses.append(replica.process.wait(60))
            replica.start()
            replica.wait_until_ready()

    thread = threading.Thread(target=restart)

    def pace(step: int) -> None:
        """Begin the restarts early, and take the last steps after them."""
        if step == 10:
            thread.start()
        elif step == steps - 10:
            thread.join(200)
        elif step > 10:
            time.sleep(0.05 if thread.is_alive() else 0)

    with argrad.Client("local") as local:
        expected = losses(local, steps)
    # Without prefetching a step is two calls, and backward needs the state that forward left behind.
    with argrad.Client(deployment.url, api_key=deployment.key, prefetch=False) as client:
        found = losses(client, steps, pace)
    assert statuses == [0, 0], "each ended as it was asked to"
    assert found == pytest.approx(expected, rel=1e-9)
    assert found[-1] < found[0]


@pytest.mark.slow
def test_without_a_key_nobody_gets_further_than_liveness(deployment: Deployment):
    with httpx.Client(base_url=deployment.url, trust_env=False) as stranger:
        assert stranger.get("/health/live").status_code == 200
        assert stranger.post("/v1/solve", json={"problem": simplex()}).status_code == 401
    assert deployment.key not in deployment.log.read_text()


@pytest.mark.slow
def test_without_a_replica_the_proxy_says_so_in_the_service_s_own_words(deployment: Deployment, tmp_path: Path):
    with serving_names([]) as nobody, proxy(nobody, 1, tmp_path / "log") as (url, _):
        response = httpx.post(f"{url}/v1/solve", json={}, trust_env=False, timeout=20)
        assert (response.status_code, response.json()["type"]) == (503, "not-ready")
        with argrad.Client(url, timeout_s=1) as client, pytest.raises(argrad.ArgradError, match=r"no replica|deadline"):
            client.solve(argrad.QP(**random_qp(1, 2)))


@pytest.mark.slow
def test_the_proxy_has_metrics_of_its_own_and_logs_no_token(deployment: Deployment, client: httpx.Client):
    token = deployment.solve(client, "k")
    client.delete(f"/v1/states/{token}", headers={"Argrad-Affinity": "k"})
    text = httpx.get(f"http://127.0.0.1:{deployment.metrics_port}/metrics", trust_env=False).text
    assert "caddy_http_requests_total" in text
    assert token not in deployment.log.read_text()
