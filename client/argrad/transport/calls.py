"""What the synchronous and the async HTTP backend share: headers, bodies, released tokens, replies."""

from __future__ import annotations

import collections
import contextlib
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
from argrad.transport.address import Address, parse_address
from argrad.transport.bodies import Outgoing, Upload
from argrad.transport.exchange import Answer, Deadline, Steps, exchange
from argrad.transport.retries import Clock, RetryBudget, RetryPolicy
from argrad.transport.targets import Target, Targets
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

_CONNECT_TIMEOUT_S = 4.0
"""The kernel asks at 0, 1 and 3 s; an address from which nothing comes back is tried again, or passed over."""

_MAX_REPLY_HEADER_BYTES = 1 << 28
_MAX_RELEASED = 4096
_MAX_RELEASED_PER_CALL = 32
_IDENTIFIER = re.compile(r"[A-Za-z0-9._:+/=@-]{1,128}")
_KEY = re.compile(r"[\x21-\x7e]+")
_TENSOR_TYPE = SAFETENSORS.encode("ascii")
_TABLE_TIMEOUT_S = 30.0
_ROUTES = ("solve", "vjp", "jvp", "solvers")

Compression = Literal["zstd"]
Header = tuple[bytes, bytes]


@dataclass(frozen=True, kw_only=True)
class HttpOptions:
    """How a service is called.

    Args:
        urls: Of the service: `http://…`, `https://…`, or `http+unix:///path/of/socket`; several replicas of one.
        api_key: Sent as `Authorization: Bearer`. Never shown; pickled with the rest, because workers need it.
        policy: Retries.
        clock: Monotonic seconds; tests bring their own.
        compression: Of bodies that are not small, both ways.

    Raises:
        ProblemError: the API key cannot be one.
        MissingExtraError: what compresses is not installed.
    """

    urls: Sequence[str]
    api_key: SecretStr | None = None
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    clock: Clock = time.monotonic
    compression: Compression | None = None

    def __post_init__(self) -> None:
        if self.compression is not None:
            load_zstd()
        if self.api_key is not None and not _KEY.fullmatch(self.api_key.get_secret_value()):
            raise ProblemError("api_key", "nothing, or what a header cannot carry", "visible ASCII characters")


@dataclass(eq=False)
class _Route:
    """What calls to one address have in common.

    Args:
        address: Where.
        headers: Of every request.
        urls: By route.
        released: States kept there that nobody needs any more.
    """

    address: Address
    headers: list[Header]
    urls: dict[str, httpx.URL]
    released: collections.deque[str] = field(default_factory=lambda: collections.deque(maxlen=_MAX_RELEASED))

    def url(self, path: str) -> httpx.URL:
        """URL of a route, such as `solve`."""
        return self.urls.get(path) or self.address.join(f"/v1/{path}")

    def take_released(self) -> list[Header]:
        """A header with some of them, which are then forgotten."""
        taken: list[str] = []
        while self.released and len(taken) < _MAX_RELEASED_PER_CALL:
            try:
                taken.append(self.released.popleft())
            except IndexError:  # another thread took the last one
                break
        return [(b"Argrad-Release", ",".join(taken).encode("ascii"))] if taken else []


class HttpCalls:
    """Prepares calls and reads replies; whoever sends them is elsewhere.

    Args:
        options: How the service is called.
    """

    def __init__(self, options: HttpOptions) -> None:
        self.options = options
        self.addresses = [parse_address(url) for url in options.urls]
        self.accepted = options.compression or IDENTITY
        self._targets = Targets(self.addresses, options.clock)
        self._routes = [self._route(address) for address in self.addresses]
        self._budget = RetryBudget(options.clock)
        self._owners: collections.OrderedDict[str, int] = collections.OrderedDict()

    def _route(self, address: Address) -> _Route:
        headers = [
            (b"Host", address.base.netloc),
            (b"Accept-Encoding", self.accepted.encode()),
            (b"User-Agent", f"argrad/{__version__} python/{platform.python_version()}".encode()),
        ]
        if self.options.api_key is not None:
            headers.append((b"Authorization", b"Bearer " + self.options.api_key.get_secret_value().encode()))
        return _Route(address, headers, {name: address.join(f"/v1/{name}") for name in _ROUTES})

    def release(self, states: Sequence[str]) -> None:
        """Note states that nobody needs any more; they ride on the next call to the address that keeps them."""
        if len(self._routes) == 1:
            self._routes[0].released.extend(states)
            return
        for state in states:
            owner = self._owners.pop(state, None)
            if owner is not None:
                self._routes[owner].released.append(state)

    def note(self, state: str | None, answer: Answer) -> None:
        """Remember which address keeps a state; of one that is forgotten the release goes nowhere.

        Args:
            state: Its token, if there is one.
            answer: The reply that it came in.
        """
        if state is not None and len(self._routes) > 1:
            self._owners[state] = answer.target
            if len(self._owners) > _MAX_RELEASED:
                with contextlib.suppress(KeyError):  # another thread took the last one
                    self._owners.popitem(last=False)

    def post(self, name: str, message: Message, tensors: TensorMap, call: Call) -> Steps:
        """Steps of POST /v1/{name}; the body is written, and compressed, here and once.

        Args:
            name: `solve`, `vjp` or `jvp`.
            message: The document.
            tensors: Its tensors; those on a GPU are copied to the host.
            call: Deadline and identifiers.
        """
        return self._send("POST", name, message, tensors, call)

    def put(self, request: RegisterRequest, tensors: TensorMap, call: Call) -> Steps:
        """Steps of PUT /v1/problems/{sha256}."""
        return self._send("PUT", f"problems/{request.problem.registered}", request, tensors, call)

    def _send(self, method: str, path: str, message: Message, tensors: TensorMap, call: Call) -> Steps:
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
        return self._steps(method, path, headers, buffers, call, deadline)

    def get(self, name: str) -> Steps:
        """Steps of GET /v1/{name}, which takes no solving."""
        deadline = Deadline(_TABLE_TIMEOUT_S, self.options.clock)
        return self._steps("GET", name, [(b"Accept", b"application/json")], [], Call(), deadline)

    def _steps(
        self,
        method: str,
        path: str,
        headers: list[Header],
        buffers: Sequence[bytes | memoryview],
        call: Call,
        deadline: Deadline,
    ) -> Steps:
        request_id = call.request_id if call.request_id is not None else secrets.token_hex(8)
        headers.append((b"X-Request-ID", _identifier("request_id", request_id)))
        if parent := traceparent():
            headers.append((b"traceparent", parent))
        upload = Upload(buffers, encoded_size(buffers), deadline)
        complete: dict[int, list[Header]] = {}

        def request(target: Target, remaining_s: float | None) -> Outgoing:
            i = target.index
            route = self._routes[i]
            if i not in complete:
                complete[i] = [*route.headers, *headers, *route.take_released()]
            timed = complete[i]
            if remaining_s is not None:
                timed = [*timed, (b"Argrad-Timeout-Ms", b"%d" % max(1, math.ceil(1e3 * remaining_s)))]
            return Outgoing(method, route.url(path), timed, upload, _timeouts(remaining_s), i)

        return exchange(
            request,
            affinity=call.affinity,
            targets=self._targets,
            deadline=deadline,
            policy=self.options.policy,
            budget=self._budget,
        )


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
    what = "the reply" if answer.request is None else f"the reply of {answer.request.method} {answer.request.url}"
    return ProtocolError(f"{what} cannot be read: {words}", status_code=answer.status_code, request_id=request_id)


def _identifier(field: str, value: str) -> bytes:
    if not _IDENTIFIER.fullmatch(value):
        raise ProblemError(field, repr(value), "1 to 128 of letters, digits and . _ : + / = @ -")
    return value.encode("ascii")


def _timeouts(remaining_s: float | None) -> dict[str, float | None]:
    connect = _CONNECT_TIMEOUT_S if remaining_s is None else min(_CONNECT_TIMEOUT_S, remaining_s)
    return {"connect": connect, "read": remaining_s, "write": remaining_s, "pool": remaining_s}
