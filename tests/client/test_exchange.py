"""Retries, deadlines and budgets, without a socket and without waiting."""

from __future__ import annotations

import heapq
import re
import ssl
import threading
from typing import Any

import httpx
import pytest

import argrad
from argrad.transport.address import parse_address
from argrad.transport.exchange import Answer, Deadline, Pause, Send, drive, exchange
from argrad.transport.retries import RetryBudget, RetryPolicy
from argrad.transport.targets import Target, Targets
from tests.client.support import FakeClock, problem_reply

OK = httpx.Response(200, content=b"fine")
BUSY = problem_reply(429, "overloaded", {"retry-after": "2"})
NOT_READY = problem_reply(503, "not-ready")
CUT = httpx.RemoteProtocolError("peer closed connection")


def no_tls_here() -> ssl.SSLError:
    """What OpenSSL says of an answer in plain HTTP."""
    inward, outward = ssl.MemoryBIO(), ssl.MemoryBIO()
    inward.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(ssl.SSLError) as caught:
        ssl.create_default_context().wrap_bio(inward, outward, server_hostname="host").do_handshake()
    return caught.value


def run(
    *outcomes: httpx.Response | Exception | None,
    timeout_s: float | None = 60.0,
    policy: RetryPolicy | None = None,
    budget: RetryBudget | None = None,
    clock: FakeClock | None = None,
    takes_s: float = 0.0,
    targets: Targets | None = None,
) -> tuple[bytes, list[float], list[float | None]]:
    """Body of the reply, seconds slept before each retry, and seconds left at each attempt; the last outcome stays."""
    clock = clock or FakeClock()
    left: list[float | None] = []
    script, began = list(outcomes), len(clock.slept)

    def request(target: Target, remaining_s: float | None) -> Any:
        left.append(remaining_s)
        return httpx.Request("POST", "http://host/v1/solve")

    def perform(effect: Send | Pause) -> Answer | None:
        if isinstance(effect, Pause):
            clock.sleep(effect.seconds)
            return None
        clock.now += takes_s
        outcome = script.pop(0) if len(script) > 1 else script[0]
        if isinstance(outcome, Exception):
            raise outcome
        assert outcome is not None
        return Answer(outcome.status_code, outcome.headers, outcome.content)

    steps = exchange(
        request,
        affinity=None,
        targets=targets or Targets([parse_address("http://host")], clock),
        deadline=Deadline(timeout_s, clock),
        policy=policy or RetryPolicy(),
        budget=budget or RetryBudget(clock),
    )
    answer = drive(steps, perform, (httpx.HTTPError,))
    return bytes(answer.body), clock.slept[began:], left


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


def tls_failure(cause: Exception) -> httpx.ConnectError:
    failure = httpx.ConnectError(str(cause))
    failure.__cause__ = cause
    return failure


@pytest.mark.parametrize(
    "cause",
    [
        pytest.param(ssl.SSLCertVerificationError(1, "certificate verify failed: self-signed"), id="refused"),
        pytest.param(no_tls_here(), id="no-tls"),
    ],
)
def test_tls_that_never_was_there_is_not_waited_for(cause: Exception) -> None:
    clock = FakeClock()
    with pytest.raises(argrad.ConnectionFailedError, match=re.escape(f"http://host: ConnectError: {cause}")):
        run(tls_failure(cause), OK, clock=clock)
    assert clock.slept == []


def test_other_failures_of_tls_are_waited_for() -> None:
    body, slept, _ = run(tls_failure(ssl.SSLEOFError(8, "EOF occurred in violation of protocol")), OK)
    assert (body, len(slept)) == (b"fine", 1)


def test_a_certificate_that_was_good_once_is_waited_for() -> None:
    answered = Targets([parse_address("http://host")], FakeClock())
    answered.answered(answered.all[0])
    refused = tls_failure(ssl.SSLCertVerificationError(1, "certificate verify failed: certificate has expired"))
    body, slept, _ = run(refused, OK, targets=answered)
    assert (body, len(slept)) == (b"fine", 1)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        pytest.param(
            problem_reply(404, "not-found"), "POST /v1/solve at http://host: detail of not-found (HTTP 404", id="404"
        ),
        pytest.param(
            httpx.Response(404, content=b"<html>"),
            "POST /v1/solve at http://host: the reply is not a problem document: '<html>' (HTTP 404",
            id="another-server",
        ),
        pytest.param(
            httpx.Response(308, headers={"location": "https://host/v1/solve"}),
            "POST /v1/solve at http://host: redirected to 'https://host/v1/solve', which is not followed: "
            "give the address that is meant (HTTP 308",
            id="redirect",
        ),
    ],
)
def test_what_no_service_of_ours_answers_names_what_was_called(reply: httpx.Response, message: str) -> None:
    with pytest.raises(argrad.ProtocolError, match=re.escape(message)):
        run(reply)


def test_delays_double_and_are_drawn_from_nothing_to_their_bound() -> None:
    draws = [run(*[CUT] * 6, OK, policy=RetryPolicy(first_delay_s=0.1, max_delay_s=0.5))[1] for _ in range(200)]
    bounds = [0.1, 0.2, 0.4, 0.5, 0.5, 0.5]
    for bound, drawn in zip(bounds, zip(*draws, strict=True), strict=True):
        assert 0.0 <= min(drawn) < 0.1 * bound
        assert 0.9 * bound < max(drawn) <= bound


def test_retry_after_is_honoured() -> None:
    _, slept, _ = run(BUSY, OK, policy=RetryPolicy(max_delay_s=0.5))
    assert 2.0 <= slept[0] <= 2.1


def test_who_is_told_to_come_back_in_a_second_comes_within_half_a_second_of_it() -> None:
    soon = problem_reply(503, "not-ready", {"retry-after": "1"})
    draws = [run(*[soon] * 8, OK)[1] for _ in range(60)]
    assert all(1.0 <= slept <= 1.5 for each in draws for slept in each)
    assert max(each[-1] for each in draws) > 1.4


def test_gives_up_after_the_last_retry_with_the_last_failure() -> None:
    with pytest.raises(argrad.OverloadedError) as caught:
        run(CUT, CUT, BUSY, policy=RetryPolicy(retries=2))
    assert caught.value.retry_after_s == 2.0
    assert "3 rounds of attempts" in caught.value.__notes__[0]
    with pytest.raises(argrad.ConnectionFailedError, match="RemoteProtocolError: peer closed") as cut:
        run(CUT, policy=RetryPolicy(retries=0))
    assert cut.value.__cause__ is CUT


def test_a_lone_caller_waits_for_a_service_that_is_away_until_its_deadline() -> None:
    clock = FakeClock()
    budget = RetryBudget(clock)
    known = [NOT_READY]  # it has answered once: the address is right
    with pytest.raises(argrad.ConnectionFailedError) as caught:
        run(*known, CUT, timeout_s=120.0, clock=clock, budget=budget)
    assert 118.0 < clock.now - 1000.0 <= 120.0
    assert "s after the first" in caught.value.__notes__[-1]
    assert max(clock.slept) <= 0.8
    # Not a storm either: three attempts a second at most.
    assert len(clock.slept) < 3 * 120 * 3


def test_where_nobody_ever_answered_the_address_may_be_wrong() -> None:
    clock = FakeClock()
    with pytest.raises(argrad.ConnectionFailedError, match="http://host: ConnectError: refused"):
        run(httpx.ConnectError("refused"), timeout_s=300.0, clock=clock)
    assert 20.0 <= clock.now - 1000.0 < 22.0


def test_the_log_says_that_a_call_waits(caplog: pytest.LogCaptureFixture) -> None:
    run(NOT_READY, *[CUT] * 60, OK, timeout_s=300.0)
    said = [record.getMessage() for record in caplog.records if record.name == "argrad"]
    assert len(said) == 1
    assert re.fullmatch(r"a call waits for the service, for 29\d s more: http://host: .*peer closed.*", said[0])


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


class TestBudget:
    def test_it_is_a_reserve_and_what_each_second_adds(self) -> None:
        clock = FakeClock()
        budget = RetryBudget(clock, reserve=3.0, per_s=2.0)
        assert [budget.take() for _ in range(4)] == [True, True, True, False]
        clock.now += 0.5
        assert [budget.take() for _ in range(2)] == [True, False]
        clock.now += 1000.0
        assert [budget.take() for _ in range(4)] == [True, True, True, False]

    def test_ten_calls_that_are_answered_pay_for_a_retry(self) -> None:
        budget = RetryBudget(FakeClock(), reserve=1.0)
        assert budget.take()
        for _ in range(9):
            budget.answered(is_paid=False)
        assert not budget.take()
        budget.answered(is_paid=False)
        budget.answered(is_paid=False)
        assert budget.take()

    def test_a_retry_that_is_answered_lets_two_go(self) -> None:
        budget = RetryBudget(FakeClock(), reserve=1.0)
        waiting, rounds = 1000, 0
        going = int(budget.take())
        while waiting:
            rounds += 1
            waiting -= going
            for _ in range(going):
                budget.answered(is_paid=True)
            going = sum(budget.take() for _ in range(waiting))
        assert rounds < 16

    def test_calls_that_failed_together_do_not_come_back_together(self) -> None:
        """A hundred callers, thirty seconds without a service: what reaches its address is a few attempts a second."""
        clock = FakeClock()
        budget = RetryBudget(clock)
        attempts: list[float] = []

        def request(target: Target, remaining_s: float | None) -> Any:
            attempts.append(clock.now)
            return httpx.Request("POST", "http://host")

        targets = Targets([parse_address("http://host")], clock)
        targets.answered(targets.all[0])
        calls = [
            exchange(
                request,
                affinity=None,
                targets=targets,
                deadline=Deadline(30.0, clock),
                policy=RetryPolicy(),
                budget=budget,
            )
            for _ in range(100)
        ]
        due = [(clock.now, i, next(call)) for i, call in enumerate(calls)]
        heapq.heapify(due)
        failed = 0
        while due:
            clock.now, i, effect = heapq.heappop(due)
            try:
                if isinstance(effect, Send):
                    effect = calls[i].throw(httpx.ConnectError("refused"))
                else:
                    effect = calls[i].send(None)
            except argrad.ConnectionFailedError:
                failed += 1
                continue
            seconds = effect.seconds if isinstance(effect, Pause) else 0.0
            heapq.heappush(due, (clock.now + seconds, i, effect))
        assert failed == 100
        assert len(attempts) <= 100 + 10 + 2.5 * 30 + 1
        assert len([at for at in attempts if at > 1010.0]) <= 2.5 * 20 + 1


def test_a_service_that_names_the_moment_to_come_back_is_not_a_matter_of_the_budget() -> None:
    budget = RetryBudget(FakeClock(), reserve=0.0, per_s=0.0)
    assert run(BUSY, BUSY, BUSY, OK, budget=budget)[0] == b"fine"
    with pytest.raises(argrad.UnavailableError):
        run(NOT_READY, OK, budget=budget, timeout_s=5.0)


def test_the_budget_is_exact_under_threads() -> None:
    budget, taken = RetryBudget(FakeClock(), reserve=100.0), []

    def take() -> None:
        taken.extend(budget.take() for _ in range(100))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken) == 100
