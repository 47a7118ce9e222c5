"""Several addresses: which one a call goes to, which are passed over, and what follows the affinity key."""

from __future__ import annotations

import collections
import pickle
from typing import Any

import httpx
import pytest
import torch

import argrad
from argrad.transport.address import parse_address
from argrad.transport.calls import HttpOptions
from argrad.transport.http import HttpBackend
from argrad.transport.retries import RetryPolicy
from argrad.transport.targets import Targets
from tests.client.support import D, FakeClock, FakeService, problem_reply, simplex

URLS = ("http://a:1", "http://b:1", "http://c:1")
QP = argrad.QP(**simplex())
UP = {"z": torch.tensor([1.0, 0.0], dtype=D)}


def make_targets(clock: FakeClock, *urls: str) -> Targets:
    return Targets([parse_address(url) for url in urls or URLS], clock)


class TestTargets:
    def test_keys_spread_and_each_keeps_its_place(self) -> None:
        targets = make_targets(FakeClock())
        first = {f"key{i}": targets.ranked(f"key{i}")[0].index for i in range(3000)}
        shares = collections.Counter(first.values())
        assert all(900 < shares[i] < 1100 for i in range(3))
        assert all(targets.ranked(key)[0].index == index for key, index in first.items())

    def test_an_address_that_goes_moves_its_own_keys_only(self) -> None:
        three, two = make_targets(FakeClock()), make_targets(FakeClock(), *URLS[:2])
        for i in range(500):
            ranked = [target.where for target in three.ranked(f"key{i}")]
            ranked.remove("http://c:1")
            assert [target.where for target in two.ranked(f"key{i}")] == ranked

    def test_one_that_failed_rests_and_one_call_looks_whether_it_is_back(self) -> None:
        clock = FakeClock()
        targets = make_targets(clock)
        ranked = targets.ranked("key")
        targets.failed(ranked[0])
        assert targets.choose(ranked, []) is ranked[1]
        clock.now += 0.25
        assert targets.choose(ranked, []) is ranked[0]
        assert targets.choose(ranked, []) is ranked[1]  # meanwhile the others go elsewhere
        targets.answered(ranked[0])
        assert targets.choose(ranked, []) is ranked[0]

    def test_rests_grow_to_a_second(self) -> None:
        clock = FakeClock()
        targets = make_targets(clock)
        target = targets.all[0]
        rests = []
        for _ in range(12):
            targets.failed(target)
            rests.append(target.rests_until - clock.now)
        assert rests[0] <= 0.2
        assert all(0.5 <= rest <= 1.0 for rest in rests[4:])
        targets.failed(target, is_silent=True)
        assert target.rests_until - clock.now > 5.0
        targets.failed(target, rest_s=4.0)
        assert target.rests_until - clock.now == pytest.approx(4.0)

    def test_where_all_rest_all_are_tried(self) -> None:
        targets = make_targets(FakeClock())
        ranked = targets.ranked("key")
        for target in ranked:
            targets.failed(target)
        tried: list[Any] = []
        while (target := targets.choose(ranked, tried)) is not None:
            tried.append(target)
        assert tried == list(ranked)


class Replicas:
    """Three services behind one transport; those in `gone` refuse, those in `faults` answer something else."""

    def __init__(self) -> None:
        self.services = {host: FakeService() for host in "abc"}
        self.gone: set[str] = set()
        self.faults: dict[str, httpx.Response] = {}
        self.asked: list[str] = []
        self.headers: list[httpx.Headers] = []

    def handle(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        self.asked.append(host)
        self.headers.append(request.headers)
        if host in self.gone:
            raise httpx.ConnectError("refused")
        if host in self.faults:
            return self.faults[host]
        return self.services[host].handle(request)

    def client(self, clock: FakeClock | None = None, **more: Any) -> argrad.Client:
        clock = clock or FakeClock()
        options = HttpOptions(urls=URLS, clock=clock, policy=RetryPolicy(**more))
        return argrad.Client(HttpBackend(options, transport=httpx.MockTransport(self.handle), sleep=clock.sleep))

    def async_client(self) -> argrad.AsyncClient:
        return argrad.AsyncClient(URLS, transport=httpx.MockTransport(self.handle))


def test_what_belongs_to_a_solve_goes_where_the_solve_went() -> None:
    replicas = Replicas()
    client = replicas.client()
    for _ in range(40):
        result = client.solve(QP)
        client.vjp(result, UP)
        client.jvp(result, {"b": torch.ones(1, dtype=D)})
        assert len(set(replicas.asked[-3:])) == 1
        assert len({headers["argrad-affinity"] for headers in replicas.headers[-3:]}) == 1
        assert replicas.headers[-1]["host"] == f"{replicas.asked[-1]}:1"
    assert set(replicas.asked) == set("abc")
    assert len(replicas.asked) == 120


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(None, id="connection"),
        pytest.param(problem_reply(503, "not-ready"), id="503"),
        pytest.param(problem_reply(429, "overloaded", {"retry-after": "9"}), id="429"),
        pytest.param(httpx.Response(502, content=b"bad gateway"), id="502-of-a-proxy"),
    ],
)
def test_the_next_one_is_asked_at_once(fault: httpx.Response | None) -> None:
    replicas, clock = Replicas(), FakeClock()
    client = replicas.client(clock, retries=0)
    for host in "ab":
        if fault is None:
            replicas.gone.add(host)
        else:
            replicas.faults[host] = fault
    for _ in range(40):
        assert client.solve(QP).solution["z"].tolist() == pytest.approx([0.25, 0.75])
    assert clock.slept == []
    assert set(replicas.asked) == set("abc")
    if fault is None or fault.status_code != 429:
        # Whoever failed is left alone meanwhile; whoever is busy keeps its keys.
        assert len(replicas.asked) <= 40 + 2


@pytest.mark.parametrize(("status", "slug", "error"), [(504, "deadline", argrad.DeadlineExceededError)])
def test_other_errors_are_the_same_everywhere(status: int, slug: str, error: type[Exception]) -> None:
    replicas = Replicas()
    replicas.faults = dict.fromkeys("abc", problem_reply(status, slug))
    with pytest.raises(error):
        replicas.client().solve(QP)
    assert len(replicas.asked) == 1


def test_a_state_whose_replica_is_gone_is_formed_elsewhere() -> None:
    replicas = Replicas()
    client = replicas.client()
    result = client.solve(QP)
    wanted = client.vjp(result, UP).gradients
    replicas.gone = {replicas.asked[-1]}
    found = client.vjp(result, UP).gradients
    assert found is not None
    assert wanted is not None
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-12) for name in wanted)


def test_keys_return_to_a_replica_that_is_back() -> None:
    replicas, clock = Replicas(), FakeClock()
    client = replicas.client(clock)
    replicas.gone = {"a"}
    for _ in range(40):
        client.solve(QP)
    assert replicas.asked.count("a") == 1
    replicas.gone.clear()
    replicas.asked.clear()
    clock.now += 1.0
    for _ in range(40):
        client.solve(QP)
    assert 2 < replicas.asked.count("a") < 30


def test_all_are_gone_and_come_back() -> None:
    replicas, clock = Replicas(), FakeClock()
    client = replicas.client(clock)
    client.solve(QP)
    replicas.gone = set("abc")
    back_at = clock.now + 20.0
    sleep = clock.sleep

    def sleep_until_one_is_back(seconds: float) -> None:
        sleep(seconds)
        if clock.now >= back_at:
            replicas.gone = {"a", "b"}

    client._backend._sleep = sleep_until_one_is_back  # type: ignore[attr-defined]
    assert client.solve(QP).solution["z"].tolist() == pytest.approx([0.25, 0.75])
    assert 0 <= clock.now - back_at < 1.5
    assert len(replicas.asked) < 3 * 2.5 * 20 + 40


def test_the_soonest_moment_that_any_named_is_waited_for() -> None:
    replicas, clock = Replicas(), FakeClock()
    for host, wait in {"a": "7", "b": "3", "c": "5"}.items():
        replicas.faults[host] = problem_reply(429, "overloaded", {"retry-after": wait})
    client = replicas.client(clock, retries=1)
    with pytest.raises(argrad.OverloadedError):
        client.solve(QP)
    assert 3.0 <= clock.slept[0] < 3.1
    assert sorted(replicas.asked) == sorted("abc" * 2)


def test_a_state_is_released_where_it_is_kept() -> None:
    replicas = Replicas()
    client = replicas.client()
    results = [client.solve(QP) for _ in range(12)]
    owners = dict(zip((result.state for result in results), replicas.asked, strict=True))
    for result in results:
        client.release(result)
    client.let_go("a token of somebody else")
    for _ in range(30):
        client.solve(QP)
    released: dict[str, str] = {}
    for host, headers in zip(replicas.asked, replicas.headers, strict=True):
        released |= dict.fromkeys(filter(None, headers.get("argrad-release", "").split(",")), host)
    assert released == owners


@pytest.mark.anyio
async def test_async() -> None:
    replicas = Replicas()
    async with replicas.async_client() as client:
        for _ in range(6):
            result = await client.solve(QP)
            await client.vjp(result, UP)
            assert len(set(replicas.asked[-2:])) == 1
        replicas.gone = {"a", "b"}
        for _ in range(6):
            assert (await client.solve(QP)).solution["z"].tolist() == pytest.approx([0.25, 0.75])
            assert replicas.asked[-1] == "c"


class TestAddresses:
    @pytest.mark.parametrize("target", [["http://a", "http://b"], ("http://a", "http://b"), "http://a, http://b"])
    def test_spellings(self, target: Any) -> None:
        client = argrad.Client(target)
        assert client._backend._calls.options.urls == ("http://a", "http://b")  # type: ignore[attr-defined]
        again = pickle.loads(pickle.dumps(client))
        assert again._backend._calls.options.urls == ("http://a", "http://b")

    @pytest.mark.parametrize(
        ("target", "words"),
        [
            ([], r"url: found \[\], wanted an address"),
            ("http://a,", "url: found 'http://a,', wanted an address"),
            (["http://a", "http://a/"], "wanted each address once"),
            (["http://a", "local"], "wanted 'local' alone"),
            (["http://a", 3], "url: found int, wanted an address"),
            (["http://a", "ftp://b"], "url: found 'ftp://b', wanted http://host:port"),
        ],
    )
    def test_what_cannot_be(self, target: Any, words: str) -> None:
        with pytest.raises(argrad.ProblemError, match=words):
            argrad.Client(target)
        with pytest.raises(argrad.ProblemError, match=words):
            argrad.AsyncClient(target)

    def test_configured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ARGRAD_URL", "http://a,http://b")
        client = argrad.defaults.default_client()
        assert client._backend._calls.options.urls == ("http://a", "http://b")  # type: ignore[attr-defined]
