"""Every way to fail becomes one exception, by what the caller can do about it."""

from __future__ import annotations

import pickle

import httpx
import pytest

import argrad
from argrad.errors import ServiceError
from argrad.transport.failures import ERROR_BY_TYPE, TRANSIENT, failure_from_httpx, failure_from_reply
from tests.client.support import problem_reply

ROWS = [
    (400, "bad-request", argrad.ProtocolError),
    (401, "unauthorized", argrad.AuthenticationError),
    (403, "forbidden", argrad.AuthenticationError),
    (404, "not-found", argrad.ProtocolError),
    (405, "method-not-allowed", argrad.ProtocolError),
    (406, "not-acceptable", argrad.ProtocolError),
    (408, "body-too-slow", argrad.DeadlineExceededError),
    (409, "state-gone", argrad.StateGoneError),
    (409, "problem-gone", argrad.ProblemGoneError),
    (409, "idempotency-in-progress", argrad.ProtocolError),
    (413, "too-large", argrad.PayloadTooLargeError),
    (415, "unsupported-media-type", argrad.ProtocolError),
    (422, "invalid", argrad.ProblemError),
    (422, "idempotency-mismatch", argrad.ProtocolError),
    (429, "overloaded", argrad.OverloadedError),
    (429, "rate-limited", argrad.OverloadedError),
    (499, "client-closed", argrad.ConnectionFailedError),
    (500, "internal", argrad.InternalServiceError),
    (501, "not-installed", argrad.MissingExtraError),
    (503, "not-ready", argrad.UnavailableError),
    (504, "deadline", argrad.DeadlineExceededError),
]


def failure(response: httpx.Response) -> argrad.ArgradError:
    return failure_from_reply(response.status_code, response.headers, response.content)


def test_the_table_is_complete() -> None:
    assert set(ERROR_BY_TYPE) == {slug for _, slug, _ in ROWS}
    kinds = pytest.importorskip("argrad_service.http.problems", reason="ends where the service is installed")
    served = {kind.type for kind in (*kinds.KINDS.values(), *kinds._ROUTING.values(), kinds.INTERNAL)}
    assert served <= set(ERROR_BY_TYPE)


@pytest.mark.parametrize(("status", "slug", "wanted"), ROWS, ids=[slug for _, slug, _ in ROWS])
def test_each_problem_type_is_one_exception(status: int, slug: str, wanted: type[Exception]) -> None:
    members = {"field": "problem.Q", "found": "this", "wanted": "that", "what": "this", "extra": "that"}
    error = failure(problem_reply(status, slug, **members))
    assert type(error) is wanted
    if isinstance(error, ServiceError):
        assert (error.status_code, error.type, error.request_id) == (status, slug, "abc")
        assert str(error) == f"detail of {slug} (HTTP {status}, request abc)"
    elif not isinstance(error, argrad.ProblemError | argrad.MissingExtraError):
        assert str(error) == f"detail of {slug} (HTTP {status}, request abc)"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), str(error))


def test_a_wrong_field_is_rebuilt() -> None:
    error = failure(problem_reply(422, "invalid", field="problem.Q", found="shape (2,)", wanted="(n, n)"))
    assert isinstance(error, argrad.ProblemError)
    assert (error.field, error.found, error.wanted) == ("problem.Q", "shape (2,)", "(n, n)")


def test_a_refused_gradient_names_its_problems() -> None:
    error = failure(problem_reply(422, "invalid", indices=[1, 4]))
    assert isinstance(error, argrad.GradientError)
    assert error.indices == (1, 4)


def test_a_missing_extra_is_rebuilt_and_says_where() -> None:
    error = failure(problem_reply(501, "not-installed", what="solver 'proxqp'", extra="proxqp"))
    assert isinstance(error, argrad.MissingExtraError)
    assert str(error) == (
        "solver 'proxqp' needs packages that are not installed where the service runs: pip install 'argrad[proxqp]'"
    )
    assert type(failure(problem_reply(501, "not-installed"))) is argrad.InternalServiceError


def test_an_invalid_without_a_field_is_a_protocol_error() -> None:
    assert type(failure(problem_reply(422, "invalid"))) is argrad.ProtocolError


@pytest.mark.parametrize(
    ("status", "wanted"),
    [
        (403, argrad.AuthenticationError),
        (413, argrad.PayloadTooLargeError),
        (418, argrad.ProtocolError),
        (429, argrad.OverloadedError),
        (500, argrad.InternalServiceError),
        (502, argrad.UnavailableError),
        (503, argrad.UnavailableError),
        (504, argrad.DeadlineExceededError),
    ],
)
def test_what_a_proxy_says_goes_by_its_status(status: int, wanted: type[Exception]) -> None:
    error = failure(httpx.Response(status, content=b"<html>no</html>"))
    assert type(error) is wanted
    assert "the reply is not a problem document: '<html>no</html>'" in str(error)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("3", 3.0), ("0.5", 0.5), ("-1", None), ("nan", None), ("Mon, 23 Nov 2026 17:00:00 GMT", None)],
)
def test_retry_after(header: str, seconds: float | None) -> None:
    error = failure(problem_reply(429, "overloaded", {"retry-after": header}))
    assert isinstance(error, argrad.OverloadedError)
    assert error.retry_after_s == seconds


def _leaves(cls: type[httpx.HTTPError]) -> list[type[httpx.HTTPError]]:
    below = [leaf for child in cls.__subclasses__() for leaf in _leaves(child)]
    return below or [cls]


@pytest.mark.parametrize("cls", _leaves(httpx.TransportError), ids=lambda cls: cls.__name__)
def test_every_failure_of_httpx_is_ours(cls: type[httpx.HTTPError]) -> None:
    error = failure_from_httpx(cls("words"), "http://host")
    is_deadline = issubclass(cls, httpx.TimeoutException) and cls is not httpx.ConnectTimeout
    assert type(error) is (argrad.DeadlineExceededError if is_deadline else argrad.ConnectionFailedError)
    assert str(error).startswith(f"http://host: {cls.__name__}: words")
    assert not (is_deadline and issubclass(cls, TRANSIENT))
