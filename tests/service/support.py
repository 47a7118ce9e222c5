"""What the service's tests share: an engine with a hook, an application in this process, and small problems."""

from __future__ import annotations

import asyncio
import contextlib
import io
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import torch
import uvicorn
from asgi_lifespan import LifespanManager
from fastapi import FastAPI

from argrad.wire import SAFETENSORS, decode, encode
from argrad.wire.messages import Message, TensorMap
from argrad_service import engine
from argrad_service.app import create_app
from argrad_service.engine.options import SolverOptions
from argrad_service.engine.outcome import Forward
from argrad_service.http.logs import make_logger
from argrad_service.settings import Settings
from argrad_service.state import Shared

D = torch.float64
SECRET = "a secret of these tests"


def tensor(*values: Any) -> torch.Tensor:
    """A float64 tensor of the values."""
    return torch.tensor(values, dtype=D)


def simplex() -> dict[str, Any]:
    """½zᵀQz + qᵀz on z₁ + z₂ = 1, z ≥ 0, as JSON: z = (¼, ¾), ν = −2¾, ∂z₁/∂q = (−¼, ¼), ∂z₁/∂b = ¼."""
    return {
        "Q": [[4, 1], [1, 2]],
        "q": [1, 1],
        "A": [[1, 1]],
        "b": [1],
        "G": [[-1, 0], [0, -1]],
        "h": [0, 0],
    }


def projection(*q: tuple[float, float]) -> TensorMap:
    """Projections of −q on z ≥ 0, tensors of a request: z = max(−q, 0), λ = max(q, 0)."""
    return {
        "problem.Q": torch.eye(2, dtype=D),
        "problem.q": tensor(*q),
        "problem.G": -torch.eye(2, dtype=D),
        "problem.h": torch.zeros(2, dtype=D),
    }


class HookedEngine:
    """The real engine; each solve calls `on_solve` with its options first."""

    def __init__(self, on_solve: Callable[[SolverOptions], None] | None = None) -> None:
        self.on_solve = on_solve or (lambda _: None)
        self.solves = 0

    def solve(self, problem: Any, *, options: SolverOptions, **more: Any) -> Forward:
        self.solves += 1
        self.on_solve(options)
        return engine.solve(problem, options=options, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(engine, name)


@contextlib.asynccontextmanager
async def running_app(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application in this process, after its start and until its end."""
    async with LifespanManager(app, startup_timeout=30, shutdown_timeout=30) as manager:
        transport = httpx.ASGITransport(app=manager.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=30) as client:
            while (await client.get("/health/ready")).status_code != 200:
                assert app.state.readiness.phase == "starting", app.state.readiness.reason
                await asyncio.sleep(0.002)
            yield client


def make_app(
    log: io.StringIO | None = None,
    engine_: Any = None,
    shared: Shared | None = None,
    clock: Callable[[], float] = time.monotonic,
    **settings: Any,
) -> FastAPI:
    """An application with settings of its own, whatever the environment says; it logs into `log`."""
    chosen = Settings.model_validate({"state_secret": SECRET, "log_format": "json", "device": "cpu", **settings})
    logger = make_logger(chosen, log if log is not None else io.StringIO())
    return create_app(chosen, engine=engine_ or engine, log=logger, shared=shared, clock=clock)


async def post(
    client: httpx.AsyncClient,
    path: str,
    request: Message,
    tensors: TensorMap,
    reply: type[Message],
    **headers: str,
) -> tuple[Any, TensorMap]:
    """One call in the binary form, which must succeed."""
    body = b"".join(encode(request, tensors, SAFETENSORS))
    response = await client.post(path, content=body, headers={"content-type": SAFETENSORS, **headers})
    assert response.status_code == 200, response.text
    return decode(reply, bytearray(response.content), response.headers["content-type"])


@contextlib.contextmanager
def serving(app: FastAPI, **options: Any) -> Iterator[str]:
    """The address of an application under uvicorn, in a thread of this process."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, lifespan="on", ws="none", log_config=None, access_log=False, **options)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            with httpx.Client(base_url=url, trust_env=False) as client:
                wait_until(lambda: server.started and client.get("/health/ready").status_code == 200)
            yield url
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def wait_until(is_so: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Return once something is so, or fail."""
    until = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < until, "it did not come to be"
        time.sleep(0.002)
