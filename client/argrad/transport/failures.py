"""What a failed attempt becomes: our exceptions by problem type, by status code, and by what httpx raises."""

from __future__ import annotations

import math
import ssl
from collections.abc import Mapping
from typing import Any

import httpx
import orjson

from argrad.errors import (
    ArgradError,
    AuthenticationError,
    ConnectionFailedError,
    DeadlineExceededError,
    GradientError,
    InternalServiceError,
    MissingExtraError,
    OverloadedError,
    PayloadTooLargeError,
    ProblemError,
    ProblemGoneError,
    ProtocolError,
    ServiceError,
    StateGoneError,
    UnavailableError,
)

ERROR_BY_TYPE: Mapping[str, type[ArgradError]] = {
    "bad-request": ProtocolError,
    "unauthorized": AuthenticationError,
    "forbidden": AuthenticationError,
    "not-found": ProtocolError,
    "method-not-allowed": ProtocolError,
    "not-acceptable": ProtocolError,
    "body-too-slow": DeadlineExceededError,
    "state-gone": StateGoneError,
    "problem-gone": ProblemGoneError,
    "idempotency-in-progress": ProtocolError,
    "idempotency-mismatch": ProtocolError,
    "too-large": PayloadTooLargeError,
    "unsupported-media-type": ProtocolError,
    "invalid": ProblemError,
    "not-installed": MissingExtraError,
    "overloaded": OverloadedError,
    "rate-limited": OverloadedError,
    "client-closed": ConnectionFailedError,
    "internal": InternalServiceError,
    "not-ready": UnavailableError,
    "deadline": DeadlineExceededError,
}
"""Every problem type of the service (RFC 9457 `type`), and the one exception that it becomes.

An `invalid` that names problems instead of a field is a `GradientError`.
"""

_ERROR_BY_STATUS: Mapping[int, type[ArgradError]] = {
    401: AuthenticationError,
    403: AuthenticationError,
    413: PayloadTooLargeError,
    429: OverloadedError,
    502: UnavailableError,
    503: UnavailableError,
    504: DeadlineExceededError,
}
"""For replies that are not problem documents, such as a proxy's."""

TRANSIENT = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout)
"""The connection failed, and another attempt may not: every call is pure, so repeating it is safe."""

_SHOWN_BYTES = 200
_NO_TLS = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL"})
"""What OpenSSL says of an answer that is not TLS."""


def failure_from_reply(
    status_code: int, headers: Mapping[str, str], body: bytes | bytearray | memoryview, where: str = ""
) -> ArgradError:
    """The exception that a reply other than 200 stands for.

    Args:
        status_code: HTTP status.
        headers: Of the reply; `X-Request-ID` and `Retry-After` are read.
        body: A problem document (RFC 9457), or whatever a proxy wrote.
        where: What was called, named where the address may be the wrong one.
    """
    document = _problem_document(body)
    problem_type = str(document.get("type", "about:blank"))
    message = str(document.get("detail") or document.get("title") or _shown(status_code, headers, body))
    if where and ERROR_BY_TYPE.get(problem_type, ProtocolError) is ProtocolError:
        message = f"{where}: {message}"
    request_id = headers.get("x-request-id")
    error = ERROR_BY_TYPE.get(problem_type) or _by_status(status_code)
    if error is ProblemError:
        rebuilt = _refusal(document, message)
        if rebuilt is not None:
            return rebuilt
        error = ProtocolError
    if error is MissingExtraError:
        what, extra = document.get("what"), document.get("extra")
        if isinstance(what, str) and isinstance(extra, str):
            return MissingExtraError(what, extra, is_remote=True)
        error = InternalServiceError
    if issubclass(error, ServiceError):
        return error(
            message,
            status_code=status_code,
            type=problem_type,
            request_id=request_id,
            retry_after_s=_retry_after(headers),
        )
    return error(f"{message} (HTTP {status_code}, request {request_id or 'unknown'})")


def failure_from_httpx(error: httpx.HTTPError, where: str) -> ArgradError:
    """The exception that a failure below HTTP stands for.

    Args:
        error: What httpx raised.
        where: Address of the service, for the message.
    """
    words = f"{where}: {type(error).__name__}: {error}" if str(error) else f"{where}: {type(error).__name__}"
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
        return DeadlineExceededError(f"{words}; no reply within the deadline")
    return ConnectionFailedError(words)


def is_misdirected(failure: ArgradError) -> bool:
    """Whether TLS failed in a way that no waiting mends: the certificate is refused, or the other end speaks no TLS.

    Args:
        failure: Made by `failure_from_httpx`, or anything else.
    """
    cause: BaseException | None = failure
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            return isinstance(cause, ssl.SSLCertVerificationError) or getattr(cause, "reason", None) in _NO_TLS
        cause = cause.__cause__
    return False


def _by_status(status_code: int) -> type[ArgradError]:
    default = InternalServiceError if status_code >= 500 else ProtocolError
    return _ERROR_BY_STATUS.get(status_code, default)


def _refusal(document: dict[str, Any], message: str) -> ProblemError | GradientError | None:
    """What a 422 says: a field is wrong, or some problems have no gradient."""
    parts = [document.get(name) for name in ("field", "found", "wanted")]
    if all(isinstance(part, str) for part in parts):
        return ProblemError(*(str(part) for part in parts))
    indices = document.get("indices")
    if isinstance(indices, list) and all(isinstance(index, int) for index in indices):
        return GradientError(message, indices)
    return None


def _problem_document(body: bytes | bytearray | memoryview) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return document if isinstance(document, dict) else {}


def _shown(status_code: int, headers: Mapping[str, str], body: bytes | bytearray | memoryview) -> str:
    location = headers.get("location")
    if 300 <= status_code < 400 and location:
        return f"redirected to {location[:_SHOWN_BYTES]!r}, which is not followed: give the address that is meant"
    text = bytes(body[:_SHOWN_BYTES]).decode("utf-8", "replace").strip()
    return f"the reply is not a problem document: {text!r}" if text else "the reply has no body"


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After header; a date, which our service never sends, counts as absent."""
    try:
        seconds = float(headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None
