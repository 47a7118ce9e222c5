"""The HTTP backend: what goes over the wire, and what happens when that goes wrong."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from pydantic import SecretStr

import argrad
from argrad.transport.bodies import Download, Upload, decoded
from argrad.transport.calls import HttpOptions
from argrad.transport.exchange import Answer, Deadline
from argrad.transport.http import HttpBackend
from argrad.transport.retries import RetryPolicy
from argrad.wire import SAFETENSORS
from tests.client.support import D, FakeClock, FakeService, assert_close, listening, problem_reply, simplex

URL = "http://127.0.0.1:9"
QP = argrad.QP(**simplex())


def make_client(service: FakeService, clock: FakeClock | None = None, **more: Any) -> argrad.Client:
    clock = clock or FakeClock()
    options = HttpOptions(urls=[URL], clock=clock, policy=RetryPolicy(retries=3))
    return argrad.Client(HttpBackend(options, transport=service.transport, sleep=clock.sleep), **more)


def cut_off(response: httpx.Response) -> httpx.Response:
    """The same reply without its second half, though its Content-Length promises it."""
    return httpx.Response(200, headers=response.headers, content=response.content[: len(response.content) // 2])


def test_headers() -> None:
    service = FakeService()
    client = argrad.Client(URL, api_key="s3cret", timeout_s=12.0, transport=service.transport)
    result = client.solve(QP, request_id="mine-1")
    client.vjp(result, {"z": torch.tensor([1.0, 0.0], dtype=D)}, timeout_s=1.5)
    client.solve(QP)
    solve, vjp, other = (received.headers for received in service.received)
    assert solve["authorization"] == "Bearer s3cret"
    assert solve["x-request-id"] == "mine-1"
    assert solve["content-type"] == solve["accept"] == SAFETENSORS
    assert solve["host"] == "127.0.0.1:9"
    assert solve["user-agent"].startswith(f"argrad/{argrad.__version__} python/")
    assert 11_900 <= int(solve["argrad-timeout-ms"]) <= 12_000
    assert 1_400 <= int(vjp["argrad-timeout-ms"]) <= 1_500
    assert solve["argrad-affinity"] == vjp["argrad-affinity"] != other["argrad-affinity"]
    assert len(vjp["x-request-id"]) == 16
    assert vjp["x-request-id"] != other["x-request-id"]


def test_without_a_deadline_none_is_sent() -> None:
    service = FakeService()
    argrad.Client(URL, timeout_s=None, transport=service.transport).solve(QP)
    assert "argrad-timeout-ms" not in service.received[0].headers
    assert "authorization" not in service.received[0].headers


def test_the_deadline_is_refreshed_at_each_attempt() -> None:
    service, clock = FakeService(problem_reply(429, "overloaded", {"retry-after": "4"})), FakeClock()
    make_client(service, clock, timeout_s=10.0).solve(QP)
    first, second = (int(received.headers["argrad-timeout-ms"]) for received in service.received)
    assert first == 10_000
    assert second == pytest.approx(10_000 - 1e3 * clock.slept[0], abs=1)
    ids = {received.headers["x-request-id"] for received in service.received}
    assert len(ids) == 1


@pytest.mark.parametrize("value", ["", "two words", "line\nbreak", "x" * 129])
def test_identifiers_that_a_header_cannot_carry_are_refused(value: str) -> None:
    service = FakeService()
    client = argrad.Client(URL, transport=service.transport)
    with pytest.raises(argrad.ProblemError, match="request_id: found"):
        client.solve(QP, request_id=value)
    assert not service.received


@pytest.mark.parametrize("key", ["", "line\nbreak", "schlüssel"])
def test_api_keys_that_a_header_cannot_carry_are_refused(key: str) -> None:
    with pytest.raises(argrad.ProblemError, match="api_key: found nothing, or what a header cannot carry") as caught:
        argrad.Client(URL, api_key=key)
    assert not key or key not in str(caught.value)


def test_retries_are_counted_from_zero() -> None:
    with pytest.raises(argrad.ProblemError, match="retries: found -1, wanted 0 or more"):
        argrad.Client(URL, retries=-1)


def test_released_states_ride_on_the_next_call() -> None:
    service = FakeService()
    client = argrad.Client(URL, transport=service.transport)
    result = client.solve(QP)
    client.release(result)
    assert len(service.received) == 1
    client.solve(QP)
    client.solve(QP)
    assert service.received[1].headers["argrad-release"] == result.state
    assert "argrad-release" not in service.received[2].headers


def test_one_call_releases_a_bounded_number_of_states() -> None:
    service = FakeService()
    client = argrad.Client(URL, transport=service.transport)
    for i in range(40):
        client.let_go(f"token{i}")
    for _ in range(3):
        client.solve(QP)
    sent = [received.headers.get("argrad-release", "").split(",") for received in service.received]
    assert [len(tokens) for tokens in sent[:2]] == [32, 8]
    assert sent[0] + sent[1] == [f"token{i}" for i in range(40)]
    assert sent[2] == [""]


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(httpx.ConnectError("refused"), id="connection"),
        pytest.param(cut_off, id="cut-reply"),
        pytest.param(problem_reply(429, "overloaded"), id="429"),
        pytest.param(problem_reply(503, "not-ready"), id="503"),
    ],
)
def test_faults_that_pass_are_tried_again(fault: Any) -> None:
    service = FakeService(fault)
    result = make_client(service).solve(QP)
    assert result.solution["z"].tolist() == pytest.approx([0.25, 0.75])
    assert len(service.received) == 2


def test_errors_of_the_service_are_raised_once() -> None:
    service = FakeService(problem_reply(500, "internal"))
    with pytest.raises(argrad.InternalServiceError, match=r"detail of internal \(HTTP 500, request abc\)") as caught:
        make_client(service).solve(QP)
    assert caught.value.request_id == "abc"
    assert len(service.received) == 1


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        pytest.param(httpx.Response(200, content=b"{}"), "Content-Type: found no such header", id="no-type"),
        pytest.param(
            httpx.Response(200, content=b"\x05\0\0\0\0\0\0\0hello", headers={"content-type": SAFETENSORS}),
            r"the reply of POST http://\S+/v1/solve cannot be read: header",
            id="garbage",
        ),
        pytest.param(
            httpx.Response(200, content=b'{"protocol": 2}', headers={"content-type": "application/json"}),
            r"the reply of POST http://\S+/v1/solve cannot be read: protocol",
            id="other-protocol",
        ),
    ],
)
def test_replies_that_cannot_be_read(reply: httpx.Response, message: str) -> None:
    with pytest.raises(argrad.ProtocolError, match=message):
        make_client(FakeService(reply)).solve(QP)


def test_a_status_that_this_client_does_not_know() -> None:
    body = b'{"status": "quantum", "report": {"solver": "x"}, "solution": {"z": [1, 2]}}'
    reply = httpx.Response(200, content=body, headers={"content-type": "application/json"})
    with pytest.raises(argrad.ProtocolError, match="does not know: 'quantum' is not a valid Status"):
        make_client(FakeService(reply)).solve(QP)


def test_nobody_answers() -> None:
    client = argrad.Client("http://127.0.0.1:1", retries=0)
    with pytest.raises(argrad.ConnectionFailedError, match=r"http://127\.0\.0\.1:1: ConnectError"):
        client.solve(QP)


class TestBodies:
    def test_large_bodies_go_in_pieces_and_can_be_sent_again(self) -> None:
        buffers = [b"head", memoryview(bytes(range(256)) * 4000)]
        upload = Upload(buffers, 4 + 256 * 4000, Deadline(None, FakeClock()))
        pieces = list(upload)
        assert max(len(piece) for piece in pieces) == 256 * 1024
        assert b"".join(pieces) == b"".join(upload) == b"".join(buffers)

    def test_small_bodies_go_at_once(self) -> None:
        assert list(Upload([b"ab", memoryview(b"cd")], 4, Deadline(None, FakeClock()))) == [b"abcd"]

    def test_an_upload_ends_at_the_deadline(self) -> None:
        clock = FakeClock()
        upload = iter(Upload([bytes(1 << 20)], 1 << 20, Deadline(1.0, clock)))
        next(upload)
        clock.now += 2.0
        with pytest.raises(argrad.DeadlineExceededError, match="no result within 1 s"):
            next(upload)

    def test_a_reply_that_trickles_in_ends_at_the_deadline(self) -> None:
        clock = FakeClock()
        download = Download({"content-length": "4"}, Deadline(1.0, clock))
        download.add(b"a")
        clock.now += 2.0
        with pytest.raises(argrad.DeadlineExceededError):
            download.add(b"b")

    @pytest.mark.parametrize("headers", [{"content-length": "6"}, {}], ids=["length", "chunked"])
    def test_a_reply_is_gathered(self, headers: dict[str, str]) -> None:
        download = Download(headers, Deadline(None, FakeClock()))
        for piece in (b"ab", b"", b"cdef"):
            download.add(piece)
        assert download.finish() == bytearray(b"abcdef")

    def test_a_reply_of_another_length_is_an_error(self) -> None:
        download = Download({"content-length": "3"}, Deadline(None, FakeClock()))
        download.add(b"ab")
        with pytest.raises(httpx.RemoteProtocolError, match="cut off after 2 of 3 bytes"):
            download.finish()
        with pytest.raises(httpx.RemoteProtocolError, match="longer than its 3 bytes"):
            download.add(b"cd")

    @pytest.mark.parametrize(("encoding", "accepted"), [("gzip", "identity"), ("gzip", "zstd"), ("zstd", "identity")])
    def test_a_reply_with_another_encoding_is_an_error(self, encoding: str, accepted: str) -> None:
        with pytest.raises(httpx.RemoteProtocolError, match=f"encoded as {encoding}"):
            decoded(Answer(200, {"content-encoding": encoding}, b"abc"), accepted)


class TestSockets:
    @pytest.fixture(params=["tcp", "unix"])
    def url(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
        with listening(FakeService(), tmp_path / "socket" if request.param == "unix" else None) as url:
            yield url

    def test_a_real_socket(self, url: str) -> None:
        with argrad.Client(url) as client:
            for _ in range(2):
                assert client.solve(QP).solution["z"].tolist() == pytest.approx([0.25, 0.75])

    def test_megabytes(self, url: str) -> None:
        n = 400
        q = torch.linspace(-1, 1, n, dtype=D)
        with argrad.Client(url) as client:
            result = client.solve(argrad.QP(Q=torch.eye(n, dtype=D), q=q), upstream={"z": q}, wrt=["Q"])
        assert_close(result.solution["z"], -q)
        assert result.gradients is not None
        assert_close(result.gradients["Q"], torch.outer(q, q))


def test_threads_share_a_client() -> None:
    wrong: list[Any] = []

    def work(offset: float) -> None:
        for i in range(10):
            q = torch.tensor([offset, float(i)], dtype=D)
            z = client.solve(argrad.QP(Q=torch.eye(2, dtype=D), q=q)).solution["z"]
            if not torch.allclose(z, -q):
                wrong.append((q, z))

    with listening(FakeService()) as url, argrad.Client(url) as client:
        threads = [threading.Thread(target=work, args=(float(k),)) for k in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def _solve_in_child(client: argrad.Client, queue: Any) -> None:
    torch.set_num_threads(1)
    try:
        queue.put(client.solve(argrad.QP(Q=torch.eye(2, dtype=D), q=torch.ones(2, dtype=D))).solution["z"].tolist())
    except argrad.ArgradError as error:
        queue.put(f"{type(error).__name__}: {error}")


def in_child(client: argrad.Client, method: str) -> Any:
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_solve_in_child, args=(client, queue))
    child.start()
    result = queue.get(timeout=60)
    child.join()
    assert child.exitcode == 0
    return result


def test_a_forked_child_has_connections_of_its_own(service_url: str) -> None:
    with argrad.Client(service_url) as client:
        result = client.solve(QP)
        client.let_go("the parent's")
        assert in_child(client, "fork") == [-1.0, -1.0]
        # The parent's connection and state are as they were.
        gradient = client.vjp(result, {"z": torch.tensor([1.0, 0.0], dtype=D)}, wrt=["q"]).gradients
    assert gradient is not None
    assert gradient["q"].tolist() == pytest.approx([-0.25, 0.25])


@pytest.mark.slow
def test_a_spawned_child_gets_the_client_by_pickle(service_url: str) -> None:
    with argrad.Client(service_url) as client:
        assert in_child(client, "spawn") == [-1.0, -1.0]


def test_pickles_with_its_key_and_never_shows_it() -> None:
    client = argrad.Client(URL, api_key="s3cret", timeout_s=3.0, retries=7)
    again = pickle.loads(pickle.dumps(client))
    assert again._settings == client._settings
    assert again._settings[1] == SecretStr("s3cret")
    backend = client._backend
    for thing in (client, backend, vars(client), vars(backend), getattr(backend, "_options")):  # noqa: B009
        assert "s3cret" not in repr(thing)
    other = pickle.loads(pickle.dumps(backend))
    assert other._options == backend._options
