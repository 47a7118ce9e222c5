"""What the client's tests share: problems, a backend that notes what it is asked, and a service behind a mock."""

from __future__ import annotations

import contextlib
import http.server
import socketserver
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
import torch
from torch import Tensor

from argrad.arguments import LOCAL, load_backend
from argrad.backend import Backend, Call
from argrad.errors import ProblemError, StateGoneError
from argrad.wire import SAFETENSORS, decode, encode
from argrad.wire.messages import JvpRequest, Message, SolveRequest, TensorMap, VjpRequest

D = torch.float64
NAMES = ("Q", "q", "G", "h", "A", "b")
REQUESTS: dict[str, type[Message]] = {"solve": SolveRequest, "vjp": VjpRequest, "jvp": JvpRequest}


def assert_close(found: Tensor | None, wanted: Tensor, tolerance: float = 1e-12) -> None:
    """Equal in shape and dtype, and in value to a relative and absolute tolerance."""
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def simplex() -> dict[str, Tensor]:
    """½zᵀQz + qᵀz on z₁ + z₂ = 1, z ≥ 0: z = (¼, ¾), ν = −2¾, ∂z₁/∂q = (−¼, ¼), ∂z₁/∂b = ¼."""
    return {
        "Q": torch.tensor([[4.0, 1.0], [1.0, 2.0]], dtype=D),
        "q": torch.ones(2, dtype=D),
        "G": -torch.eye(2, dtype=D),
        "h": torch.zeros(2, dtype=D),
        "A": torch.ones(1, 2, dtype=D),
        "b": torch.ones(1, dtype=D),
    }


def draw(
    seed: int, *, batch: int | None, batched: str = "QqGhAb", n: int = 4, m: int = 3, p: int = 1
) -> dict[str, Tensor]:
    """Strictly complementary QPs with one or two active rows, drawn so that a solution is known.

    Args:
        seed: Of everything.
        batch: B, or None.
        batched: Which parameters have the batch dimension; G, h, b follow from a solution of each problem, so that with
            some of them shared the active sets may differ from the drawn ones.
        n: Variables.
        m: Inequalities.
        p: Equalities.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(name: str, *shape: int) -> Tensor:
        lead = (batch,) if batch is not None and name in batched else ()
        return torch.randn(*lead, *shape, generator=random, dtype=D)

    root = normal("Q", n, n)
    G, A = normal("G", m, n), normal("A", p, n)
    parameters = {
        "Q": root @ root.mT + 0.5 * torch.eye(n, dtype=D),
        "q": normal("q", n),
        "G": G,
        "h": 0.3 + 0.2 * normal("h", m).abs(),
        "A": A,
        "b": 0.1 * normal("b", p),
    }
    return {name: tensor for name, tensor in parameters.items() if tensor.shape[-1]}


def infeasible(batch: int = 3, which: int = 1) -> dict[str, Tensor]:
    """Projections of −q on −1 ≤ z₁ ≤ 1, z₂ free; in one of them z₁ ≤ −1 and z₁ ≥ 1 contradict each other."""
    h = torch.ones(batch, 2, dtype=D)
    h[which] = -1.0
    q = 1.6 * torch.arange(2 * batch, dtype=D).reshape(batch, 2) / batch - 0.7
    return {"Q": torch.eye(2, dtype=D), "q": q, "G": torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=D), "h": h}


class Recorder:
    """A backend that passes everything on and notes it; `before` may raise in its place."""

    def __init__(self, inner: Backend | None = None) -> None:
        self.inner = inner or load_backend(LOCAL)
        self.exchanges: list[tuple[str, Any, TensorMap, Call]] = []
        self.released: list[str] = []
        self.before: Callable[[str, Any], None] = lambda name, request: None

    def _pass(self, name: str, request: Any, tensors: TensorMap, call: Call) -> Any:
        self.exchanges.append((name, request, tensors, call))
        self.before(name, request)
        return getattr(self.inner, name)(request, tensors, call)

    def solve(self, request: Any, tensors: TensorMap, call: Call) -> Any:
        return self._pass("solve", request, tensors, call)

    def vjp(self, request: Any, tensors: TensorMap, call: Call) -> Any:
        return self._pass("vjp", request, tensors, call)

    def jvp(self, request: Any, tensors: TensorMap, call: Call) -> Any:
        return self._pass("jvp", request, tensors, call)

    def register(self, request: Any, tensors: TensorMap, call: Call) -> Any:
        return self._pass("register", request, tensors, call)

    def release(self, states: Sequence[str]) -> None:
        self.released.extend(states)
        self.inner.release(states)

    def solvers(self) -> dict[str, Any]:
        return self.inner.solvers()

    def close(self) -> None:
        self.inner.close()

    @property
    def names(self) -> list[str]:
        return [name for name, *_ in self.exchanges]

    def forget_states(self) -> None:
        """Make every token and every digest unknown, as a restart does."""
        self.inner.close()


class FakeClock:
    """Seconds that pass only when told to; `sleep` tells."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def problem_reply(status: int, slug: str, headers: dict[str, str] | None = None, **members: Any) -> httpx.Response:
    """A problem document as the service writes it."""
    document = {"type": slug, "title": f"title of {slug}", "status": status, "detail": f"detail of {slug}", **members}
    headers = {"content-type": "application/problem+json", "x-request-id": "abc", **(headers or {})}
    return httpx.Response(status, content=orjson.dumps(document), headers=headers)


@dataclass
class Received:
    """One request as it arrived."""

    path: str
    headers: httpx.Headers
    document: Any
    tensors: TensorMap


class FakeService:
    """A service behind `httpx.MockTransport`: the engine in this process, and faults in front of it.

    Args:
        faults: Consumed one a request: a response, an exception, a callable of the honest response, or None.
    """

    def __init__(self, *faults: Any) -> None:
        self.backend = load_backend(LOCAL)
        self.faults = iter(faults)
        self.received: list[Received] = []

    @property
    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self.handle)

    def handle(self, request: httpx.Request) -> httpx.Response:
        name = request.url.path.rpartition("/")[2]
        if name == "solvers":
            self.received.append(Received(request.url.path, request.headers, None, {}))
            return self._faulty(lambda: httpx.Response(200, json=self.backend.solvers()))
        body = bytearray(b"".join(bytes(piece) for piece in request.stream))  # type: ignore[union-attr]
        document, tensors = decode(REQUESTS[name], body, request.headers["content-type"])
        self.received.append(Received(request.url.path, request.headers, document, tensors))
        return self._faulty(lambda: self._answer(name, document, tensors))

    def _faulty(self, answer: Callable[[], httpx.Response]) -> httpx.Response:
        fault = next(self.faults, None)
        if isinstance(fault, Exception):
            raise fault
        if isinstance(fault, httpx.Response):
            return fault
        return fault(answer()) if fault is not None else answer()

    def _answer(self, name: str, document: Any, tensors: TensorMap) -> httpx.Response:
        try:
            reply, out = getattr(self.backend, name)(document, tensors, Call())
        except StateGoneError:
            return problem_reply(409, "state-gone")
        except ProblemError as error:
            return problem_reply(422, "invalid", field=error.field, found=error.found, wanted=error.wanted)
        body = b"".join(encode(reply, out, SAFETENSORS))
        return httpx.Response(200, content=body, headers={"content-type": SAFETENSORS, "x-request-id": "abc"})


class _Handler(http.server.BaseHTTPRequestHandler):
    """Hands requests of a real socket to a `FakeService`."""

    protocol_version = "HTTP/1.1"
    service: FakeService

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        request = httpx.Request("POST", f"http://host{self.path}", headers=dict(self.headers), content=body)
        response = self.service.handle(request)
        self.send_response(response.status_code)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(response.content)

    def address_string(self) -> str:
        return "unix or loopback"

    def log_message(self, *_: Any) -> None:
        pass


class _UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


@contextlib.contextmanager
def listening(service: FakeService, uds: Path | None = None) -> Iterator[str]:
    """Put a fake service on a real socket, TCP or unix; yields its address."""
    handler = type("Handler", (_Handler,), {"service": service})
    server: socketserver.BaseServer
    if uds is None:
        tcp = server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        url = f"http://127.0.0.1:{tcp.server_port}"
    else:
        server, url = _UnixServer(str(uds), handler), f"http+unix://{uds}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield url
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
