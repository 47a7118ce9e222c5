"""Prometheus metrics of one application, in a registry of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from argrad_service.http.iterations import Iterations
from argrad_service.http.phases import Phases
from argrad_service.http.record import Record
from argrad_service.http.series import Counts, Histogram
from argrad_service.scheduling import SIZES, Pending, Scheduler
from argrad_service.state import ProblemStore, StateStore

_SECONDS = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
    30,
    60,
    300,
)
_MS = 1e-3


class Metrics:
    """Counts requests, their stages and what came of their problems.

    Args:
        scheduler: Asked for its state at each scrape, as are the next two.
        pending: Calls in the house.
        store: Forward state.
        problems: Registered problems.
        phases: Calls by where they are.
        shared: Of what replicas share.
    """

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        pending: Pending,
        store: StateStore,
        problems: ProblemStore,
        phases: Phases,
        shared: Collector,
    ) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counts(
            "argrad_requests", "Requests by route, HTTP status and problem type.", ["route", "status", "type"]
        )
        self._seconds = Histogram(
            "argrad_request_seconds", "From a request's first byte to its reply's last.", ["route"], _SECONDS
        )
        self._stages = Histogram("argrad_stage_seconds", "Stages of a call.", ["route", "stage"], _SECONDS)
        self._problems = Counts("argrad_problems", "Problems solved, by status.", ["status"])
        self._bytes = Counts(
            "argrad_body_bytes",
            "Bytes of bodies: of requests decompressed, of replies as sent.",
            ["route", "direction"],
        )
        for series in (self._requests, self._seconds, self._stages, self._problems, self._bytes):
            registry.register(series)
        self._iterations = Iterations()
        registry.register(_Scraped(scheduler, pending, store, problems, phases))
        registry.register(self._iterations)
        registry.register(shared)
        # Memory, processor time and file descriptors of the process; Linux only.
        ProcessCollector(registry=registry)

    def count(self, route: str, status: int, record: Record) -> None:
        """Count a request that is over."""
        self._requests.add((route, str(status), record.problem_type or ""))
        self._seconds.observe((route,), record.elapsed_ms * _MS)
        for stage, ms in record.stages_ms.items():
            self._stages.observe((route, stage), ms * _MS)
        for word, number in record.problems.items():
            self._problems.add((word,), number)
        if record.solver is not None and record.iterations is not None:
            self._iterations.count(record.solver, record.iterations)
        if record.request_bytes:
            self._bytes.add((route, "in"), record.request_bytes)
        if record.reply_bytes:
            self._bytes.add((route, "out"), record.reply_bytes)

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)


class _Scraped(Collector):
    """What is read at each scrape instead of being counted along the way."""

    def __init__(
        self, scheduler: Scheduler, pending: Pending, store: StateStore, problems: ProblemStore, phases: Phases
    ) -> None:
        self._scheduler, self._pending, self._store, self._registered = scheduler, pending, store, problems
        self._phases = phases

    def collect(self) -> Iterator[Metric]:
        """The metrics of this moment."""
        solver, state = self._scheduler.health(), self._store.counts()
        registered = self._registered.counts()
        for name, text, number in (
            ("argrad_queued_calls", "Calls that wait for the solver.", solver.queued),
            ("argrad_running_calls", "Calls that are being solved.", solver.running),
            ("argrad_solver_threads_alive", "Solver threads that are alive.", solver.alive),
            ("argrad_pending_calls", "Calls in the house, those sending their body included.", self._pending.calls),
            ("argrad_pending_bytes", "Request bodies in memory.", self._pending.nbytes),
            ("argrad_state_entries", "Forward states kept.", state.entries),
            ("argrad_state_bytes", "Bytes of forward states kept.", state.held_bytes),
            ("argrad_registered_entries", "Registered problems kept.", registered.entries),
            ("argrad_registered_bytes", "Bytes of registered problems kept.", registered.held_bytes),
        ):
            yield GaugeMetricFamily(name, text, number)
        for name, text, number in (
            ("argrad_dropped_calls", "Calls left out when their turn came: nobody waited any more.", solver.dropped),
            ("argrad_solver_restarts", "Solver threads that ended and were replaced.", solver.restarts),
            ("argrad_state_hits", "State tokens found.", state.hits),
            ("argrad_state_misses", "State tokens that named nothing.", state.misses),
            (
                "argrad_affinity_misses",
                "State tokens of this service that are not held by the process that was asked: another's, or lost.",
                state.signed_misses,
            ),
            ("argrad_state_evictions", "Forward states pushed out by newer ones.", state.evictions),
            ("argrad_state_expirations", "Forward states past their time to live.", state.expirations),
            ("argrad_state_refusals", "Forward states larger than the whole budget.", state.refusals),
            ("argrad_registered_hits", "Registered problems found.", registered.hits),
            ("argrad_registered_misses", "Digests under which nothing was registered.", registered.misses),
            ("argrad_registered_evictions", "Registered problems pushed out by newer ones.", registered.evictions),
            ("argrad_registered_expirations", "Registered problems past their time to live.", registered.expirations),
            ("argrad_registered_refusals", "Problems too large to be registered.", registered.refusals),
        ):
            yield CounterMetricFamily(name, text, number)
        phases = GaugeMetricFamily("argrad_calls_in_flight", "Calls by where they are.", labels=["phase"])
        for phase, number in {**self._phases.calls, "queue": solver.queued, "solve": solver.running}.items():
            phases.add_metric([phase], number)
        yield phases
        yield from _device_memory()
        yield from self._batches()

    def _batches(self) -> Iterator[Metric]:
        tally = self._scheduler.tally()
        bounds = [*(str(float(size)) for size in SIZES), "+Inf"]
        buckets = list(zip(bounds, itertools.accumulate(tally.sizes), strict=True))
        sizes = HistogramMetricFamily("argrad_batch_calls", "Calls that were solved together.")
        sizes.add_metric([], buckets=buckets, sum_value=tally.calls)
        yield sizes
        released = CounterMetricFamily(
            "argrad_batches",
            "Batches by why each went: the solver was idle, was freed, the budget was full, or the call goes alone.",
            labels=["reason"],
        )
        for reason, number in tally.released.items():
            released.add_metric([reason], number)
        yield released


def _device_memory() -> Iterator[Metric]:
    """Of each GPU that this process has used; nothing without one."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    family = GaugeMetricFamily(
        "argrad_device_memory_bytes",
        "Memory of a GPU: in use by tensors, kept by torch's allocator, and in use by all processes.",
        labels=["device", "kind"],
    )
    for device in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(device)
        kinds = {
            "allocated": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
            "used": total - free,
            "total": total,
        }
        for kind, number in kinds.items():
            family.add_metric([str(device), kind], number)
    yield family
