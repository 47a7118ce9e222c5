"""The application: everything is made and wired here, and nothing is read at import."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from fastapi import FastAPI
from starlette.exceptions import HTTPException

from argrad._version import __version__
from argrad.errors import MissingExtraError
from argrad_service import engine as default_engine
from argrad_service.admission import Limits
from argrad_service.engine.options import Stopped
from argrad_service.http import openapi
from argrad_service.http.cors import Cors
from argrad_service.http.envelope import Envelope
from argrad_service.http.exchange import Exchange
from argrad_service.http.fastlane import Calls, Service
from argrad_service.http.guard import make_guard
from argrad_service.http.health import Readiness
from argrad_service.http.idempotency import Once
from argrad_service.http.keys import follow_keys, make_keyring
from argrad_service.http.logs import Logger, make_logger
from argrad_service.http.metrics import Metrics
from argrad_service.http.phases import Phases
from argrad_service.http.problems import KINDS, answer
from argrad_service.http.routes import add_routes
from argrad_service.http.shared_metrics import SharedMetrics
from argrad_service.operations import Operations
from argrad_service.registered import Registrations
from argrad_service.scheduling import Job, Pending, PendingLimits, Scheduler
from argrad_service.settings import Settings, load_settings
from argrad_service.sharing import Sharing, make_shared
from argrad_service.state import MemoryProblemStore, MemoryStateStore, ProblemStore, Shared, StateStore, TokenSigner
from argrad_service.warming import PARTS, compiling
from argrad_service.working import Engine

if TYPE_CHECKING:
    from argrad_service.http.tracing import Tracing

_CODEC_THREADS = 2
_STOP_TIMEOUT_S = 5.0
_SWEEP_PERIOD_S = 15.0


def create_app(
    settings: Settings | None = None,
    *,
    engine: Engine = default_engine,
    store: StateStore | None = None,
    problems: ProblemStore | None = None,
    shared: Shared | None = None,
    log: Logger | None = None,
    clock: Callable[[], float] = time.monotonic,
    tracing: Tracing | None = None,
) -> FastAPI:
    """Build the service.

    Args:
        settings: From the environment by default.
        engine: Solves and differentiates.
        store: Keeps forward state; in memory by default.
        problems: Keeps registered problems; in memory by default.
        shared: Keeps what replicas share; by default in Redis or in memory, as the settings say.
        log: Structured logger; by default to standard error as the settings say.
        clock: Monotonic seconds, for both stores and the rates.
        tracing: Exports spans; by default to where the settings say, if they do.

    Raises:
        SettingsError: a variable has a wrong value.
        MissingExtraError: spans are asked for, and OpenTelemetry is not installed.
    """
    settings = settings or load_settings()
    log = log or make_logger(settings)
    device = choose_device(settings, engine)
    has_kernels = engine is default_engine and device.type == "cpu"
    signer = TokenSigner(settings.state_secret.get_secret_value())
    store = store or MemoryStateStore(
        budget_bytes=settings.state_budget_bytes, ttl_s=settings.state_ttl_s, signer=signer, clock=clock
    )
    problems = problems or MemoryProblemStore(
        budget_bytes=settings.problem_budget_bytes, ttl_s=settings.problem_ttl_s, clock=clock
    )
    registrations = Registrations(problems, settings.limits())
    budget = settings.batch_budget()
    scheduler = Scheduler(
        threads=settings.solver_threads, max_queue=settings.max_queue, stopped=(Stopped,), budget=budget
    )
    pending = Pending(PendingLimits(calls=settings.max_pending, nbytes=settings.max_pending_bytes))
    operations = Operations(
        engine=engine,
        store=store,
        registrations=registrations,
        limits=settings.limits(),
        device=device,
        budget=budget,
    )
    keyring = make_keyring(settings)
    shared = shared or make_shared(settings, in_flight=lambda: pending.calls, clock=clock)
    readiness = Readiness(scheduler, store, str(device), shared)
    phases = Phases()
    once = Once(shared)
    metrics = Metrics(
        scheduler=scheduler,
        pending=pending,
        store=store,
        problems=problems,
        phases=phases,
        shared=SharedMetrics(shared, once.counts),
    )
    tracing = tracing or _tracing_to(settings.otlp_endpoint)
    codecs = ThreadPoolExecutor(_CODEC_THREADS, thread_name_prefix="argrad-codec")
    sharing = None
    if shared.is_shared:
        sharing = Sharing(
            shared=shared,
            store=store,
            problems=problems,
            operations=operations,
            registrations=registrations,
            signer=signer,
            max_state_bytes=settings.shared_state_bytes,
            max_problem_bytes=settings.shared_problem_bytes,
            in_thread=lambda work: asyncio.get_running_loop().run_in_executor(codecs, work),
        )
    exchange = Exchange(settings, operations, scheduler, pending, codecs, once, phases, sharing=sharing)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        scheduler.start()
        await shared.start()
        unlimited = Operations(engine=engine, store=store, limits=Limits(), device=device)
        tasks = [
            asyncio.create_task(_warm_up(unlimited, scheduler, readiness, log, has_kernels=has_kernels)),
            asyncio.create_task(_sweep(store, problems, shared)),
        ]
        if keyring is not None:
            tasks.append(asyncio.create_task(follow_keys(keyring, log)))
        try:
            yield
        finally:
            readiness.phase = "stopping"
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.to_thread(scheduler.stop, _STOP_TIMEOUT_S)
            await shared.stop()
            codecs.shutdown(wait=False, cancel_futures=True)
            if tracing is not None:
                await asyncio.to_thread(tracing.close)
            store.clear()
            problems.clear()

    app = Service(
        title="argrad",
        version=__version__,
        description="Gradients of optimisation problems, served.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.readiness, app.state.keyring, app.state.doors = readiness, keyring, exchange.doors
    app.state.metrics = metrics
    app.state.shared = app.state.rates = shared
    add_routes(app, exchange, registrations, readiness, metrics)
    around: dict[str, Any] = {
        "metrics": metrics,
        "log": log,
        "guard": make_guard(settings, keyring, shared),
        "cors": Cors(settings.cors_origins),
        "readiness": readiness,
        "tracing": tracing,
    }
    app.add_middleware(Envelope, **around)
    app.calls = Calls(app)
    app.lane = Envelope(app.calls, **around)
    handled: list[type[Exception]] = [HTTPException, *KINDS]
    for error in handled:
        app.add_exception_handler(error, answer)
    app.openapi = functools.partial(openapi.document, app)  # type: ignore[method-assign]
    return app


def choose_device(settings: Settings, engine: Engine = default_engine) -> torch.device:
    """Where problems are solved."""
    return engine.default_device() if settings.device == "auto" else torch.device(settings.device)


def _tracing_to(endpoint: str | None) -> Tracing | None:
    """Where spans go; OpenTelemetry is imported here, and only if they go anywhere."""
    if endpoint is None:
        return None
    try:
        from argrad_service.http.tracing import Tracing
    except ImportError:
        raise MissingExtraError("ARGRAD_OTLP_ENDPOINT", "otel") from None
    return Tracing.to(endpoint)


async def _warm_up(
    operations: Operations, scheduler: Scheduler, readiness: Readiness, log: Logger, *, has_kernels: bool
) -> None:
    """Solve and differentiate a problem on each path, which compiles what is not yet; then say that we are ready."""
    began = time.perf_counter()
    try:
        async with compiling(log, threads=torch.get_num_threads() if has_kernels else 0) as compiled:
            for name, part in PARTS.items():
                await compiled(name)
                await scheduler.submit(functools.partial(_do, part, operations), deadline=float("inf")).future
    except Exception as error:
        readiness.phase, readiness.reason = "failed", f"the first solve failed: {error}"
        log.error("not ready", reason=readiness.reason, exc_info=error)
    else:
        readiness.phase = "ready"
        log.info("ready", device=readiness.device, seconds=round(time.perf_counter() - began, 3))


def _do(part: Callable[[Operations], None], operations: Operations, _: Job[None]) -> None:
    part(operations)


async def _sweep(*stores: StateStore | ProblemStore | Shared) -> None:
    """Free what has expired even where nobody calls."""
    while True:
        await asyncio.sleep(_SWEEP_PERIOD_S)
        for store in stores:
            store.sweep()
