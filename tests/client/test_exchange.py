"""Retries, deadlines and budgets, without a socket and without waiting."""

from __future__ import annotations

import threading

import httpx
import pytest

import argrad
from argrad.transport.exchange import Answer, Deadline, Pause, RetryBudget, RetryPolicy, Send, drive, exchange
from tests.client.support import FakeClock, problem_reply

OK = httpx.Response(200, content=b"fine")
BUSY = problem_reply(429, "overloaded", {"retry-after": "2"})
NOT_READY = problem_reply(503, "not-ready")
CUT = httpx.RemoteProtocolError("peer closed connection")


def run(
    *outcomes: httpx.Response | Exception,
    timeout_s: float | None = 60.0,
    policy: RetryPolicy | None = None,
    budget: RetryBudget | None = None,
    takes_s: float = 0.0,
) -> tuple[bytes, list[float], list[float | None]]:
    """Body of the reply, seconds slept before each retry, and seconds left at each attempt."""
    clock, left, script = FakeClock(), [], iter(outcomes)

    def request(remaining_s: float | None) -> httpx.Request:
        left.append(remaining_s)
        return httpx.Request("POST", "http://host/v1/solve")

    def perform(effect: Send | Pause) -> Answer | None:
        if isinstance(effect, Pause):
            clock.sleep(effect.seconds)
            return None
        clock.now += takes_s
        outcome = next(script)
        if isinstance(outcome, Exception):
            raise outcome
        return Answer(outcome.status_code, outcome.headers, outcome.content)

    steps = exchange(
        request,
        where="http://host",
        deadline=Deadline(timeout_s, clock),
        policy=policy or RetryPolicy(),
        budget=budget or RetryBudget(),
    )
    answer = drive(steps, perform, (httpx.HTTPError,))
    return bytes(answer.body), clock.slept, left


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(httpx.ConnectError("refused"), id="connect"),
        pytest.param(httpx.ConnectTimeout("slow"), id="connect-timeout"),
        pytest.param(httpx.ReadError("reset"), id="read"),
        pytest.param(httpx.WriteError("reset"), id="write"),
        pytest.param(CUT, id="cut-reply"),
        pytest.param(BUSY, id="429"),
        pytest.param(NOT_READY, id="503"),
        pytest.param(httpx.Response(502, content=b"bad gateway"), id="502-of-a-proxy"),
    ],
)
def test_tries_again(failure: httpx.Response | Exception) -> None:
    body, slept, _ = run(failure, failure, OK)
    assert body == b"fine"
    assert len(slept) == 2


@pytest.mark.parametrize(
    ("failure", "wanted"),
    [
        pytest.param(problem_reply(400, "bad-request"), argrad.ProtocolError, id="400"),
        pytest.param(problem_reply(401, "unauthorized"), argrad.AuthenticationError, id="401"),
        pytest.param(problem_reply(409, "state-gone"), argrad.StateGoneError, id="409"),
        pytest.param(problem_reply(413, "too-large"), argrad.PayloadTooLargeError, id="413"),
        pytest.param(problem_reply(422, "invalid", field="a", found="b", wanted="c"), argrad.ProblemError, id="422"),
        pytest.param(problem_reply(500, "internal"), argrad.InternalServiceError, id="500"),
        pytest.param(problem_reply(504, "deadline"), argrad.DeadlineExceededError, id="504"),
        pytest.param(httpx.ReadTimeout("slow"), argrad.DeadlineExceededError, id="read-timeout"),
        pytest.param(httpx.UnsupportedProtocol("x"), argrad.ConnectionFailedError, id="unsupported-protocol"),
    ],
)
def test_never_tries_again(failure: httpx.Response | Exception, wanted: type[Exception]) -> None:
    with pytest.raises(wanted):
        run(failure, OK)


def test_delays_double_and_are_jittered() -> None:
    _, slept, _ = run(*[CUT] * 5, OK, policy=RetryPolicy(retries=5, first_delay_s=0.1, max_delay_s=0.5))
    bounds = [0.1, 0.2, 0.4, 0.5, 0.5]
    assert all(bound / 2 <= seconds <= bound for seconds, bound in zip(slept, bounds, strict=True))
    assert len(set(slept)) == 5


def test_retry_after_is_honoured() -> None:
    _, slept, _ = run(BUSY, OK, policy=RetryPolicy(max_delay_s=0.5))
    assert 2.0 <= slept[0] <= 2.1


def test_gives_up_after_the_last_retry_with_the_last_failure() -> None:
    with pytest.raises(argrad.OverloadedError) as caught:
        run(CUT, CUT, BUSY, policy=RetryPolicy(retries=2))
    assert caught.value.retry_after_s == 2.0
    with pytest.raises(argrad.ConnectionFailedError, match="RemoteProtocolError: peer closed") as cut:
        run(CUT, policy=RetryPolicy(retries=0))
    assert cut.value.__cause__ is CUT


def test_each_attempt_gets_what_is_left_of_the_deadline() -> None:
    _, slept, left = run(CUT, CUT, OK, timeout_s=10.0, takes_s=1.0)
    assert left == pytest.approx([10.0, 9.0 - slept[0], 8.0 - slept[0] - slept[1]])
    assert run(OK, timeout_s=None)[2] == [None]


def test_does_not_wait_beyond_the_deadline() -> None:
    with pytest.raises(argrad.OverloadedError):
        run(BUSY, OK, timeout_s=1.9)
    with pytest.raises(argrad.ConnectionFailedError):
        run(CUT, OK, timeout_s=1.0, takes_s=1.5)


def test_a_deadline_that_passed_sends_nothing() -> None:
    clock = FakeClock()
    deadline = Deadline(1.0, clock)
    clock.now += 2.0
    with pytest.raises(argrad.DeadlineExceededError, match=r"no result within 1 s"):
        deadline.check()


def test_the_budget_bounds_the_retries_of_all_calls() -> None:
    budget = RetryBudget(capacity=3.0)
    with pytest.raises(argrad.ConnectionFailedError):
        run(*[CUT] * 9, policy=RetryPolicy(retries=8), budget=budget)
    with pytest.raises(argrad.ConnectionFailedError):
        run(CUT, OK, budget=budget)
    for _ in range(11):
        run(OK, budget=budget)
    assert run(CUT, OK, budget=budget)[0] == b"fine"


def test_the_budget_is_exact_under_threads() -> None:
    budget, taken = RetryBudget(capacity=100.0), []

    def take() -> None:
        taken.extend(budget.take() for _ in range(100))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken) == 100
