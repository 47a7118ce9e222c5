"""Real sockets: liveness during a solve, deadlines, cancellation, a full queue, a crash."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

from argrad.wire import JSON, SAFETENSORS, encode
from argrad.wire.messages import SolveRequest
from argrad_service.engine.options import SolverOptions, Stopped
from argrad_service.http.protocol import GuardedProtocol, OneWrite
from tests.service.support import D, HookedEngine, make_app, serving, simplex, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.alone]

BODY = json.dumps({"problem": simplex()}).encode()
LIVE_S = 0.05
LONG_SOLVE_S = 10.0


class Slow:
    """A hook that keeps each solve until it is released, told to stop, or ten seconds have passed."""

    def __init__(self) -> None:
        self.released, self.entered = threading.Event(), threading.Semaphore(0)
        self.stopped = 0

    def __call__(self, options: SolverOptions) -> None:
        self.entered.release()
        until = time.monotonic() + LONG_SOLVE_S
        while not self.released.is_set() and time.monotonic() < until:
            if options.should_stop():
                self.stopped += 1
                raise Stopped
            time.sleep(0.001)


@pytest.fixture
def slow() -> Slow:
    return Slow()


@pytest.fixture
def engine(slow: Slow) -> HookedEngine:
    return HookedEngine()


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def url(slow: Slow, engine: HookedEngine, log: io.StringIO) -> Iterator[str]:
    """A server whose solves are slow from its first ready moment on; at most two calls wait."""
    with serving(make_app(log, engine, max_queue=2), http=GuardedProtocol.with_bounds(header_timeout_s=0.3)) as url:
        engine.on_solve = slow
        yield url
        slow.released.set()


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
        yield client


def solve(url: str, **headers: str) -> httpx.Response:
    with httpx.Client(trust_env=False, timeout=30) as client:
        return client.post(f"{url}/v1/solve", content=BODY, headers={"content-type": JSON, **headers})


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def request_bytes(body: bytes, length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    return (
        f"POST /v1/solve HTTP/1.1\r\nhost: localhost\r\ncontent-type: {JSON}\r\n".encode()
        + f"content-length: {length}\r\n\r\n".encode()
        + body
    )


def metric(http: httpx.Client, name: str) -> float:
    found = re.search(rf"^{name} ([\d.]+)$", http.get("/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def probe(url: str, seconds: float) -> list[float]:
    """Seconds that each liveness probe took, one after the other on one connection."""
    took: list[float] = []
    with httpx.Client(base_url=url, trust_env=False) as client:
        client.get("/health/live")
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            began = time.perf_counter()
            assert client.get("/health/live").json() == {"status": "live"}
            took.append(time.perf_counter() - began)
            time.sleep(0.005)
    return took


def test_liveness_answers_at_once_during_a_ten_second_solve(url: str, slow: Slow):
    with ThreadPoolExecutor() as pool:
        solving = pool.submit(solve, url)
        assert slow.entered.acquire(timeout=5)
        took = probe(url, 1.0)
        assert not solving.done()
        slow.released.set()
        assert solving.result().status_code == 200
    # One probe in twenty may meet a busy machine; a blocked loop would show in all of them.
    assert len(took) > 20
    assert sorted(took)[int(0.95 * len(took))] < LIVE_S


@pytest.mark.slow
def test_liveness_answers_at_once_during_real_solves_and_large_bodies(service_url: str):
    torch.manual_seed(0)
    B, n = 128, 100
    L = torch.randn(B, n, n, dtype=D)
    tensors = {
        "problem.Q": L @ L.mT / n + torch.eye(n, dtype=D),
        "problem.q": torch.randn(B, n, dtype=D),
        "problem.G": torch.randn(B, n, n, dtype=D),
        "problem.h": torch.rand(B, n, dtype=D),
    }
    small = {name: t[:4, :60, :60] if t.ndim == 3 else t[:4, :60] for name, t in tensors.items()}
    bodies = {
        SAFETENSORS: b"".join(encode(SolveRequest(), tensors, SAFETENSORS)),
        JSON: b"".join(encode(SolveRequest(), small, JSON)),
    }
    assert len(bodies[SAFETENSORS]) > 20_000_000
    assert len(bodies[JSON]) > 400_000
    until = time.monotonic() + 5.0

    def load(content_type: str) -> int:
        calls = 0
        with connect(service_url) as connection:
            head = f"POST /v1/solve HTTP/1.1\r\nhost: localhost\r\ncontent-type: {content_type}\r\ncontent-length: "
            while time.monotonic() < until:
                connection.sendall(head.encode() + str(len(bodies[content_type])).encode() + b"\r\n\r\n")
                connection.sendall(bodies[content_type])
                reply = connection.makefile("rb")
                assert b"200 OK" in reply.readline()
                length = 0
                while (line := reply.readline()) != b"\r\n":
                    name, _, value = line.partition(b":")
                    length = int(value) if name.lower() == b"content-length" else length
                assert len(reply.read(length)) == length
                calls += 1
        return calls

    with ThreadPoolExecutor() as pool:
        loads = [pool.submit(load, content_type) for content_type in bodies]
        took = sorted(probe(service_url, 4.5))
        assert all(future.result() > 2 for future in loads)
    assert took[int(0.95 * len(took))] < LIVE_S
    assert statistics.median(took) < 0.02


def test_a_deadline_is_a_504_and_stops_the_work(url: str, slow: Slow, http: httpx.Client):
    began = time.monotonic()
    response = http.post("/v1/solve", content=BODY, headers={"content-type": JSON, "argrad-timeout-ms": "100"})
    assert time.monotonic() - began < 2.0
    assert response.status_code == 504
    assert response.json()["type"] == "deadline"
    wait_until(lambda: slow.stopped == 1)
    slow.released.set()
    assert http.post("/v1/solve", json={"problem": simplex()}).status_code == 200


def test_the_service_s_own_deadline_holds_for_who_names_none(slow: Slow, engine: HookedEngine):
    with serving(make_app(engine_=engine, timeout_s=0.1)) as url:
        engine.on_solve = slow
        for headers in ({}, {"argrad-timeout-ms": "60000"}):
            assert solve(url, **headers).status_code == 504


def test_a_full_queue_is_a_429_that_says_when_to_come_back(url: str, slow: Slow):
    with ThreadPoolExecutor() as pool:
        running = pool.submit(solve, url)
        assert slow.entered.acquire(timeout=5)
        with httpx.Client(base_url=url, trust_env=False) as http:
            waiting = [pool.submit(solve, url) for _ in range(2)]
            wait_until(lambda: metric(http, "argrad_queued_calls") == 2)
            response = solve(url)
            assert response.status_code == 429
            assert response.json()["type"] == "overloaded"
            assert "2 calls wait for the solver, the limit" in response.json()["detail"]
            assert 1 <= int(response.headers["retry-after"]) <= 60
            slow.released.set()
            assert [future.result().status_code for future in (running, *waiting)] == [200] * 3
            assert solve(url).status_code == 200


def test_too_many_calls_in_the_house_are_a_429(slow: Slow, engine: HookedEngine):
    with serving(make_app(engine_=engine, max_pending=1)) as url, ThreadPoolExecutor() as pool:
        engine.on_solve = slow
        running = pool.submit(solve, url)
        assert slow.entered.acquire(timeout=5)
        response = solve(url)
        assert response.status_code == 429
        assert "1 calls are in the house, the limit (ARGRAD_MAX_PENDING)" in response.json()["detail"]
        assert httpx.get(f"{url}/health/live", trust_env=False).status_code == 200
        slow.released.set()
        assert running.result().status_code == 200


def test_too_many_bytes_in_the_house_are_a_429(slow: Slow, engine: HookedEngine):
    with serving(make_app(engine_=engine, max_pending_bytes=len(BODY) + 1)) as url, ThreadPoolExecutor() as pool:
        engine.on_solve = slow
        running = pool.submit(solve, url)
        assert slow.entered.acquire(timeout=5)
        response = solve(url)
        assert response.status_code == 429
        assert "bytes of bodies are in memory (ARGRAD_MAX_PENDING_BYTES)" in response.json()["detail"]
        slow.released.set()
        assert running.result().status_code == 200


def test_a_caller_who_leaves_stops_the_work_and_is_a_499_in_the_log(
    url: str, slow: Slow, http: httpx.Client, log: io.StringIO
):
    with connect(url) as connection:
        connection.sendall(request_bytes(BODY))
        assert slow.entered.acquire(timeout=5)
        time.sleep(0.05)
    wait_until(lambda: slow.stopped == 1)
    wait_until(lambda: '"status": 499' in log.getvalue())
    line = next(line for line in map(json.loads, log.getvalue().splitlines()) if line.get("status") == 499)
    assert (line["route"], line["type"]) == ("/v1/solve", "client-closed")
    slow.released.set()
    assert http.post("/v1/solve", json={"problem": simplex()}).status_code == 200


def test_a_caller_who_leaves_the_queue_is_never_solved(url: str, slow: Slow, engine: HookedEngine, http: httpx.Client):
    solves = engine.solves
    with ThreadPoolExecutor() as pool:
        running = pool.submit(solve, url)
        assert slow.entered.acquire(timeout=5)
        with connect(url) as connection:
            connection.sendall(request_bytes(BODY))
            wait_until(lambda: metric(http, "argrad_queued_calls") == 1)
            time.sleep(0.05)
        wait_until(lambda: metric(http, "argrad_pending_calls") == 1)
        slow.released.set()
        assert running.result().status_code == 200
    assert solve(url).status_code == 200
    assert engine.solves == solves + 2


def test_a_crash_of_the_solver_thread_is_a_500_and_the_next_call_works(
    url: str, slow: Slow, engine: HookedEngine, http: httpx.Client
):
    def crash(_: SolverOptions) -> None:
        raise SystemExit("the thread ends")

    engine.on_solve = crash
    response = http.post("/v1/solve", json={"problem": simplex()})
    assert (response.status_code, response.json()["type"]) == (500, "internal")
    assert "the thread ends" not in response.text
    engine.on_solve = lambda _: None
    assert http.post("/v1/solve", json={"problem": simplex()}).status_code == 200
    solver = http.get("/health/ready").json()["checks"]["solver"]
    assert (solver["alive"], solver["restarts"]) == (1, 1)
    assert solver["last_crash"] == "SystemExit: the thread ends"
    assert metric(http, "argrad_solver_restarts_total") == 1


def test_a_body_that_comes_too_slowly_is_a_408(engine: HookedEngine):
    with serving(make_app(engine_=engine, body_timeout_s=0.2)) as url, connect(url) as connection:
        connection.sendall(request_bytes(b"{", length=100))
        reply = connection.makefile("rb").read()  # to the end: the connection is closed
        assert reply.startswith(b"HTTP/1.1 408 ")
        assert b'"type":"body-too-slow"' in reply
        assert solve(url).status_code == 200


def test_a_body_that_misses_the_deadline_is_a_504(url: str):
    with connect(url) as connection:
        request = request_bytes(b"{", length=100).replace(b"\r\n", b"\r\nargrad-timeout-ms: 100\r\n", 1)
        connection.sendall(request)
        assert connection.recv(65536).startswith(b"HTTP/1.1 504 ")


def test_a_body_that_breaks_off_is_a_499_and_nothing_is_left_behind(url: str, http: httpx.Client, log: io.StringIO):
    with connect(url) as connection:
        connection.sendall(request_bytes(b"{", length=100))
        wait_until(lambda: metric(http, "argrad_pending_calls") == 1)
    wait_until(lambda: '"status": 499' in log.getvalue())
    assert metric(http, "argrad_pending_calls") == 0
    assert metric(http, "argrad_pending_bytes") == 0


def test_a_head_that_never_ends_loses_its_connection(url: str, http: httpx.Client):
    with connect(url) as connection:
        connection.sendall(b"POST /v1/solve HTTP/1.1\r\nhost: localhost\r\n")
        assert connection.recv(1) == b""
    with connect(url) as silent:
        assert silent.recv(1) == b""
    assert http.get("/health/live").status_code == 200


@pytest.mark.parametrize(
    ("sent", "found"),
    [
        (b"hello\r\n\r\n", "Invalid method encountered"),
        (b"GET http://[ HTTP/1.1\r\nhost: localhost\r\n\r\n", "invalid url b'http://['"),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\nx-long: " + b"a" * 70_000, "more than 65536 bytes of headers"),
    ],
    ids=["no HTTP", "no target", "an endless head"],
)
def test_what_is_no_request_is_a_problem_too(url: str, http: httpx.Client, sent: bytes, found: str):
    with connect(url) as connection:
        connection.sendall(sent)
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"content-type: application/problem+json" in head
    problem = json.loads(body)
    assert (problem["type"], problem["found"]) == ("bad-request", found)
    assert http.get("/health/live").status_code == 200


def test_a_refused_body_is_drained_so_that_its_sender_reads_why(url: str, http: httpx.Client):
    body = b" " * (8 << 20)
    response = http.post("/v1/solve", content=body, headers={"content-type": JSON})
    assert (response.status_code, response.json()["type"]) == (413, "too-large")
    assert http.get("/health/live").status_code == 200


def test_an_unread_body_that_trickles_in_after_its_reply_does_not_keep_the_connection(engine: HookedEngine):
    with serving(make_app(io.StringIO(), engine), http=GuardedProtocol, timeout_keep_alive=1) as url:
        with connect(url) as connection:
            connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
            began = time.monotonic()
            connection.settimeout(0.1)
            with contextlib.suppress(ConnectionError):
                while time.monotonic() < began + 10:
                    connection.sendall(b"x")  # each byte stopped uvicorn's clock for good
                    with contextlib.suppress(TimeoutError):
                        assert connection.recv(1) == b""
                        break
        assert 0.5 < time.monotonic() - began < 5


def test_a_reply_to_who_has_left_is_no_error():
    loop = asyncio.new_event_loop()
    transport = OneWrite(_Closing(), loop)  # type: ignore[arg-type]
    transport.write(b"HTTP/1.1 200 OK\r\n\r\n")  # would be held back for its body
    transport.write(b"body")
    loop.close()


class _Closing:
    """uvloop's transport of a connection that was lost."""

    def is_closing(self) -> bool:
        return True

    def writelines(self, _: list[bytes]) -> None:
        raise RuntimeError("unable to perform operation; the handler is closed")

    write = writelines


def test_many_callers_at_once_get_their_own_answers(engine: HookedEngine):
    def ask(i: int) -> Any:
        body = {"problem": {"Q": [[1]], "q": [-i]}, "upstream": {"z": [i]}}
        with httpx.Client(trust_env=False, timeout=30) as client:
            reply = client.post(f"{url}/v1/solve", json=body).json()
        return reply["solution"]["z"] + reply["gradients"]["q"]

    with serving(make_app(engine_=engine)) as url, ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(1, 41))) == [pytest.approx([i, -i]) for i in range(1, 41)]
