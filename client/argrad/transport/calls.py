"""What the synchronous and the async HTTP backend share: headers, bodies, released tokens, replies."""

from __future__ import annotations

import collections
import math
import platform
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import httpx
import orjson
from pydantic import SecretStr

from argrad._version import __version__
from argrad.backend import Call
from argrad.errors import ProblemError, ProtocolError
from argrad.transport.address import parse_address
from argrad.transport.bodies import Outgoing, Upload
from argrad.transport.exchange import Answer, Clock, Deadline, RetryBudget, RetryPolicy, Steps, exchange
from argrad.transport.tracing import traceparent
from argrad.wire import (
    IDENTITY,
    LEAST_BYTES,
    SAFETENSORS,
    ZSTD,
    WireError,
    compress,
    decode,
    encode,
    encoded_size,
    load_zstd,
)
from argrad.wire.messages import Message, RegisterRequest, TensorMap

M = TypeVar("M", bound=Message)

_CONNECT_TIMEOUT_S = 10.0
_MAX_REPLY_HEADER_BYTES = 1 << 28
_MAX_RELEASED = 4096
_MAX_RELEASED_PER_CALL = 32
_IDENTIFIER = re.compile(r"[A-Za-z0-9._:+/=@-]{1,128}")
_KEY = re.compile(r"[\x21-\x7e]+")
_TENSOR_TYPE = SAFETENSORS.encode("ascii")
_TABLE_TIMEOUT_S = 30.0

Compression = Literal["zstd"]
Header = tuple[bytes, bytes]


@dataclass(frozen=True, kw_only=True)
class HttpOptions:
    """How a service is called.

    Args:
        url: Of the service: `http://…`, `https://…`, or `http+unix:///path/of/socket`.
        api_key: Sent as `Authorization: Bearer`. Never shown; pickled with the rest, because workers need it.
        policy: Retries.
        clock: Monotonic seconds; tests bring their own.
        compression: Of bodies that are not small, both ways.

    Raises:
        ProblemError: the API key cannot be one.
        MissingExtraError: what compresses is not installed.
    """

    url: str
    api_key: SecretStr | None = None
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    clock: Clock = time.monotonic
    compression: Compression | None = None

    def __post_init__(self) -> None:
        if self.compression is not None:
            load_zstd()
        if self.api_key is not None and not _KEY.fullmatch(self.api_key.get_secret_value()):
            raise ProblemError("api_key", "nothing, or what a header cannot carry", "visible ASCII characters")


class HttpCalls:
    """Prepares calls and reads replies; whoever sends them is elsewhere.

    Args:
        options: How the service is called.
    """

    def __init__(self, options: HttpOptions) -> None:
        self.options = options
        self.address = parse_address(options.url)
        self.accepted = options.compression or IDENTITY
        self._urls = {name: self.address.join(f"/v1/{name}") for name in ("solve", "vjp", "jvp", "solvers")}
        self._headers = self._fixed_headers()
        self._budget = RetryBudget()
        self._released: collections.deque[str] = collections.deque(maxlen=_MAX_RELEASED)

    def _fixed_headers(self) -> list[Header]:
        headers = [
            (b"Host", self.address.base.netloc),
            (b"Accept-Encoding", self.accepted.encode()),
            (b"User-Agent", f"argrad/{__version__} python/{platform.python_version()}".encode()),
        ]
        if self.options.api_key is not None:
            headers.append((b"Authorization", b"Bearer " + self.options.api_key.get_secret_value().encode()))
        return headers

    def release(self, states: Sequence[str]) -> None:
        """Note states that nobody needs any more; they ride on the next call. Safe in finalisers."""
        self._released.extend(states)

    def post(self, name: str, message: Message, tensors: TensorMap, call: Call) -> Steps:
        """Steps of POST /v1/{name}; the body is written, and compressed, here and once.

        Args:
            name: `solve`, `vjp` or `jvp`.
            message: The document.
            tensors: Its tensors; those on a GPU are copied to the host.
            call: Deadline and identifiers.
        """
        return self._send("POST", self._urls[name], message, tensors, call)

    def put(self, request: RegisterRequest, tensors: TensorMap, call: Call) -> Steps:
        """Steps of PUT /v1/problems/{sha256}."""
        url = self.address.join(f"/v1/problems/{request.problem.registered}")
        return self._send("PUT", url, request, tensors, call)

    def _send(self, method: str, url: httpx.URL, message: Message, tensors: TensorMap, call: Call) -> Steps:
        deadline = Deadline(call.timeout_s, self.options.clock)
        buffers: Sequence[bytes | memoryview] = encode(message, tensors, SAFETENSORS)
        headers = [(b"Content-Type", _TENSOR_TYPE), (b"Accept", _TENSOR_TYPE)]
        if self.options.compression == ZSTD and (size := encoded_size(buffers)) >= LEAST_BYTES:
            compressed = compress(buffers, size)
            if encoded_size(compressed) < size:
                buffers = compressed
                headers.append((b"Content-Encoding", ZSTD.encode()))
        headers.append((b"Content-Length", b"%d" % encoded_size(buffers)))
        if call.affinity is not None:
            headers.append((b"Argrad-Affinity", _identifier("affinity", call.affinity)))
        return self._steps(method, url, headers, buffers, call, deadline)

    def get(self, name: str) -> Steps:
        """Steps of GET /v1/{name}, which takes no solving."""
        deadline = Deadline(_TABLE_TIMEOUT_S, self.options.clock)
        return self._steps("GET", self._urls[name], [(b"Accept", b"application/json")], [], Call(), deadline)

    def _steps(
        self,
        method: str,
        url: httpx.URL,
        headers: list[Header],
        buffers: Sequence[bytes | memoryview],
        call: Call,
        deadline: Deadline,
    ) -> Steps:
        request_id = call.request_id if call.request_id is not None else secrets.token_hex(8)
        common = [*self._headers, *headers, (b"X-Request-ID", _identifier("request_id", request_id))]
        if parent := traceparent():
            common.append((b"traceparent", parent))
        if released := self._take_released():
            common.append((b"Argrad-Release", ",".join(released).encode("ascii")))
        upload = Upload(buffers, encoded_size(buffers), deadline)

        def request(remaining_s: float | None) -> Outgoing:
            timed = common
            if remaining_s is not None:
                timed = [*common, (b"Argrad-Timeout-Ms", b"%d" % max(1, math.ceil(1e3 * remaining_s)))]
            return Outgoing(method, url, timed, upload, _timeouts(remaining_s))

        return exchange(
            request, where=self.options.url, deadline=deadline, policy=self.options.policy, budget=self._budget
        )

    def _take_released(self) -> list[str]:
        taken: list[str] = []
        while self._released and len(taken) < _MAX_RELEASED_PER_CALL:
            try:
                taken.append(self._released.popleft())
            except IndexError:  # another thread took the last one
                break
        return taken


def read_reply(model: type[M], answer: Answer) -> tuple[M, TensorMap]:
    """Document and tensors of a reply; the tensors are views of its buffer.

    Raises:
        ProtocolError: the reply cannot be read.
    """
    content_type = answer.headers.get("content-type")
    try:
        return decode(model, answer.body, content_type, max_header_bytes=_MAX_REPLY_HEADER_BYTES)
    except (WireError, ProblemError) as error:
        raise _unreadable(str(error), answer) from error


def read_document(answer: Answer) -> dict[str, Any]:
    """JSON object of a reply.

    Raises:
        ProtocolError: the reply is something else.
    """
    try:
        document = orjson.loads(answer.body)
    except orjson.JSONDecodeError as error:
        raise _unreadable(str(error), answer) from error
    if not isinstance(document, dict):
        raise _unreadable(f"found {type(document).__name__}, wanted a JSON object", answer)
    return document


def _unreadable(words: str, answer: Answer) -> ProtocolError:
    request_id = answer.headers.get("x-request-id")
    return ProtocolError(f"the reply cannot be read: {words}", status_code=answer.status_code, request_id=request_id)


def _identifier(field: str, value: str) -> bytes:
    if not _IDENTIFIER.fullmatch(value):
        raise ProblemError(field, repr(value), "1 to 128 of letters, digits and . _ : + / = @ -")
    return value.encode("ascii")


def _timeouts(remaining_s: float | None) -> dict[str, float | None]:
    connect = _CONNECT_TIMEOUT_S if remaining_s is None else min(_CONNECT_TIMEOUT_S, remaining_s)
    return {"connect": connect, "read": remaining_s, "write": remaining_s, "pool": remaining_s}
